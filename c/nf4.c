#include <stdio.h>
#include <string.h>

#include "launch.h"

/* How a call runs: few tokens split over K and then added up, or one product after x a^T. */
struct plan {
  const struct kernel *skinny, *reduce, *linear, *down, *sum;
  int64_t columns;   /* of a split's sums: features, then ranks */
  void *part, *xa;
};

static ffs_status check_weight(const char *op, ffs_dtype dtype, const ffs_nf4 *w) {
  TRY(check_dtype(op, "dtype", dtype));
  REQUIRE(w, "%s: weight is NULL", op);
  TRY(check_size(op, "weight->N", w->N, 16, 16));
  TRY(check_size(op, "weight->K", w->K, 64, 64));
  REQUIRE(w->N <= (INT64_C(1) << 36) / w->K, "%s: the weight is %lld x %lld, expected up to 2^36 elements", op, (long long)w->N, (long long)w->K);
  return ffs_ok;
}

static ffs_status check_storage(const char *op, const ffs_nf4 *w) {
  TRY(check_pointer(op, "weight->packed", w->packed));
  TRY(check_pointer(op, "weight->absmax", w->absmax));
  REQUIRE(!w->index == !w->code && !w->index == !w->offset, "%s: weight->index is %s, code %s, offset %s: nested scales have all three, flat ones none", op,
          w->index ? "given" : "NULL", w->code ? "given" : "NULL", w->offset ? "given" : "NULL");
  if (!w->index) return ffs_ok;
  TRY(check_pointer(op, "weight->index", w->index));
  TRY(check_pointer(op, "weight->code", w->code));
  REQUIRE((uintptr_t)w->offset % 4 == 0, "%s: weight->offset is %p, expected a multiple of 4", op, (const void *)w->offset);
  return ffs_ok;
}

static struct nf4_arguments of_weight(const ffs_nf4 *w) {
  return (struct nf4_arguments){.packed = w->packed, .index = w->index, .code = w->code, .absmax = w->absmax, .offset = w->offset,
                                .N = (int32_t)w->N,  .K = (int32_t)w->K, .n = w->N * w->K};
}

static ffs_status make_plan(struct plan *p, struct workspace *memory, const struct device *device, const char *op, ffs_dtype dtype, int64_t M, const ffs_nf4 *w,
                            const ffs_lora *lora, bool biased) {
  TRY(check_weight(op, dtype, w));
  TRY(check_size(op, "M", M, 0, 1));
  ffs_dtype low = dtype;
  int64_t R = 0;
  if (lora) {
    TRY(check_size(op, "lora->R", lora->R, 1, 1));
    REQUIRE(lora->dtype == dtype || lora->dtype == FFS_FP32, "%s: lora->dtype is %s, expected %s or fp32", op, dtype_name(lora->dtype), dtype_name(dtype));
    REQUIRE(M * lora->R <= INT32_MAX && w->N + lora->R <= INT32_MAX - 16, "%s: lora->R is %lld, too many for %lld tokens of %lld features", op,
            (long long)lora->R, (long long)M, (long long)w->N);
    low = lora->dtype;
    R = lora->R;
  }
  const enum storage storage = w->index ? NESTED : FLAT;
  char what[96];
  snprintf(what, sizeof what, "%s over %s, %s adapters, %s scales", op, dtype_name(dtype), dtype_name(low), storage == NESTED ? "nested" : "flat");
  *p = (struct plan){.columns = round_up(w->N + R, 16)};
  p->skinny = find(device, NF4_SKINNY, KEY(dtype, storage, low), M, w->N, w->K);
  if (p->skinny) {
    const int splits = p->skinny->tile.SPLIT_K;
    TRY(want(&p->reduce, device, NF4_REDUCE, KEY(dtype, low, biased, (uint8_t)splits), M, w->N, w->K, what));
    p->part = take(memory, splits * M * p->columns, sizeof(float));
    p->xa = take(memory, M * round_up(R, 16), dtype_bytes(low)); /* only a backward would read it */
    return ffs_ok;
  }
  TRY(want(&p->linear, device, NF4_LINEAR, KEY(dtype, storage, low, biased), M, w->N, w->K, what));
  if (!R) return ffs_ok;
  TRY(want(&p->down, device, LORA_DOWN, KEY(dtype, low), M, R, w->K, what));
  const int splits = p->down->tile.SPLIT_K;
  TRY(want(&p->sum, device, LORA_SUM, KEY(low, (uint8_t)splits), M, R, w->K, what));
  p->part = take(memory, splits * M * R, sizeof(float));
  p->xa = take(memory, M * R, dtype_bytes(low));
  return ffs_ok;
}

ffs_status ffs_nf4_linear_workspace(ffs_dtype dtype, int64_t M, const ffs_nf4 *weight, const ffs_lora *lora, size_t *bytes) {
  const char *op = "ffs_nf4_linear_workspace";
  REQUIRE(bytes, "%s: bytes is NULL", op);
  struct device device;
  struct plan plan;
  struct workspace memory = {0};
  TRY(current_device(&device));
  TRY(make_plan(&plan, &memory, &device, op, dtype, M, weight, lora, false));
  *bytes = memory.used;
  return ffs_ok;
}

ffs_status ffs_nf4_linear(CUstream stream, ffs_dtype dtype, int64_t M, const void *x, int64_t stride_xm, const ffs_nf4 *weight, const ffs_lora *lora,
                          const void *bias, void *out, void *workspace, size_t workspace_bytes) {
  const char *op = "ffs_nf4_linear";
  struct device device;
  struct plan plan;
  struct workspace memory = {workspace, 0};
  TRY(current_device(&device));
  TRY(make_plan(&plan, &memory, &device, op, dtype, M, weight, lora, bias != NULL));
  if (M == 0) return ffs_ok;
  TRY(check_storage(op, weight));
  TRY(check_pointer(op, "x", x));
  TRY(check_pointer(op, "out", out));
  TRY(check_size(op, "stride_xm", stride_xm, M > 1 ? weight->K : 0, 16));
  if (bias) TRY(check_pointer(op, "bias", bias));
  if (lora) {
    TRY(check_pointer(op, "lora->a", lora->a));
    TRY(check_pointer(op, "lora->b", lora->b));
  }
  TRY(check_workspace(op, workspace, workspace_bytes, memory.used));

  struct nf4_arguments args = of_weight(weight);
  args.x = x;
  args.bias = bias;
  args.out = out;
  args.xa = plan.xa;
  args.part = plan.part;
  args.M = (int32_t)M;
  args.stride_xm = (int32_t)stride_xm;
  /* Without an adapter its rank is 0, and nothing of these is read. */
  args.a = lora ? lora->a : weight->packed;
  args.b = lora ? lora->b : weight->packed;
  args.R = lora ? (int32_t)lora->R : 0;
  args.scaling = lora ? lora->scaling : 0.0f;
  if (!args.xa) args.xa = out;

  if (plan.skinny) {
    const struct tile *tile = &plan.skinny->tile;
    const int64_t tiles = ceil_div(weight->N, tile->BLOCK_N);
    args.columns = (int32_t)plan.columns;
    args.stride_xam = (int32_t)round_up(args.R, 16);
    TRY(launch(&device, plan.skinny, stream, tiles + ceil_div(args.R, tile->BLOCK_N), tile->SPLIT_K, 1, &args));
    return launch(&device, plan.reduce, stream, tiles, 1, 1, &args);
  }
  if (plan.down) {
    const struct tile *tile = &plan.down->tile;
    args.columns = (int32_t)(M * args.R);
    TRY(launch(&device, plan.down, stream, ceil_div(M, tile->BLOCK_M) * ceil_div(args.R, tile->BLOCK_R), tile->SPLIT_K, 1, &args));
    TRY(launch(&device, plan.sum, stream, ceil_div(args.columns, plan.sum->tile.BLOCK_N), 1, 1, &args));
  }
  const struct tile *tile = &plan.linear->tile;
  args.stride_xam = args.R;
  return launch(&device, plan.linear, stream, ceil_div(M, tile->BLOCK_M) * ceil_div(weight->N, tile->BLOCK_N), 1, 1, &args);
}

ffs_status ffs_nf4_dequantize(CUstream stream, ffs_dtype dtype, const ffs_nf4 *weight, void *out) {
  const char *op = "ffs_nf4_dequantize";
  struct device device;
  const struct kernel *kernel;
  TRY(check_weight(op, dtype, weight));
  TRY(check_storage(op, weight));
  TRY(check_pointer(op, "out", out));
  TRY(current_device(&device));
  TRY(want(&kernel, &device, NF4_DEQUANTIZE, KEY(dtype, weight->index ? NESTED : FLAT), 0, 0, 0, op));
  struct nf4_arguments args = of_weight(weight);
  args.out = out;
  return launch(&device, kernel, stream, ceil_div(args.n, 128 * 64), 1, 1, &args); /* BLOCKS of BLOCK_SIZE a program */
}
