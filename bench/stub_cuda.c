/* A CUDA driver for a machine without one: every call that Triton's driver.c makes succeeds, and launches are counted instead of done.
 * It says what an H200 says: 232448 bytes of shared memory, 1024 threads a block. What a function is given and does not read is not declared. */
#include <string.h>

typedef void *Handle;

enum { DRIVER_VERSION = 13000, DEVICE_ATTRIBUTE = 232448, MAX_THREADS = 1024 };

long long launches = 0;
static int context, module, function;

#define DOES_NOTHING(name) int name(void) { return 0; }
#define GIVES(name, type, value) int name(type *out) { *out = value; return 0; }

DOES_NOTHING(cuInit)
GIVES(cuDriverGetVersion, int, DRIVER_VERSION)
int cuGetErrorString(int error, const char **text) { *text = "a driver that does nothing"; return 0; }

int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return 0; }
GIVES(cuDeviceGetCount, int, 1)
GIVES(cuDeviceGetAttribute, int, DEVICE_ATTRIBUTE)
GIVES(cuDevicePrimaryCtxRetain, Handle, &context)

GIVES(cuCtxGetCurrent, Handle, &context)
DOES_NOTHING(cuCtxSetCurrent)
GIVES(cuCtxGetDevice, int, 0)
GIVES(cuCtxGetLimit, size_t, 0)
DOES_NOTHING(cuCtxSetLimit)

GIVES(cuModuleLoadData, Handle, &module)
DOES_NOTHING(cuModuleUnload)
GIVES(cuModuleGetFunction, Handle, &function)
int cuFuncGetAttribute(int *value, int attribute) { *value = attribute == 0 ? MAX_THREADS : 0; return 0; }
DOES_NOTHING(cuFuncSetAttribute)
DOES_NOTHING(cuFuncSetCacheConfig)
GIVES(cuOccupancyMaxActiveClusters, int, 1)

/* A tensor's address on the device is the one it was asked about. */
int cuPointerGetAttribute(void *value, int attribute, unsigned long long pointer) { memcpy(value, &pointer, sizeof pointer); return 0; }
DOES_NOTHING(cuPointerGetAttributes)
DOES_NOTHING(cuTensorMapEncodeTiled)
DOES_NOTHING(cuTensorMapEncodeIm2col)

int cuStreamIsCapturing(Handle stream, int *status) { *status = 0; return 0; }
int cuLaunchKernelEx(void) { ++launches; return 0; }

DOES_NOTHING(stub_call) /* any function of bitsandbytes' C library */
