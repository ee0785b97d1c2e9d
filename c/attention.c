#include <stdio.h>

#include "launch.h"

/* COLUMNS of a block in a mask's lists, rows of a program of the kernels below. */
enum { COLUMNS = 128, LISTED_ROWS = 128, MERGED_ROWS = 16, PACKED_ROWS = 16, STATE_BLOCKS = 32, COLUMNS_OF_A_SPLIT = 256 };
static const float LOG2E = 1.4426950408889634f;

static ffs_status check_group(const char *op, int64_t group) {
  REQUIRE(group == 1 || group == 4 || group == 8, "%s: %lld query heads share a key head, expected 1, 4 or 8", op, (long long)group);
  return ffs_ok;
}

/* Fills in where the parts of a mask lie in memory. */
static ffs_status lay_out(struct mask_arguments *args, struct workspace *memory, const char *op, int64_t b, int64_t s, int64_t s_e, int64_t group, bool tiles) {
  TRY(check_size(op, "b", b, 1, 1));
  TRY(check_size(op, "s", s, 1, 1));
  TRY(check_size(op, "s_e", s_e, 1, 1));
  TRY(check_group(op, group));
  const int64_t tokens = LISTED_ROWS / group, NQ = ceil_div(s, tokens), NK = ceil_div(s_e, COLUMNS);
  REQUIRE(NQ <= INT32_MAX / NK && b <= 65535, "%s: a batch of %lld masks of %lld x %lld tokens is too large", op, (long long)b, (long long)s, (long long)s_e);
  *args = (struct mask_arguments){.s = (int32_t)s, .tokens = (int32_t)tokens, .NK = (int32_t)NK, .stride_b = (int32_t)(NQ * NK)};
  args->states = take(memory, b * NQ * NK, 1);
  args->blocks = take(memory, b * NQ * NK, sizeof(int32_t));
  args->counts = take(memory, b * NQ * 2, sizeof(int32_t));
  if (tiles) {
    args->visible = take(memory, b * s * 4 * NK, sizeof(int32_t));
    args->empty = take(memory, b * s, 1);
  }
  return ffs_ok;
}

ffs_status ffs_mask_memory(int64_t b, int64_t s, int64_t s_e, int64_t group, int tiles, size_t *bytes) {
  const char *op = "ffs_mask_memory";
  struct mask_arguments args;
  struct workspace memory = {0};
  REQUIRE(bytes, "%s: bytes is NULL", op);
  TRY(lay_out(&args, &memory, op, b, s, s_e, group, tiles != 0));
  *bytes = memory.used;
  return ffs_ok;
}

/* The lists of blocks of what is visible. */
static ffs_status list_blocks(const struct device *device, CUstream stream, const char *op, enum mask_kind kind, int64_t b, const struct mask_arguments *args) {
  const struct kernel *states, *list;
  const int64_t NQ = args->stride_b / args->NK;
  TRY(want(&states, device, BLOCK_STATES, KEY(kind), 0, 0, 0, op));
  TRY(want(&list, device, BLOCK_LIST, KEY(0), 0, 0, 0, op));
  TRY(launch(device, states, stream, NQ, ceil_div(args->NK, STATE_BLOCKS), b, args));
  return launch(device, list, stream, NQ, b, 1, args);
}

static ffs_mask made(enum mask_kind kind, int64_t b, int64_t s, int64_t s_e, int64_t group, const struct mask_arguments *args) {
  return (ffs_mask){kind, b, s, s_e, group, args->visible, args->empty, args->blocks, args->counts};
}

ffs_status ffs_mask_intervals(CUstream stream, int64_t b, int64_t s, int64_t s_e, int64_t group, const int32_t *intervals, const uint8_t *empty, void *memory,
                              size_t memory_bytes, ffs_mask *mask) {
  const char *op = "ffs_mask_intervals";
  struct device device;
  struct mask_arguments args;
  struct workspace parts = {memory, 0};
  TRY(current_device(&device));
  TRY(lay_out(&args, &parts, op, b, s, s_e, group, false));
  TRY(check_pointer(op, "intervals", intervals));
  TRY(check_pointer(op, "empty", empty));
  REQUIRE(mask, "%s: mask is NULL", op);
  REQUIRE(memory_bytes >= parts.used, "%s: memory_bytes is %zu, this mask needs %zu", op, memory_bytes, parts.used);
  TRY(check_pointer(op, "memory", memory));
  args.visible = intervals;
  args.empty = empty;
  *mask = made(INTERVALS, b, s, s_e, group, &args);
  return list_blocks(&device, stream, op, INTERVALS, b, &args);
}

ffs_status ffs_mask_tiles(CUstream stream, int64_t b, int64_t s, int64_t n_tiles, int64_t tokens_per_tile, int64_t group, const uint8_t *visible, void *memory,
                          size_t memory_bytes, ffs_mask *mask) {
  const char *op = "ffs_mask_tiles";
  struct device device;
  struct mask_arguments args;
  const struct kernel *pack;
  struct workspace parts = {memory, 0};
  TRY(current_device(&device));
  TRY(check_size(op, "n_tiles", n_tiles, 1, 1));
  TRY(check_size(op, "tokens_per_tile", tokens_per_tile, 31, 1)); /* a word's 32 columns then touch two tiles at most */
  TRY(lay_out(&args, &parts, op, b, s, n_tiles * tokens_per_tile, group, true));
  TRY(check_pointer(op, "visible", visible));
  REQUIRE(mask, "%s: mask is NULL", op);
  REQUIRE(memory_bytes >= parts.used, "%s: memory_bytes is %zu, this mask needs %zu", op, memory_bytes, parts.used);
  TRY(check_pointer(op, "memory", memory));
  TRY(want(&pack, &device, PACK_TILES, KEY(0), 0, 0, 0, op));
  args.tiles = visible;
  args.n_tiles = (int32_t)n_tiles;
  args.tokens_per_tile = (int32_t)tokens_per_tile;
  TRY(launch(&device, pack, stream, ceil_div(s, PACKED_ROWS), b, 1, &args));
  *mask = made(BITS, b, s, n_tiles * tokens_per_tile, group, &args);
  return list_blocks(&device, stream, op, BITS, b, &args);
}

struct plan {
  const struct kernel *attend, *merge;
  int64_t programs; /* token blocks of a key head */
  struct attention_arguments args;
};

static ffs_status check(const char *op, const ffs_attention *p) {
  REQUIRE(p, "%s: args is NULL", op);
  TRY(check_dtype(op, "dtype", p->dtype));
  TRY(check_size(op, "b", p->b, 0, 1));
  TRY(check_size(op, "s", p->s, 0, 1));
  TRY(check_size(op, "s_e", p->s_e, 1, 1));
  TRY(check_size(op, "hkv", p->hkv, 1, 1));
  TRY(check_size(op, "hq", p->hq, 1, 1));
  REQUIRE(p->hq % p->hkv == 0, "%s: hq is %lld, hkv %lld, which does not divide it", op, (long long)p->hq, (long long)p->hkv);
  TRY(check_group(op, p->hq / p->hkv));
  REQUIRE(p->d == 64 || p->d == 128, "%s: d is %lld, expected 64 or 128", op, (long long)p->d);
  REQUIRE(p->b * p->hkv <= 65535, "%s: the batch has %lld key heads in all, expected up to 65535", op, (long long)(p->b * p->hkv));
  REQUIRE(p->s <= INT32_MAX / 8, "%s: s is %lld, expected up to %d", op, (long long)p->s, INT32_MAX / 8);
  REQUIRE(p->scale > 0, "%s: scale is %g, expected a number above 0", op, (double)p->scale);
  REQUIRE(!p->mask != !p->lengths, "%s: mask is %s, lengths %s: expected one of them", op, p->mask ? "given" : "NULL", p->lengths ? "given" : "NULL");
  if (!p->mask) return ffs_ok;
  const ffs_mask *m = p->mask;
  REQUIRE(m->kind == INTERVALS || m->kind == BITS, "%s: mask->kind is %d: no ffs_mask_ function made it", op, m->kind);
  REQUIRE((m->b == p->b || m->b == 1) && m->s == p->s && m->s_e == p->s_e, "%s: mask is for %lld x %lld x %lld tokens, q and k need %lld x %lld x %lld", op,
          (long long)m->b, (long long)m->s, (long long)m->s_e, (long long)p->b, (long long)p->s, (long long)p->s_e);
  REQUIRE(m->group == p->hq / p->hkv, "%s: mask is for %lld query heads of a key head, q has %lld", op, (long long)m->group, (long long)(p->hq / p->hkv));
  return ffs_ok;
}

static ffs_status make_plan(struct plan *plan, struct workspace *memory, const struct device *device, const char *op, const ffs_attention *p) {
  TRY(check(op, p));
  const int64_t group = p->hq / p->hkv, rows = p->s * group, heads = p->b * p->hkv;
  const enum mask_kind kind = p->mask ? (enum mask_kind)p->mask->kind : LENGTHS;
  char what[96];
  snprintf(what, sizeof what, "%s in %s, %d query heads of %d for a key head, %s", op, dtype_name(p->dtype), (int)group, (int)p->d,
           kind == LENGTHS ? "lengths" : kind == BITS ? "a mask of tiles" : "a mask of intervals");
  *plan = (struct plan){0};
  const struct key whole = KEY(p->dtype, HEADS(group, p->d), kind, false), parts = KEY(p->dtype, HEADS(group, p->d), kind, true);
  TRY(want(&plan->attend, device, ATTENTION, parts, rows, 0, 0, what));
  TRY(want(&plan->merge, device, ATTENTION_MERGE, KEY(p->dtype, HEADS(group, p->d)), rows, 0, 0, what));
  plan->programs = ceil_div(rows, plan->attend->tile.BLOCK_M);
  /* Two programs for every multiprocessor, of 256 columns at least; as fastfuse.ops. Of shapes alone: a graph keeps it. */
  const int64_t unsplit = plan->programs * heads;
  int64_t splits = unsplit > 0 ? 2 * device->processors / unsplit : 1;
  if (splits > p->s_e / COLUMNS_OF_A_SPLIT) splits = p->s_e / COLUMNS_OF_A_SPLIT;
  if (splits < 1) splits = 1;
  plan->args = (struct attention_arguments){
      .lse = take(memory, heads * rows, sizeof(float)),
      .s = (int32_t)p->s, .s_e = (int32_t)p->s_e, .key_heads = (int32_t)p->hkv, .masks = p->mask ? (int32_t)p->mask->b : 1, .splits = (int32_t)splits,
      .scale = p->scale * LOG2E,
  };
  /* Few rows have a kernel for splits alone, as decoding mostly needs them: one split is one then. */
  if (splits == 1 && !plan->attend->when.M_max) {
    TRY(want(&plan->attend, device, ATTENTION, whole, rows, 0, 0, what));
    plan->merge = NULL;
    return ffs_ok;
  }
  plan->args.parts = take(memory, splits * heads * rows * p->d, sizeof(float));
  plan->args.part_lse = take(memory, splits * heads * rows, sizeof(float));
  return ffs_ok;
}

ffs_status ffs_cross_attention_workspace(const ffs_attention *args, size_t *bytes) {
  const char *op = "ffs_cross_attention_workspace";
  REQUIRE(bytes, "%s: bytes is NULL", op);
  struct device device;
  struct plan plan;
  struct workspace memory = {0};
  TRY(current_device(&device));
  TRY(make_plan(&plan, &memory, &device, op, args));
  *bytes = memory.used;
  return ffs_ok;
}

static ffs_status check_strides(const char *op, const char *name, const int64_t *stride) {
  static const char *const dims[] = {"batch", "head", "token"};
  for (int i = 0; i < 3; i++) {
    const int64_t most = i == 2 ? INT32_MAX / LISTED_ROWS : INT32_MAX; /* offsets within a block are 32 bits wide */
    REQUIRE(stride[i] >= 0 && stride[i] % 16 == 0 && stride[i] <= most, "%s: %s of a %s is %lld, expected a multiple of 16 up to %lld", op, name, dims[i],
            (long long)stride[i], (long long)most);
  }
  return ffs_ok;
}

ffs_status ffs_cross_attention(CUstream stream, const ffs_attention *p, void *workspace, size_t workspace_bytes) {
  const char *op = "ffs_cross_attention";
  struct device device;
  struct plan plan;
  struct workspace memory = {workspace, 0};
  TRY(current_device(&device));
  TRY(make_plan(&plan, &memory, &device, op, p));
  if (p->b == 0 || p->s == 0) return ffs_ok;
  TRY(check_pointer(op, "q", p->q));
  TRY(check_pointer(op, "k", p->k));
  TRY(check_pointer(op, "v", p->v));
  TRY(check_pointer(op, "out", p->out));
  if (p->lengths) TRY(check_pointer(op, "lengths", p->lengths));
  TRY(check_strides(op, "stride_q", p->stride_q));
  TRY(check_strides(op, "stride_k", p->stride_k));
  TRY(check_strides(op, "stride_v", p->stride_v));
  TRY(check_strides(op, "stride_out", p->stride_out));
  TRY(check_workspace(op, workspace, workspace_bytes, memory.used));

  struct attention_arguments *args = &plan.args;
  args->q = p->q;
  args->k = p->k;
  args->v = p->v;
  args->o = p->out;
  args->lengths = p->lengths;
  if (p->mask) {
    args->visible = p->mask->visible;
    args->empty = p->mask->empty;
    args->blocks = p->mask->blocks;
    args->counts = p->mask->counts;
  }
#define STRIDES(x, given) args->x##_batch = (int32_t)(given)[0], args->x##_head = (int32_t)(given)[1], args->x##_token = (int32_t)(given)[2]
  STRIDES(q, p->stride_q);
  STRIDES(k, p->stride_k);
  STRIDES(v, p->stride_v);
  STRIDES(o, p->stride_out);
  const int64_t heads = p->b * p->hkv;
  TRY(launch(&device, plan.attend, stream, plan.programs, heads, args->splits, args));
  return plan.merge ? launch(&device, plan.merge, stream, ceil_div(p->s * (p->hq / p->hkv), MERGED_ROWS), heads, 1, args) : ffs_ok;
}
