/* Attention of a row to the slots that it sees, in the order of its text: a run of the cache, then a list.
 *
 * Places of the text are taken in blocks. Rows of a tile mostly see the same slots at the same places, and heads of a group
 * have the same keys, so what one has read lies in the nearest cache for the others. In a block each slot has a sum of its
 * own, so none waits for another. */
#include "elementary.h"
#include "ops.h"

enum { PLACES = 16, MAX_TILE_ROWS = 8, MAX_TILE_HEADS = 8, MAX_SCORES = 1 << 16 };
#if WIDTH == 16
enum { TOGETHER = 16, MIXED = 4 }; /* slots whose sums are in registers, heads that share a loaded value */
#else
enum { TOGETHER = 4, MIXED = 1 };
#endif

typedef struct {
  const attention_args *args;
  int64_t num_rows, tile_rows, most_seen;
  int failed;
} attention_job;

/* What one row sees: its slots by their place in its text. */
typedef struct {
  const slab *slab;
  int64_t num, run, start;
  const int32_t *own;
} seen;

static seen seen_by(const attention_args *a, int64_t row) {
  const int64_t run = a->end[row] - a->start[row], first = a->own_start[row];
  return (seen){a->slabs + a->lanes[row], run + a->own_start[row + 1] - first, run, a->start[row], a->own + first};
}

/* The slots of up to 16 places from `first` on; returns how many there are. The rest is filled up with the last. */
static int64_t slots_at(const seen *s, int64_t first, int64_t slots[PLACES]) {
  if (first + PLACES <= s->run) {
    for (int64_t i = 0; i < PLACES; i++) slots[i] = s->start + first + i;
    return PLACES;
  }
  const int64_t count = s->num - first < PLACES ? s->num - first : PLACES;
  for (int64_t i = 0; i < PLACES; i++) {
    const int64_t place = first + (i < count ? i : count - 1);
    slots[i] = place < s->run ? s->start + place : s->own[place - s->run];
  }
  return count;
}

/* Scores of one head with the slots of a block. */
static void score(const float *query, const float *keys, int64_t stride, const int64_t *slots, int64_t dim, float *scores) {
  UNROLLED for (int done = 0; done < PLACES; done += TOGETHER) {
    const float *key[TOGETHER];
    f16x sum[TOGETHER];
    UNROLLED for (int i = 0; i < TOGETHER; i++) key[i] = keys + slots[done + i] * stride, sum[i] = all16(0.0f);
    int64_t d = 0;
    for (; d + 16 <= dim; d += 16) {
      const f16x q = load16(query + d);
      UNROLLED for (int i = 0; i < TOGETHER; i++) sum[i] = fma16(q, load16(key[i] + d), sum[i]);
    }
    if (d < dim) {
      const f16x q = load_some(query + d, dim - d);
      UNROLLED for (int i = 0; i < TOGETHER; i++) sum[i] = fma16(q, load_some(key[i] + d, dim - d), sum[i]);
    }
    store_sums(scores + done, sum, TOGETHER);
  }
}

/* Make shares of scores; returns their sum. `scores` has room for whole sixteens. */
static float share(const attention_args *a, int64_t num, float *scores, float sink, int has_sink) {
  const float cap = (float)a->soft_cap;
  f16x greatest, sum = all16(0.0f);
  for (int64_t i = num; i % 16; i++) scores[i] = 0.0f;
  for (int64_t i = 0; i < num; i += 16) {
    f16x x = mul16(load16(scores + i), all16((float)a->scale));
    if (cap > 0) x = mul16(tanh16(div16(x, all16(cap))), all16(cap));
    store16(scores + i, x);
  }
  for (int64_t i = num; i % 16; i++) scores[i] = -__builtin_inff();
  greatest = load16(scores);
  for (int64_t i = 16; i < num; i += 16) greatest = max16(greatest, load16(scores + i));
  float most = greatest16(greatest);
  if (has_sink && sink > most) most = sink;
  for (int64_t i = 0; i < num; i += 16) {
    f16x x = exp16(sub16(load16(scores + i), all16(most)));
    store16(scores + i, x);
    sum = add16(sum, x);
  }
  float total = sum16(sum);
  if (has_sink) {
    float alone[16];
    store16(alone, exp16(all16(sink - most)));
    total += alone[0];
  }
  return total;
}

static void divide(float *of, int64_t num, float by) {
  for (int64_t i = 0; i < num; i += 16) store_some(of + i, div16(load_some(of + i, num - i), all16(by)), num - i);
}

/* out += shares times values of a block, of `width` sixteens of dimensions of some heads; the first dimensions of heads lie
 * `out_stride` apart, their shares `share_stride`. */
inlined void mix(const int heads, const int width, const float *shares, int64_t share_stride, const float *values,
                 int64_t stride, const int64_t *slots, int64_t count, float *out, int64_t out_stride) {
  f16x sum[MIXED][4];
  UNROLLED for (int h = 0; h < heads; h++) {
    UNROLLED for (int c = 0; c < width; c++) sum[h][c] = load16(out + h * out_stride + 16 * c);
  }
  for (int64_t i = 0; i < count; i++) {
    const float *value = values + slots[i] * stride;
    f16x some[4];
    UNROLLED for (int c = 0; c < width; c++) some[c] = load16(value + 16 * c);
    UNROLLED for (int h = 0; h < heads; h++) {
      const f16x share = all16(shares[h * share_stride + i]);
      UNROLLED for (int c = 0; c < width; c++) sum[h][c] = fma16(share, some[c], sum[h][c]);
    }
  }
  UNROLLED for (int h = 0; h < heads; h++) {
    UNROLLED for (int c = 0; c < width; c++) store16(out + h * out_stride + 16 * c, sum[h][c]);
  }
}

/* All dimensions of up to MIXED heads. */
inlined void mix_all(const int heads, int64_t dim, const float *shares, int64_t share_stride, const float *values,
                     int64_t stride, const int64_t *slots, int64_t count, float *out) {
  int64_t d = 0;
  for (; d + 64 <= dim; d += 64) mix(heads, 4, shares, share_stride, values + d, stride, slots, count, out + d, dim);
  for (; d + 16 <= dim; d += 16) mix(heads, 1, shares, share_stride, values + d, stride, slots, count, out + d, dim);
  for (int h = 0; d < dim && h < heads; h++) {
    f16x sum = load_some(out + h * dim + d, dim - d);
    for (int64_t i = 0; i < count; i++) {
      sum = fma16(all16(shares[h * share_stride + i]), load_some(values + slots[i] * stride + d, dim - d), sum);
    }
    store_some(out + h * dim + d, sum, dim - d);
  }
}

static void mix_heads(int64_t heads, int64_t dim, const float *shares, int64_t share_stride, const float *values,
                      int64_t stride, const int64_t *slots, int64_t count, float *out) {
  switch (heads) {
#define CASE(n) case n: mix_all(n, dim, shares, share_stride, values, stride, slots, count, out); break;
    CASE(1)
#if WIDTH == 16
    CASE(2) CASE(3) CASE(4)
#endif
#undef CASE
  }
}

/* Some heads, of one key head, of the rows of a tile. */
static void attend_tile(attention_job *job, int64_t first_row, int64_t num_rows, int64_t head, int64_t num_heads) {
  const attention_args *a = job->args;
  const int64_t key_head = head / (a->heads / a->key_heads), dim = a->value_dim;
  const int64_t stride = (job->most_seen + PLACES - 1) / PLACES * PLACES; /* of the scores of a head */
  seen rows[MAX_TILE_ROWS];
  float totals[MAX_TILE_ROWS][MAX_TILE_HEADS];
  int64_t slots[PLACES], most = 0;
  float *scores = scratch(SCRATCH_SCORES, 4 * num_rows * num_heads * stride + 64);
  if (!scores) {
    job->failed = 1;
    return;
  }
#define OUT(r) (a->out + ((first_row + (r)) * a->heads + head) * dim)
#define SCORES(r, h) (scores + ((r) * num_heads + (h)) * stride)
  for (int64_t r = 0; r < num_rows; r++) {
    rows[r] = seen_by(a, first_row + r);
    most = rows[r].num > most ? rows[r].num : most;
    memset(OUT(r), 0, (size_t)(4 * num_heads * dim));
  }
  for (int64_t first = 0; first < most; first += PLACES) {
    for (int64_t r = 0; r < num_rows; r++) {
      if (first >= rows[r].num) continue;
      const slab *s = rows[r].slab;
      const float *query = a->queries + ((first_row + r) * a->heads + head) * a->head_dim;
      slots_at(&rows[r], first, slots);
      for (int64_t h = 0; h < num_heads; h++) {
        score(query + h * a->head_dim, s->keys + key_head * s->key_strides[0], s->key_strides[1], slots, a->head_dim,
              SCORES(r, h) + first);
      }
    }
  }
  for (int64_t r = 0; r < num_rows; r++) {
    for (int64_t h = 0; rows[r].num > 0 && h < num_heads; h++) {
      totals[r][h] = share(a, rows[r].num, SCORES(r, h), a->sinks ? a->sinks[head + h] : 0.0f, a->sinks != NULL);
    }
  }
  for (int64_t first = 0; first < most; first += PLACES) {
    for (int64_t r = 0; r < num_rows; r++) {
      if (first >= rows[r].num) continue;
      const slab *s = rows[r].slab;
      const int64_t count = slots_at(&rows[r], first, slots);
      for (int64_t h = 0; h < num_heads; h += MIXED) {
        mix_heads(num_heads - h < MIXED ? num_heads - h : MIXED, dim, SCORES(r, h) + first, stride,
                  s->values + key_head * s->value_strides[0], s->value_strides[1], slots, count, OUT(r) + h * dim);
      }
    }
  }
  for (int64_t r = 0; r < num_rows; r++) {
    for (int64_t h = 0; rows[r].num > 0 && h < num_heads; h++) divide(OUT(r) + h * dim, dim, totals[r][h]);
  }
#undef OUT
#undef SCORES
}

/* Items are heads of tiles of rows, those of a tile one after another. */
static void attend(void *given, int64_t first, int64_t count) {
  attention_job *job = given;
  const int64_t heads = job->args->heads, group = heads / job->args->key_heads;
  for (int64_t item = first, some; item < first + count; item += some) {
    const int64_t row = item / heads * job->tile_rows, head = item % heads, left = job->num_rows - row;
    some = group - head % group;
    if (some > first + count - item) some = first + count - item;
    if (some > MAX_TILE_HEADS) some = MAX_TILE_HEADS;
    attend_tile(job, row, left < job->tile_rows ? left : job->tile_rows, head, some);
  }
}

/* Whether all slots are in the cache, and all lists in `own`. */
static int are_there(const attention_args *a, int64_t rows) {
  if (a->own_start[0] < 0 || a->own_start[rows] > a->num_own) return 0;
  for (int64_t row = 0; row < rows; row++) {
    const int64_t lane = a->lanes[row];
    if (lane < 0 || lane >= a->num_lanes || !a->slabs[lane].keys || a->own_start[row] > a->own_start[row + 1]) return 0;
    const int64_t capacity = a->slabs[lane].capacity;
    if (a->start[row] < 0 || a->start[row] > a->end[row] || a->end[row] > capacity) return 0;
    if (a->own_start[row] < 0 || a->own_start[row + 1] > a->num_own) return 0;
    for (int64_t i = a->own_start[row]; i < a->own_start[row + 1]; i++) {
      if (a->own[i] < 0 || a->own[i] >= capacity) return 0;
    }
  }
  return 1;
}

/* Rows of a tile: each thread has some, and their scores stay in the cache. */
static int64_t rows_of_tile(int64_t rows, int64_t threads, int64_t most_seen) {
  int64_t size = (rows + threads - 1) / threads;
  if (size > MAX_TILE_ROWS) size = MAX_TILE_ROWS;
  while (size > 1 && size * most_seen > MAX_SCORES) size /= 2;
  return size;
}

int run_attention(const attention_args *args, int64_t rows, team *team) {
  if (!are_there(args, rows)) return NO_SUCH_SLOT;
  int64_t most_seen = 0;
  for (int64_t row = 0; row < rows; row++) {
    const int64_t num = seen_by(args, row).num;
    most_seen = num > most_seen ? num : most_seen;
  }
  const int64_t size = rows_of_tile(rows, team_size(team), most_seen);
  attention_job job = {args, rows, size, most_seen, 0};
  run_job(attend, &job, (rows + size - 1) / size * args->heads, args->heads / args->key_heads, team);
  return job.failed;
}
