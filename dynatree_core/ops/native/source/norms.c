/* Norms, the rotation of queries and keys, and writing into the cache. */
#include <math.h>

#include "elementary.h"
#include "ops.h"

enum { FEW = 8192 }; /* elements that are not worth waking a thread for */

static float sum_of_squares(const float *from, int64_t size, float mean) {
  f16x sum = all16(0.0f);
  for (int64_t i = 0; i < size; i += 16) {
    f16x x = load_some(from + i, size - i);
    if (mean != 0.0f) {
      float all[16];
      x = sub16(x, all16(mean));
      if (size - i < 16) { /* what is missing is 0, not -mean */
        store16(all, x);
        x = load_some(all, size - i);
      }
    }
    sum = add16(sum, mul16(x, x));
  }
  return sum16(sum);
}

void norm_row(const norm *how, const float *weight, const float *bias, const float *from, float *to) {
  const int64_t size = how->size;
  float mean = 0.0f;
  if (how->kind == LAYER_NORM) {
    f16x sum = all16(0.0f);
    for (int64_t i = 0; i < size; i += 16) sum = add16(sum, load_some(from + i, size - i));
    mean = sum16(sum) / (float)size;
  }
  const float inverse = 1.0f / sqrtf(sum_of_squares(from, size, mean) / (float)size + (float)how->eps);
  for (int64_t i = 0; i < size; i += 16) {
    f16x x = load_some(from + i, size - i);
    if (how->kind == LAYER_NORM) x = sub16(x, all16(mean));
    x = mul16(x, all16(inverse));
    if (weight) x = mul16(x, add16(all16((float)how->offset), load_some(weight + i, size - i)));
    if (bias) x = add16(x, load_some(bias + i, size - i));
    store_some(to + i, x, size - i);
  }
}

typedef struct { const norm *how; const float *from; float *to; } norms_job;

static void norm_some(void *given, int64_t first, int64_t count) {
  const norms_job *job = given;
  const norm *how = job->how;
  for (int64_t row = first; row < first + count; row++) {
    norm_row(how, how->weight, how->bias, job->from + row * how->size, job->to + row * how->size);
  }
}

void norm_rows(const norm *how, const float *from, float *to, int64_t rows, team *team) {
  norms_job job = {how, from, to};
  run_job(norm_some, &job, rows, 1, rows * how->size < FEW ? NULL : team);
}

typedef struct { const ending *end; const float *products; int64_t size; } end_job;

static void end_some(void *given, int64_t first, int64_t count) {
  const end_job *job = given;
  const ending *end = job->end;
  const int64_t size = job->size;
  for (int64_t row = first; row < first + count; row++) {
    const float *from = job->products + row * size, *residual = end->residual ? end->residual + row * size : NULL;
    float *to = end->out + row * size;
    float *own = (float *)from; /* products are ours to write to */
    norm_row(end->after, end->after->weight, end->after->bias, from, own);
    for (int64_t i = 0; i < size; i += 16) {
      f16x x = mul16(load_some(own + i, size - i), all16((float)end->scale));
      if (end->soft_cap > 0) x = mul16(tanh16(div16(x, all16((float)end->soft_cap))), all16((float)end->soft_cap));
      if (residual) x = add16(load_some(residual + i, size - i), x);
      store_some(to + i, x, size - i);
    }
  }
}

void end_rows(const ending *end, const float *products, int64_t size, int64_t rows, team *team) {
  end_job job = {end, products, size};
  run_job(end_some, &job, rows, 1, rows * size < FEW ? NULL : team);
}

int run_norm(const norm_args *args, int64_t rows, team *team) {
  const int64_t size = args->size;
  float *to = scratch(SCRATCH_PRODUCT, 4 * rows * size); /* out may be the rows or the residual */
  if (!to) return 1;
  norm_rows(args->norm, args->rows, to, rows, team);
  for (int64_t i = 0; i < rows * size; i += 16) {
    f16x x = load_some(to + i, rows * size - i);
    if (args->end.residual) x = add16(load_some(args->end.residual + i, rows * size - i), x);
    store_some(args->end.out + i, x, rows * size - i);
  }
  return 0;
}

/* Rotate the first 2 * half elements of a head: (a, b) becomes (a cos - b sin, b cos + a sin). */
static void rotate(float *head, const float *cos, const float *sin, int64_t half, int64_t is_interleaved) {
  for (int64_t i = 0; i < half; i++) {
    float *a = head + (is_interleaved ? 2 * i : i), *b = head + (is_interleaved ? 2 * i + 1 : i + half);
    const float first = *a, second = *b;
    *a = first * cos[i] + -second * sin[i];
    *b = second * cos[i] + first * sin[i];
  }
}

/* Norm the heads of one row from `from` to `to`. */
static void norm_heads(const norm *how, int64_t own, const float *from, float *to, int64_t heads, int64_t head_dim) {
  if (!how) {
    if (to != from) memcpy(to, from, (size_t)(4 * heads * head_dim));
    return;
  }
  const int64_t rows = heads * head_dim / how->size; /* 1 where all heads are normed together */
  for (int64_t r = 0; r < rows; r++) {
    const int64_t at = own > 1 ? r * how->size : 0;
    norm_row(how, how->weight + at, how->bias ? how->bias + at : NULL, from + r * how->size, to + r * how->size);
  }
}

static void clip_row(const float *from, float *to, int64_t size, float most) {
  for (int64_t i = 0; i < size; i++) to[i] = from[i] > most ? most : from[i] < -most ? -most : from[i];
}

static void rope_some(void *given, int64_t first, int64_t count) {
  const rope_args *a = given;
  const int64_t q_size = a->heads * a->head_dim, k_size = a->key_heads * a->head_dim;
  const int64_t width = q_size + k_size + a->key_heads * a->value_dim;
  float key_row[k_size]; /* of all heads: some hundreds to thousands of floats */
  float clipped[a->clip > 0 ? width : 1];
  for (int64_t row = first; row < first + count; row++) {
    const float *from = a->rows + row * width;
    if (a->clip > 0) {
      clip_row(from, clipped, width, (float)a->clip);
      from = clipped;
    }
    const float *cos = a->cos ? a->cos + row * a->half : NULL, *sin = a->sin ? a->sin + row * a->half : NULL;
    float *queries = a->queries + row * q_size;
    norm_heads(a->query_norm, a->query_norm_heads, from, queries, a->heads, a->head_dim);
    norm_heads(a->key_norm, a->key_norm_heads, from + q_size, key_row, a->key_heads, a->head_dim);
    for (int64_t h = 0; cos && h < a->heads; h++) {
      rotate(queries + h * a->head_dim, cos, sin, a->half, a->is_interleaved);
    }
    for (int64_t i = 0; a->growth && i < q_size; i++) queries[i] *= a->growth[row];
    const slab *s = a->slabs + a->lanes[row];
    const int64_t slot = a->slots[row];
    for (int64_t h = 0; h < a->key_heads; h++) {
      float *head = key_row + h * a->head_dim;
      if (cos) rotate(head, cos, sin, a->half, a->is_interleaved);
      memcpy(s->keys + h * s->key_strides[0] + slot * s->key_strides[1], head, (size_t)(4 * a->head_dim));
      memcpy(s->values + h * s->value_strides[0] + slot * s->value_strides[1],
             from + q_size + k_size + h * a->value_dim, (size_t)(4 * a->value_dim));
    }
  }
}

int run_rope_write(const rope_args *args, int64_t rows, team *team) {
  const int64_t size = (args->heads + 2 * args->key_heads) * args->head_dim;
  for (int64_t row = 0; row < rows; row++) {
    const int64_t lane = args->lanes[row], slot = args->slots[row];
    if (lane < 0 || lane >= args->num_lanes || !args->slabs[lane].keys) return NO_SUCH_SLOT;
    if (slot < 0 || slot >= args->slabs[lane].capacity) return NO_SUCH_SLOT;
  }
  run_job(rope_some, (void *)args, rows, 1, rows * size < FEW ? NULL : team);
  return 0;
}
