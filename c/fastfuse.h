/* fastfuse for C and C++: the kernels of Llama-3.2-Vision-class models, compiled ahead of time. No Python, no PyTorch.

   Every function returns ffs_ok or a status; ffs_last_error() then says, in one line, which argument is wrong and both facts, or what the driver said.
   A context must be current (cuCtxSetCurrent, or any call of the CUDA runtime); work goes to `stream` and nothing waits for it. Nothing is
   allocated: where a workspace is needed, its _workspace function says how many bytes, for the device of the current context.
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

#ifdef __cplusplus
}
#endif
#endif
