#include "fake_driver.h"

#include <elf.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct fake_state fake = {.major = 9, .processors = 132};

typedef struct {
  const unsigned char *image;
  char entry[96];
  int allowed[64]; /* shared memory, by device */
} kernel;

int cuGetErrorString(int code, const char **text) {
  *text = code == 700 ? "an illegal memory access was encountered" : "some error";
  return 0;
}

int cuCtxGetDevice(int *device) {
  *device = fake.ordinal;
  return 0;
}

int cuDeviceGetAttribute(int *value, int attribute, int device) {
  (void)device;
  *value = attribute == 75 ? fake.major : attribute == 76 ? fake.minor : attribute == 16 ? fake.processors : -1;
  return 0;
}

int cuLibraryLoadData(void **library, const void *image, int *a, void **b, unsigned c, int *d, void **e, unsigned f) {
  (void)a, (void)b, (void)c, (void)d, (void)e, (void)f;
  if (memcmp(image, ELFMAG, SELFMAG)) return 200; /* CUDA_ERROR_INVALID_IMAGE */
  fake.loads++;
  *library = (void *)image;
  return 0;
}

/* .nv.info of the entry: a record (1, attribute 0x17, 12 bytes) for every parameter. */
static int read_sizes(const kernel *k, unsigned *sizes) {
  const Elf64_Ehdr *header = (const void *)k->image;
  const Elf64_Shdr *sections = (const void *)(k->image + header->e_shoff);
  const char *names = (const char *)k->image + sections[header->e_shstrndx].sh_offset;
  char wanted[128];
  snprintf(wanted, sizeof wanted, ".nv.info.%s", k->entry);
  int count = 0;
  for (int i = 0; i < header->e_shnum; i++) {
    if (strcmp(names + sections[i].sh_name, wanted)) continue;
    const unsigned char *at = k->image + sections[i].sh_offset, *end = at + sections[i].sh_size;
    while (at < end) {
      uint16_t bytes = 0, ordinal;
      uint32_t packed;
      if (at[0] == 4) memcpy(&bytes, at + 2, 2);
      if (at[0] == 4 && at[1] == 0x17) {
        memcpy(&ordinal, at + 8, 2);
        memcpy(&packed, at + 12, 4);
        if (ordinal >= FAKE_PARAMETERS) abort();
        sizes[ordinal] = packed >> 18;
        count++;
      }
      at += 4 + bytes;
    }
  }
  return count;
}

int cuLibraryGetKernel(kernel **made, void *library, const char *name) {
  kernel *k = calloc(1, sizeof *k);
  unsigned sizes[FAKE_PARAMETERS];
  k->image = library;
  snprintf(k->entry, sizeof k->entry, "%s", name);
  memset(k->allowed, -1, sizeof k->allowed);
  *made = k;
  return read_sizes(k, sizes) ? 0 : 500; /* CUDA_ERROR_NOT_FOUND */
}

int cuKernelSetAttribute(int attribute, int value, kernel *k, int device) {
  if (attribute != 8) return 1;
  k->allowed[device] = value;
  return 0;
}

int cuLaunchKernel(kernel *k, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared, void *stream, void **values,
                   void **extra) {
  if (extra || fake.launches >= FAKE_LAUNCHES) abort();
  if (fake.next_error) {
    const int code = fake.next_error;
    fake.next_error = 0;
    return code;
  }
  fake_launch *l = &fake.launch[fake.launches++];
  *l = (fake_launch){.image = k->image, .grid = {gx, gy, gz}, .block = {bx, by, bz}, .shared = shared, .stream = stream, .allowed_shared = k->allowed[fake.ordinal]};
  memcpy(l->entry, k->entry, sizeof l->entry);
  l->count = read_sizes(k, l->size);
  for (int i = 0; i < l->count; i++) memcpy(l->value[i], values[i], l->size[i] <= 8 ? l->size[i] : 8);
  return 0;
}
