/* Included once per instruction set, of V fp32 lanes and with FN(name) for its names: vectors, scales, tables, decoded rows. */

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
