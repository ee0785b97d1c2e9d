/* A libcuda that launches nothing and remembers every launch, with what the real one would have copied out of the parameters. */
#ifndef FAKE_DRIVER_H
#define FAKE_DRIVER_H

#include <stdint.h>

enum { FAKE_PARAMETERS = 64, FAKE_LAUNCHES = 64 };

typedef struct {
  const void *image; /* of the cubin */
  char entry[96];
  unsigned grid[3], block[3], shared;
  void *stream;
  int allowed_shared; /* by an attribute set on this device before, or -1 */
  int count;
  unsigned size[FAKE_PARAMETERS];          /* of each parameter, as the cubin says */
  unsigned char value[FAKE_PARAMETERS][8]; /* that many bytes from where the launch pointed, then zeros */
} fake_launch;

/* Replaced by the caller at will. */
extern struct fake_state {
  int ordinal, major, minor, processors, next_error; /* next_error: what the next launch returns */
  int loads, launches;
  fake_launch launch[FAKE_LAUNCHES];
} fake;

#endif
