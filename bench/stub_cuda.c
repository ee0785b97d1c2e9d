/* A CUDA driver for a machine without one: every call that Triton's driver.c makes succeeds, and launches are counted instead of done.
 * It says what an H200 says: 232448 bytes of shared memory, 1024 threads a block. */
#include <stddef.h>
#include <string.h>

typedef int Result;
typedef void *Handle;

enum { DRIVER_VERSION = 13000, DEVICE_ATTRIBUTE = 232448, MAX_THREADS = 1024 };

long long launches = 0;
static int context, module, function;

Result cuInit(unsigned flags) { return 0; }
Result cuDriverGetVersion(int *version) { *version = DRIVER_VERSION; return 0; }
Result cuGetErrorString(int error, const char **text) { *text = "a driver that does nothing"; return 0; }

Result cuDeviceGet(int *device, int ordinal) { *device = ordinal; return 0; }
Result cuDeviceGetCount(int *count) { *count = 1; return 0; }
Result cuDeviceGetAttribute(int *value, int attribute, int device) { *value = DEVICE_ATTRIBUTE; return 0; }
Result cuDevicePrimaryCtxRetain(Handle *out, int device) { *out = &context; return 0; }

Result cuCtxGetCurrent(Handle *out) { *out = &context; return 0; }
Result cuCtxSetCurrent(Handle given) { return 0; }
Result cuCtxGetDevice(int *device) { *device = 0; return 0; }
Result cuCtxGetLimit(size_t *value, int limit) { *value = 0; return 0; }
Result cuCtxSetLimit(int limit, size_t value) { return 0; }

Result cuModuleLoadData(Handle *out, const void *image) { *out = &module; return 0; }
Result cuModuleUnload(Handle given) { return 0; }
Result cuModuleGetFunction(Handle *out, Handle given, const char *name) { *out = &function; return 0; }
Result cuFuncGetAttribute(int *value, int attribute, Handle given) { *value = attribute == 0 ? MAX_THREADS : 0; return 0; }
Result cuFuncSetAttribute(Handle given, int attribute, int value) { return 0; }
Result cuFuncSetCacheConfig(Handle given, int config) { return 0; }
Result cuOccupancyMaxActiveClusters(int *count, Handle given, const void *config) { *count = 1; return 0; }

/* A tensor's address on the device is the one it was asked about. */
Result cuPointerGetAttribute(void *value, int attribute, unsigned long long pointer) { memcpy(value, &pointer, sizeof pointer); return 0; }
Result cuPointerGetAttributes(unsigned count, int *attributes, void **values, unsigned long long pointer) { return 0; }
Result cuTensorMapEncodeTiled(void *map) { return 0; }
Result cuTensorMapEncodeIm2col(void *map) { return 0; }

Result cuStreamIsCapturing(Handle stream, int *status) { *status = 0; return 0; }
Result cuLaunchKernelEx(const void *config, Handle given, void **arguments, void **extra) { ++launches; return 0; }

/* Any function of bitsandbytes' C library. */
int stub_call(void) { return 0; }
