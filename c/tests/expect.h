/* What the tests of launches are written in. A launch is expected whole: every parameter, in order, of its width. */
#ifndef EXPECT_H
#define EXPECT_H

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "fake_driver.h"
#include "fastfuse.h"

#define EXPECT(condition)                                                                                      \
  do {                                                                                                         \
    if (!(condition)) {                                                                                        \
      fprintf(stderr, "%s:%d: %s (last error: %s)\n", __FILE__, __LINE__, #condition, ffs_last_error());       \
      exit(1);                                                                                                 \
    }                                                                                                          \
  } while (0)

/* A call that must fail, without a launch, and name these facts. */
#define REFUSED(call, status, ...)                                                      \
  do {                                                                                  \
    const char *const facts_[] = {__VA_ARGS__};                                         \
    const int launches_ = fake.launches;                                                \
    EXPECT((call) == (status));                                                         \
    EXPECT(fake.launches == launches_ && !strchr(ffs_last_error(), '\n'));              \
    for (size_t i_ = 0; i_ < sizeof facts_ / sizeof *facts_; i_++) EXPECT(strstr(ffs_last_error(), facts_[i_])); \
  } while (0)

typedef struct {
  unsigned bytes;
  uint64_t bits;
} value;

static inline value ptr(uint64_t address) { return (value){8, address}; }
static inline value i32(int32_t n) { return (value){4, (uint32_t)n}; }
static inline value i64(int64_t n) { return (value){8, (uint64_t)n}; }
static inline value f32(float x) {
  value v = {4, 0};
  memcpy(&v.bits, &x, 4);
  return v;
}

/* Device memory that nobody reads: an address to recognise. */
static inline void *at(uint64_t address) { return (void *)(uintptr_t)address; }

static inline void expect_launch(int index, const char *entry, unsigned x, unsigned y, unsigned z, unsigned threads, const value *values, size_t count) {
  EXPECT(index < fake.launches);
  const fake_launch *l = &fake.launch[index];
  if (strcmp(l->entry, entry) || l->grid[0] != x || l->grid[1] != y || l->grid[2] != z || l->block[0] != threads || l->block[1] != 1 || l->block[2] != 1) {
    fprintf(stderr, "launch %d: %s <%u %u %u> of %u threads, expected %s <%u %u %u> of %u\n", index, l->entry, l->grid[0], l->grid[1], l->grid[2], l->block[0],
            entry, x, y, z, threads);
    exit(1);
  }
  EXPECT(l->shared <= 48 * 1024 || l->allowed_shared == (int)l->shared);
  if (l->count != (int)count + 2) {
    fprintf(stderr, "%s: the cubin takes %d parameters, expected %zu and two for scratch\n", entry, l->count, count);
    exit(1);
  }
  for (int i = 0; i < l->count; i++) {
    const value want = i < (int)count ? values[i] : ptr(0);
    uint64_t got;
    memcpy(&got, l->value[i], 8);
    if (l->size[i] != want.bytes || got != want.bits) {
      fprintf(stderr, "%s: parameter %d has %u bytes, %#llx, expected %u bytes, %#llx\n", entry, i, l->size[i], (unsigned long long)got, want.bytes,
              (unsigned long long)want.bits);
      exit(1);
    }
  }
}

#define LAUNCHED(index, entry, x, y, z, threads, ...) \
  expect_launch(index, entry, x, y, z, threads, (const value[]){__VA_ARGS__}, sizeof((const value[]){__VA_ARGS__}) / sizeof(value))

#endif
