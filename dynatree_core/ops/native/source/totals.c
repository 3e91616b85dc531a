/* What a softmax of each row divides by. */
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

static void totals_some(void *given, int64_t first, int64_t count) {
  const totals_args *args = ((const totals_job *)given)->args;
  const int64_t size = args->size;
  for (int64_t row = first; row < first + count; row++) {
    const float *from = args->rows + row * size, greatest = greatest_of(from, size);
    f16x sum = all16(0.0f);
    for (int64_t start = 0; start < size; start += BLOCK) {
      const int64_t end = start + BLOCK < size ? start + BLOCK : size;
      f16x part = all16(0.0f);
      for (int64_t i = start; i < end; i += 16) {
        f16x x = exp16(sub16(load_some(from + i, size - i), all16(greatest)));
        if (size - i < 16) { /* what is missing is 0, not exp(-greatest) */
          float all[16];
          store16(all, x);
          x = load_some(all, size - i);
        }
        part = add16(part, x);
      }
      sum = add16(sum, part);
    }
    args->out[2 * row] = greatest;
    args->out[2 * row + 1] = logf(sum16(sum));
  }
}

int run_totals(const totals_args *args, int64_t rows, team *team) {
  totals_job job = {args};
  run_job(totals_some, &job, rows, 1, team);
  return 0;
}
