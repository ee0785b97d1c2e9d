#include <stdio.h>

#include "launch.h"

enum { COLUMNS_MULTIPLE = 64, PATCHIFY_ROWS = 32, PATCHIFY_COLUMNS = 128 };

struct plan {
  const struct kernel *tile_rows, *patchify, *embed, *place;
  struct patch_arguments args;
};

int64_t ffs_patch_embed_columns(int64_t patch) { return round_up(3 * patch * patch, COLUMNS_MULTIPLE); }

static ffs_status check(const char *op, const ffs_patches *p) {
  REQUIRE(p, "%s: args is NULL", op);
  TRY(check_dtype(op, "dtype", p->dtype));
  REQUIRE(p->image_dtype == p->dtype || p->image_dtype == FFS_FP32 || p->image_dtype == FFS_U8, "%s: image_dtype is %s (%d), expected %s, fp32 or u8", op,
          dtype_name(p->image_dtype), (int)p->image_dtype, dtype_name(p->dtype));
  TRY(check_size(op, "images", p->images, 0, 1));
  TRY(check_size(op, "tiles", p->tiles, 1, 1));
  REQUIRE(p->patch == 14 || p->patch == 16, "%s: patch is %lld, expected 14 or 16", op, (long long)p->patch);
  TRY(check_size(op, "height", p->height, p->patch, p->patch));
  TRY(check_size(op, "width", p->width, p->patch, p->patch));
  TRY(check_size(op, "D", p->D, 16, 16));
  TRY(check_size(op, "pad_tokens_to", p->pad_tokens_to, 1, 1));
  REQUIRE(!p->norm_weight == !p->norm_bias, "%s: norm_weight is %s, norm_bias %s: a norm has both", op, p->norm_weight ? "given" : "NULL",
          p->norm_bias ? "given" : "NULL");
  const bool tiled = p->global_pos != NULL;
  REQUIRE(tiled == (p->pre_pos != NULL) && tiled == (p->gate != NULL) && tiled == (p->pre_gate != NULL) && tiled == (p->aspect_ratio != NULL),
          "%s: global_pos is %s, pre_pos %s, gate %s, pre_gate %s, aspect_ratio %s: images in tiles have all of them, others none", op,
          tiled ? "given" : "NULL", p->pre_pos ? "given" : "NULL", p->gate ? "given" : "NULL", p->pre_gate ? "given" : "NULL", p->aspect_ratio ? "given" : "NULL");
  if (!tiled) return ffs_ok;
  REQUIRE(p->cls && !p->bias, "%s: cls is %s, bias %s: images in tiles have a class token and no bias", op, p->cls ? "given" : "NULL",
          p->bias ? "given" : "NULL");
  TRY(check_size(op, "entries", p->entries, 1, 1));
  TRY(check_size(op, "side", p->side, 1, 1));
  REQUIRE(p->aspect_ids ? p->tiles <= p->side : p->entries == p->side, "%s: tables are for %lld x %lld tiles, which %s of %lld tiles cannot index", op,
          (long long)p->entries, (long long)p->side, p->aspect_ids ? "ids of images" : "(h, w) of images", (long long)p->tiles);
  return ffs_ok;
}

static ffs_status make_plan(struct plan *plan, struct workspace *memory, const struct device *device, const char *op, const ffs_patches *p) {
  TRY(check(op, p));
  const enum tables tables = p->global_pos ? TILED : p->bias ? BIASED : PLAIN;
  const int64_t across = p->width / p->patch, patches = p->height / p->patch * across;
  const int64_t tokens = patches + (p->cls != NULL), padded = round_up(tokens, p->pad_tokens_to), all = p->images * p->tiles;
  const int64_t K = ffs_patch_embed_columns(p->patch);
  REQUIRE(all <= INT32_MAX && padded <= INT32_MAX && all * padded <= INT32_MAX, "%s: %lld tiles of %lld tokens are more than %d rows", op, (long long)all,
          (long long)padded, INT32_MAX);
  REQUIRE(tokens * p->D <= INT32_MAX && (tables != TILED || p->entries * p->side <= INT32_MAX / p->D), "%s: D is %lld, too many for tables of %lld tokens", op,
          (long long)p->D, (long long)tokens);
  const int64_t M = all * padded;
  char what[96];
  snprintf(what, sizeof what, "%s in %s of %s pixels, patches of %d, %s tables", op, dtype_name(p->dtype), dtype_name(p->image_dtype), (int)p->patch,
           tables == TILED ? "tiled" : tables == BIASED ? "plain, with a bias," : "plain");
  *plan = (struct plan){0};
  TRY(want(&plan->patchify, device, PATCHIFY, KEY(p->dtype, p->image_dtype, (uint8_t)p->patch), M, K, 0, what));
  if (tables == TILED) TRY(want(&plan->tile_rows, device, TILE_ROWS, KEY(p->dtype, p->aspect_ids != 0), 0, 0, 0, what));
  if (p->norm_weight) {
    REQUIRE(p->D <= 2048, "%s: D is %lld, a norm is covered up to 2048", op, (long long)p->D);
    TRY(want(&plan->place, device, PLACE, KEY(p->dtype, tables), M, p->D, 0, what));
  }
  TRY(want(&plan->embed, device, PATCH_EMBED, KEY(p->dtype, p->norm_weight ? NO_TABLES : tables), M, p->D, K, what));
  plan->args = (struct patch_arguments){
      .a = take(memory, M * K, dtype_bytes(p->dtype)),
      .rows = take(memory, tables == TILED ? all : 0, sizeof(int32_t)),
      .factors = take(memory, tables == TILED ? 3 : 0, sizeof(float)),
      .fits = take(memory, tables == TILED ? 1 : 0, 1),
      .n = (int32_t)all, .n_tiles = (int32_t)p->tiles, .side = (int32_t)p->side, .entries = (int32_t)p->entries,
      .across = (int32_t)across, .padded = (int32_t)padded, .tokens = (int32_t)tokens, .patches = (int32_t)patches,
      .first = p->cls && !p->append_cls, .cls_at = !p->cls ? -1 : p->append_cls ? (int32_t)tokens - 1 : 0,
      .M = (int32_t)M, .N = (int32_t)p->D, .K = (int32_t)K,
      .scale0 = p->scale[0], .scale1 = p->scale[1], .scale2 = p->scale[2],
      .shift0 = p->shift[0], .shift1 = p->shift[1], .shift2 = p->shift[2], .eps = p->eps,
  };
  return ffs_ok;
}

ffs_status ffs_patch_embed_workspace(const ffs_patches *args, size_t *bytes) {
  const char *op = "ffs_patch_embed_workspace";
  REQUIRE(bytes, "%s: bytes is NULL", op);
  struct device device;
  struct plan plan;
  struct workspace memory = {0};
  TRY(current_device(&device));
  TRY(make_plan(&plan, &memory, &device, op, args));
  *bytes = memory.used;
  return ffs_ok;
}

static ffs_status check_memory(const char *op, const ffs_patches *p) {
  const struct {
    const char *name;
    const void *pointer;
    bool needed;
  } tables[] = {{"weight", p->weight, true},
                {"out", p->out, true},
                {"local_pos", p->local_pos, true},
                {"cls", p->cls, false},
                {"bias", p->bias, false},
                {"global_pos", p->global_pos, false},
                {"pre_pos", p->pre_pos, false},
                {"aspect_ratio", p->aspect_ratio, false},
                {"norm_weight", p->norm_weight, false},
                {"norm_bias", p->norm_bias, false}};
  for (size_t i = 0; i < sizeof tables / sizeof *tables; i++)
    if (tables[i].needed || tables[i].pointer) TRY(check_pointer(op, tables[i].name, tables[i].pointer));
  REQUIRE(p->pixels, "%s: pixels is NULL", op);
  /* Within a tile offsets are 32 bits wide. */
  const struct {
    const char *name;
    int64_t stride, most;
  } strides[] = {{"stride_tile", p->stride_tile, INT32_MAX},
                 {"stride_channel", p->stride_channel, INT32_MAX / 4},
                 {"stride_line", p->stride_line, INT32_MAX / 4 / p->height}};
  for (size_t i = 0; i < sizeof strides / sizeof *strides; i++)
    REQUIRE(strides[i].stride >= 0 && strides[i].stride <= strides[i].most, "%s: %s is %lld, expected 0 to %lld", op, strides[i].name,
            (long long)strides[i].stride, (long long)strides[i].most);
  return ffs_ok;
}

ffs_status ffs_patch_embed(CUstream stream, const ffs_patches *p, void *workspace, size_t workspace_bytes) {
  const char *op = "ffs_patch_embed";
  struct device device;
  struct plan plan;
  struct workspace memory = {workspace, 0};
  TRY(current_device(&device));
  TRY(make_plan(&plan, &memory, &device, op, p));
  if (p->images == 0) return ffs_ok;
  TRY(check_memory(op, p));
  TRY(check_workspace(op, workspace, workspace_bytes, memory.used));

  struct patch_arguments *args = &plan.args;
  args->images = p->pixels;
  args->stride_tile = (int32_t)p->stride_tile;
  args->stride_channel = (int32_t)p->stride_channel;
  args->stride_line = (int32_t)p->stride_line;
  args->weight = p->weight;
  args->cls = p->cls ? p->cls : p->weight; /* read and, as no token is the class token, not added */
  args->bias = p->bias;
  args->local_pos = p->local_pos;
  args->global_pos = p->global_pos;
  args->pre_pos = p->pre_pos;
  args->gate = p->gate;
  args->pre_gate = p->pre_gate;
  args->aspect = p->aspect_ratio;
  args->norm_weight = p->norm_weight;
  args->norm_bias = p->norm_bias;
  args->out = p->out;
  if (p->fits) args->fits = p->fits;

  if (plan.tile_rows) TRY(launch(&device, plan.tile_rows, stream, 1, 1, 1, args));
  TRY(launch(&device, plan.patchify, stream, ceil_div(args->M, PATCHIFY_ROWS), ceil_div(args->K, PATCHIFY_COLUMNS), 1, args));
  const struct tile *tile = &plan.embed->tile;
  int64_t programs = ceil_div(args->M, tile->BLOCK_M) * ceil_div(args->N, tile->BLOCK_N);
  if (tile->FLATTEN && programs > device.processors) programs = device.processors;
  TRY(launch(&device, plan.embed, stream, programs, 1, 1, args));
  return plan.place ? launch(&device, plan.place, stream, ceil_div(args->M, plan.place->tile.BLOCK_M), 1, 1, args) : ffs_ok;
}
