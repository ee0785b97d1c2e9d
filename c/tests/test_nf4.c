/* Launches of the NF4 linear layer as they reach the driver, on sm_90 with its launch rows. */
#include "expect.h"

enum { N = 4096, K = 4096 };
static const ffs_nf4 nested = {.N = N, .K = K, .packed = (void *)0x1000, .index = (void *)0x2000, .code = (void *)0x3000, .absmax = (void *)0x4000,
                               .offset = (void *)0x5004};
static const ffs_lora lora = {.R = 8, .scaling = 2.5f, .dtype = FFS_BF16, .a = (void *)0x6000, .b = (void *)0x7000};
static void *const x = (void *)0x8000, *const out = (void *)0x9000, *const bias = (void *)0xa000, *const workspace = (void *)0x100000;
static CUstream const stream = (CUstream)0x77;

static size_t needed(int64_t M, const ffs_lora *with) {
  size_t bytes = 1;
  EXPECT(ffs_nf4_linear_workspace(FFS_BF16, M, &nested, with, &bytes) == ffs_ok);
  return bytes;
}

static void decode(void) {
  fake.launches = 0;
  const size_t bytes = needed(3, &lora);
  EXPECT(bytes == 4 * 3 * (N + 16) * 4 + 256); /* 4 splits of 3 tokens, columns a multiple of 16; x a^T */
  EXPECT(ffs_nf4_linear(stream, FFS_BF16, 3, x, 5120, &nested, &lora, bias, out, workspace, bytes) == ffs_ok);
  EXPECT(fake.launches == 2 && fake.launch[0].stream == stream && fake.launch[1].stream == stream);
  LAUNCHED(0, "nf4_skinny_kernel", N / 64 + 1, 4, 1, 128, ptr(0x8000), ptr(0x1000), ptr(0x2000), ptr(0x3000), ptr(0x4000), ptr(0x5004), ptr(0x6000), i32(N),
           i32(8), f32(2.5f), ptr(0x100000), i32(5120), i32(3), i32(K), i32(N + 16));
  LAUNCHED(1, "nf4_skinny_reduce_kernel", N / 64, 1, 1, 128, ptr(0x100000), ptr(0x7000), ptr(0xa000), ptr(0x9000), i32(N), i32(8), f32(2.5f),
           ptr(0x100000 + bytes - 256), i32(16), i32(3), i32(N + 16));
}

static void decode_without_adapter(void) {
  fake.launches = 0;
  const size_t bytes = needed(1, NULL);
  EXPECT(ffs_nf4_linear(stream, FFS_BF16, 1, x, 0, &nested, NULL, NULL, out, workspace, bytes) == ffs_ok);
  EXPECT(fake.launches == 2);
  LAUNCHED(0, "nf4_skinny_kernel", N / 64, 4, 1, 128, ptr(0x8000), ptr(0x1000), ptr(0x2000), ptr(0x3000), ptr(0x4000), ptr(0x5004), ptr(0x1000), i32(N), i32(0),
           f32(0), ptr(0x100000), i32(0), i32(1), i32(K), i32(N));
}

static void prefill(void) {
  fake.launches = 0;
  const size_t bytes = needed(100, &lora);
  EXPECT(bytes == 16 * 100 * 8 * 4 + 100 * 8 * 2 + 192); /* the splits of x a^T, and their sum */
  EXPECT(ffs_nf4_linear(stream, FFS_BF16, 100, x, K, &nested, &lora, NULL, out, workspace, bytes) == ffs_ok);
  EXPECT(fake.launches == 3);
  LAUNCHED(0, "lora_down_kernel", 4, 16, 1, 128, ptr(0x8000), ptr(0x6000), ptr(0x100000), i32(K), i32(100), i32(K), i32(8));
  LAUNCHED(1, "nf4_skinny_reduce_kernel", 1, 1, 1, 128, ptr(0x100000), ptr(0x100000 + 51200), i32(800), i32(800));
  LAUNCHED(2, "nf4_linear_fwd_kernel", N / 128, 1, 1, 256, ptr(0x8000), ptr(0x1000), ptr(0x2000), ptr(0x3000), ptr(0x4000), ptr(0x5004), ptr(0x7000),
           ptr(0x9000), i32(N), i32(8), f32(2.5f), ptr(0x100000 + 51200), i32(K), i32(8), i32(100), i32(K));
  EXPECT(fake.launch[2].shared > 48 * 1024 && fake.launch[2].allowed_shared == (int)fake.launch[2].shared);

  fake.launches = 0;
  EXPECT(needed(5000, NULL) == 0);
  EXPECT(ffs_nf4_linear(stream, FFS_BF16, 5000, x, K, &nested, NULL, bias, out, NULL, 0) == ffs_ok);
  EXPECT(fake.launches == 1);
  LAUNCHED(0, "nf4_linear_fwd_kernel", 40 * (N / 128), 1, 1, 256, ptr(0x8000), ptr(0x1000), ptr(0x2000), ptr(0x3000), ptr(0x4000), ptr(0x5004), ptr(0x1000),
           ptr(0xa000), ptr(0x9000), i32(N), i32(0), f32(0), ptr(0x9000), i32(K), i32(0), i32(5000), i32(K));
}

static void rows_follow_the_shape(void) {
  const struct {
    int64_t M, N, K;
    unsigned splits, threads;
  } cases[] = {{16, 1536, 4096, 16, 128}, {16, 1024, 1024, 4, 128}, {16, 14336, 4096, 2, 128}, {16, 4096, 192, 2, 128}, {16, 4096, 64, 1, 128},
               {17, 4096, 4096, 1, 128}, {65, 4096, 4096, 1, 256}};
  for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
    ffs_nf4 w = nested;
    w.N = cases[i].N, w.K = cases[i].K;
    fake.launches = 0;
    EXPECT(ffs_nf4_linear(stream, FFS_BF16, cases[i].M, x, w.K, &w, NULL, NULL, out, workspace, (size_t)1 << 30) == ffs_ok);
    EXPECT(fake.launch[0].grid[1] == cases[i].splits && fake.launch[0].block[0] == cases[i].threads);
  }
}

static void dequantize(void) {
  fake.launches = 0;
  EXPECT(ffs_nf4_dequantize(stream, FFS_BF16, &nested, out) == ffs_ok);
  EXPECT(fake.launches == 1);
  LAUNCHED(0, "nf4_dequantize_kernel", N * K / 8192, 1, 1, 128, ptr(0x1000), ptr(0x2000), ptr(0x3000), ptr(0x4000), ptr(0x5004), ptr(0x9000),
           i64((int64_t)N * K));
}

static void nothing_to_do(void) {
  fake.launches = 0;
  EXPECT(needed(0, &lora) == 0);
  EXPECT(ffs_nf4_linear(stream, FFS_BF16, 0, NULL, K, &nested, &lora, NULL, NULL, NULL, 0) == ffs_ok && fake.launches == 0);
}

static void devices(void) {
  const int loads = fake.loads;
  fake.ordinal = 1;
  prefill(); /* loaded once for all devices, allowed its shared memory on each */
  EXPECT(fake.loads == loads);
  fake.ordinal = 2, fake.major = 7, fake.minor = 5;
  REFUSED(ffs_nf4_dequantize(stream, FFS_BF16, &nested, out), ffs_unsupported, "sm_75", "sm_90");
  fake.ordinal = 0, fake.major = 9, fake.minor = 0;
  fake.next_error = 700;
  REFUSED(ffs_nf4_dequantize(stream, FFS_BF16, &nested, out), ffs_driver_error, "cuLaunchKernel", "illegal memory access", "700");
}

static void refusals(void) {
  const size_t lots = (size_t)1 << 30;
#define LINEAR(...) ffs_nf4_linear(stream, __VA_ARGS__)
  ffs_nf4 w = nested;
  ffs_lora l = lora;
  REFUSED(LINEAR(FFS_FP32, 1, x, K, &nested, NULL, NULL, out, workspace, lots), ffs_invalid_argument, "dtype", "fp32", "bf16");
  REFUSED(LINEAR((ffs_dtype)9, 1, x, K, &nested, NULL, NULL, out, workspace, lots), ffs_invalid_argument, "dtype", "9", "bf16");
  REFUSED(LINEAR(FFS_BF16, -1, x, K, &nested, NULL, NULL, out, workspace, lots), ffs_invalid_argument, "M", "-1", "from 0");
  REFUSED(LINEAR(FFS_BF16, 1, NULL, K, &nested, NULL, NULL, out, workspace, lots), ffs_invalid_argument, "x is NULL");
  REFUSED(LINEAR(FFS_BF16, 1, at(0x8008), K, &nested, NULL, NULL, out, workspace, lots), ffs_invalid_argument, "x is 0x8008", "16");
  REFUSED(LINEAR(FFS_BF16, 2, x, K - 16, &nested, NULL, NULL, out, workspace, lots), ffs_invalid_argument, "stride_xm", "4080", "4096");
  REFUSED(LINEAR(FFS_BF16, 2, x, K + 8, &nested, NULL, NULL, out, workspace, lots), ffs_invalid_argument, "stride_xm", "4104", "multiple of 16");
  REFUSED(LINEAR(FFS_BF16, 2, x, K, NULL, NULL, NULL, out, workspace, lots), ffs_invalid_argument, "weight is NULL");
  REFUSED(LINEAR(FFS_BF16, 2, x, K, &nested, NULL, at(0xa004), out, workspace, lots), ffs_invalid_argument, "bias", "0xa004");
  REFUSED(LINEAR(FFS_BF16, 3, x, K, &nested, &lora, NULL, out, workspace, 100), ffs_invalid_argument, "workspace_bytes is 100", "needs");
  REFUSED(LINEAR(FFS_BF16, 3, x, K, &nested, &lora, NULL, out, NULL, lots), ffs_invalid_argument, "workspace is NULL");
  w.N = 4100;
  REFUSED(LINEAR(FFS_BF16, 2, x, K, &w, NULL, NULL, out, workspace, lots), ffs_invalid_argument, "weight->N", "4100", "16");
  w = nested, w.K = 96;
  REFUSED(LINEAR(FFS_BF16, 2, x, K, &w, NULL, NULL, out, workspace, lots), ffs_invalid_argument, "weight->K", "96", "64");
  w = nested, w.offset = NULL;
  REFUSED(LINEAR(FFS_BF16, 2, x, K, &w, NULL, NULL, out, workspace, lots), ffs_invalid_argument, "weight->index is given", "offset NULL");
  l.R = 0;
  REFUSED(LINEAR(FFS_BF16, 2, x, K, &nested, &l, NULL, out, workspace, lots), ffs_invalid_argument, "lora->R", "0", "from 1");
  l = lora, l.dtype = FFS_FP16;
  REFUSED(LINEAR(FFS_BF16, 2, x, K, &nested, &l, NULL, out, workspace, lots), ffs_invalid_argument, "lora->dtype is fp16", "bf16 or fp32");
  l = lora, l.b = NULL;
  REFUSED(LINEAR(FFS_BF16, 2, x, K, &nested, &l, NULL, out, workspace, lots), ffs_invalid_argument, "lora->b is NULL");
  REFUSED(ffs_nf4_linear_workspace(FFS_BF16, 1, &nested, NULL, NULL), ffs_invalid_argument, "bytes is NULL");
}

int main(void) {
  decode();
  decode_without_adapter();
  prefill();
  rows_follow_the_shape();
  dequantize();
  nothing_to_do();
  devices();
  refusals();
  puts("ok");
  return 0;
}
