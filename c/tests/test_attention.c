/* Launches of cross-attention and its masks as they reach the driver, on sm_90 with its launch rows. */
#include <math.h>

#include "expect.h"

static CUstream const stream = (CUstream)0x77;
static char *const workspace = (char *)0x1000000;
static const float LOG2E = 1.4426950408889634f;

/* 32 heads over 8, text rows [b, s, heads, d] over a cache [b, heads, s_e, d]. */
static ffs_attention text(int64_t b, int64_t s, int64_t s_e) {
  return (ffs_attention){.dtype = FFS_BF16, .b = b, .hq = 32, .hkv = 8, .s = s, .s_e = s_e, .d = 128, .q = at(0x1000), .k = at(0x2000), .v = at(0x3000),
                         .out = at(0x4000), .stride_q = {s * 4096, 128, 4096}, .stride_k = {8 * s_e * 128, s_e * 128, 128},
                         .stride_v = {16 * s_e * 128, s_e * 128, 256}, .stride_out = {s * 4096, 128, 4096}, .scale = 0.088388f};
}

static size_t needed(const ffs_attention *p) {
  size_t bytes = 0;
  EXPECT(ffs_cross_attention_workspace(p, &bytes) == ffs_ok);
  return bytes;
}

#define STRIDES(p)                                                                                                                                            \
  i32((int)(p).stride_q[0]), i32(128), i32(4096), i32((int)(p).stride_k[0]), i32((int)(p).stride_k[1]), i32(128), i32((int)(p).stride_v[0]),                   \
      i32((int)(p).stride_v[1]), i32(256), i32((int)(p).stride_out[0]), i32(128), i32(4096)

static uint64_t address(const void *base, size_t offset) { return (uint64_t)(uintptr_t)base + offset; }

static void decode(void) {
  ffs_attention p = text(2, 1, 6404);
  p.lengths = at(0x5000);
  /* 16 programs on 132 multiprocessors */
  const size_t lse = 256, parts = 16 * 16 * 4 * 128 * 4;
  EXPECT(needed(&p) == lse + parts + 16 * 16 * 4 * 4);
  fake.launches = 0;
  EXPECT(ffs_cross_attention(stream, &p, workspace, needed(&p)) == ffs_ok && fake.launches == 2);
  LAUNCHED(0, "cross_attention_fwd_kernel", 1, 16, 16, 128, ptr(0x1000), ptr(0x2000), ptr(0x3000), ptr(address(workspace, lse)),
           ptr(address(workspace, lse + parts)), ptr(0x5000), STRIDES(p), i32(1), i32(6404), i32(8), i32(1), f32(0.088388f * LOG2E), i32(16));
  LAUNCHED(1, "cross_attention_merge_kernel", 1, 16, 1, 128, ptr(address(workspace, lse)), ptr(address(workspace, lse + parts)), ptr(0x4000),
           ptr(address(workspace, 0)), i32(4096), i32(128), i32(4096), i32(1), i32(6404), i32(8), i32(1), i32(16));

  p = text(64, 1, 200); /* nothing to split: one split */
  p.lengths = at(0x5000);
  fake.launches = 0;
  EXPECT(ffs_cross_attention(stream, &p, workspace, needed(&p)) == ffs_ok && fake.launches == 2);
  EXPECT(fake.launch[0].grid[1] == 512 && fake.launch[0].grid[2] == 1);
}

static void prefill(void) {
  ffs_attention p = text(4, 512, 6404);
  ffs_mask mask;
  size_t bytes = 0;
  EXPECT(ffs_mask_memory(4, 512, 6404, 4, 1, &bytes) == ffs_ok);
  fake.launches = 0;
  EXPECT(ffs_mask_tiles(stream, 4, 512, 4, 1601, 4, at(0x6000), workspace, bytes, &mask) == ffs_ok && fake.launches == 3);
  /* 16 lists of 51 blocks a sequence */
  const uint64_t states = address(workspace, 0), blocks = states + 3328, counts = blocks + 13056, bits = counts + 512, empty = bits + 4 * 512 * 204 * 4;
  EXPECT(bytes == empty + 2048 - states);
  LAUNCHED(0, "pack_tiles_kernel", 32, 4, 1, 128, ptr(0x6000), ptr(bits), ptr(empty), i32(512), i32(4), i32(1601), i32(51));
  LAUNCHED(1, "block_states_kernel", 16, 2, 4, 128, ptr(bits), ptr(empty), ptr(states), i32(512), i32(32), i32(51));
  LAUNCHED(2, "block_list_kernel", 16, 4, 1, 128, ptr(states), ptr(blocks), ptr(counts), i32(16 * 51), i32(51), i32(51));

  p.mask = &mask;
  EXPECT(needed(&p) == 4 * 8 * 512 * 4 * 4);
  fake.launches = 0;
  EXPECT(ffs_cross_attention(stream, &p, workspace, needed(&p)) == ffs_ok && fake.launches == 1);
  LAUNCHED(0, "cross_attention_fwd_kernel", 16, 32, 1, 256, ptr(0x1000), ptr(0x2000), ptr(0x3000), ptr(0x4000), ptr(address(workspace, 0)), ptr(bits),
           ptr(empty), ptr(blocks), ptr(counts), STRIDES(p), i32(512), i32(6404), i32(8), i32(4), f32(0.088388f * LOG2E), i32(1));
  EXPECT(fake.launch[0].shared > 48 * 1024 && fake.launch[0].allowed_shared == (int)fake.launch[0].shared);
}

/* Little text, few programs: each split of the columns takes one. */
static void short_prefill(void) {
  ffs_attention p = text(1, 40, 1601);
  ffs_mask mask;
  size_t bytes = 0;
  EXPECT(ffs_mask_memory(1, 40, 1601, 4, 0, &bytes) == ffs_ok);
  fake.launches = 0;
  EXPECT(ffs_mask_intervals(stream, 1, 40, 1601, 4, at(0x7000), at(0x8000), workspace, bytes, &mask) == ffs_ok && fake.launches == 2);
  LAUNCHED(0, "block_states_kernel", 2, 1, 1, 128, ptr(0x7000), ptr(0x8000), ptr(address(workspace, 0)), i32(40), i32(32), i32(13));
  p.mask = &mask;
  fake.launches = 0;
  EXPECT(ffs_cross_attention(stream, &p, workspace, needed(&p)) == ffs_ok && fake.launches == 2);
  EXPECT(fake.launch[0].grid[0] == 2 && fake.launch[0].grid[1] == 8 && fake.launch[0].grid[2] == 6);
  EXPECT(!memcmp(fake.launch[0].value[5], &(uint64_t){0x7000}, 8) && !memcmp(fake.launch[0].value[6], &(uint64_t){0x8000}, 8));
}

static void refusals(void) {
  const size_t lots = (size_t)1 << 30;
  ffs_mask mask = {.kind = 2, .b = 1, .s = 7, .s_e = 300, .group = 4};
  ffs_attention p;
#define REFUSE(change, ...)                    \
  p = text(2, 7, 300), p.lengths = at(0x5000); \
  change;                                      \
  REFUSED(ffs_cross_attention(stream, &p, workspace, lots), __VA_ARGS__)
#define MASKED p.lengths = NULL, p.mask = &mask
  REFUSE(p.dtype = FFS_U8, ffs_invalid_argument, "dtype is u8", "bf16");
  REFUSE(p.d = 80, ffs_invalid_argument, "d is 80", "64 or 128");
  REFUSE(p.hkv = 5, ffs_invalid_argument, "hq is 32", "hkv 5");
  REFUSE(p.hkv = 16, ffs_invalid_argument, "2 query heads", "1, 4 or 8");
  REFUSE(p.s_e = 0, ffs_invalid_argument, "s_e is 0");
  REFUSE(p.scale = -1, ffs_invalid_argument, "scale is -1");
  REFUSE(p.scale = NAN, ffs_invalid_argument, "scale is nan");
  REFUSE(p.lengths = NULL, ffs_invalid_argument, "mask is NULL", "lengths NULL");
  REFUSE(p.mask = &mask, ffs_invalid_argument, "mask is given", "lengths given");
  REFUSE(p.stride_k[2] = 130, ffs_invalid_argument, "stride_k of a token is 130", "16");
  REFUSE(p.stride_q[0] = INT64_C(1) << 32, ffs_invalid_argument, "stride_q of a batch", "4294967296");
  REFUSE(p.v = NULL, ffs_invalid_argument, "v is NULL");
  REFUSE(p.out = at(0x4008), ffs_invalid_argument, "out is 0x4008");
  REFUSE((MASKED, p.s = 8), ffs_invalid_argument, "mask is for 1 x 7 x 300", "2 x 8 x 300");
  REFUSE((MASKED, p.hq = 8), ffs_invalid_argument, "4 query heads", "q has 1");
  mask.kind = 0;
  REFUSE(MASKED, ffs_invalid_argument, "mask->kind is 0");
  p = text(2, 7, 300), p.lengths = at(0x5000);
  REFUSED(ffs_cross_attention(stream, &p, workspace, 10), ffs_invalid_argument, "workspace_bytes is 10");
  REFUSED(ffs_mask_tiles(stream, 1, 7, 4, 30, 4, at(0x6000), workspace, lots, &mask), ffs_invalid_argument, "tokens_per_tile is 30", "from 31");
  REFUSED(ffs_mask_intervals(stream, 1, 7, 300, 4, at(0x6000), NULL, workspace, lots, &mask), ffs_invalid_argument, "empty is NULL");
  REFUSED(ffs_mask_intervals(stream, 1, 7, 300, 4, at(0x6000), at(0x7000), workspace, 1, &mask), ffs_invalid_argument, "memory_bytes is 1");
  p.b = 0;
  fake.launches = 0;
  EXPECT(ffs_cross_attention(stream, &p, NULL, 0) == ffs_ok && fake.launches == 0);
}

int main(void) {
  decode();
  prefill();
  short_prefill();
  refusals();
  puts("ok");
  return 0;
}
