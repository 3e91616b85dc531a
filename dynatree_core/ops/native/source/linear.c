/* Products of rows with a packed matrix.
 *
 * A tile is some rows and some blocks of 16 outputs. Its sums stay in registers while the inputs pass by in ascending
 * order: one load gives 16 weights, and each row's input multiplies them. So a sum has one order, whatever the tile. Many
 * rows share each weight that was read and decoded; a row alone takes some blocks at once, since one chain of
 * multiply-adds would wait for itself. */
#include "elementary.h"
#include "ops.h"

/* Rows of a tile at most: as many as have their sums in registers. */
#if WIDTH == 16
enum { MAX_ROWS = 16 };
#elif WIDTH == 8 || defined(__aarch64__)
enum { MAX_ROWS = 6 };
#else
enum { MAX_ROWS = 4 };
#endif
enum { MAX_BLOCKS = 4 };

enum { AHEAD = 4096 }; /* bytes that are fetched ahead of a block's reading: hardware stops at the end of a page */

/* How the codes of a kind lie; kinds of one form differ in their scales only. */
enum { FLOATS, BRAINS, HALVES, BYTES, NIBBLES, FIVES, SIXES, NUM_FORMS };

inlined int form_of(int64_t kind) {
  static const int8_t forms[NUM_KINDS] = {
      [FLOAT32] = FLOATS, [BFLOAT16] = BRAINS, [FLOAT16] = HALVES, [Q8_0] = BYTES,   [Q4_0] = NIBBLES, [Q4_1] = NIBBLES,
      [Q5_0] = FIVES,     [Q5_1] = FIVES,      [Q4_K] = NIBBLES,   [Q5_K] = FIVES, [Q6_K] = SIXES};
  return forms[kind];
}

/* Rows of a tile at most whose weights are decoded in it; with more rows a block is decoded once for all tiles. With 16
 * registers there is not much room beside scales and codes. */
inlined int64_t most_rows(int form) { return WIDTH != 8 || form <= HALVES ? MAX_ROWS : form == BYTES ? 4 : 3; }

/* Blocks of a tile: measured, the fastest for each. */
inlined int64_t most_blocks(int form, int64_t rows) {
#if WIDTH == 4 && !defined(__aarch64__)
  return 1;
#else
  if (rows == 1) return WIDTH == 8 && form >= NIBBLES ? 2 : 4;
  return form <= HALVES && rows <= 3 ? 2 : 1;
#endif
}

/* Of 16 outputs of one group of inputs: w = code * scale + least, code from 0 on but of bytes. Code times scale is exact,
 * and so is the whole where a kind has an offset, as (code - 8) * scale; so w has the bits of the published formula. */
typedef struct {
  f16x scale, least;
  f16x above_scale, above_least; /* of 256 inputs, where there are two levels */
} group_scales;

/* Read the scales of the group that begins with `input`; returns where its codes begin. */
inlined const uint8_t *read_scales(int64_t kind, group_scales *g, const uint8_t *at, int64_t input) {
  if (kind == Q4_K || kind == Q5_K || kind == Q6_K) {
    if (input % SUPER == 0) {
      g->above_scale = load_half16(at), at += 32;
      if (kind != Q6_K) g->above_least = load_half16(at), at += 32;
    }
    if (kind == Q6_K) {
      g->scale = mul16(g->above_scale, load_int8(at)), at += 16;
      g->least = mul16(all16(-32.0f), g->scale);
    } else {
      g->scale = mul16(g->above_scale, load_uint8(at)), at += 16;
      g->least = mul16(all16(-1.0f), mul16(g->above_least, load_uint8(at))), at += 16;
    }
    return at;
  }
  g->scale = load_half16(at), at += 32;
  if (kind == Q4_1 || kind == Q5_1) {
    g->least = load_half16(at), at += 32;
  } else {
    g->least = mul16(all16(kind == Q4_0 ? -8.0f : kind == Q5_0 ? -16.0f : -0.0f), g->scale);
  }
  return at;
}

inlined int group_of(int form) { return form == SIXES ? 16 : 32; }
inlined int code_bytes(int form) { return form == BYTES ? 512 : form == NIBBLES ? 256 : form == FIVES ? 320 : 192; }

/* The codes of the next inputs of a group, lowest bits first. */
typedef struct { u16x low, high; } code_words;

inlined f16x next_weights(int form, const group_scales *g, code_words *codes, const uint8_t *bytes) {
  f16x code;
  if (form == BYTES) {
    code = load_int8(bytes);
  } else {
    code = low_bits(codes->low, 4, 1.0f);
    codes->low = shift_right(codes->low, 4);
    if (form != NIBBLES) {
      const int more = form == FIVES ? 1 : 2;
      code = add16(code, low_bits(codes->high, more, 16.0f));
      codes->high = shift_right(codes->high, more);
    }
  }
  return fma16(code, g->scale, g->least);
}

inlined f16x plain_weights(int form, const uint8_t *block, int64_t input) {
  f16x w;
  if (form == BRAINS) return load_brain16(block + 32 * input);
  if (form == HALVES) return load_half16(block + 32 * input);
  memcpy(&w, block + 64 * input, sizeof w);
  return w;
}

inlined void fetch_ahead(const uint8_t *at, int bytes) {
  UNROLLED for (int line = 0; line < bytes; line += 64) __builtin_prefetch((const void *)((uintptr_t)at + AHEAD + (uintptr_t)line), 0, 2);
}

#define EACH_BLOCK UNROLLED for (int b = 0; b < num_blocks; b++)
#define EACH_ROW UNROLLED for (int r = 0; r < num_rows; r++)

/* sums[row][block][16]; form, num_rows and num_blocks are constants of each variant. */
inlined void tile(const int form, const int num_rows, const int num_blocks, int64_t kind, const uint8_t *const *block,
                  int64_t inputs, const float *rows, int64_t stride, float *sums) {
  f16x sum[MAX_ROWS][MAX_BLOCKS], w[MAX_BLOCKS];
  EACH_ROW EACH_BLOCK sum[r][b] = all16(0.0f);
#define ADD_INPUT(input)                                         \
  EACH_ROW {                                                     \
    const f16x x = all16(rows[r * stride + (input)]);            \
    EACH_BLOCK sum[r][b] = fma16(x, w[b], sum[r][b]);            \
  }
  if (form <= HALVES) {
    const int bytes = form == FLOATS ? 64 : 32; /* of one input */
    for (int64_t i = 0; i < inputs; i++) {
      if (form == FLOATS || i % 2 == 0) EACH_BLOCK fetch_ahead(block[b] + bytes * i, 64);
      EACH_BLOCK w[b] = plain_weights(form, block[b], i);
      ADD_INPUT(i)
    }
  } else {
    const int group = group_of(form);
    group_scales scales[MAX_BLOCKS];
    code_words codes[MAX_BLOCKS];
    const uint8_t *at[MAX_BLOCKS];
    EACH_BLOCK at[b] = block[b];
    for (int64_t first = 0; first < inputs; first += group) {
      const int count = inputs - first < group ? (int)(inputs - first) : group;
      EACH_BLOCK {
        fetch_ahead(at[b], code_bytes(form) + 64);
        at[b] = read_scales(kind, &scales[b], at[b], first);
        if (form > NIBBLES) codes[b].high = load_words(at[b] + 8 * group);
      }
      for (int i = 0; i < count; i += 8) { /* a word has the codes of 8 inputs */
        const int end = count - i < 8 ? count : i + 8;
        if (form != BYTES) EACH_BLOCK codes[b].low = load_words(at[b] + 8 * i);
        ROLLED for (int j = i; j < end; j++) {
          EACH_BLOCK w[b] = next_weights(form, &scales[b], &codes[b], at[b] + 16 * j);
          ADD_INPUT(first + j)
        }
      }
      EACH_BLOCK at[b] += code_bytes(form);
    }
  }
  EACH_ROW EACH_BLOCK store16(sums + 16 * (r * num_blocks + b), sum[r][b]);
}

typedef void tile_fn(int64_t kind, const uint8_t *const *block, int64_t inputs, const float *rows, int64_t stride,
                     float *sums);

/* A variant for each form and number of rows and blocks, in which the compiler keeps all sums in registers. */
#define VARIANT(form, num_rows, num_blocks)                                                                           \
  static void tile_##form##_##num_rows##_##num_blocks(int64_t kind, const uint8_t *const *block, int64_t inputs,      \
                                                      const float *rows, int64_t stride, float *sums) {               \
    tile(form, num_rows, num_blocks, kind, block, inputs, rows, stride, sums);                                        \
  }
#define FEW_ROWS(form, X)                                                                                          \
  X(form, 1, 1) X(form, 1, 2) X(form, 1, 4) X(form, 2, 1) X(form, 2, 2) X(form, 3, 1) X(form, 3, 2) X(form, 4, 1)
#if WIDTH == 16
#define ALL_ROWS(form, X)                                                                                       \
  FEW_ROWS(form, X) X(form, 5, 1) X(form, 6, 1) X(form, 7, 1) X(form, 8, 1) X(form, 9, 1) X(form, 10, 1)        \
  X(form, 11, 1) X(form, 12, 1) X(form, 13, 1) X(form, 14, 1) X(form, 15, 1) X(form, 16, 1)
#elif WIDTH == 8 || defined(__aarch64__)
#define ALL_ROWS(form, X) FEW_ROWS(form, X) X(form, 5, 1) X(form, 6, 1)
#else
#define ALL_ROWS(form, X) X(form, 1, 1) X(form, 2, 1) X(form, 3, 1) X(form, 4, 1)
#endif
#define ALL_VARIANTS(X)                                                                                         \
  ALL_ROWS(FLOATS, X) ALL_ROWS(BRAINS, X) ALL_ROWS(HALVES, X) ALL_ROWS(BYTES, X) ALL_ROWS(NIBBLES, X)           \
  ALL_ROWS(FIVES, X) ALL_ROWS(SIXES, X)
#define ENTRY(form, num_rows, num_blocks) [form][num_rows][num_blocks] = tile_##form##_##num_rows##_##num_blocks,

ALL_VARIANTS(VARIANT)
static tile_fn *const tiles[NUM_FORMS][MAX_ROWS + 1][MAX_BLOCKS + 1] = {ALL_VARIANTS(ENTRY)};

/* One block as float32 [inputs][16]: for many rows, which then share the decoding. */
inlined void decode_form(const int form, int64_t kind, const uint8_t *at, int64_t inputs, float *to) {
  if (form <= HALVES) {
    for (int64_t i = 0; i < inputs; i++) store16(to + 16 * i, plain_weights(form, at, i));
    return;
  }
  const int group = group_of(form);
  group_scales scales = {0};
  for (int64_t first = 0; first < inputs; first += group, at += code_bytes(form)) {
    const int count = inputs - first < group ? (int)(inputs - first) : group;
    at = read_scales(kind, &scales, at, first);
    code_words codes = {0};
    if (form > NIBBLES) codes.high = load_words(at + 8 * group);
    for (int i = 0; i < count; i++) {
      if (form != BYTES && i % 8 == 0) codes.low = load_words(at + 8 * i);
      store16(to + 16 * (first + i), next_weights(form, &scales, &codes, at + 16 * i));
    }
  }
}

static void decode(int64_t kind, const uint8_t *block, int64_t inputs, float *to) {
  switch (form_of(kind)) {
#define CASE(form) case form: decode_form(form, kind, block, inputs, to); break;
    CASE(FLOATS) CASE(BRAINS) CASE(HALVES) CASE(BYTES) CASE(NIBBLES) CASE(FIVES) CASE(SIXES)
#undef CASE
  }
}

int run_lookup(const lookup_args *args, int64_t num_rows) {
  const matrix *m = args->packed;
  float *panel = scratch(SCRATCH_PANEL, 64 * m->inputs);
  if (!panel) return NO_MEMORY;
  for (int64_t r = 0; r < num_rows; r++) {
    const int64_t output = args->outputs[r];
    if (output < 0 || output >= m->outputs) return NO_SUCH_OUTPUT;
    decode(m->kind, m->data + output / LANES * m->block_bytes, m->inputs, panel);
    for (int64_t i = 0; i < m->inputs; i++) args->out[r * m->inputs + i] = panel[LANES * i + output % LANES];
  }
  return 0;
}

typedef struct {
  const matrix *packed;
  const float *rows; /* [num_rows, inputs] */
  float *out;        /* [num_rows, outputs] */
  int64_t num_rows;
  const ending *end; /* NULL: only the bias */
  int64_t num_blocks, tile_blocks; /* of the matrix, and of an item of the job */
  int failed;
} product_job;

/* What follows a sum, where it needs no whole row. */
inlined f16x ended(const ending *end, f16x x, const float *residual, int64_t count) {
  x = mul16(x, all16((float)end->scale));
  if (end->soft_cap > 0) x = mul16(tanh16(div16(x, all16((float)end->soft_cap))), all16((float)end->soft_cap));
  if (residual) x = add16(load_some(residual, count), x);
  return x;
}

static void write_sums(const product_job *job, int64_t block, int64_t num_blocks, int64_t row, int64_t num_rows,
                       const float *sums) {
  const int64_t outputs = job->packed->outputs;
  for (int64_t r = 0; r < num_rows; r++) {
    for (int64_t b = 0; b < num_blocks; b++) {
      const int64_t first = LANES * (block + b), count = outputs - first, place = (row + r) * outputs + first;
      f16x x = load16(sums + 16 * (r * num_blocks + b));
      if (job->packed->bias) x = add16(x, load16(job->packed->bias + first));
      if (job->end) x = ended(job->end, x, job->end->residual ? job->end->residual + place : NULL, count);
      store_some(job->out + place, x, count);
    }
  }
}

static void multiply_blocks(product_job *job, int64_t first, int64_t count) {
  const matrix *m = job->packed;
  const int64_t inputs = m->inputs, num_rows = job->num_rows;
  float sums[MAX_ROWS * MAX_BLOCKS * 16] __attribute__((aligned(64)));
  const int form = form_of(m->kind);
  if (num_rows <= most_rows(form)) {
    for (int64_t done = 0, step; done < count; done += step) {
      const int64_t left = count - done, wide = job->tile_blocks;
      const uint8_t *block[MAX_BLOCKS];
      step = left >= wide ? wide : left >= 2 && wide >= 2 ? 2 : 1;
      for (int64_t b = 0; b < step; b++) block[b] = m->data + (first + done + b) * m->block_bytes;
      tiles[form][num_rows][step](m->kind, block, inputs, job->rows, inputs, sums);
      write_sums(job, first + done, step, 0, num_rows, sums);
    }
    return;
  }
  /* more rows than a tile has: tiles of about the same size, over one block as it lies or decoded */
  const int64_t num_tiles = (num_rows + MAX_ROWS - 1) / MAX_ROWS;
  for (int64_t b = first; b < first + count; b++) {
    const uint8_t *block = m->data + b * m->block_bytes;
    if (m->kind != FLOAT32) {
      float *panel = scratch(SCRATCH_PANEL, 64 * inputs);
      if (!panel) {
        job->failed = 1;
        return;
      }
      decode(m->kind, block, inputs, panel);
      block = (const uint8_t *)panel;
    }
    for (int64_t t = 0, row = 0; t < num_tiles; t++) {
      const int64_t some = (num_rows - row + num_tiles - t - 1) / (num_tiles - t);
      tiles[FLOATS][some][1](FLOAT32, &block, inputs, job->rows + row * inputs, inputs, sums);
      write_sums(job, b, 1, row, some, sums);
      row += some;
    }
  }
}

/* Items are as many blocks as a tile has, so that only the matrix's last ones are ever by themselves. */
static void multiply(void *given, int64_t first, int64_t count) {
  product_job *job = given;
  const int64_t begin = first * job->tile_blocks, end = (first + count) * job->tile_blocks;
  multiply_blocks(job, begin, (end < job->num_blocks ? end : job->num_blocks) - begin);
}

/* out = rows @ packed.T + bias, and what follows where it needs no whole row. */
static int product(const matrix *packed, const float *rows, float *out, const ending *end, int64_t num_rows,
                   team *team) {
  const int64_t num_blocks = (packed->outputs + LANES - 1) / LANES, blocks = most_blocks(form_of(packed->kind), num_rows);
  product_job job = {packed, rows, out, num_rows, end, num_blocks, blocks, 0};
  run_job(multiply, &job, (num_blocks + blocks - 1) / blocks, MAX_BLOCKS / blocks, team);
  return job.failed;
}

static const float *normed(const norm *how, const float *rows, int64_t num_rows, team *team) {
  if (!how) return rows;
  float *to = scratch(SCRATCH_ROWS, 4 * num_rows * how->size);
  if (to) norm_rows(how, rows, to, num_rows, team);
  return to;
}

/* A product and all that follows it. */
static int ended_product(const matrix *packed, const float *rows, const ending *end, int64_t num_rows, team *team) {
  if (!end->after) return product(packed, rows, end->out, end, num_rows, team);
  float *to = scratch(SCRATCH_PRODUCT, 4 * num_rows * packed->outputs); /* out may be the residual */
  if (!to || product(packed, rows, to, NULL, num_rows, team)) return 1;
  end_rows(end, to, packed->outputs, num_rows, team);
  return 0;
}

int run_linear(const linear_args *args, int64_t num_rows, team *team) {
  const float *rows = normed(args->norm, args->rows, num_rows, team);
  return !rows || ended_product(args->packed, rows, &args->end, num_rows, team);
}

typedef struct {
  const float *from;
  float *to;
  int64_t size, activation, is_gated; /* size: of a result's row */
} activation_job;

static void activate(void *given, int64_t first, int64_t count) {
  const activation_job *job = given;
  const int64_t size = job->size;
  for (int64_t row = first; row < first + count; row++) {
    const float *gate = job->from + row * size * (1 + job->is_gated);
    for (int64_t i = 0; i < size; i += 16) {
      f16x x = activate16(job->activation, load_some(gate + i, size - i));
      if (job->is_gated) x = mul16(x, load_some(gate + size + i, size - i));
      store_some(job->to + row * size + i, x, size - i);
    }
  }
}

int run_mlp(const mlp_args *args, int64_t num_rows, team *team) {
  const int64_t size = args->outer->inputs, width = args->inner->outputs;
  float *hidden = scratch(SCRATCH_HIDDEN, 4 * num_rows * (width + size));
  const float *rows = normed(args->norm, args->rows, num_rows, team);
  if (!hidden || !rows || product(args->inner, rows, hidden, NULL, num_rows, team)) return 1;
  float *activated = hidden + num_rows * width;
  activation_job job = {hidden, activated, size, args->activation, width != size};
  run_job(activate, &job, num_rows, 1, num_rows * size < 8192 ? NULL : team);
  return ended_product(args->outer, activated, &args->end, num_rows, team);
}
