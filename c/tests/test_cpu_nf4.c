/* libfastfuse_cpu against plain loops in double, on every instruction set this CPU has. */
#include "fastfuse_cpu.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

enum { N = 45, K = 200, R = 5, MOST = 9 };
static uint8_t packed[N * K / 2];
static float code[16], absmax[(N * K + 63) / 64], x[MOST * N * K], y[MOST * N * K], a[R * K], b[N * R], bias[N], xa[MOST * R];
static unsigned state = 1;

static float uniform(void) { return (float)((state = state * 1664525u + 1013904223u) >> 8) / (1 << 23) - 1; }
static double weight(int n, int k) {
  int i = n * K + k;
  return (double)(code[i % 2 ? packed[i / 2] & 15 : packed[i / 2] >> 4] * absmax[i / 64]);
}
static int far(const char *what, int isa, int m, int n, double got, double want, double terms) {
  if (fabs(got - want) <= 1e-6 * terms) return 0;
  printf("%s, instruction set %d: [%d, %d] is %.9g, expected %.9g\n", what, isa, m, n, got, want);
  return 1;
}
static int check(int isa, int M) {
  ffs_cpu_nf4 c = {.packed = packed, .code = code, .scale = {absmax}, .scales = FFS_CPU_FLAT, .N = N, .K = K, .block = 64, .scale_block = 256, .x = x, .y = y,
                   .M = M, .stride = K, .bias = bias, .a = a, .b = b, .xa = xa, .R = R, .scaling = 0.5, .threads = 2};
  if (ffs_cpu_nf4_linear(&c)) return 1;
  for (int m = 0; m < M; m++)
    for (int n = 0; n < N; n++) {
      double sum = bias[n], terms = 1;
      for (int k = 0; k < K; k++) sum += x[m * K + k] * weight(n, k), terms += fabs(x[m * K + k] * weight(n, k));
      for (int r = 0; r < R; r++)
        for (int k = 0; k < K; k++) sum += 0.5 * x[m * K + k] * a[r * K + k] * b[n * R + r], terms += fabs(x[m * K + k] * a[r * K + k] * b[n * R + r]);
      if (far("linear", isa, m, n, y[m * N + n], sum, terms)) return 1;
    }
  c.stride = N;
  if (ffs_cpu_nf4_linear_dx(&c)) return 1;
  for (int m = 0; m < M; m++)
    for (int k = 0; k < K; k++) {
      double sum = 0, terms = 1;
      for (int n = 0; n < N; n++) sum += x[m * N + n] * weight(n, k), terms += fabs(x[m * N + n] * weight(n, k));
      if (far("dx", isa, m, k, y[m * K + k], sum, terms)) return 1;
    }
  c.stride = 3, c.M = N - 3; /* all rows but the first three */
  if (ffs_cpu_nf4_dequantize(&c)) return 1;
  for (int n = 3; n < N; n++)
    for (int k = 0; k < K; k++)
      if (far("dequantize", isa, n, k, y[(n - 3) * K + k], weight(n, k), 0)) return 1;
  return 0;
}
int main(void) {
  for (int i = 0; i < N * K / 2; i++) packed[i] = (uint8_t)(uniform() * 128 + 128);
  for (int i = 0; i < 16; i++) code[i] = (float)(i - 7) / 8;
  for (int i = 0; i < (N * K + 63) / 64; i++) absmax[i] = 1.5f + uniform();
  for (int i = 0; i < MOST * K; i++) x[i] = uniform();
  for (int i = 0; i < R * K; i++) a[i] = uniform();
  for (int i = 0; i < N * R; i++) b[i] = uniform();
  for (int i = 0; i < N; i++) bias[i] = uniform();
  for (int isa = ffs_cpu_isa(-1); isa >= 0; isa--) {
    ffs_cpu_isa(isa);
    for (int M = 1; M <= MOST; M += 2)
      if (check(isa, M)) return EXIT_FAILURE;
  }
  return 0;
}
