/* NF4 weights on a CPU: decode, y = x W^T + scaling (x A^T) B^T + bias, dX = dY W. Sums are fp32, decoded values equal PyTorch's to the bit.

   decode.h and products.h are included once per instruction set; ffs_cpu_isa chooses among them. Compile with -O3 -ffp-contract=off: scales are products and sums that
   round one after the other. Where a fused multiply-add is wanted it is written.

   Few tokens: a row of W is decoded in registers, one linear stream per thread (2 to 4 streams at once cost up to 1.6x from DRAM). More: some rows are decoded
   into a panel that stays in the first cache, and multiplied by all tokens. A block has 32 elements or more and a power of two of them, so 32 elements at a
   multiple of 32 have one scale, and with it one table of 16 values to look up: all rounding happens there, 16 times a block. */
#include "fastfuse_cpu.h"

#include <stdlib.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define CAT_(a, b) a##b
#define CAT(a, b) CAT_(a, b)
#define TEXT_(...) #__VA_ARGS__
#define TEXT(...) TEXT_(__VA_ARGS__)
#define MIN(a, b) ((a) < (b) ? (a) : (b))
#define UP(n, to) (((n) + (to)-1) / (to) * (to))
#ifdef __clang__
#define UNROLL(n) _Pragma(TEXT(unroll n))
#define TARGET(names) _Pragma(TEXT(clang attribute push(__attribute__((target(names))), apply_to = function)))
#define END_TARGET _Pragma("clang attribute pop")
#else
#define UNROLL(n) _Pragma(TEXT(GCC unroll n))
#define TARGET(names) _Pragma("GCC push_options") _Pragma(TEXT(GCC target(names)))
#define END_TARGET _Pragma("GCC pop_options")
#endif

enum { FP32 = FFS_CPU_FP32, BF16 = FFS_CPU_BF16, FP16 = FFS_CPU_FP16 };
enum { FLAT = FFS_CPU_FLAT, TORCHAO = FFS_CPU_TORCHAO, NESTED = FFS_CPU_NESTED };
enum { PORTABLE, AVX2, AVX512, AVX512_BF16 };

typedef struct { const ffs_cpu_nf4 *c; char *x; float *t; char *own; int64_t own_size, Mp, Rp; int half, share; } Work; /* of a call, shared by its threads */

#define KC 1024                                    /* 4-byte words of a panel's row */
#define LDW (KC + 112)                             /* from a row to the next: an odd number of cache lines */
#define MB 128                                     /* tokens whose slice of x stays in the second cache */
#define NC 504                                     /* rows of W whose sums do */
#define BATCH 512                                  /* scales of rows, about */
#define KD 768                                     /* columns of dX at a time, rows of W: */
#define ND 64
#define LDD (KD + 16)                              /* from a row of them to the next */

INLINE float from_bf16(uint16_t h) { uint32_t u = (uint32_t)h << 16; float f; memcpy(&f, &u, 4); return f; }
INLINE uint16_t to_bf16(float f) {
  uint32_t u; memcpy(&u, &f, 4);
  return (u & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
INLINE float from_fp16(uint16_t h) {
  uint32_t m = h & 0x7fff, u = m >= 0x7c00 ? 0x7f800000 | (m & 0x3ff) << 13 : (m << 13) + 0x38000000; float f; memcpy(&f, &u, 4);
  if (m < 0x400) f = m * 0x1p-24f;
  return h & 0x8000 ? -f : f;
}
INLINE uint16_t to_fp16(float f) {
  uint32_t u; memcpy(&u, &f, 4);
  uint16_t sign = u >> 16 & 0x8000;
  u &= 0x7fffffff;
  if (u >= 0x47800000) return sign | (u > 0x7f800000 ? 0x7e00 : 0x7c00);
  if (u >= 0x38800000) return sign | ((u - 0x38000000 + 0xfff + (u >> 13 & 1)) >> 13);
  memcpy(&f, &u, 4); f += 0.5f; memcpy(&u, &f, 4);
  return sign | (u - 0x3f000000);
}
INLINE float at(const void *p, int64_t i, int dtype) {
  return dtype == FP32 ? ((const float *)p)[i] : dtype == BF16 ? from_bf16(((const uint16_t *)p)[i]) : from_fp16(((const uint16_t *)p)[i]);
}
INLINE void put(void *p, int64_t i, int dtype, float f) {
  if (dtype == FP32) ((float *)p)[i] = f; else ((uint16_t *)p)[i] = dtype == BF16 ? to_bf16(f) : to_fp16(f);
}
INLINE float rounded(float f, int dtype) { return dtype == FP32 ? f : dtype == BF16 ? from_bf16(to_bf16(f)) : from_fp16(to_fp16(f)); }
INLINE int size_of(int dtype) { return dtype == FP32 ? 4 : 2; }
INLINE int64_t first_of(int64_t n, int64_t id, int64_t of, int64_t unit) { return MIN(UP(n, unit) / unit * id / of * unit, n); }

#if defined(__x86_64__)
#define V 16
#if defined(__clang__) || __GNUC__ > 10            /* gcc 10 cannot ask the CPU for it */
#define HAS_BF16
#define BF16DOT
#define FN(name) CAT(name, _bf16dot)
TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c")
#include "decode.h"
#include "products.h"
END_TARGET
#undef BF16DOT
#undef FN
#endif
#define FN(name) CAT(name, _avx512)
TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#include "decode.h"
#include "products.h"
END_TARGET
#undef V
#undef FN
#define V 8
#define FN(name) CAT(name, _avx2)
TARGET("avx2,fma,f16c")
#include "decode.h"
#include "products.h"
END_TARGET
#undef V
#undef FN
#endif
#define V 4
#define FN(name) CAT(name, _portable)
#include "decode.h"
#include "products.h"

typedef void Part(const Work *, int, int);
static int isa_ = -1;
int ffs_cpu_isa(int force) {
  int best = PORTABLE;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) best = AVX2; /* and with them F16C, on every CPU that was made */
  int wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw");
  if (best && wide && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) best = AVX512;
#ifdef HAS_BF16
  if (best == AVX512 && __builtin_cpu_supports("avx512bf16")) best = AVX512_BF16;
#endif
#endif
  return isa_ = force < 0 ? best : MIN(force, best);
}
#ifdef HAS_BF16
#define OF_ISA(name) (isa_ == AVX512_BF16 ? name##_bf16dot : isa_ == AVX512 ? name##_avx512 : isa_ == AVX2 ? name##_avx2 : name##_portable)
#elif defined(__x86_64__)
#define OF_ISA(name) (isa_ == AVX512 ? name##_avx512 : isa_ == AVX2 ? name##_avx2 : name##_portable)
#else
#define OF_ISA(name) name##_portable
#endif
/* part(work, i, n) by n threads, and no parallel region where n is 1. Memory: shared bytes for x and t, own for each thread. Returns 1 where there is none. */
static int run(Part *part, Work *w, int64_t threads, int64_t for_x, int64_t for_t, int64_t own) {
  threads = threads < 1 ? 1 : threads;
  for_x = UP(for_x, 64), for_t = UP(for_t, 64), own = UP(own, 64);
  char *memory = aligned_alloc(64, for_x + for_t + threads * own);
  if (!memory) return 1;
  w->x = memory, w->t = (float *)(memory + for_x), w->own = memory + for_x + for_t, w->own_size = own;
#ifdef _OPENMP
  if (threads > 1) {
#pragma omp parallel num_threads((int)threads)
    part(w, omp_get_thread_num(), omp_get_num_threads());
  } else
#endif
    part(w, 0, 1);
  free(memory);
  return 0;
}
static int64_t threads_for(const ffs_cpu_nf4 *c, int64_t M) { return c->N * c->K * M < 200000 ? 1 : c->threads; }

int ffs_cpu_nf4_dequantize(const ffs_cpu_nf4 *c) {
  if (isa_ < 0) ffs_cpu_isa(-1);
  Work w = {.c = c};
  return run(OF_ISA(dequantize), &w, threads_for(c, 1), 0, 0, 1024);
}
int ffs_cpu_nf4_linear(const ffs_cpu_nf4 *c) {
  if (isa_ < 0) ffs_cpu_isa(-1);
  Work w = {.c = c, .half = isa_ == AVX512_BF16 && c->x_dtype == BF16, .Rp = UP(c->R, 16)};
  w.share = w.half ? 4 : 2;
  /* Where K is no multiple of 8 rows begin in up to 128 places of a group, and x is put in order for each: that pays for one token. */
  int few = c->M <= (c->K % 8 ? 1 : 4) && (w.half ? c->block >= 64 : c->scales != TORCHAO || c->dtype == FP32);
  w.Mp = few ? c->M : UP(c->M, 4);
  int64_t Kp = UP(c->K, 128) + 256, scales = 4 * (Kp / 32 + 16) + BATCH + 64 + (c->K % 128 ? c->N * c->K / c->block : 0);
  int64_t own = 4 * (few ? Kp * (c->M + 1) + w.Rp + scales : 6 * LDW + KC / 16 + 64 + 6 * w.Rp + (NC + 16) * MB + Kp);
  return run(few ? OF_ISA(few) : OF_ISA(many), &w, threads_for(c, c->M), few ? 0 : w.Mp * Kp * 4, w.Mp * w.Rp * 4, own);
}
int ffs_cpu_nf4_linear_dx(const ffs_cpu_nf4 *c) {
  if (isa_ < 0) ffs_cpu_isa(-1);
  Work w = {.c = c, .half = isa_ == AVX512_BF16 && c->x_dtype == BF16, .Mp = UP(c->M, 4)};
  return run(OF_ISA(dx), &w, threads_for(c, c->M), w.Mp * (UP(c->N, 16) + 32) * 4, 0, 4 * (ND * LDD + 2 * (KD + 128) + KD / 32 + 64 + MB * LDD));
}
