/* NF4 weights on a CPU: decode, y = x W^T + scaling (x A^T) B^T + bias, dX = dY W. Sums are fp32, decoded values equal PyTorch's to the bit.

   The file includes itself once per instruction set; ffs_cpu_isa chooses among them. Compile with -O3 -ffp-contract=off: scales are products and sums that
   round one after the other. Where a fused multiply-add is wanted it is written.

   Few tokens: a row of W is decoded in registers, one linear stream per thread (2 to 4 streams at once cost up to 1.6x from DRAM). More: some rows are decoded
   into a panel that stays in the first cache, and multiplied by all tokens. A block has 32 elements or more and a power of two of them, so 32 elements at a
   multiple of 32 have one scale, and with it one table of 16 values to look up: all rounding happens there, 16 times a block. */
#ifndef V
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

typedef struct { const ffs_cpu_nf4 *c; char *x; float *t; char *own; int64_t own_size, Mp, Rp; int half; } Work; /* of a call, shared by its threads */

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
#include "cpu_nf4.c"
END_TARGET
#undef BF16DOT
#undef FN
#endif
#define FN(name) CAT(name, _avx512)
TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#include "cpu_nf4.c"
END_TARGET
#undef V
#undef FN
#define V 8
#define FN(name) CAT(name, _avx2)
TARGET("avx2,fma,f16c")
#include "cpu_nf4.c"
END_TARGET
#undef V
#undef FN
#endif
#define V 4
#define FN(name) CAT(name, _portable)
#include "cpu_nf4.c"

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

#else /* ------------------------------------------------------------------ once per instruction set: V fp32 lanes */
#define G (8 * V)                                  /* elements of a group: V words of 8 nibbles */
#define NR (V == 16 ? 6 : 3)                       /* rows of W and tokens of a tile of sums that fills the registers */
#define MR 4
#define vf FN(vf)
#define vu FN(vu)
#define v4 FN(v4)
typedef float vf __attribute__((vector_size(4 * V)));
typedef uint32_t vu __attribute__((vector_size(4 * V)));
typedef float v4 __attribute__((vector_size(16), aligned(4), may_alias));
typedef float FN(uf) __attribute__((vector_size(4 * V), aligned(1), may_alias));
typedef uint32_t FN(uu) __attribute__((vector_size(4 * V), aligned(1), may_alias));
#define LD(p) ((vf) * (const FN(uf) *)(p))
#define LDU(p) ((vu) * (const FN(uu) *)(p))
#define ST(p, v) (*(FN(uf) *)(p) = (v))

INLINE vf FN(fma)(vf a, vf b, vf c) {
#if V == 16
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif V == 8
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}
#ifdef BF16DOT
#define DOT(a, b, c) (half ? (vf)_mm512_dpbf16_ps((__m512)(c), (__m512bh)(a), (__m512bh)(b)) : FN(fma)(a, b, c))
#else
#define DOT(a, b, c) ((void)half, FN(fma)(a, b, c))
#endif
INLINE vf FN(load)(const void *p, int64_t i, int dtype) { /* V elements from i on */
  if (dtype == FP32) return LD((const float *)p + i);
  const uint16_t *h = (const uint16_t *)p + i;
#if V == 16
  __m256i u = _mm256_loadu_si256((const void *)h);
  return dtype == BF16 ? (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(u), 16) : (vf)_mm512_cvtph_ps(u);
#elif V == 8
  __m128i u = _mm_loadu_si128((const void *)h);
  return dtype == BF16 ? (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(u), 16) : (vf)_mm256_cvtph_ps(u);
#else
  return (vf){at(h, 0, dtype), at(h, 1, dtype), at(h, 2, dtype), at(h, 3, dtype)};
#endif
}
INLINE vf FN(round)(vf v, int dtype) {
  if (dtype == FP32) return v;
  if (dtype == BF16) {
    vu u = (vu)v, number = (vu)(v == v);
    return (vf)(((u + 0x7fff + (u >> 16 & 1)) & 0xffff0000 & number) | (0x7fc00000 & ~number));
  }
#if V == 16
  return (vf)_mm512_cvtph_ps(_mm512_cvtps_ph((__m512)v, 0));
#elif V == 8
  return (vf)_mm256_cvtph_ps(_mm256_cvtps_ph((__m256)v, 0));
#else
  return (vf){rounded(v[0], FP16), rounded(v[1], FP16), rounded(v[2], FP16), rounded(v[3], FP16)};
#endif
}
INLINE void FN(store)(void *p, int64_t i, int dtype, vf v) {
  if (dtype == FP32) { ST((float *)p + i, v); return; }
  uint16_t *h = (uint16_t *)p + i;
#if V == 16
  _mm256_storeu_si256((void *)h, dtype == BF16 ? _mm512_cvtepi32_epi16((__m512i)((vu)FN(round)(v, BF16) >> 16)) : _mm512_cvtps_ph((__m512)v, 0));
#elif V == 8
  __m256i u = (__m256i)((vu)FN(round)(v, BF16) >> 16);
  __m128i both = _mm_packus_epi32(_mm256_castsi256_si128(u), _mm256_extracti128_si256(u, 1));
  _mm_storeu_si128((void *)h, dtype == BF16 ? both : _mm256_cvtps_ph((__m256)v, 0));
#else
  for (int j = 0; j < 4; j++) put(h, j, dtype, v[j]);
#endif
}
static void FN(widen)(const void *p, int64_t from, int dtype, int64_t n, float *out) {
  int64_t whole = n / V * V;
  for (int64_t i = 0; i < whole; i += V) ST(out + i, FN(load)(p, from + i, dtype));
  for (int64_t i = whole; i < n; i++) out[i] = at(p, from + i, dtype);
}
INLINE float FN(sum)(vf v) {
#if V == 16
  return _mm512_reduce_add_ps((__m512)v);
#elif V == 8
  __m128 h = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
  h = _mm_add_ps(h, _mm_movehl_ps(h, h));
  return _mm_cvtss_f32(_mm_add_ss(h, _mm_movehdup_ps(h)));
#else
  return (v[0] + v[2]) + (v[1] + v[3]);
#endif
}
INLINE v4 FN(sum4)(vf a, vf b, vf c, vf d) { /* {sum a, sum b, sum c, sum d} */
#if V == 4
  vf p = {a[0], b[0], c[0], d[0]}, q = {a[1], b[1], c[1], d[1]}, r = {a[2], b[2], c[2], d[2]}, s = {a[3], b[3], c[3], d[3]};
  return (v4)((p + r) + (q + s));
#elif V == 8
  __m256 p = _mm256_hadd_ps((__m256)a, (__m256)b), q = _mm256_hadd_ps((__m256)c, (__m256)d), u = _mm256_hadd_ps(p, q);
  return (v4)_mm_add_ps(_mm256_castps256_ps128(u), _mm256_extractf128_ps(u, 1));
#else
  __m512 p = _mm512_add_ps(_mm512_unpacklo_ps((__m512)a, (__m512)b), _mm512_unpackhi_ps((__m512)a, (__m512)b));
  __m512 q = _mm512_add_ps(_mm512_unpacklo_ps((__m512)c, (__m512)d), _mm512_unpackhi_ps((__m512)c, (__m512)d));
  __m512 u = _mm512_add_ps(_mm512_shuffle_ps(p, q, 0x44), _mm512_shuffle_ps(p, q, 0xee));
  __m256 h = _mm256_add_ps(_mm512_castps512_ps256(u), _mm512_extractf32x8_ps(u, 1));
  return (v4)_mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
#endif
}

/* fp32 scales of `count` blocks from `first` on; zeros where the weight has ended, and for a vector past them */
static __attribute__((noinline)) void FN(scales)(const ffs_cpu_nf4 *c, int64_t first, int64_t count, float *out) {
  int64_t i = first, end = MIN(first + count, ((c->N * c->K - 1) >> __builtin_ctzll(c->block)) + 1);
  if (c->scales == FLAT) {
    memcpy(out, (const float *)c->scale[0] + first, 4 * (end - first));
    out += end - first, i = end;
  }
  for (int64_t g = i / c->scale_block; i < end; g++) { /* flat ones are done */
    int64_t stop = MIN((g + 1) * c->scale_block, end);
    int64_t n = stop - i, j = 0;
    if (c->scales == NESTED) {
      const uint8_t *index = (const uint8_t *)c->scale[0] + i;
      const float *code = c->scale[1], absmax = ((const float *)c->scale[2])[g], offset = *(const float *)c->scale[3];
      for (j = 0; j < n; j++) out[j] = code[index[j]];
      for (j = 0; j + V <= n; j += V) ST(out + j, LD(out + j) * absmax + offset);
      for (; j < n; j++) out[j] = out[j] * absmax + offset;
    } else {
      const int8_t *scaler = (const int8_t *)c->scale[0] + i;
      float factor = at(c->scale[1], g, c->dtype), mean = at(c->scale[2], 0, c->dtype);
      for (j = 0; j < n; j++) out[j] = scaler[j];
      for (j = 0; j + V <= n; j += V) ST(out + j, FN(round)(FN(round)(LD(out + j) / factor, c->dtype) + mean, c->dtype));
      for (; j < n; j++) out[j] = rounded(rounded(out[j] / factor, c->dtype) + mean, c->dtype);
    }
    out += n, i = stop;
  }
  memset(out, 0, 4 * (first + count - end + V));
}
/* of n elements from e on: a copy where the weight ends among them */
INLINE const uint8_t *FN(bytes)(const ffs_cpu_nf4 *c, int64_t e, int64_t n, uint8_t *spare) {
  int64_t total = c->N * c->K;
  if (__builtin_expect(e + n <= total, 1)) return c->packed + e / 2;
  memset(spare, 0, n / 2);
  if (e < total) memcpy(spare, c->packed + e / 2, (total - e + 1) / 2);
  return spare;
}
typedef struct { float t[16]; vf v[16 / V]; } FN(table);
INLINE void FN(table_of)(const ffs_cpu_nf4 *c, const float *code, float scale, FN(table) *t) {
  UNROLL(4) for (int i = 0; i < 16 / V; i++) {
    t->v[i] = FN(round)(LD(code + i * V) * scale, c->scales == TORCHAO ? (int)c->dtype : FP32);
#if V == 4
    ST(t->t + i * V, t->v[i]);
#endif
  }
}
INLINE vf FN(lookup)(vu v, const FN(table) *t) { /* t[v & 15] */
#if V == 16
  return (vf)_mm512_permutexvar_ps((__m512i)v, (__m512)t->v[0]);
#elif V == 8
  __m256 low = _mm256_permutevar8x32_ps((__m256)t->v[0], (__m256i)v), high = _mm256_permutevar8x32_ps((__m256)t->v[1], (__m256i)v);
  return (vf)_mm256_blendv_ps(low, high, (__m256)(v << 28));
#else
  return (vf){t->t[v[0] & 15], t->t[v[1] & 15], t->t[v[2] & 15], t->t[v[3] & 15]};
#endif
}
/* 32 elements of one block in their order */
INLINE void FN(expand)(const uint8_t *p, const FN(table) *t, float *out) {
#if V == 16
  const vu shift = {4, 0, 12, 8, 20, 16, 28, 24, 4, 0, 12, 8, 20, 16, 28, 24}, one = {0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1};
  __m512i b = _mm512_broadcast_i32x4(_mm_loadu_si128((const void *)p));
  ST(out, FN(lookup)((vu)_mm512_permutexvar_epi32((__m512i)one, b) >> shift, t));
  ST(out + 16, FN(lookup)((vu)_mm512_permutexvar_epi32((__m512i)(one + 2), b) >> shift, t));
#elif V == 8
  const vu shift = {4, 0, 12, 8, 20, 16, 28, 24};
  for (int i = 0; i < 4; i++) {
    uint32_t word; memcpy(&word, p + 4 * i, 4);
    ST(out + 8 * i, FN(lookup)((vu)_mm256_set1_epi32(word) >> shift, t));
  }
#else
  for (int i = 0; i < 16; i++) out[2 * i] = t->t[p[i] >> 4], out[2 * i + 1] = t->t[p[i] & 15];
#endif
}
/* the same of 16-bit values */
typedef struct {
#if V == 16
  __m512i all;
#elif V == 8
  __m128i low, high;
#else
  uint16_t t[16];
#endif
} FN(table16);
INLINE void FN(narrow)(const FN(table) *t, int dtype, const int panel, FN(table16) *out) {
  (void)panel;
#ifdef BF16DOT
  if (panel) { /* one instruction; it flushes denormals, and so will the product */
    out->all = _mm512_broadcast_i64x4((__m256i)_mm512_cvtneps_pbh((__m512)t->v[0]));
    return;
  }
#endif
#if V == 16
  __m256i u = dtype == BF16 ? _mm512_cvtepi32_epi16((__m512i)((vu)FN(round)(t->v[0], BF16) >> 16)) : _mm512_cvtps_ph((__m512)t->v[0], 0);
  out->all = _mm512_broadcast_i64x4(u);
#elif V == 8
  __m128i u[2];
  for (int i = 0; i < 2; i++) {
    __m256i r = (__m256i)((vu)FN(round)(t->v[i], BF16) >> 16);
    u[i] = dtype == BF16 ? _mm_packus_epi32(_mm256_castsi256_si128(r), _mm256_extracti128_si256(r, 1)) : _mm256_cvtps_ph((__m256)t->v[i], 0);
  }
  __m128i byte = _mm_set1_epi16(255);
  out->low = _mm_packus_epi16(_mm_and_si128(u[0], byte), _mm_and_si128(u[1], byte));
  out->high = _mm_packus_epi16(_mm_srli_epi16(u[0], 8), _mm_srli_epi16(u[1], 8));
#else
  for (int i = 0; i < 16; i++) put(out->t, i, dtype, t->t[i]);
#endif
}
INLINE void FN(expand16)(const uint8_t *p, const FN(table16) *t, uint16_t *out) {
#if V == 16
  const __m512i shift = _mm512_set1_epi64(0x0008000c00000004);
  const __m512i word = _mm512_set_epi16(7, 7, 7, 7, 6, 6, 6, 6, 5, 5, 5, 5, 4, 4, 4, 4, 3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
  __m512i b = _mm512_permutexvar_epi16(word, _mm512_castsi128_si512(_mm_loadu_si128((const void *)p)));
  _mm512_storeu_si512(out, _mm512_permutexvar_epi16(_mm512_srlv_epi16(b, shift), t->all)); /* the table twice over: the fifth bit of an index is any */
#elif V == 8
  __m128i b = _mm_loadu_si128((const void *)p), odd = _mm_and_si128(b, _mm_set1_epi8(15)), even = _mm_and_si128(_mm_srli_epi16(b, 4), _mm_set1_epi8(15));
  __m128i n[2] = {_mm_unpacklo_epi8(even, odd), _mm_unpackhi_epi8(even, odd)};
  for (int i = 0; i < 2; i++) {
    __m128i low = _mm_shuffle_epi8(t->low, n[i]), high = _mm_shuffle_epi8(t->high, n[i]);
    _mm_storeu_si128((__m128i *)out + 2 * i, _mm_unpacklo_epi8(low, high));
    _mm_storeu_si128((__m128i *)out + 2 * i + 1, _mm_unpackhi_epi8(low, high));
  }
#else
  for (int i = 0; i < 16; i++) out[2 * i] = t->t[p[i] >> 4], out[2 * i + 1] = t->t[p[i] & 15];
#endif
}
/* Elements [e, end) of the flat weight, e a multiple of 32; up to 31 more are written. Room for scales: one a block and 16. ahead: bytes to what is next */
INLINE void FN(decode)(const ffs_cpu_nf4 *c, const float *code, int64_t e, int64_t end, const int dtype, const int panel, int64_t ahead, void *out,
                       float *scale) {
  int shift = __builtin_ctzll(c->block), size = size_of(dtype);
  int64_t start = e, first = e >> shift, whole = MIN(UP(end, 32), c->N * c->K & ~31);
  FN(scales)(c, first, ((end - 1) >> shift) - first + 1, scale);
  const uint8_t *p = c->packed + e / 2;
  FN(table) t; FN(table16) t16;
#define NEXT_TABLE \
  FN(table_of)(c, code, *scale++, &t); \
  if (dtype != FP32) FN(narrow)(&t, dtype, panel, &t16);
#define EXPAND(p) \
  if (dtype == FP32) FN(expand)(p, &t, out); else FN(expand16)(p, &t16, out);
  while (e < whole) {
    NEXT_TABLE
    for (int64_t stop = MIN(((e >> shift) + 1) << shift, whole); e < stop; e += 32, p += 16, out = (char *)out + 32 * size) {
      __builtin_prefetch(p + ahead, 0, 2);
      EXPAND(p)
    }
  }
  if (e < end) { /* the weight ends within these 32 */
    uint8_t spare[16] = {0};
    memcpy(spare, p, (c->N * c->K - e + 1) / 2);
    if (e % c->block && e > start) scale--; /* still the block of those before */
    NEXT_TABLE
    EXPAND(spare)
  }
#undef NEXT_TABLE
#undef EXPAND
}
static __attribute__((noinline)) void FN(panel)(const ffs_cpu_nf4 *c, const float *code, int64_t e, int64_t end, int half, int64_t ahead, void *out,
                                                float *scale) {
#ifdef BF16DOT
  if (half) { FN(decode)(c, code, e, end, BF16, 1, ahead, out, scale); return; }
#endif
  (void)half;
  FN(decode)(c, code, e, end, FP32, 1, ahead, out, scale);
}
static void FN(dequantize)(const Work *w, int id, int of) {
  const ffs_cpu_nf4 *c = w->c;
  int64_t size = size_of(c->x_dtype), from = c->stride * c->K, total = c->M * c->K;
  int64_t e = from + first_of(total, id, of, 32), end = from + first_of(total, id + 1, of, 32);
  char *to = (char *)c->y + (e - from) * size;
  float code[16], scale[128 + 32] __attribute__((aligned(64))), some[32];
  FN(widen)(c->code, 0, c->scales == TORCHAO ? c->dtype : FP32, 16, code);
#define DECODE(end, out) \
  if (c->x_dtype == FP32) FN(decode)(c, code, e, end, FP32, 0, 2048, out, scale); \
  else FN(decode)(c, code, e, end, c->x_dtype, 0, 2048, out, scale);
  for (int64_t next; e < end; to += (next - e) * size, e = next) {
    int64_t skip = e % 32;
    if (skip || end - e < 32) { /* a piece of 32 */
      next = MIN(e - skip + 32, end);
      e -= skip;
      DECODE(next, some)
      e += skip;
      memcpy(to, (char *)some + skip * size, (next - e) * size);
    } else {
      next = MIN(e + 4096, end & ~31);
      DECODE(next, to)
    }
  }
#undef DECODE
}

/* Item (m, 4 rows of A) of x A^T, in fp32: into xa, and by scaling into t, of many tokens MR side by side */
INLINE void FN(low_item)(const Work *w, const float *x, int64_t m, int64_t r0, const int dtype, int side) {
  const ffs_cpu_nf4 *c = w->c;
  int64_t K = c->K, k = 0, size = size_of(dtype);
  int n = MIN(4, c->R - r0);
  const char *a = (const char *)c->a + r0 * K * size, *row[4] = {a, n > 1 ? a + K * size : a, n > 2 ? a + 2 * K * size : a, n > 3 ? a + 3 * K * size : a};
  vf acc[4] = {};
  while (k + V <= K) { /* sums of sums: one of thousands of terms would be less accurate than PyTorch's */
    vf part[4] = {};
    for (int64_t stop = MIN(k + 64 * V, K / V * V); k < stop; k += V)
      UNROLL(4) for (int r = 0; r < 4; r++) part[r] = FN(fma)(LD(x + k), FN(load)(row[r], k, dtype), part[r]);
    for (int r = 0; r < 4; r++) acc[r] += part[r];
  }
  for (int r = 0; r < n; r++) {
    float s = FN(sum)(acc[r]);
    for (int64_t i = k; i < K; i++) s += x[i] * at(row[r], i, dtype);
    int64_t j = r0 + r;
    put(c->xa, m * c->R + j, c->xa_dtype, s);
    w->t[side ? m / MR * MR * w->Rp + j / V * MR * V + m % MR * V + j % V : m * w->Rp + j] = s * (float)c->scaling;
  }
}
static void FN(low)(const Work *w, float *x, int side, int id, int of) {
  const ffs_cpu_nf4 *c = w->c;
  int64_t each = (c->R + 3) / 4, have = -1;
  for (int64_t i = c->M * each * id / of; i < c->M * each * (id + 1) / of; i++) {
    int64_t m = i / each, r = i % each * 4;
    if (m != have) FN(widen)(c->x, m * c->stride, c->x_dtype, c->K, x), have = m;
    if (c->a_dtype == FP32) FN(low_item)(w, x, m, r, FP32, side);
    else if (c->a_dtype == BF16) FN(low_item)(w, x, m, r, BF16, side);
    else FN(low_item)(w, x, m, r, FP16, side);
  }
}
static void FN(barrier)(int of) {
  if (of > 1) {
#pragma omp barrier
  }
}

/* nr rows of W, decoded in registers, times mr tokens. e: where the groups begin that have the rows' first elements, x: in the order of the nibbles */
INLINE void FN(rows)(const ffs_cpu_nf4 *c, const float *code, const void *x, int64_t ldx, const float *scale, const int64_t *e, int64_t groups,
                     const int mr, const int nr, vf *acc) {
  int shift = __builtin_ctzll(c->block);
  uint8_t spare[4 * V];
  FN(table) t;
  memcpy(t.t, code, 64);
  for (int i = 0; i < 16 / V; i++) t.v[i] = LD(code + i * V);
#if V == 16
  const vu spread = (vu){0, 8, 16, 24, 32, 40, 48, 56, 64, 72, 80, 88, 96, 104, 112, 120} >> shift;
#elif V == 8
  const vu spread = (vu){0, 8, 16, 24, 32, 40, 48, 56} >> shift;
#endif
  vf sums[4][2] = {};
  for (int64_t g = 0; g < groups; g++)
    UNROLL(2) for (int r = 0; r < nr; r++) {
      const uint8_t *p = FN(bytes)(c, e[r] + g * G, G, spare);
      __builtin_prefetch(p + 2048, 0, 3);
      vu v = LDU(p);
      vf part[4] = {};
      UNROLL(8) for (int s = 0; s < 8; s++) {
        vf row = FN(lookup)(v >> (4 * s), &t);
        UNROLL(4) for (int m = 0; m < mr; m++) part[m] = FN(fma)(row, LD((const float *)x + m * ldx + g * G + s * V), part[m]);
      }
      const float *of_group = scale + ((e[r] + g * G) >> shift);
#if V == 16
      vf each = (vf)_mm512_permutexvar_ps((__m512i)spread, (__m512)LD(of_group));
#elif V == 8
      vf each = (vf)_mm256_permutevar8x32_ps((__m256)LD(of_group), (__m256i)spread);
#else
      vf each = *of_group - (vf){};
#endif
      UNROLL(4) for (int m = 0; m < mr; m++) sums[m][r] = FN(fma)(part[m], each, sums[m][r]);
    }
  UNROLL(4) for (int m = 0; m < mr; m++) UNROLL(2) for (int r = 0; r < nr; r++) acc[m * 4 + r] = sums[m][r];
}
#ifdef BF16DOT
/* The same of bf16, by a table for each block; two blocks' are side by side. chains: sums that need not wait for each other, as a product takes 6 cycles */
INLINE void FN(rows16)(const ffs_cpu_nf4 *c, const float *code, const void *x, int64_t ldx, const float *scale, const int64_t *e, int64_t groups,
                       const int mr, const int nr, const int chains, vf *acc) {
  int shift = __builtin_ctzll(c->block), rounds = c->scales == TORCHAO && c->dtype == FP16;
  uint8_t spare[4 * V];
  vf sums[4][2][4] = {}, values = LD(code);
  __m512i second = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(16), 1);
  for (int64_t g = 0; g < groups; g++)
    UNROLL(2) for (int r = 0; r < nr; r++) {
      int64_t at = e[r] + g * G;
      const uint8_t *p = FN(bytes)(c, at, G, spare);
      __builtin_prefetch(p + 2048, 0, 3);
      __m512i v = (__m512i)LDU(p);
      vf low = values * scale[at >> shift], high = values * scale[(at + 64) >> shift];
      if (rounds) low = FN(round)(low, FP16), high = FN(round)(high, FP16);
      __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
      UNROLL(4) for (int s = 0; s < 4; s++) {
        __m512i index = _mm512_ternarylogic_epi32(_mm512_srli_epi16(v, 4 * s), _mm512_set1_epi16(15), second, 0xea);
        __m512bh row = (__m512bh)_mm512_permutexvar_epi16(index, both);
        UNROLL(4) for (int m = 0; m < mr; m++) {
          vf *sum = &sums[m][r][s % chains];
          *sum = (vf)_mm512_dpbf16_ps((__m512)*sum, row, (__m512bh)_mm512_loadu_si512((const uint16_t *)x + m * ldx + g * G + s * 32));
        }
      }
    }
  UNROLL(4) for (int m = 0; m < mr; m++)
    UNROLL(2) for (int r = 0; r < nr; r++) acc[m * 4 + r] = (sums[m][r][0] + sums[m][r][1]) + (sums[m][r][2] + sums[m][r][3]);
}
#endif
/* x in the order of the nibbles, after `skip` zeros and before as many as its last group has room for */
static void FN(order)(const Work *w, char *x, int64_t ld, float *row, int64_t skip, int64_t groups) {
  const ffs_cpu_nf4 *c = w->c;
  int64_t K = c->K, rest = groups * G - skip - K;
  for (int64_t m = 0; m < c->M; m++) {
#ifdef BF16DOT
    if (w->half) {
      uint16_t *flat = (uint16_t *)row, *d = (uint16_t *)x + m * ld;
      memset(flat, 0, 2 * skip);
      memcpy(flat + skip, (const uint16_t *)c->x + m * c->stride, 2 * K);
      memset(flat + skip + K, 0, 2 * rest);
      for (int64_t g = 0; g < groups * G; g += G) for (int s = 0; s < 4; s++) for (int i = 0; i < 32; i++) d[g + s * 32 + i] = flat[g + 4 * i + (s ^ 1)];
      continue;
    }
#endif
    float *d = (float *)x + m * ld;
    memset(row, 0, 4 * skip);
    FN(widen)(c->x, m * c->stride, c->x_dtype, K, row + skip);
    memset(row + skip + K, 0, 4 * rest);
    for (int64_t g = 0; g < groups * G; g += G) for (int s = 0; s < 8; s++) for (int i = 0; i < V; i++) d[g + s * V + i] = row[g + 8 * i + (s ^ 1)];
  }
}
/* At most 4 tokens. Groups begin where whole groups of the flat weight do: a row may begin within one, and x is put in order for each place where it does. */
static void FN(few)(const Work *w, int id, int of) {
  const ffs_cpu_nf4 *c = w->c;
  int64_t N = c->N, K = c->K, M = c->M, R = c->R, places = G, ld = UP(K, 128) + 256, n0 = first_of(N, id, of, 1), n1 = first_of(N, id + 1, of, 1);
  char *x = w->own + id * w->own_size;
  float *row = (float *)(x + 4 * M * ld), *b = row + ld, *scale = b + w->Rp, code[16];
  int shift = __builtin_ctzll(c->block);
  FN(widen)(c->code, 0, c->scales == TORCHAO ? c->dtype : FP32, 16, code);
  for (int64_t k = K; k % 2 == 0 && places > 1; k /= 2) places /= 2;
  if (R) {
    if (id == 0) memset(w->t, 0, 4 * M * w->Rp);
    FN(barrier)(of);
    FN(low)(w, row, 0, id, of);
    FN(barrier)(of);
  }
#ifdef BF16DOT
  int half = w->half;
#endif
  const float *batch = NULL;
  if (places > 1 && n0 < n1) { /* rows are not taken in order: scales of all */
    int64_t first = (n0 * K / G * G) >> shift;
    FN(scales)(c, first, (UP(n1 * K, G) >> shift) - first + 1, scale);
    batch = scale - first;
  }
  for (int64_t place = 0; place < places; place++) {
    int64_t skip = place * K % G, groups = (skip + K + G - 1) / G;
    FN(order)(w, x, ld, row, skip, groups);
    int64_t until = 0;
    for (int64_t n = n0 + ((place - n0) % places + places) % places, next; n < n1; n = next) {
      int nr = MIN(M > 1 ? 2 : 4, (n1 - n + places - 1) / places); /* of one token 4 rows one after the other: one stream */
      vf acc[16];
      int64_t e[4];
      next = n + nr * places;
      if (places == 1 && n + nr > until) { /* scales of some rows at once */
        until = MIN(n1, n + 4 + (BATCH << shift) / K);
        FN(scales)(c, n * K >> shift, ((until * K - 1) >> shift) - (n * K >> shift) + 1, scale);
        batch = scale - (n * K >> shift);
      }
      for (int r = 0; r < nr; r++) e[r] = (n + r * places) * K - skip;
#define ROWS(mr, nr) FN(rows)(c, code, x, ld, batch, e + q, groups, mr, nr, acc + q)
#ifdef BF16DOT
#define CASE(mr, nr) case mr * 2 + nr: \
        if (half) FN(rows16)(c, code, x, ld, batch, e + q, groups, mr, nr, mr * nr < 4 ? 4 / (mr * nr) : 1, acc + q); else ROWS(mr, nr); \
        break;
#else
#define CASE(mr, nr) case mr * 2 + nr: ROWS(mr, nr); break;
#endif
      for (int q = 0; q < (M > 1 ? 1 : nr); q++)
        switch (M > 1 ? M * 2 + nr : 3) { CASE(1, 1) CASE(2, 1) CASE(2, 2) CASE(3, 1) CASE(3, 2) CASE(4, 1) CASE(4, 2) }
#undef CASE
#undef ROWS
      for (int r = 0; R && r < nr; r++) {
        const float *up = b;
        if (R == w->Rp && c->b_dtype == FP32) up = (const float *)c->b + (n + r * places) * R;
        else FN(widen)(c->b, (n + r * places) * R, c->b_dtype, R, b), memset(b + R, 0, 4 * (w->Rp - R));
        for (int64_t m = 0; m < M; m++)
          for (int64_t j = 0; j < w->Rp; j += V) acc[m * 4 + r] = FN(fma)(LD(up + j), LD(w->t + m * w->Rp + j), acc[m * 4 + r]);
      }
      for (int64_t m = 0; m < M; m++) {
        for (int r = nr; r < 4; r++) acc[m * 4 + r] = (vf){};
        v4 s = FN(sum4)(acc[m * 4], acc[m * 4 + 1], acc[m * 4 + 2], acc[m * 4 + 3]);
        for (int r = 0; r < nr; r++) {
          int64_t i = n + r * places;
          put(c->y, m * N + i, c->x_dtype, s[r] + (c->bias ? at(c->bias, i, c->bias_dtype) : 0));
        }
      }
    }
  }
}

/* out[r][m] (+)= NR rows of decoded W times MR tokens side by side, n vectors long */
INLINE void FN(tile)(const float *const *row, const float *x, int64_t n, const int half, float *out, int first) {
  vf acc[MR][NR] = {};
  for (int64_t k = 0; k < n; k++, x += MR * V) {
    vf a[MR];
    UNROLL(4) for (int m = 0; m < MR; m++) __builtin_prefetch(x + (m + 8 * MR) * V, 0, 3);
    UNROLL(4) for (int m = 0; m < MR; m++) a[m] = LD(x + m * V);
    UNROLL(6) for (int r = 0; r < NR; r++) {
      vf b = LD(row[r] + k * V);
      UNROLL(4) for (int m = 0; m < MR; m++) acc[m][r] = DOT(b, a[m], acc[m][r]);
    }
  }
  UNROLL(6) for (int r = 0; r < NR; r++) {
    v4 s = FN(sum4)(acc[0][r], acc[1][r], acc[2][r], acc[3][r]), *o = (v4 *)(out + r * MB);
    if (!first) s += *o;
    *o = s;
  }
}
/* Sums [n][m] into y[m][n]: 4 tokens, up to 16 rows of W; those past the last are in memory, and not read */
static void FN(finish)(const ffs_cpu_nf4 *c, const float *acc, int64_t m0, int64_t ms, int64_t n0, int64_t ns) {
  float turned[MR][16];
  for (int n = 0; n < 16; n += 4) {
    v4 r[4];
    for (int i = 0; i < 4; i++) r[i] = *(const v4 *)(acc + (n + i) * MB);
#if V > 4
    _MM_TRANSPOSE4_PS(r[0], r[1], r[2], r[3]);
    for (int m = 0; m < 4; m++) *(v4 *)(turned[m] + n) = r[m];
#else
    for (int m = 0; m < 4; m++) for (int i = 0; i < 4; i++) turned[m][n + i] = r[i][m];
#endif
  }
  for (int64_t m = 0; m < ms; m++) {
    int64_t n = 0, to = (m0 + m) * c->N + n0;
    for (; n + V <= ns; n += V) {
      vf v = LD(turned[m] + n);
      if (c->bias) v += FN(load)(c->bias, n0 + n, c->bias_dtype);
      FN(store)(c->y, to + n, c->x_dtype, v);
    }
    for (; n < ns; n++) put(c->y, to + n, c->x_dtype, turned[m][n] + (c->bias ? at(c->bias, n0 + n, c->bias_dtype) : 0));
  }
}
/* x in slices of KC words, MR tokens side by side: a power of two as the stride would leave most of a cache unused */
static void FN(pack)(const Work *w, int id, int of) {
  const ffs_cpu_nf4 *c = w->c;
  int size = w->half ? 2 : 4, each = w->half ? 2 * V : V;
  int64_t K = c->K, kc = 4 * KC / size, step = MR * each;
  for (int64_t m = w->Mp * id / of; m < w->Mp * (id + 1) / of; m++)
    for (int64_t k0 = 0; k0 < K; k0 += kc) {
      int64_t kn = MIN(kc, K - k0), ld = UP(kn, each);
      char *d = w->x + (w->Mp * k0 + m / MR * MR * ld + m % MR * each) * size;
      for (int64_t k = 0; k < kn; k += each, d += step * size) {
        int64_t from = m * c->stride + k0 + k, n = m < c->M ? MIN(each, kn - k) : 0;
        if (n < each) memset(d, 0, 4 * V);
        if (w->half) memcpy(d, (const uint16_t *)c->x + from, 2 * n);
        else if (n == V) ST(d, FN(load)(c->x, from, c->x_dtype));
        else for (int64_t i = 0; i < n; i++) ((float *)d)[i] = at(c->x, from + i, c->x_dtype);
      }
    }
}
static void FN(many)(const Work *w, int id, int of) {
  const ffs_cpu_nf4 *c = w->c;
  int half = w->half, size = half ? 2 : 4, each = half ? 2 * V : V;
  int64_t N = c->N, K = c->K, R = c->R, kc = 4 * KC / size, n0 = first_of(N, id, of, NR), n1 = first_of(N, id + 1, of, NR);
  float *panel = (float *)(w->own + id * w->own_size), *scale = panel + 6 * LDW, *b = scale + KC / 16 + 64, *acc = b + 6 * w->Rp;
  float *flat = acc + (NC + 16) * MB, code[16];
  const float *row[NR];
  FN(widen)(c->code, 0, c->scales == TORCHAO ? c->dtype : FP32, 16, code);
  FN(pack)(w, id, of);
  if (R) {
    if (id == 0) memset(w->t, 0, 4 * w->Mp * w->Rp);
    FN(barrier)(of);
    FN(low)(w, flat, 1, id, of);
  }
  FN(barrier)(of);
  for (int64_t nb = n0; nb < n1; nb += NC)
    for (int64_t m0 = 0; m0 < c->M; m0 += MB) {
      int64_t ne = MIN(nb + NC, n1), me = MIN(m0 + MB, c->M);
      for (int64_t k0 = 0; k0 < K; k0 += kc) {
        int64_t kn = MIN(kc, K - k0), ld = UP(kn, each);
        for (int64_t n = nb; n < ne; n += NR) {
          for (int r = 0; r < NR; r++) {
            int64_t e = MIN(n + r, N - 1) * K + k0, skip = e % 32; /* past the last row: it again */
            char *to = (char *)(panel + r * LDW);
            FN(panel)(c, code, e - skip, e + kn, half, NR * K / 2, to, scale);
            row[r] = (float *)(to + skip * size);
            memset((char *)row[r] + kn * size, 0, (ld - kn) * size);
          }
          const float *x = (const float *)(w->x + (w->Mp * k0 + m0 * ld) * size);
          for (int64_t m = m0; m < me; m += MR, x += MR * ld * size / 4) {
            float *out = acc + (n - nb) * MB + (m - m0);
            if (half) FN(tile)(row, x, ld / each, 1, out, k0 == 0); else FN(tile)(row, x, ld / each, 0, out, k0 == 0);
          }
        }
      }
      for (int64_t n = nb; R && n < ne; n += NR) { /* B: more columns of W */
        for (int r = 0; r < NR; r++) {
          float *to = b + r * w->Rp;
          FN(widen)(c->b, MIN(n + r, N - 1) * R, c->b_dtype, R, to);
          memset(to + R, 0, 4 * (w->Rp - R));
          row[r] = to;
        }
        for (int64_t m = m0; m < me; m += MR) FN(tile)(row, w->t + m * w->Rp, w->Rp / V, 0, acc + (n - nb) * MB + (m - m0), 0);
      }
      for (int64_t n = nb; n < ne; n += 16)
        for (int64_t m = m0; m < me; m += MR) FN(finish)(c, acc + (n - nb) * MB + (m - m0), m, MIN(me - m, MR), n, MIN(ne - n, 16));
    }
}

/* out[m][NR vectors] += MR rows of dY times n rows of decoded W; of bf16, pairs of rows in a word */
INLINE void FN(outer)(const float *rows, const float *dy, int64_t ldy, int64_t n, const int half, float *out) {
  vf acc[MR][NR];
  UNROLL(4) for (int m = 0; m < MR; m++) UNROLL(6) for (int r = 0; r < NR; r++) acc[m][r] = LD(out + m * LDD + r * V);
  for (int64_t i = 0; i < n; i++, rows += LDD) {
    vf b[NR];
    UNROLL(6) for (int r = 0; r < NR; r++) b[r] = LD(rows + r * V);
    UNROLL(4) for (int m = 0; m < MR; m++) {
      uint32_t word; memcpy(&word, dy + m * ldy + i, 4);
      vf a = (vf)(word - (vu){});
      UNROLL(6) for (int r = 0; r < NR; r++) acc[m][r] = DOT(b[r], a, acc[m][r]);
    }
  }
  UNROLL(4) for (int m = 0; m < MR; m++) UNROLL(6) for (int r = 0; r < NR; r++) ST(out + m * LDD + r * V, acc[m][r]);
}
/* kn columns from k on of nn rows from n on, as outer takes them, with zeros up to kt. flat: room for two rows */
static void FN(dx_panel)(const Work *w, const float *code, int64_t n, int64_t nn, int64_t k, int64_t kn, int64_t kt, float *panel, float *flat, float *scale) {
  int64_t K = w->c->K;
#ifdef BF16DOT
  uint16_t *pair[2];
#endif
  for (int64_t i = 0; i < nn; i++) {
    int64_t e = (n + i) * K + k, skip = e % 32;
    float *to = flat + i % 2 * (KD + 128);
    FN(panel)(w->c, code, e - skip, e + kn, w->half, 4 * K / 2, to, scale);
#ifdef BF16DOT
    if (w->half) {
      pair[i % 2] = (uint16_t *)to + skip;
      memset(pair[i % 2] + kn, 0, 2 * (kt - kn));
      if (i + 1 == nn && i % 2 == 0) memset(pair[1] = (uint16_t *)(flat + KD + 128), 0, 2 * kt);
      else if (i % 2 == 0) continue;
      for (int64_t j = 0; j < kt; j += V) {
        __m512i p = _mm512_cvtepu16_epi32(_mm256_loadu_si256((void *)(pair[0] + j)));
        __m512i q = _mm512_cvtepu16_epi32(_mm256_loadu_si256((void *)(pair[1] + j)));
        _mm512_storeu_si512(panel + i / 2 * LDD + j, _mm512_or_si512(p, _mm512_slli_epi32(q, 16)));
      }
      continue;
    }
#endif
    memcpy(panel + i * LDD, to + skip, 4 * kn);
    memset(panel + i * LDD + kn, 0, 4 * (kt - kn));
  }
}
static void FN(dx)(const Work *w, int id, int of) {
  const ffs_cpu_nf4 *c = w->c;
  int half = w->half, size = half ? 2 : 4, tile = NR * V;
  int64_t N = c->N, K = c->K, ldy = UP(N, 16) + 32, k0 = first_of(K, id, of, tile), k1 = first_of(K, id + 1, of, tile);
  float *panel = (float *)(w->own + id * w->own_size), *flat = panel + ND * LDD, *scale = flat + 2 * (KD + 128), *acc = scale + KD / 32 + 64, code[16];
  FN(widen)(c->code, 0, c->scales == TORCHAO ? c->dtype : FP32, 16, code);
  for (int64_t m = w->Mp * id / of; m < w->Mp * (id + 1) / of; m++) {
    char *d = w->x + m * ldy * size;
    memset(d, 0, ldy * size);
    if (m >= c->M) continue;
    if (half) memcpy(d, (const uint16_t *)c->x + m * c->stride, 2 * N); else FN(widen)(c->x, m * c->stride, c->x_dtype, N, (float *)d);
  }
  FN(barrier)(of);
  for (int64_t k = k0; k < k1; k += KD)
    for (int64_t m0 = 0; m0 < c->M; m0 += MB) {
      int64_t kn = MIN(KD, k1 - k), kt = UP(kn, tile), me = MIN(m0 + MB, w->Mp);
      for (int64_t m = 0; m < me - m0; m++) memset(acc + m * LDD, 0, 4 * kt);
      for (int64_t n = 0, nd = half ? 2 * ND : ND; n < N; n += nd) {
        int64_t nn = MIN(nd, N - n), steps = half ? (nn + 1) / 2 : nn;
        FN(dx_panel)(w, code, n, nn, k, kn, kt, panel, flat, scale);
        for (int64_t j = 0; j < kt; j += tile)
          for (int64_t m = m0; m < me; m += MR) {
            const float *dy = (const float *)(w->x + (m * ldy + n) * size);
            float *out = acc + (m - m0) * LDD + j;
            if (half) FN(outer)(panel + j, dy, ldy / 2, steps, 1, out); else FN(outer)(panel + j, dy, ldy, steps, 0, out);
          }
      }
      for (int64_t m = m0; m < MIN(me, c->M); m++) {
        int64_t j = 0;
        for (; j + V <= kn; j += V) FN(store)(c->y, m * K + k + j, c->x_dtype, LD(acc + (m - m0) * LDD + j));
        for (; j < kn; j++) put(c->y, m * K + k + j, c->x_dtype, acc[(m - m0) * LDD + j]);
      }
    }
}
#undef G
#undef NR
#undef MR
#undef vf
#undef vu
#undef v4
#undef LD
#undef LDU
#undef ST
#undef DOT
#endif
