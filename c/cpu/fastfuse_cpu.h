/* NF4 linear layers on a CPU, as bitsandbytes and torchao store them: libfastfuse_cpu. Needs no GPU and no Python. */
#ifndef FASTFUSE_CPU_H
#define FASTFUSE_CPU_H
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum { FFS_CPU_FP32, FFS_CPU_BF16, FFS_CPU_FP16 };
enum { FFS_CPU_FLAT = 1, FFS_CPU_TORCHAO = 3, FFS_CPU_NESTED = 4 }; /* how many tensors the scales are */

/* A call. Tensors are row-major without gaps, but for rows of x, and of any alignment. */
typedef struct {
  const uint8_t *packed;       /* [ceil(N K / 2)], the even element in the high nibble */
  const void *code;            /* [16]: fp32, torchao's in the weight's dtype */
  const void *scale[4];        /* absmax; or index, code, absmax, offset; or scaler, factor, mean, in the weight's dtype but for the int8 scaler */
  int64_t scales, dtype;       /* how many of them; torchao's dtype, in which each step rounds */
  int64_t N, K;                /* of W */
  int64_t block, scale_block;  /* elements that share a scale, a power of two from 32; blocks that share an absmax or a factor */
  const void *x;               /* [M, K]; for dX the gradient, [M, N] */
  void *y;                     /* [M, N]; for dX [M, K]; decoded rows [M, K] */
  int64_t M, stride, x_dtype;  /* rows; elements from a row of x to the next; dtype of x and y. For decoding: how many rows, and the first of them */
  const void *bias, *a, *b;    /* [N], [R, K], [N, R], or NULL with R = 0 */
  void *xa;                    /* [M, R], x A^T: written, where R > 0 */
  int64_t bias_dtype, a_dtype, b_dtype, xa_dtype, R;
  double scaling;              /* of the low-rank update */
  int64_t threads;             /* OpenMP's; 1 opens no parallel region */
} ffs_cpu_nf4;

/* Each returns 0, or 1 where there is no memory. Sums are fp32 and round to y's dtype once. */
int ffs_cpu_nf4_linear(const ffs_cpu_nf4 *call);     /* y = x W^T + scaling (x A^T) B^T + bias */
int ffs_cpu_nf4_linear_dx(const ffs_cpu_nf4 *call);  /* y = x W */
int ffs_cpu_nf4_dequantize(const ffs_cpu_nf4 *call); /* y = W, equal to the bit to what PyTorch makes of the same codes */

/* Chooses the instruction set of all calls: 3 AVX-512 with BF16, 2 AVX-512, 1 AVX2 with FMA, 0 portable; the best there is where force < 0, else no better one
   than force. Returns the choice. The first call chooses the best where nobody has. */
int ffs_cpu_isa(int force);

#ifdef __cplusplus
}
#endif
#endif
