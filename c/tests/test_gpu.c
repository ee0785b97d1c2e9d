/* Numbers on a GPU against the formulas in double. Exits with 77 where there is none, or none that the library was built for.
   Bounds follow from where values round to bf16 (u = 2^-9 of a value, at most), never from what was seen. */
#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#include "fastfuse.h"
#include "gpu.h"

static const double u = 1.0 / 512, LESS = 1e-4; /* LESS: of fp32 sums, far below u */

static uint64_t state = 1;
static double uniform(void) { /* -1 to 1 */
  state = state * 6364136223846793005u + 1442695040888963407u;
  return (double)(state >> 40) / (1 << 23) - 1;
}

static uint16_t to_bf16(double x) {
  const float f = (float)x;
  uint32_t bits;
  memcpy(&bits, &f, 4);
  return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
static double of_bf16(uint16_t h) {
  const uint32_t bits = (uint32_t)h << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

/* Values that are the same on both sides. */
typedef struct {
  double *host;
  void *device;
  size_t n;
} tensor;

static tensor random_tensor(size_t n, double size) {
  tensor t = {malloc(n * sizeof(double)), NULL, n};
  uint16_t *halves = malloc(n * 2);
  for (size_t i = 0; i < n; i++) t.host[i] = of_bf16(halves[i] = to_bf16(size * uniform()));
  t.device = gpu_copy_of(halves, n * 2);
  free(halves);
  return t;
}

static void ok(ffs_status status) {
  if (status != ffs_ok) {
    fprintf(stderr, "%s\n", ffs_last_error());
    exit(1);
  }
}

static void *workspace_of(size_t bytes) { return gpu_filled(bytes, 0xff); } /* NaN: what nobody wrote shows */

/* Every element of what the device made must lie within its bound. */
static void compare(const char *what, const void *device, size_t n, const double *want, const double *bound) {
  uint16_t *got = malloc(n * 2);
  double worst = 0;
  gpu_read(got, device, n * 2);
  for (size_t i = 0; i < n; i++) {
    const double error = fabs(of_bf16(got[i]) - want[i]);
    if (!(error <= bound[i])) {
      fprintf(stderr, "%s: element %zu is %g, expected %g +- %g\n", what, i, of_bf16(got[i]), want[i], bound[i]);
      exit(1);
    }
    if (bound[i] > 0 && error / bound[i] > worst) worst = error / bound[i];
  }
  printf("%s: within %.2f of the bound\n", what, worst);
  free(got);
}

static const double CODEBOOK[16] = {-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
                                    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
                                    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0};

static double *weight(ffs_nf4 *w, int N, int K) {
  const size_t n = (size_t)N * (size_t)K, blocks = n / 64, groups = (blocks + 255) / 256;
  uint8_t *packed = malloc(n / 2), *index = malloc(blocks);
  float code[256], *absmax = malloc(groups * 4), offset = 0.05f;
  double *decoded = malloc(n * sizeof(double));
  for (int i = 0; i < 256; i++) code[i] = (float)(i - 128) / 256;
  for (size_t i = 0; i < groups; i++) absmax[i] = 0.05f + 0.01f * (float)i;
  for (size_t i = 0; i < blocks; i++) index[i] = (uint8_t)(127 * (1 + uniform()));
  for (size_t i = 0; i < n / 2; i++) packed[i] = (uint8_t)(127 * (1 + uniform()));
  for (size_t i = 0; i < n; i++) {
    const float scale = code[index[i / 64]] * absmax[i / 64 / 256] + offset;
    decoded[i] = CODEBOOK[i % 2 ? packed[i / 2] & 15 : packed[i / 2] >> 4] * scale;
  }
  *w = (ffs_nf4){.N = N, .K = K, .packed = gpu_copy_of(packed, n / 2), .index = gpu_copy_of(index, blocks), .code = gpu_copy_of(code, sizeof code),
                 .absmax = gpu_copy_of(absmax, groups * 4), .offset = gpu_copy_of(&offset, 4)};
  free(packed), free(index), free(absmax);
  return decoded;
}

static void linear(int M, int N, int K, int R, bool biased) {
  ffs_nf4 w;
  double *decoded = weight(&w, N, K);
  const size_t m = (size_t)M, n = (size_t)N, k = (size_t)K, r = (size_t)R, stride = k + 16;
  const tensor x = random_tensor(m * stride, 1), a = random_tensor(r * k + 16, 0.05), b = random_tensor(n * r + 16, 0.5), bias = random_tensor(n, 1);
  const ffs_lora lora = {.R = R, .scaling = 2, .dtype = FFS_BF16, .a = a.device, .b = b.device};
  void *out = gpu_filled(m * n * 2, 0xff);
  size_t bytes;
  ok(ffs_nf4_linear_workspace(FFS_BF16, M, &w, R ? &lora : NULL, &bytes));
  ok(ffs_nf4_linear(NULL, FFS_BF16, M, x.device, (int64_t)stride, &w, R ? &lora : NULL, biased ? bias.device : NULL, out, workspace_of(bytes), bytes));
  double *want = malloc(m * n * sizeof(double)), *bound = malloc(m * n * sizeof(double));
  for (size_t i = 0; i < m; i++)
    for (size_t j = 0; j < n; j++) {
      double y = biased ? bias.host[j] : 0, rounded = 0, all = fabs(y);
      for (size_t p = 0; p < k; p++) {
        const double product = x.host[i * stride + p] * decoded[j * k + p];
        y += product, rounded += fabs(product);
      }
      for (size_t q = 0; q < r; q++) {
        double low = 0, size = 0;
        for (size_t p = 0; p < k; p++) low += x.host[i * stride + p] * a.host[q * k + p], size += fabs(x.host[i * stride + p] * a.host[q * k + p]);
        y += 2 * low * b.host[j * r + q];
        rounded += fabs(2 * low * b.host[j * r + q]); /* x a^T rounds, and so may scaling * b */
        all += 2 * size * fabs(b.host[j * r + q]);
      }
      want[i * n + j] = y;
      /* a decoded weight: its code, its scale and their product round */
      bound[i * n + j] = 3.02 * u * rounded + u * fabs(y) + LESS * (rounded + all);
    }
  char what[64];
  snprintf(what, sizeof what, "nf4_linear M=%d N=%d K=%d R=%d%s", M, N, K, R, biased ? " bias" : "");
  compare(what, out, m * n, want, bound);

  void *dequantized = gpu_filled(n * k * 2, 0xff);
  ok(ffs_nf4_dequantize(NULL, FFS_BF16, &w, dequantized));
  double *bounds = malloc(n * k * sizeof(double));
  for (size_t i = 0; i < n * k; i++) bounds[i] = 1.001 * u * fabs(decoded[i]);
  compare("nf4_dequantize", dequantized, n * k, decoded, bounds);
  free(bounds), free(want), free(bound), free(decoded);
}

/* Two images of up to 4 tiles of 28 x 42 pixels, 6 patches and CLS, the second image 1 x 2 tiles. */
static void patches(bool normed) {
  enum { D = 48, IMAGES = 2, TILES = 4, PATCHES = 6, TOKENS = 7, PADDED = 8, H = 28, W = 42, P = 14, KK = 3 * P * P, COLUMNS = 640,
         ROWS = IMAGES * TILES * PADDED };
  const tensor pixels = random_tensor(IMAGES * TILES * 3 * H * W, 1), weight = random_tensor(D * KK, 0.1), cls = random_tensor(D, 1),
               local = random_tensor(TOKENS * D, 1);
  const tensor global = random_tensor(16 * TOKENS * D, 1), pre = random_tensor(16 * D, 1), gates = random_tensor(2, 1), nw = random_tensor(D, 1),
               nb = random_tensor(D, 1);
  const int64_t ratio[IMAGES][2] = {{2, 2}, {1, 2}};
  uint16_t *rows = calloc(D * COLUMNS, 2);
  for (int i = 0; i < D; i++)
    for (int k = 0; k < KK; k++) rows[i * COLUMNS + k] = to_bf16(weight.host[i * KK + k]);
  uint8_t *fits = gpu_filled(1, 7), seen = 7;
  ffs_patches p = {.dtype = FFS_BF16, .image_dtype = FFS_BF16, .images = IMAGES, .tiles = TILES, .height = H, .width = W, .patch = P, .D = D,
                   .pixels = pixels.device, .stride_tile = 3 * H * W, .stride_channel = H * W, .stride_line = W,
                   .weight = gpu_copy_of(rows, D * COLUMNS * 2), .cls = cls.device,
                   .local_pos = local.device, .global_pos = global.device, .pre_pos = pre.device, .gate = gates.device, .pre_gate = (char *)gates.device + 2,
                   .aspect_ratio = gpu_copy_of(ratio, sizeof ratio), .entries = 4, .side = 4, .fits = fits, .pad_tokens_to = 8, .eps = 1e-5f};
  if (normed) p.norm_weight = nw.device, p.norm_bias = nb.device;
  p.out = gpu_filled(ROWS * D * 2, 0xff);
  size_t bytes;
  ok(ffs_patch_embed_workspace(&p, &bytes));
  ok(ffs_patch_embed(NULL, &p, workspace_of(bytes), bytes));
  gpu_read(&seen, fits, 1);
  if (seen != 1) fprintf(stderr, "patch_embed: fits is %d, expected 1\n", seen), exit(1);
  static double want[ROWS * D], bound[ROWS * D];
  const double open = tanh(gates.host[0]), pre_open = tanh(gates.host[1]);
  for (int row = 0; row < ROWS; row++) {
    const int tile = row / PADDED, token = row % PADDED, image = tile / TILES, t = tile % TILES, patch = token - 1;
    const int h = (int)ratio[image][0], w = (int)ratio[image][1], place = t < h * w ? t / w * 4 + t % w : -1;
    double *y = want + row * D, *e = bound + row * D, mean = 0, variance = 0;
    for (int d = 0; d < D; d++) {
      double product = 0, size = 0;
      y[d] = e[d] = 0;
      if (token >= TOKENS) continue;
      for (int k = 0; token && k < KK; k++) {
        const int c = k / (P * P), line = k / P % P, column = k % P;
        const double one = weight.host[d * KK + k] * pixels.host[((tile * 3 + c) * H + patch / 3 * P + line) * W + patch % 3 * P + column];
        product += one, size += fabs(one);
      }
      y[d] = product + (token ? 0 : cls.host[d]) + (1 - open) * local.host[token * D + d];
      if (place >= 0) y[d] += open * global.host[(place * TOKENS + token) * D + d] + (token ? pre_open * pre.host[place * D + d] : 0);
      /* with a norm the product rounds before everything else is added */
      e[d] = LESS * (size + 4) + (normed ? u * fabs(product) : u * fabs(y[d]));
      mean += y[d] / D;
    }
    if (!normed || token >= TOKENS) continue;
    double most = 0;
    for (int d = 0; d < D; d++) variance += (y[d] - mean) * (y[d] - mean) / D, most = fmax(most, e[d]);
    const double rstd = 1 / sqrt(variance + 1e-5);
    for (int d = 0; d < D; d++) {
      const double hat = (y[d] - mean) * rstd;
      y[d] = hat * nw.host[d] + nb.host[d];
      /* an error of `most` in every input moves the mean by it, and the deviation by its share */
      e[d] = fabs(nw.host[d]) * most * rstd * (2 + fabs(hat)) * 1.1 + u * fabs(y[d]) + LESS;
    }
  }
  compare(normed ? "patch_embed with a norm" : "patch_embed", p.out, ROWS * D, want, bound);
  free(rows);
}

/* kind 0: lengths, 1: intervals, 2: tiles. Text rows are [b, s, heads, d], k and v [b, heads, s_e, d]. */
static void attention(int b, int s, int n_tiles, int kind) {
  enum { HQ = 8, HKV = 2, G = 4, D = 128, A_TILE = 101 };
  const int s_e = n_tiles * A_TILE;
  const size_t text = (size_t)b * (size_t)s * HQ * D, cached = (size_t)b * HKV * (size_t)s_e * D, sees = (size_t)b * (size_t)s;
  const tensor q = random_tensor(text, 1), k = random_tensor(cached, 1), v = random_tensor(cached, 1);
  int32_t *lengths = calloc((size_t)b, 4), *intervals = calloc(sees * 2, 4);
  uint8_t *empty = calloc(sees, 1), *tiles = calloc(sees * (size_t)n_tiles, 1);
  for (int i = 0; i < b; i++) lengths[i] = i == 1 ? 0 : s_e - 37 * i;
  for (size_t row = 0; row < sees; row++) {
    intervals[2 * row] = (int32_t)(row * 3 % (size_t)s_e), intervals[2 * row + 1] = row % 5 == 4 ? intervals[2 * row] : s_e;
    empty[row] = row % 5 == 4;
    for (int t = 0; t < n_tiles; t++) tiles[row * (size_t)n_tiles + (size_t)t] = row % 7 != 3 && (row + (size_t)t) % 3 != 0;
  }
  ffs_attention p = {.dtype = FFS_BF16, .b = b, .hq = HQ, .hkv = HKV, .s = s, .s_e = s_e, .d = D, .q = q.device, .k = k.device, .v = v.device,
                     .out = gpu_filled(text * 2, 0xff), .stride_q = {s * HQ * D, D, HQ * D}, .stride_k = {HKV * s_e * D, s_e * D, D},
                     .stride_v = {HKV * s_e * D, s_e * D, D}, .stride_out = {s * HQ * D, D, HQ * D}, .scale = 0.125f};
  ffs_mask mask;
  size_t bytes;
  if (kind == 0) {
    p.lengths = gpu_copy_of(lengths, (size_t)b * 4);
  } else {
    ok(ffs_mask_memory(b, s, s_e, G, kind == 2, &bytes));
    if (kind == 1) ok(ffs_mask_intervals(NULL, b, s, s_e, G, gpu_copy_of(intervals, sees * 8), gpu_copy_of(empty, sees), workspace_of(bytes), bytes, &mask));
    if (kind == 2) ok(ffs_mask_tiles(NULL, b, s, n_tiles, A_TILE, G, gpu_copy_of(tiles, sees * (size_t)n_tiles), workspace_of(bytes), bytes, &mask));
    p.mask = &mask;
  }
  ok(ffs_cross_attention_workspace(&p, &bytes));
  ok(ffs_cross_attention(NULL, &p, workspace_of(bytes), bytes));
  double *want = calloc(text, sizeof(double)), *bound = calloc(text, sizeof(double)), *weights = malloc((size_t)s_e * sizeof(double));
  for (int i = 0; i < b; i++)
    for (int t = 0; t < s; t++)
      for (int h = 0; h < HQ; h++) {
        const size_t row = (size_t)(i * s + t), at = (row * HQ + (size_t)h) * D, head = (size_t)(i * HKV + h / G) * (size_t)s_e * D;
        double total = 0;
        for (int n = 0; n < s_e; n++) {
          const bool seen = kind == 0   ? n < lengths[i]
                            : kind == 1 ? n >= intervals[2 * row] && n < intervals[2 * row + 1]
                                        : tiles[row * (size_t)n_tiles + (size_t)(n / A_TILE)];
          double score = 0;
          for (int d = 0; d < D; d++) score += q.host[at + (size_t)d] * k.host[head + (size_t)(n * D + d)];
          total += weights[n] = seen ? exp(0.125 * score) : 0;
        }
        for (int n = 0; total > 0 && n < s_e; n++)
          for (int d = 0; d < D; d++) {
            const double part = weights[n] / total * v.host[head + (size_t)(n * D + d)];
            want[at + (size_t)d] += part;
            bound[at + (size_t)d] += u * fabs(part); /* a weight rounds before it meets v */
          }
        for (int d = 0; d < D; d++) bound[at + (size_t)d] += u * fabs(want[at + (size_t)d]) + (total > 0 ? LESS : 0);
      }
  char what[64];
  snprintf(what, sizeof what, "cross_attention b=%d s=%d s_e=%d %s", b, s, s_e, kind == 0 ? "lengths" : kind == 1 ? "intervals" : "tiles");
  compare(what, p.out, text, want, bound);
  free(lengths), free(intervals), free(empty), free(tiles), free(want), free(bound), free(weights);
}

int main(void) {
  const char *reason = gpu_open();
  if (!reason) {
    ffs_nf4 w = {.N = 64, .K = 128, .index = (const uint8_t *)"nested"};
    size_t bytes;
    if (ffs_nf4_linear_workspace(FFS_BF16, 1, &w, NULL, &bytes) == ffs_unsupported) reason = ffs_last_error();
  }
  if (reason) {
    printf("not run: %s\n", reason);
    return 77;
  }
  linear(1, 192, 2048, 0, false);
  linear(3, 192, 512, 8, true);
  linear(16, 2048, 192, 20, false);
  linear(40, 208, 512, 8, true);
  linear(130, 192, 1088, 16, false);
  patches(false);
  patches(true);
  attention(3, 1, 12, 0);
  attention(2, 40, 3, 0);
  attention(2, 70, 4, 1);
  attention(2, 70, 4, 2);
  puts("ok");
  return 0;
}
