/* The driver is opened at run time, so that the library builds and loads where there is none; its few functions are declared here. */
#define _POSIX_C_SOURCE 200809L
#include "launch.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>

typedef struct CUlib_st *CUlibrary;
typedef struct CUkern_st *CUkernel;

enum { MULTIPROCESSOR_COUNT = 16, CAPABILITY_MAJOR = 75, CAPABILITY_MINOR = 76 }; /* CUdevice_attribute */
enum { MAX_DYNAMIC_SHARED_SIZE_BYTES = 8 };                                        /* CUfunction_attribute */
enum { MAX_DEVICES = 64, MAX_PARAMETERS = 48, SCRATCH_POINTERS = 2 };

static struct {
  int (*cuGetErrorString)(int, const char **);
  int (*cuCtxGetDevice)(int *);
  int (*cuDeviceGetAttribute)(int *, int, int);
  int (*cuLibraryLoadData)(CUlibrary *, const void *, int *, void **, unsigned, int *, void **, unsigned);
  int (*cuLibraryGetKernel)(CUkernel *, CUlibrary, const char *);
  int (*cuKernelSetAttribute)(int, int, CUkernel, int);
  int (*cuLaunchKernel)(CUkernel, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, CUstream, void **, void **);
} driver;

struct parameter {
  uint16_t offset; /* in the op's struct of arguments */
};

struct cubin {
  const void *image;
  const char *entry;
  unsigned threads, shared;
  int count; /* of parameters */
  const struct parameter *parameters;
  _Atomic(CUkernel) kernel;  /* belongs to no context: one load serves every device */
  _Atomic uint64_t prepared; /* devices, a bit each, that know how much shared memory it takes */
};

#define FIELD(arguments, name) {offsetof(struct arguments, name)}
#define PARAMETERS(i) .count = sizeof parameters_##i / sizeof *parameters_##i, .parameters = parameters_##i
/* What the cubin itself says of a parameter's size must be what C passes: a scalar of another width would be read wrong, in silence. */
#define SIZE(arguments, name, bytes) _Static_assert(sizeof(((struct arguments *)0)->name) == (bytes), #arguments "." #name)
#include "table.inc"

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static _Thread_local char message[512] = "no error";

const char *ffs_last_error(void) { return message; }

ffs_status fail(ffs_status status, const char *format, ...) {
  va_list values;
  va_start(values, format);
  vsnprintf(message, sizeof message, format, values);
  va_end(values);
  return status;
}

static ffs_status driver_says(const char *function, int code) {
  const char *text = NULL;
  if (driver.cuGetErrorString) driver.cuGetErrorString(code, &text);
  return fail(ffs_driver_error, "%s: %s (%d)", function, text ? text : "unknown error", code);
}

#define DRIVER(function, ...)                                  \
  do {                                                         \
    int code_ = driver.function(__VA_ARGS__);                  \
    if (code_) return driver_says(#function, code_);           \
  } while (0)

static ffs_status open_driver(void) {
  static atomic_bool is_open;
  if (atomic_load(&is_open)) return ffs_ok;
  void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (!library) return fail(ffs_driver_error, "libcuda.so.1: %s", dlerror());
  static const char *const names[] = {"cuGetErrorString",   "cuCtxGetDevice",       "cuDeviceGetAttribute", "cuLibraryLoadData",
                                      "cuLibraryGetKernel", "cuKernelSetAttribute", "cuLaunchKernel"};
  void *found[sizeof names / sizeof *names];
  _Static_assert(sizeof found == sizeof driver, "a name for every function");
  for (size_t i = 0; i < sizeof names / sizeof *names; i++)
    if (!(found[i] = dlsym(library, names[i]))) return fail(ffs_driver_error, "libcuda.so.1 has no %s: a driver for CUDA 12 or later is needed", names[i]);
  pthread_mutex_lock(&lock);
  if (!atomic_load(&is_open)) memcpy(&driver, found, sizeof driver); /* POSIX lets an object pointer of dlsym be a function */
  atomic_store(&is_open, true);
  pthread_mutex_unlock(&lock);
  return ffs_ok;
}

ffs_status current_device(struct device *device) {
  /* of each device seen, arch and processors in one word: a driver call less for every launch */
  static _Atomic uint64_t known[MAX_DEVICES];
  TRY(open_driver());
  DRIVER(cuCtxGetDevice, &device->ordinal);
  if (device->ordinal < 0 || device->ordinal >= MAX_DEVICES)
    return fail(ffs_unsupported, "device %d: up to %d devices are covered", device->ordinal, MAX_DEVICES);
  uint64_t facts = atomic_load(&known[device->ordinal]);
  if (!facts) {
    int major, minor, processors;
    DRIVER(cuDeviceGetAttribute, &major, CAPABILITY_MAJOR, device->ordinal);
    DRIVER(cuDeviceGetAttribute, &minor, CAPABILITY_MINOR, device->ordinal);
    DRIVER(cuDeviceGetAttribute, &processors, MULTIPROCESSOR_COUNT, device->ordinal);
    facts = (uint64_t)(10 * major + minor) << 32 | (uint32_t)processors;
    atomic_store(&known[device->ordinal], facts);
  }
  device->arch = (int)(facts >> 32);
  device->processors = (int)(uint32_t)facts;
  return ffs_ok;
}

const struct kernel *find(const struct device *device, enum kernel_id id, struct key key, int64_t M, int64_t N, int64_t K) {
  for (size_t i = 0; i < sizeof kernels / sizeof *kernels; i++) {
    const struct kernel *k = &kernels[i];
    if (k->id == id && k->arch == device->arch && !memcmp(k->key, key.part, sizeof k->key) && (!k->when.M_max || M <= k->when.M_max) &&
        (!k->when.N_max || N <= k->when.N_max) && K >= k->when.K_min && (!k->when.K_multiple || K % k->when.K_multiple == 0))
      return k;
  }
  return NULL;
}

ffs_status want(const struct kernel **kernel, const struct device *device, enum kernel_id id, struct key key, int64_t M, int64_t N, int64_t K,
                const char *what) {
  *kernel = find(device, id, key, M, N, K);
  if (*kernel) return ffs_ok;
  for (size_t i = 0; i < sizeof kernels / sizeof *kernels; i++)
    if (kernels[i].arch == device->arch) return fail(ffs_unsupported, "%s is not among the variants that this library was built with", what);
  return fail(ffs_unsupported, "the device is sm_%d, this library was built for " ARCHS, device->arch);
}

static ffs_status load(struct cubin *c, int ordinal) {
  CUkernel kernel = atomic_load(&c->kernel);
  if (!kernel) {
    CUlibrary library;
    DRIVER(cuLibraryLoadData, &library, c->image, NULL, NULL, 0, NULL, NULL, 0);
    DRIVER(cuLibraryGetKernel, &kernel, library, c->entry);
    atomic_store(&c->kernel, kernel);
  }
  /* What a launch asks for beyond this must be allowed first, on each device. */
  if (c->shared > 48 * 1024) DRIVER(cuKernelSetAttribute, MAX_DYNAMIC_SHARED_SIZE_BYTES, (int)c->shared, kernel, ordinal);
  atomic_fetch_or(&c->prepared, UINT64_C(1) << ordinal);
  return ffs_ok;
}

ffs_status launch(const struct device *device, const struct kernel *kernel, CUstream stream, int64_t x, int64_t y, int64_t z, const void *arguments) {
  if (x == 0 || y == 0 || z == 0) return ffs_ok;
  struct cubin *c = &cubins[kernel->cubin];
  REQUIRE(x <= INT32_MAX && y <= 65535 && z <= 65535, "%s: a grid of %lld x %lld x %lld programs is too large", c->entry, (long long)x, (long long)y,
          (long long)z);
  if (!(atomic_load(&c->prepared) >> device->ordinal & 1)) {
    pthread_mutex_lock(&lock);
    const ffs_status status = load(c, device->ordinal);
    pthread_mutex_unlock(&lock);
    TRY(status);
  }
  void *values[MAX_PARAMETERS + SCRATCH_POINTERS], *scratch = NULL;
  for (int i = 0; i < c->count; i++) values[i] = (char *)arguments + c->parameters[i].offset;
  for (int i = 0; i < SCRATCH_POINTERS; i++) values[c->count + i] = &scratch;
  DRIVER(cuLaunchKernel, atomic_load(&c->kernel), (unsigned)x, (unsigned)y, (unsigned)z, c->threads, 1, 1, c->shared, stream, values, NULL);
  return ffs_ok;
}

const char *dtype_name(ffs_dtype dtype) {
  return dtype == FFS_BF16 ? "bf16" : dtype == FFS_FP16 ? "fp16" : dtype == FFS_FP32 ? "fp32" : dtype == FFS_U8 ? "u8" : "no dtype";
}

ffs_status check_pointer(const char *op, const char *name, const void *pointer) {
  REQUIRE(pointer, "%s: %s is NULL", op, name);
  REQUIRE((uintptr_t)pointer % 16 == 0, "%s: %s is %p, expected a multiple of 16", op, name, (void *)(uintptr_t)pointer);
  return ffs_ok;
}

ffs_status check_size(const char *op, const char *name, int64_t n, int64_t least, int64_t multiple) {
  REQUIRE(n >= least && n % multiple == 0 && n <= INT32_MAX, "%s: %s is %lld, expected a multiple of %lld from %lld to %d", op, name, (long long)n,
          (long long)multiple, (long long)least, INT32_MAX);
  return ffs_ok;
}

ffs_status check_dtype(const char *op, const char *name, ffs_dtype dtype) {
  REQUIRE(dtype == FFS_BF16 || dtype == FFS_FP16, "%s: %s is %s (%d), expected bf16 or fp16", op, name, dtype_name(dtype), (int)dtype);
  return ffs_ok;
}

ffs_status check_workspace(const char *op, const void *workspace, size_t have, size_t need) {
  if (!need) return ffs_ok;
  REQUIRE(have >= need, "%s: workspace_bytes is %zu, this call needs %zu", op, have, need);
  return check_pointer(op, "workspace", workspace);
}
