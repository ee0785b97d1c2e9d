/* What the ops share: the table of compiled kernels, the driver, arguments checked. */
#ifndef FASTFUSE_LAUNCH_H
#define FASTFUSE_LAUNCH_H

#include <stdbool.h>

#include "fastfuse.h"

enum kernel_id {
  NF4_SKINNY, NF4_REDUCE, NF4_LINEAR, LORA_DOWN, LORA_SUM, NF4_DEQUANTIZE,
  TILE_ROWS, PATCHIFY, PATCH_EMBED, PLACE,
  PACK_TILES, BLOCK_STATES, BLOCK_LIST, ATTENTION, ATTENTION_MERGE,
};

/* What the parts of a key mean, beside dtypes. */
enum storage { FLAT, NESTED };
enum tables { NO_TABLES, TILED, PLAIN, BIASED };
enum mask_kind { LENGTHS, INTERVALS, BITS };
#define HEADS(group, d) ((uint8_t)((d) / 4 + (group)))

/* The arguments that kernels of one op can have, under the names that variants.py gives them. Which of them a kernel takes, and in what
   order, is in the generated table, so a launch only has to fill in fields. */
struct nf4_arguments {
  const void *x, *packed, *index, *code, *absmax, *offset, *a, *b, *bias;
  void *xa, *part, *out;
  int64_t n;
  int32_t M, N, K, R, columns, stride_xm, stride_xam;
  float scaling;
};

struct patch_arguments {
  const void *images, *weight, *cls, *bias, *local_pos, *global_pos, *pre_pos, *aspect, *gate, *pre_gate, *norm_weight, *norm_bias;
  void *a, *rows, *factors, *fits, *out;
  int32_t n, n_tiles, side, entries;
  int32_t stride_tile, stride_channel, stride_line, across;
  int32_t padded, tokens, patches, first, cls_at;
  int32_t M, N, K;
  float scale0, scale1, scale2, shift0, shift1, shift2, eps;
};

struct mask_arguments {
  const void *tiles;
  const void *visible, *empty;
  void *states, *blocks, *counts;
  int32_t s, n_tiles, tokens_per_tile, tokens, NK, stride_b;
};

struct attention_arguments {
  const void *q, *k, *v, *lengths, *visible, *empty, *blocks, *counts;
  void *o, *lse, *parts, *part_lse;
  int32_t s, s_e, key_heads, masks, splits;
  int32_t q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token, o_batch, o_head, o_token;
  float scale;
};

struct tile {
  int BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R, SPLIT_K, FLATTEN;
};

/* A row of the table: a launch of `id` with this key, where the shape meets the conditions; a condition of 0 holds always. */
struct kernel {
  enum kernel_id id;
  int arch;
  uint8_t key[4];
  int cubin;
  struct {
    int64_t M_max, N_max, K_min, K_multiple;
  } when;
  struct tile tile;
};

struct device {
  int ordinal, arch, processors;
};

struct key {
  uint8_t part[4];
};
#define KEY(...) ((struct key){{__VA_ARGS__}})

/* Records the message and gives back the status. */
ffs_status fail(ffs_status status, const char *format, ...) __attribute__((format(printf, 2, 3)));

#define TRY(call)                            \
  do {                                       \
    ffs_status status_ = (call);             \
    if (status_ != ffs_ok) return status_;   \
  } while (0)
#define REQUIRE(condition, ...)                                            \
  do {                                                                     \
    if (!(condition)) return fail(ffs_invalid_argument, __VA_ARGS__);      \
  } while (0)

/* The device of the current context. */
ffs_status current_device(struct device *device);

/* The first row that matches, NULL without one. */
const struct kernel *find(const struct device *device, enum kernel_id id, struct key key, int64_t M, int64_t N, int64_t K);

/* As find, and an ffs_unsupported that says for what there is none. */
ffs_status want(const struct kernel **kernel, const struct device *device, enum kernel_id id, struct key key, int64_t M, int64_t N, int64_t K,
                const char *what);

/* Launches nothing where a dimension of the grid is 0. */
ffs_status launch(const struct device *device, const struct kernel *kernel, CUstream stream, int64_t x, int64_t y, int64_t z, const void *arguments);

/* Is it memory that kernels can read: there, and aligned. */
ffs_status check_pointer(const char *op, const char *name, const void *pointer);
ffs_status check_size(const char *op, const char *name, int64_t n, int64_t least, int64_t multiple);
ffs_status check_dtype(const char *op, const char *name, ffs_dtype dtype);
const char *dtype_name(ffs_dtype dtype);

static inline int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }
static inline int64_t round_up(int64_t n, int64_t to) { return ceil_div(n, to) * to; }
static inline size_t dtype_bytes(ffs_dtype dtype) { return dtype == FFS_FP32 ? 4 : dtype == FFS_U8 ? 1 : 2; }

/* Parts of a workspace, one after another, each aligned. With base NULL it only counts. */
struct workspace {
  char *base;
  size_t used;
};
static inline void *take(struct workspace *w, int64_t elements, size_t bytes) {
  void *part = w->base ? w->base + w->used : NULL;
  w->used += (size_t)round_up(elements * (int64_t)bytes, 256);
  return part;
}
ffs_status check_workspace(const char *op, const void *workspace, size_t have, size_t need);

#endif
