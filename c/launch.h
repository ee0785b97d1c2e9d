/* What the ops share: the table of compiled kernels, the driver, arguments checked. */
#ifndef FASTFUSE_LAUNCH_H
#define FASTFUSE_LAUNCH_H

#include <stdbool.h>

#include "fastfuse.h"

enum kernel_id { NF4_SKINNY, NF4_REDUCE, NF4_LINEAR, LORA_DOWN, LORA_SUM, NF4_DEQUANTIZE };

/* The arguments that kernels of one op can have, under the names that variants.py gives them. Which of them a kernel takes, and in what
   order, is in the generated table, so a launch only has to fill in fields. */
struct nf4_arguments {
  const void *x, *packed, *index, *code, *absmax, *offset, *a, *b, *bias;
  void *xa, *part, *out;
  int64_t n;
  int32_t M, N, K, R, columns, stride_xm, stride_xam;
  float scaling;
};

enum storage { FLAT, NESTED };

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
ffs_status want(const struct kernel **kernel, const struct device *device, enum kernel_id id, struct key key, int64_t M, int64_t N, int64_t K, const char *what);

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
