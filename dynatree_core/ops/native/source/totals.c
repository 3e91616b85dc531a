/* What a softmax of each row divides by, and which number of the row is the greatest. */
#include <math.h>

#include "elementary.h"
#include "ops.h"

enum { BLOCK = 1024 }; /* elements that are looked at twice while they are in the nearest cache */

typedef struct { const totals_args *args; } totals_job;

/* The greatest number of a block; what is no number is passed over, and -infinity where nothing is left. */
static float greatest_of(const float *from, int64_t size) {
  enum { CHAINS = 4 }; /* maxima that do not wait for each other */
  f16x most[CHAINS];
  int64_t i = 0;
  UNROLLED for (int chain = 0; chain < CHAINS; chain++) most[chain] = all16(-INFINITY);
  for (; i + 16 * CHAINS <= size; i += 16 * CHAINS) {
    UNROLLED for (int chain = 0; chain < CHAINS; chain++) most[chain] = max16(load16(from + i + 16 * chain), most[chain]);
  }
  for (; i + 16 <= size; i += 16) most[0] = max16(load16(from + i), most[0]);
  UNROLLED for (int chain = 1; chain < CHAINS; chain++) most[0] = max16(most[0], most[chain]);
  float greatest = greatest16(most[0]);
  for (; i < size; i++) greatest = from[i] > greatest ? from[i] : greatest;
  return greatest;
}

/* sum + exp(x) where x is not above 0, or no number; exp(-87) below -87, which adds nothing to a sum above 1. The error
 * grows with -x, as exp(x) gets small: of a sum it stays within two units in the last place, for half the work of exp16. */
inlined f16x add_exp16(f16x sum, f16x x) {
  /* 2^f = 1 + f (c1 + ...) from -0.5 to 0.5, within 8e-8; highest power first */
  static const float P[] = {1.535336196e-4f, 1.339887502e-3f, 9.618436918e-3f,
                            5.550332367e-2f, 2.402264774e-1f, 6.931471825e-1f, 1.0f};
  const f16x log2e = all16(1.44269504088896341f), shift = all16(12582912.0f + 127.0f);
  EACH {
    const floats low = -87.0f - (floats){0};
    x.of[part] = choose((ints)(x.of[part] < low), low, x.of[part]);
  }
  const f16x shifted = fma16(x, log2e, shift); /* rounds to a whole number, whose lowest bits are an exponent's */
  f16x turns = sub16(shift, shifted), power;
  EACH power.of[part] = (floats)((ints)shifted.of[part] << 23);
  return fma16(polynomial(fma16(x, log2e, turns), P, 7), power, sum);
}

/* The place of the first number that is equal to the greatest, from `best` on; where one is no number, of the first of
 * these. */
static int64_t place_of(const float *from, int64_t size, int64_t best, float greatest, int has_none) {
  for (int64_t i = 0; has_none && i < size; i++) {
    if (from[i] != from[i]) return i;
  }
  for (int64_t i = best; i < size; i++) {
    if (from[i] == greatest) return i;
  }
  return 0;
}

/* Sum of exp(number - greatest) of a block. */
static float sum_of(const float *from, int64_t size, float greatest) {
  const f16x most = all16(greatest);
  f16x sum = all16(0.0f);
  int64_t i = 0;
  for (; i + 16 <= size; i += 16) sum = add_exp16(sum, sub16(load16(from + i), most));
  if (i < size) { /* what is missing is 0, not exp(-greatest) */
    float all[16];
    store16(all, add_exp16(all16(0.0f), sub16(load_some(from + i, size - i), most)));
    sum = add16(sum, load_some(all, size - i));
  }
  return sum16(sum);
}

/* Each block is read from memory once: what was added up before is made smaller where a block has a greater number. */
static void totals_some(void *given, int64_t first, int64_t count) {
  const totals_args *args = ((const totals_job *)given)->args;
  const int64_t size = args->size;
  for (int64_t row = first; row < first + count; row++) {
    const float *from = args->rows + row * size;
    float greatest = -INFINITY;
    double total = 0.0;
    int64_t best = 0; /* the first block with the greatest number */
    for (int64_t start = 0; start < size; start += BLOCK) {
      const int64_t length = start + BLOCK < size ? BLOCK : size - start;
      const float own = greatest_of(from + start, length);
      if (own > greatest) {
        total *= exp((double)greatest - own);
        greatest = own, best = start;
      }
      /* where nothing was above -infinity yet, 0 stands for it: the difference of two would be no number */
      total += sum_of(from + start, length, greatest == -INFINITY ? 0.0f : greatest);
    }
    if (greatest == -INFINITY) total = NAN; /* nothing is possible */
    args->out[3 * row] = greatest;
    args->out[3 * row + 1] = logf((float)total);
    args->out[3 * row + 2] = (float)place_of(from, size, best, greatest, total != total);
  }
}

int run_totals(const totals_args *args, int64_t rows, team *team) {
  totals_job job = {args};
  run_job(totals_some, &job, rows, 1, team);
  return 0;
}
