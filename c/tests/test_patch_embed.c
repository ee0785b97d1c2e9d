/* Launches of the patch embedding as they reach the driver, on sm_90 with its launch rows. */
#include "expect.h"

static CUstream const stream = (CUstream)0x77;
static char *const workspace = (char *)0x1000000;

/* Llama 3.2 Vision: 2 images of 4 tiles of 560 x 560 in patches of 14, 1601 tokens padded to 1608. */
static ffs_patches llama(void) {
  return (ffs_patches){
      .dtype = FFS_BF16, .image_dtype = FFS_BF16, .images = 2, .tiles = 4, .height = 560, .width = 560, .patch = 14, .D = 1280,
      .pixels = at(0x1002), .stride_tile = 3 * 560 * 560, .stride_channel = 560 * 560, .stride_line = 560,
      .weight = at(0x2000), .cls = at(0x3000), .local_pos = at(0x4000), .global_pos = at(0x5000), .pre_pos = at(0x6000), .gate = at(0x7002),
      .pre_gate = at(0x8002), .aspect_ratio = at(0x9000), .entries = 4, .side = 4, .pad_tokens_to = 8, .out = at(0xa000)};
}

static size_t needed(const ffs_patches *p) {
  size_t bytes = 0;
  EXPECT(ffs_patch_embed_workspace(p, &bytes) == ffs_ok);
  return bytes;
}

#define SHAPE i32(1608), i32(1601), i32(1600), i32(1), i32(0)
enum { M = 8 * 1608, K = 640 };

static void tiled(void) {
  ffs_patches p = llama();
  const size_t a = (size_t)M * K * 2;
  EXPECT(ffs_patch_embed_columns(14) == K && ffs_patch_embed_columns(16) == 768);
  EXPECT(needed(&p) == a + 3 * 256);
  fake.launches = 0;
  EXPECT(ffs_patch_embed(stream, &p, workspace, needed(&p)) == ffs_ok && fake.launches == 3);
  const uint64_t rows = (uint64_t)(uintptr_t)workspace + a, factors = rows + 256, fits = factors + 256;
  LAUNCHED(0, "tile_rows_kernel", 1, 1, 1, 128, ptr(0x9000), ptr(0x7002), ptr(0x8002), ptr(rows), ptr(factors), ptr(fits), i32(8), i32(4), i32(4), i32(4));
  LAUNCHED(1, "patchify_kernel", M / 32, 5, 1, 128, ptr(0x1002), ptr(0x1000000), i32(940800), i32(313600), i32(560), i32(40), SHAPE, i32(M), i32(K));
  /* persistent: as many programs as multiprocessors */
  LAUNCHED(2, "patch_embed_fwd_kernel", 132, 1, 1, 256, ptr(0x1000000), ptr(0x2000), ptr(0xa000), ptr(0x3000), ptr(0x4000), ptr(0x5000), ptr(0x6000), ptr(rows),
           ptr(factors), SHAPE, i32(M), i32(1280), i32(K));

  p.images = 1, p.tiles = 2, p.fits = at(0xb001), p.append_cls = 1, p.pad_tokens_to = 1;
  fake.launches = 0;
  EXPECT(ffs_patch_embed(stream, &p, workspace, (size_t)1 << 30) == ffs_ok && fake.launches == 3);
  EXPECT(fake.launch[2].grid[0] == (3202 + 127) / 128 * 10); /* few rows: a program for every tile of the product */
  const value last[] = {i32(1601), i32(1601), i32(1600), i32(0), i32(1600)};
  for (int i = 0; i < 5; i++) EXPECT(!memcmp(fake.launch[1].value[6 + i], &last[i].bits, 4));
  EXPECT(!memcmp(fake.launch[0].value[5], &(uint64_t){0xb001}, 8));
}

static void normed(void) {
  ffs_patches p = llama();
  p.norm_weight = at(0xc000), p.norm_bias = at(0xd000), p.eps = 1e-5f, p.image_dtype = FFS_U8, p.aspect_ids = 1;
  for (int c = 0; c < 3; c++) p.scale[c] = 0.5f + (float)c, p.shift[c] = -1.0f - (float)c;
  fake.launches = 0;
  EXPECT(ffs_patch_embed(stream, &p, workspace, needed(&p)) == ffs_ok && fake.launches == 4);
  const uint64_t rows = (uint64_t)(uintptr_t)workspace + (size_t)M * K * 2, factors = rows + 256;
  LAUNCHED(1, "patchify_kernel", M / 32, 5, 1, 128, ptr(0x1002), ptr(0x1000000), i32(940800), i32(313600), i32(560), i32(40), SHAPE, f32(0.5f), f32(1.5f),
           f32(2.5f), f32(-1), f32(-2), f32(-3), i32(M), i32(K));
  LAUNCHED(2, "patch_embed_fwd_kernel", 132, 1, 1, 256, ptr(0x1000000), ptr(0x2000), ptr(0xa000), SHAPE, i32(M), i32(1280), i32(K));
  LAUNCHED(3, "place_kernel", M / 2, 1, 1, 128, ptr(0xa000), ptr(0xa000), ptr(0x3000), ptr(0x4000), ptr(0x5000), ptr(0x6000), ptr(rows), ptr(factors),
           ptr(0xc000), ptr(0xd000), SHAPE, i32(M), i32(1280), f32(1e-5f));
}

/* As SigLIP: a bias, no class token, whose place in the launch holds memory that can be read. */
static void plain(void) {
  ffs_patches p = {.dtype = FFS_BF16, .image_dtype = FFS_BF16, .images = 3, .tiles = 1, .height = 378, .width = 378, .patch = 14, .D = 1152,
           .pixels = at(0x1000),
                   .stride_tile = 3 * 378 * 378, .stride_channel = 378 * 378, .stride_line = 378, .weight = at(0x2000), .bias = at(0x3000),
                   .local_pos = at(0x4000),
                   .pad_tokens_to = 1, .out = at(0xa000)};
  fake.launches = 0;
  EXPECT(ffs_patch_embed(stream, &p, workspace, needed(&p)) == ffs_ok && fake.launches == 2);
  LAUNCHED(1, "patch_embed_fwd_kernel", (2187 + 127) / 128 * 9, 1, 1, 256, ptr(0x1000000), ptr(0x2000), ptr(0xa000), ptr(0x2000), ptr(0x3000), ptr(0x4000),
           i32(729), i32(729), i32(729), i32(0), i32(-1), i32(2187), i32(1152), i32(K));
  p.images = 0;
  fake.launches = 0;
  EXPECT(ffs_patch_embed(stream, &p, NULL, 0) == ffs_ok && fake.launches == 0);
}

static void refusals(void) {
  ffs_patches p;
#define REFUSE(change, ...) \
  p = llama(), change;       \
  REFUSED(ffs_patch_embed(stream, &p, workspace, (size_t)1 << 30), __VA_ARGS__)
  REFUSE(p.dtype = FFS_FP32, ffs_invalid_argument, "dtype is fp32", "bf16");
  REFUSE(p.image_dtype = FFS_FP16, ffs_invalid_argument, "image_dtype is fp16", "bf16, fp32 or u8");
  REFUSE(p.patch = 15, ffs_invalid_argument, "patch is 15", "14 or 16");
  REFUSE(p.height = 555, ffs_invalid_argument, "height is 555", "multiple of 14");
  REFUSE(p.D = 1284, ffs_invalid_argument, "D is 1284", "16");
  REFUSE(p.gate = NULL, ffs_invalid_argument, "gate NULL", "global_pos is given");
  REFUSE(p.cls = NULL, ffs_invalid_argument, "cls is NULL", "class token");
  REFUSE(p.side = 3, ffs_invalid_argument, "4 x 3 tiles");
  REFUSE(p.weight = at(0x2004), ffs_invalid_argument, "weight is 0x2004", "16");
  REFUSE(p.local_pos = NULL, ffs_invalid_argument, "local_pos is NULL");
  REFUSE(p.stride_line = -560, ffs_invalid_argument, "stride_line is -560");
  REFUSE(p.norm_bias = at(0xd000), ffs_invalid_argument, "norm_weight is NULL", "norm_bias given");
  REFUSE((p.norm_weight = p.norm_bias = at(0xd000), p.D = 4096), ffs_invalid_argument, "D is 4096", "2048");
  REFUSE(p.images = 1 << 20, ffs_invalid_argument, "rows");
  p = llama();
  REFUSED(ffs_patch_embed(stream, &p, workspace, 1000), ffs_invalid_argument, "workspace_bytes is 1000", "needs");
  REFUSED(ffs_patch_embed(stream, NULL, workspace, 1000), ffs_invalid_argument, "args is NULL");
}

int main(void) {
  tiled();
  normed();
  plain();
  refusals();
  puts("ok");
  return 0;
}
