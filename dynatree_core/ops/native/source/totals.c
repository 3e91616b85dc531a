/* What a softmax of each row divides by, and which number of the row is the greatest. */
#include <math.h>

#include "elementary.h"
#include "ops.h"

typedef struct {
  const totals_args *args;
  float *parts;
} totals_job;

/* The greatest number of some; what is no number is passed over, and -infinity where nothing is left. */
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

/* sum + times * exp(x) where x is not above 0, or no number; exp(-87) below -87, which adds nothing to a sum above 1. The
 * error grows with -x, as exp(x) gets small: of a sum it stays within two units in the last place, for half the work of
 * exp16. */
inlined f16x add_exp16(f16x sum, f16x x, f16x times) {
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
  return fma16(polynomial(fma16(x, log2e, turns), P, 7), mul16(power, times), sum);
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

/* Sum of exp(number - greatest). */
static float sum_of(const float *from, int64_t size, float greatest) {
  const f16x most = all16(greatest), one = all16(1.0f);
  f16x sum = all16(0.0f);
  int64_t i = 0;
  for (; i + 16 <= size; i += 16) sum = add_exp16(sum, sub16(load16(from + i), most), one);
  if (i < size) { /* what is missing is 0, not exp(-greatest) */
    float all[16];
    store16(all, add_exp16(all16(0.0f), sub16(load_some(from + i, size - i), most), one));
    sum = add16(sum, load_some(all, size - i));
  }
  return sum16(sum);
}

/* Parts of a row that have room: whole vectors. */
static int64_t room_of(int64_t size) { return ((size + PART - 1) / PART + 15) / 16 * 16; }

float *room_for_parts(int64_t rows, int64_t size) {
  const int64_t room = room_of(size);
  float *parts = scratch(SCRATCH_PARTS, 4 * rows * 2 * room);
  for (int64_t row = 0; parts && row < rows; row++) {
    for (int64_t i = room - 16; i < room; i++) parts[2 * room * row + i] = -INFINITY, parts[2 * room * row + room + i] = 0;
  }
  return parts;
}

void note_part(float *parts, const float *rows, int64_t size, int64_t row, int64_t part) {
  const int64_t room = room_of(size), start = part * PART, length = start + PART < size ? PART : size - start;
  const float *from = rows + row * size + start;
  const float greatest = greatest_of(from, length);
  float *to = parts + 2 * room * row + part;
  to[0] = greatest;
  /* where nothing is above -infinity, 0 stands for it: the difference of two would be no number */
  to[room] = sum_of(from, length, greatest == -INFINITY ? 0.0f : greatest);
}

void join_parts(const float *parts, const float *rows, int64_t num_rows, int64_t size, float *out) {
  const int64_t room = room_of(size);
  for (int64_t row = 0; row < num_rows; row++) {
    const float *most = parts + 2 * room * row, *sums = most + room;
    const float greatest = greatest_of(most, room);
    const f16x all = all16(greatest);
    f16x sum = all16(0.0f);
    for (int64_t i = 0; i < room; i += 16) sum = add_exp16(sum, sub16(load16(most + i), all), load16(sums + i));
    const float total = greatest == -INFINITY ? NAN : sum16(sum); /* else nothing is possible */
    int64_t first = 0;
    while (most[first] != greatest) first++;
    out[3 * row] = greatest;
    out[3 * row + 1] = logf(total);
    out[3 * row + 2] = (float)place_of(rows + row * size, size, first * PART, greatest, total != total);
  }
}

static void note_row(void *given, int64_t first, int64_t count) {
  const totals_job *job = given;
  const int64_t size = job->args->size;
  for (int64_t row = first; row < first + count; row++) {
    for (int64_t part = 0; part * PART < size; part++) note_part(job->parts, job->args->rows, size, row, part);
  }
}

int run_totals(const totals_args *args, int64_t rows, team *team) {
  totals_job job = {args, room_for_parts(rows, args->size)};
  if (!job.parts) return NO_MEMORY;
  run_job(note_row, &job, rows, 1, team);
  join_parts(job.parts, args->rows, rows, args->size, args->out);
  return 0;
}
