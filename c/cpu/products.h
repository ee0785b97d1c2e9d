/* After decode.h, for the same instruction set: x A^T, few tokens, many tokens, dX. */

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
                     int64_t ahead, const int mr, const int nr, vf *acc) {
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
  vf sums[4][4] = {};
  for (int64_t g = 0; g < groups; g++) {
    vu v[4];
    vf part[4][4] = {};
    UNROLL(4) for (int r = 0; r < nr; r++) {
      const uint8_t *p = FN(bytes)(c, e[r] + g * G, G, spare);
      __builtin_prefetch(p + ahead, 0, 3);
      v[r] = LDU(p);
    }
    UNROLL(8) for (int s = 0; s < 8; s++)
      UNROLL(4) for (int r = 0; r < nr; r++) {
        vf w = FN(lookup)(v[r] >> (4 * s), &t);
        UNROLL(4) for (int m = 0; m < mr; m++) part[m][r] = FN(fma)(w, LD((const float *)x + m * ldx + g * G + s * V), part[m][r]);
      }
    UNROLL(4) for (int r = 0; r < nr; r++) {
      const float *of_group = scale + ((e[r] + g * G) >> shift);
#if V == 16
      vf each = (vf)_mm512_permutexvar_ps((__m512i)spread, (__m512)LD(of_group));
#elif V == 8
      vf each = (vf)_mm256_permutevar8x32_ps((__m256)LD(of_group), (__m256i)spread);
#else
      vf each = *of_group - (vf){};
#endif
      UNROLL(4) for (int m = 0; m < mr; m++) sums[m][r] = FN(fma)(part[m][r], each, sums[m][r]);
    }
  }
  UNROLL(4) for (int m = 0; m < mr; m++) UNROLL(4) for (int r = 0; r < nr; r++) acc[m * 4 + r] = sums[m][r];
}
#ifdef BF16DOT
/* The same of bf16, by a table for each block; two blocks' are side by side. chains: sums that need not wait for each other, as a product takes 6 cycles */
INLINE void FN(rows16)(const ffs_cpu_nf4 *c, const float *code, const void *x, int64_t ldx, const float *scale, const int64_t *e, int64_t groups,
                       int64_t ahead, const int mr, const int nr, const int chains, vf *acc) {
  int shift = __builtin_ctzll(c->block), rounds = c->scales == TORCHAO && c->dtype == FP16;
  uint8_t spare[4 * V];
  vf sums[4][4][4] = {}, values = LD(code);
  __m512i second = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(16), 1);
  for (int64_t g = 0; g < groups; g++) {
    __m512i v[4], both[4];
    UNROLL(4) for (int r = 0; r < nr; r++) {
      int64_t at = e[r] + g * G;
      const uint8_t *p = FN(bytes)(c, at, G, spare);
      __builtin_prefetch(p + ahead, 0, 3);
      v[r] = (__m512i)LDU(p);
      vf low = values * scale[at >> shift], high = values * scale[(at + 64) >> shift];
      if (rounds) low = FN(round)(low, FP16), high = FN(round)(high, FP16);
      both[r] = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
    }
    UNROLL(4) for (int s = 0; s < 4; s++)
      UNROLL(4) for (int r = 0; r < nr; r++) {
        __m512i index = _mm512_ternarylogic_epi32(_mm512_srli_epi16(v[r], 4 * s), _mm512_set1_epi16(15), second, 0xea);
        __m512bh w = (__m512bh)_mm512_permutexvar_epi16(index, both[r]);
        UNROLL(4) for (int m = 0; m < mr; m++) {
          vf *sum = &sums[m][r][s % chains];
          *sum = (vf)_mm512_dpbf16_ps((__m512)*sum, w, (__m512bh)_mm512_loadu_si512((const uint16_t *)x + m * ldx + g * G + s * 32));
        }
      }
  }
  UNROLL(4) for (int m = 0; m < mr; m++)
    UNROLL(4) for (int r = 0; r < nr; r++) acc[m * 4 + r] = (sums[m][r][0] + sums[m][r][1]) + (sums[m][r][2] + sums[m][r][3]);
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
      int nr = MIN(4, (n1 - n + places - 1) / places);
      vf acc[16];
      int64_t e[4];
      next = n + nr * places;
      if (places == 1 && n + nr > until) { /* scales of some rows at once */
        until = MIN(n1, n + 4 + (BATCH << shift) / K);
        FN(scales)(c, n * K >> shift, ((until * K - 1) >> shift) - (n * K >> shift) + 1, scale);
        batch = scale - (n * K >> shift);
      }
      for (int r = 0; r < nr; r++) e[r] = (n + r * places) * K - skip;
      /* Of one token, in bf16 of two, a row at a time: one stream is what memory likes. Of more x leaves the first cache: rows share what is read of it. */
      for (int q = 0, k; q < nr; q += k) {
        k = M > (w->half ? 2 : 1) && nr - q >= w->share ? w->share : 1;
        int64_t ahead = k > 1 ? k * places * K / 2 : 2048;
#define CASE(mr, k, chains) case mr * 8 + k: ROWS(mr, k, chains); break;
#ifdef BF16DOT
#define ROWS(mr, k, chains) FN(rows16)(c, code, x, ld, batch, e + q, groups, ahead, mr, k, chains, acc + q)
        if (half) switch (M * 8 + k) { CASE(1, 1, 4) CASE(2, 1, 4) CASE(3, 1, 2) CASE(4, 1, 2) CASE(3, 4, 1) CASE(4, 4, 1) }
        else
#undef ROWS
#endif
#define ROWS(mr, k, chains) FN(rows)(c, code, x, ld, batch, e + q, groups, ahead, mr, k, acc + q)
        switch (M * 8 + k) { CASE(1, 1, 0) CASE(2, 1, 0) CASE(3, 1, 0) CASE(4, 1, 0) CASE(2, 2, 0) CASE(3, 2, 0) CASE(4, 2, 0) }
      }
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
