/* Attention of a row to the slots that it sees, in the order of its text: a run of the cache, then a list. */
#include "elementary.h"
#include "ops.h"
#include "pool.h"

typedef struct { const attention_args *args; int failed; } attention_job;

/* The slots of one row by their place in its text. */
typedef struct { int64_t run, start; const int32_t *own; } seen;

inlined int64_t slot_at(const seen *s, int64_t place) { return place < s->run ? s->start + place : s->own[place - s->run]; }

/* Scores of one head with all places. */
static void score(const attention_args *a, const seen *s, int64_t num, const float *query, const float *keys, float *scores) {
  const int64_t dim = a->head_dim, stride = a->key_strides[2];
  for (int64_t place = 0; place < num; place++) {
    const float *key = keys + slot_at(s, place) * stride;
    f16x sum = all16(0.0f);
    for (int64_t d = 0; d < dim; d += 16) sum = fma16(load_some(query + d, dim - d), load_some(key + d, dim - d), sum);
    scores[place] = sum16(sum);
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

/* out = sum of shares times values, over the total; up to four sixteens of dimensions at a time. */
inlined void mix(const attention_args *a, const seen *s, int64_t num, const float *shares, const float *values, float total,
                 float *out, const int width) {
  const int64_t stride = a->value_strides[2];
  f16x sum[4];
  for (int c = 0; c < width; c++) sum[c] = all16(0.0f);
  for (int64_t place = 0; place < num; place++) {
    const float *value = values + slot_at(s, place) * stride;
    const f16x share = all16(shares[place]);
    for (int c = 0; c < width; c++) sum[c] = fma16(share, load16(value + 16 * c), sum[c]);
  }
  for (int c = 0; c < width; c++) store16(out + 16 * c, div16(sum[c], all16(total)));
}

static void mix_all(const attention_args *a, const seen *s, int64_t num, const float *shares, const float *values,
                    float total, float *out) {
  const int64_t dim = a->value_dim, stride = a->value_strides[2];
  int64_t d = 0;
  for (; d + 64 <= dim; d += 64) mix(a, s, num, shares, values + d, total, out + d, 4);
  for (; d + 16 <= dim; d += 16) mix(a, s, num, shares, values + d, total, out + d, 1);
  if (d == dim) return;
  f16x sum = all16(0.0f);
  for (int64_t place = 0; place < num; place++) {
    sum = fma16(all16(shares[place]), load_some(values + slot_at(s, place) * stride + d, dim - d), sum);
  }
  store_some(out + d, div16(sum, all16(total)), dim - d);
}

/* Items are heads of rows, those of a row one after another. */
static void attend(void *given, int64_t first, int64_t count) {
  attention_job *job = given;
  const attention_args *a = job->args;
  for (int64_t item = first; item < first + count; item++) {
    const int64_t row = item / a->heads, head = item % a->heads, key_head = head / (a->heads / a->key_heads);
    const int64_t lane = a->lanes[row];
    const seen s = {a->end[row] - a->start[row], a->start[row], a->own + a->own_start[row]};
    const int64_t num = s.run + a->own_start[row + 1] - a->own_start[row];
    float *out = a->out + item * a->value_dim;
    if (num <= 0) {
      memset(out, 0, (size_t)(4 * a->value_dim));
      continue;
    }
    float *scores = scratch(SCRATCH_PANEL, 4 * (num + 16));
    if (!scores) {
      job->failed = 1;
      return;
    }
    score(a, &s, num, a->queries + item * a->head_dim, a->keys + lane * a->key_strides[0] + key_head * a->key_strides[1],
          scores);
    const float total = share(a, num, scores, a->sinks ? a->sinks[head] : 0.0f, a->sinks != NULL);
    mix_all(a, &s, num, scores, a->values + lane * a->value_strides[0] + key_head * a->value_strides[1], total, out);
  }
}

/* Whether all slots are in the cache, and all lists in `own`. */
static int are_there(const attention_args *a, int64_t rows) {
  if (a->own_start[0] < 0 || a->own_start[rows] > a->num_own) return 0;
  for (int64_t row = 0; row < rows; row++) {
    if (a->lanes[row] < 0 || a->lanes[row] >= a->num_lanes || a->own_start[row] > a->own_start[row + 1]) return 0;
    if (a->start[row] < 0 || a->start[row] > a->end[row] || a->end[row] > a->capacity) return 0;
  }
  for (int64_t i = a->own_start[0]; i < a->own_start[rows]; i++) {
    if (a->own[i] < 0 || a->own[i] >= a->capacity) return 0;
  }
  return 1;
}

int run_attention(const attention_args *args, int64_t rows, int64_t threads) {
  attention_job job = {args, 0};
  if (!are_there(args, rows)) return NO_SUCH_SLOT;
  run_job(attend, &job, rows * args->heads, args->heads, threads);
  return job.failed;
}
