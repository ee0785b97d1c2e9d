/* fastfuse for C and C++: the kernels of Llama-3.2-Vision-class models, compiled ahead of time. No Python, no PyTorch.

   Every function returns ffs_ok or a status; ffs_last_error() then says, in one line, which argument is wrong and both facts, or what the driver said.
   A context must be current (cuCtxSetCurrent, or any call of the CUDA runtime); work goes to `stream` and nothing waits for it. No memory is
   allocated: where a workspace is needed, its _workspace function says how many bytes, for the device of the current context. The first call of a
   kind loads its kernels: make it before a stream is captured into a graph.
   Pointers are device memory aligned to 16 bytes unless said otherwise, strides count elements, and the last dim of everything is contiguous.
   Any number of threads may call at once. Only the architectures that the library was built for run it (FASTFUSE_ARCHS). */
#ifndef FASTFUSE_H
#define FASTFUSE_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct CUstream_st *CUstream; /* as in cuda.h; the runtime's cudaStream_t is the same type */

typedef enum { ffs_ok = 0, ffs_invalid_argument = 1, ffs_unsupported = 2, ffs_driver_error = 3 } ffs_status;
typedef enum { FFS_BF16 = 1, FFS_FP16 = 2, FFS_FP32 = 3, FFS_U8 = 4 } ffs_dtype;

/* What went wrong in this thread's last call that failed; never NULL. */
const char *ffs_last_error(void);

/* A weight [N, K] in NF4 as bitsandbytes stores it: blocks of 64 elements in rows of K, the even element in a byte's high nibble.
   flat:    index, code and offset are NULL, absmax holds a scale per block.
   nested:  index holds a byte per block, code 256 values, absmax one value per 256 blocks, offset one value (any alignment):
            scale = code[index] * absmax + offset. */
typedef struct {
  int64_t N, K;
  const void *packed;
  const uint8_t *index;
  const float *code, *absmax, *offset;
} ffs_nf4;

/* A LoRA adapter: a [R, K], b [N, R], in dtype, that of x or FFS_FP32. */
typedef struct {
  int64_t R;
  float scaling; /* alpha / R, or alpha / sqrt(R) */
  ffs_dtype dtype;
  const void *a, *b;
} ffs_lora;

/* out [M, N] = x W^T + scaling (x a^T) b^T + bias, in dtype, out without gaps. x [M, K] with rows stride_xm apart. lora and bias may be NULL.
   N and stride_xm are multiples of 16, K of 64. Up to 16 tokens run split over K, more as one product; from about 700 on
   ffs_nf4_dequantize and a library's matrix product are the faster way, this one works. */
ffs_status ffs_nf4_linear(CUstream stream, ffs_dtype dtype, int64_t M, const void *x, int64_t stride_xm, const ffs_nf4 *weight, const ffs_lora *lora,
                          const void *bias, void *out, void *workspace, size_t workspace_bytes);
ffs_status ffs_nf4_linear_workspace(ffs_dtype dtype, int64_t M, const ffs_nf4 *weight, const ffs_lora *lora, size_t *bytes);

/* out [N, K] in dtype: the weight, rounded as bitsandbytes rounds it. N K is a multiple of 64. */
ffs_status ffs_nf4_dequantize(CUstream stream, ffs_dtype dtype, const ffs_nf4 *weight, void *out);

/* Pixels to placed tokens: patches times the weight, plus class token, bias and positions, then a layer norm where norm_weight is given. */
typedef struct {
  ffs_dtype dtype;       /* of weight, tables and out */
  ffs_dtype image_dtype; /* dtype, FFS_FP32, or FFS_U8, whose pixels become pixel * scale + shift, by channel */
  int64_t images, tiles; /* of each image */
  int64_t height, width; /* of a tile, multiples of patch */
  int64_t patch;         /* 14 or 16; 3 channels */
  int64_t D;             /* a multiple of 16; up to 2048 with a norm */
  const void *pixels;    /* [images * tiles, 3, height, width], pixels of a line side by side; any alignment */
  int64_t stride_tile, stride_channel, stride_line;
  float scale[3], shift[3];
  const void *weight; /* [D, ffs_patch_embed_columns(patch)]: a convolution's (D, 3, patch, patch), zeros behind each row */
  const void *cls;    /* [D], or NULL for no class token */
  int append_cls;     /* 0: the class token is the first, 1: the last */
  const void *bias;      /* [D] or NULL */
  const void *local_pos; /* [tokens, D], tokens = patches + 1 with a class token */
  /* Images in tiles, as Llama 3.2 Vision has them: all of these and cls, no bias. Without them all NULL.
     out = ... + (1 - tanh(gate)) local_pos + tanh(gate) global_pos[row of the tile] + tanh(pre_gate) pre_pos[row], the last for patches alone. */
  const void *global_pos, *pre_pos;   /* [entries, side, tokens, D], [entries, side, 1, D] */
  const void *gate, *pre_gate;        /* one value each, any alignment */
  const int64_t *aspect_ratio;        /* [images, 2] of (h, w) with entries = side, or with aspect_ids [images] of entries */
  int aspect_ids;
  int64_t entries, side;
  uint8_t *fits; /* NULL, or one byte that becomes 1 if every aspect ratio has its place in the tables, else 0; such images get no global_pos and pre_pos */
  const void *norm_weight, *norm_bias; /* [D], both or neither */
  float eps;
  int64_t pad_tokens_to; /* rows of zeros behind each tile's tokens, up to a multiple of this; 1 for none */
  void *out;             /* [images * tiles, padded tokens, D] */
} ffs_patches;

ffs_status ffs_patch_embed(CUstream stream, const ffs_patches *args, void *workspace, size_t workspace_bytes);
ffs_status ffs_patch_embed_workspace(const ffs_patches *args, size_t *bytes);
int64_t ffs_patch_embed_columns(int64_t patch);

/* Which encoder tokens a text token sees, in the form that attention reads: made once by one of the functions below, serves all layers.
   The fields belong to the library; the memory that they point to is the caller's and must outlive the mask. */
typedef struct {
  int kind;
  int64_t b, s, s_e, group;
  const int32_t *visible;
  const uint8_t *empty;
  const int32_t *blocks, *counts;
} ffs_mask;

/* Bytes of memory that a mask takes. group: query heads of a key head. tiles: whether it is made by ffs_mask_tiles. */
ffs_status ffs_mask_memory(int64_t b, int64_t s, int64_t s_e, int64_t group, int tiles, size_t *bytes);

/* Token t of sequence i sees the encoder tokens lo <= n < hi: intervals int32 [b, s, 2] of (lo, hi). empty [b, s]: 1 where lo >= hi, else 0.
   Both stay the caller's, and must outlive the mask. b may be 1 to serve any batch. */
ffs_status ffs_mask_intervals(CUstream stream, int64_t b, int64_t s, int64_t s_e, int64_t group, const int32_t *intervals, const uint8_t *empty, void *memory,
                              size_t memory_bytes, ffs_mask *mask);

/* Token t of sequence i sees tile j where visible [b, s, n_tiles] is not 0: encoder tokens j * tokens_per_tile and on, of which there are 31 at least. */
ffs_status ffs_mask_tiles(CUstream stream, int64_t b, int64_t s, int64_t n_tiles, int64_t tokens_per_tile, int64_t group, const uint8_t *visible, void *memory,
                          size_t memory_bytes, ffs_mask *mask);

/* out = softmax(scale q k^T) v: text tokens q [b, hq, s, d] over encoder tokens k, v [b, hkv, s_e, d], prefill and decode.
   Head j of k serves the hq / hkv query heads from j hq / hkv on: 1, 4 or 8 of them. d is 64 or 128. A token that sees nothing gets 0.
   Strides are (batch row, head, token), multiples of 16. Either mask, or lengths int32 [b]: sequence i sees the first lengths[i] tokens, read on the device,
   and what lies behind them is never looked at. k and v of tokens that a mask hides must be finite. */
typedef struct {
  ffs_dtype dtype;
  int64_t b, hq, hkv, s, s_e, d;
  const void *q, *k, *v;
  void *out;
  int64_t stride_q[3], stride_k[3], stride_v[3], stride_out[3];
  const int32_t *lengths;
  const ffs_mask *mask;
  float scale; /* mostly 1 / sqrt(d) */
} ffs_attention;

ffs_status ffs_cross_attention(CUstream stream, const ffs_attention *args, void *workspace, size_t workspace_bytes);
ffs_status ffs_cross_attention_workspace(const ffs_attention *args, size_t *bytes);

#ifdef __cplusplus
}
#endif
#endif
