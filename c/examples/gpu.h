/* Device memory with nothing but the driver, opened at run time: for programs that must build without a CUDA toolkit. With one, use cudaMalloc and so on. */
#ifndef GPU_H
#define GPU_H

#include <dlfcn.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>

typedef unsigned long long gpu_address;

static struct {
  int (*init)(unsigned);
  int (*device)(int *, int);
  int (*retain)(void **, int);
  int (*set_current)(void *);
  int (*alloc)(gpu_address *, size_t);
  int (*upload)(gpu_address, const void *, size_t);
  int (*download)(void *, gpu_address, size_t);
  int (*fill)(gpu_address, unsigned char, size_t);
  int (*synchronize)(void);
} gpu;

/* NULL, or why there is no GPU. Makes the first device's context current. */
static inline const char *gpu_open(void) {
  static const char *const names[] = {"cuInit",          "cuDeviceGet",     "cuDevicePrimaryCtxRetain", "cuCtxSetCurrent", "cuMemAlloc_v2",
                                      "cuMemcpyHtoD_v2", "cuMemcpyDtoH_v2", "cuMemsetD8_v2",            "cuCtxSynchronize"};
  void *library = dlopen("libcuda.so.1", RTLD_NOW), *context = NULL;
  int device = 0;
  if (!library) return "no libcuda.so.1";
  for (size_t i = 0; i < sizeof names / sizeof *names; i++)
    if (!(((void **)&gpu)[i] = dlsym(library, names[i]))) return names[i];
  if (gpu.init(0) || gpu.device(&device, 0)) return "the driver has no device";
  if (gpu.retain(&context, device) || gpu.set_current(context)) return "the device gives no context";
  return NULL;
}

static inline void gpu_check(int code, const char *what) {
  if (code) {
    fprintf(stderr, "%s: CUresult %d\n", what, code);
    exit(1);
  }
}

/* At least one byte, never given back. */
static inline void *gpu_alloc(size_t bytes) {
  gpu_address address = 0;
  gpu_check(gpu.alloc(&address, bytes ? bytes : 1), "cuMemAlloc");
  return (void *)(size_t)address;
}

static inline void *gpu_copy_of(const void *host, size_t bytes) {
  void *made = gpu_alloc(bytes);
  gpu_check(gpu.upload((gpu_address)(size_t)made, host, bytes), "cuMemcpyHtoD");
  return made;
}

static inline void *gpu_filled(size_t bytes, unsigned char byte) {
  void *made = gpu_alloc(bytes);
  gpu_check(gpu.fill((gpu_address)(size_t)made, byte, bytes), "cuMemsetD8");
  return made;
}

static inline void gpu_read(void *host, const void *device, size_t bytes) {
  gpu_check(gpu.synchronize(), "cuCtxSynchronize");
  gpu_check(gpu.download(host, (gpu_address)(size_t)device, bytes), "cuMemcpyDtoH");
}

#endif
