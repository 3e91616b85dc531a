/* What a softmax of each row divides by, and which number of the row is the greatest. */
#include <math.h>

#include "elementary.h"
#include "ops.h"

enum { BLOCK = 1024 }; /* elements whose exponentials are added up by themselves, so that small ones are not lost */

typedef struct { const totals_args *args; } totals_job;

static float greatest_of(const float *from, int64_t size) {
  const int64_t whole = size - size % 16;
  f16x most = all16(from[0]);
  float all[16], greatest = from[0];
  for (int64_t i = 0; i < whole; i += 16) most = max16(most, load16(from + i));
  store16(all, most);
  for (int64_t i = 0; i < 16; i++) greatest = all[i] > greatest ? all[i] : greatest;
  for (int64_t i = whole; i < size; i++) greatest = from[i] > greatest ? from[i] : greatest;
  return greatest;
}

/* exp of what is not above 0, or is no number; exp(-87) for what is below that, which adds nothing to a sum above 1. */
inlined f16x exp_below16(f16x x) {
  EACH {
    const floats low = -87.0f - (floats){0};
    x.of[part] = choose((ints)(x.of[part] < low), low, x.of[part]);
  }
  return exp_between16(x);
}

/* The place of the first number that is equal to the greatest; where one is no number, of the first of these. */
static int64_t place_of(const float *from, int64_t size, float greatest, int has_none) {
  if (has_none) {
    for (int64_t i = 0; i < size; i++) {
      if (from[i] != from[i]) return i;
    }
  }
  for (int64_t start = 0; start < size; start += 64) { /* of a block it is only asked whether it has one */
    const int64_t end = start + 64 < size ? start + 64 : size;
    int is_here = 0;
    for (int64_t i = start; i < end; i++) is_here |= from[i] == greatest;
    for (int64_t i = start; is_here && i < end; i++) {
      if (from[i] == greatest) return i;
    }
  }
  return 0;
}

static void totals_some(void *given, int64_t first, int64_t count) {
  const totals_args *args = ((const totals_job *)given)->args;
  const int64_t size = args->size;
  for (int64_t row = first; row < first + count; row++) {
    const float *from = args->rows + row * size, greatest = greatest_of(from, size);
    f16x sum = all16(0.0f);
    for (int64_t start = 0; start < size; start += BLOCK) {
      const int64_t end = start + BLOCK < size ? start + BLOCK : size;
      f16x part = all16(0.0f);
      for (int64_t i = start; i + 16 <= end; i += 16) {
        part = add16(part, exp_below16(sub16(load16(from + i), all16(greatest))));
      }
      if (end % 16) { /* what is missing is 0, not exp(-greatest) */
        const int64_t i = end - end % 16;
        float all[16];
        store16(all, exp_below16(sub16(load_some(from + i, end - i), all16(greatest))));
        part = add16(part, load_some(all, end - i));
      }
      sum = add16(sum, part);
    }
    const float total = sum16(sum);
    args->out[3 * row] = greatest;
    args->out[3 * row + 1] = logf(total);
    args->out[3 * row + 2] = (float)place_of(from, size, greatest, total != total);
  }
}

int run_totals(const totals_args *args, int64_t rows, team *team) {
  totals_job job = {args};
  run_job(totals_some, &job, rows, 1, team);
  return 0;
}
