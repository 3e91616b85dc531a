/* What Python calls: a list of operators, each a record of 8-byte fields, computed one after another for as many rows as
 * are given. `signature.py` says what they compute and in which order they add; `calls.py` writes the records. */
#pragma once

#include <stdint.h>

#include "pool.h"
#include "simd.h"

enum { FLOAT32, BFLOAT16, FLOAT16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K, Q6_K, NUM_KINDS };
enum { NO_NORM, RMS_NORM, LAYER_NORM };
enum { LANES = 16, SUPER = 256 };

typedef struct {
  int64_t kind, outputs, inputs, block_bytes;
  int64_t rounds_rows; /* whether its products round their rows to 8 bits */
  const uint8_t *data; /* blocks of 16 outputs */
  const float *bias;   /* filled up to whole blocks, or NULL */
} matrix;

typedef struct {
  int64_t kind, size; /* of one row */
  const float *weight, *bias; /* or NULL */
  double eps, offset;
} norm;

/* What follows a product: after(sum + bias) * scale, capped, + residual. */
typedef struct {
  const norm *after; /* or NULL */
  double scale, soft_cap; /* 0: none */
  const float *residual; /* or NULL */
  float *out;
} ending;

typedef struct { const float *rows; const norm *norm; ending end; int64_t size; } norm_args;
typedef struct {
  const float *rows;
  const norm *norm;
  ending end; /* without `after` where there are totals */
  const matrix *packed;
  float *totals; /* of the result: [rows, 3] as of OP_TOTALS, or NULL */
} linear_args;
typedef struct {
  const float *rows;
  const norm *norm;
  ending end;
  const matrix *inner, *outer;
  int64_t activation;
} mlp_args;

/* Feed-forward blocks of which each row goes to some: `inner` and `outer` of each, in turn. */
typedef struct {
  const float *rows;
  const norm *norm;
  const float *residual; /* or NULL */
  float *out;
  const matrix *router; /* an output for each expert, and one more where there is a shared one behind them */
  const matrix *const *experts;
  int64_t num_experts, num_chosen; /* without the shared one */
  int64_t adds_up; /* whether the weights of a row's experts add up to 1 */
  int64_t activation;
} experts_args;

/* Keys and values of one lane: a row of the table of `Slabs` in `signature.py`. */
typedef struct {
  float *keys, *values; /* NULL: there is no such lane */
  int64_t key_strides[2], value_strides[2]; /* of a head, a slot, in floats */
  int64_t capacity, unused;
} slab;

typedef struct {
  const float *rows;
  float *queries;
  const slab *slabs; /* by lane */
  int64_t num_lanes, heads, key_heads, head_dim, value_dim;
  const int32_t *lanes, *slots;
  const float *cos, *sin; /* [rows, half], or NULL */
  int64_t half, is_interleaved;
  const norm *query_norm, *key_norm; /* or NULL */
  int64_t query_norm_heads, key_norm_heads; /* heads that have weights of their own: 1, or all */
  double clip;         /* 0: none */
  const float *growth; /* [rows], or NULL */
} rope_args;

typedef struct {
  const float *queries, *sinks;
  float *out;
  const slab *slabs; /* by lane */
  int64_t num_lanes, heads, key_heads, head_dim, value_dim;
  const int32_t *lanes, *start, *end, *own_start, *own;
  int64_t num_own; /* the length of `own` */
  double scale, soft_cap;
} attention_args;

typedef struct { const matrix *packed; const int64_t *outputs; float *out; } lookup_args; /* out: [rows, inputs] */
typedef struct { const float *rows; float *out; int64_t size; } totals_args; /* out: [rows, 3] */

enum { OP_NORM, OP_LINEAR, OP_MLP, OP_ROPE_WRITE, OP_ATTENTION, OP_LOOKUP, OP_EXPERTS, OP_TOTALS };

typedef struct {
  int64_t code;
  union {
    norm_args norm;
    linear_args linear;
    mlp_args mlp;
    rope_args rope;
    attention_args attention;
    lookup_args lookup;
    experts_args experts;
    totals_args totals;
    int64_t fields[31];
  } of;
} op;

/* Compute `count` operators for the first `rows` rows of their tensors, on up to `threads` threads.
 * Returns 0, or what went wrong, and then nothing is promised of the results; nothing is written outside of tensors. */
enum { NO_MEMORY = 1, NO_SUCH_SLOT = 2, NO_SUCH_OUTPUT = 3 };
int dynatree_run(const op *ops, int64_t count, int64_t rows, int64_t threads);

int run_norm(const norm_args *args, int64_t rows, team *team);
int run_linear(const linear_args *args, int64_t rows, team *team);
int run_mlp(const mlp_args *args, int64_t rows, team *team);
int run_experts(const experts_args *args, int64_t rows, team *team);
int run_rope_write(const rope_args *args, int64_t rows, team *team);
int run_attention(const attention_args *args, int64_t rows, team *team);
int run_lookup(const lookup_args *args, int64_t rows);
int run_totals(const totals_args *args, int64_t rows, team *team);

/* Totals of rows [rows, size] by their parts, each of PART numbers: the greatest of a part, and what its exponentials
 * add up to. Parts may be noted in any order and at once, so that whoever computes a row's numbers can note them while
 * they are in the nearest cache. Joined, they have one order. */
enum { PART = 128 };
float *room_for_parts(int64_t rows, int64_t size); /* NULL where there is no memory */
void note_part(float *parts, const float *rows, int64_t size, int64_t row, int64_t part);
void join_parts(const float *parts, const float *rows, int64_t num_rows, int64_t size, float *out);

/* One row of a norm; `to` may be `from`. */
void norm_row(const norm *how, const float *weight, const float *bias, const float *from, float *to);

/* Rows [rows, how->size] one by one, on several threads where they are many. */
void norm_rows(const norm *how, const float *from, float *to, int64_t rows, team *team);

/* Finish products [rows, size], which lie in `out` already. */
void end_rows(const ending *end, const float *products, int64_t size, int64_t rows, team *team);
