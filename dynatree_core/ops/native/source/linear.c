/* Products of rows with a packed matrix.
 *
 * A tile is some rows and some blocks of 16 outputs. Its sums stay in registers while the inputs pass by in ascending
 * order: one load gives 16 weights, and each row's input multiplies them. So a sum has one order, whatever the tile. Many
 * rows share each weight that was read and decoded; a row alone takes some blocks at once, since one chain of
 * multiply-adds would wait for itself. More rows than decode in a tile have some inputs' weights decoded into the first
 * cache, then all rows multiply with them, and so on: sums wait in memory meanwhile. */
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
enum { CHUNK = 128 }; /* inputs that are decoded before rows multiply them: whole groups of every kind */
enum { BAND = 96 };   /* rows that share what was decoded, and whose sums wait */

/* Rows of a band's tile, and blocks: with 32 registers two blocks share each input that was loaded. */
enum { BAND_ROWS = WIDTH == 16 ? 12 : MAX_ROWS, BAND_BLOCKS = WIDTH == 16 ? 2 : 1 };

/* Bytes that are fetched ahead of a block's reading: hardware stops at the end of a page. Several blocks of a tile fetch
 * their places in the next ones instead, of which all but the first would begin unfetched, unless that is too far. */
enum { AHEAD = 4096, FAR_AHEAD = 65536 };

/* How the codes of a kind lie; kinds of one form differ in their scales only. KEPT is what was decoded: floats that are in
 * the cache already. */
enum { KEPT, FLOATS, BRAINS, HALVES, BYTES, NIBBLES, FIVES, SIXES, NUM_FORMS };

inlined int form_of(int64_t kind) {
  static const int8_t forms[NUM_KINDS] = {
      [FLOAT32] = FLOATS, [BFLOAT16] = BRAINS, [FLOAT16] = HALVES, [Q8_0] = BYTES,   [Q4_0] = NIBBLES, [Q4_1] = NIBBLES,
      [Q5_0] = FIVES,     [Q5_1] = FIVES,      [Q4_K] = NIBBLES,   [Q5_K] = FIVES, [Q6_K] = SIXES};
  return forms[kind];
}

/* Rows of a tile at most whose weights are decoded in it: measured. With 16 registers there is not much room beside scales
 * and codes. */
inlined int64_t most_rows(int form) {
#if WIDTH == 16
  return form == BRAINS || form == HALVES ? MAX_ROWS : BAND_ROWS;
#elif WIDTH == 8
  return form <= HALVES ? MAX_ROWS : form <= NIBBLES ? 5 : 3;
#else
  (void)form;
  return MAX_ROWS;
#endif
}

/* Blocks of a tile of so many rows: measured, the fastest for each. */
inlined int64_t most_blocks(int form, int64_t rows) {
#if WIDTH == 16
  if (rows > most_rows(form)) return BAND_BLOCKS;
  return rows <= (form <= HALVES ? 6 : 4) ? 4 : rows <= 12 ? 2 : 1;
#elif WIDTH == 8 || defined(__aarch64__)
  if (rows == 1) return WIDTH == 8 && form >= BYTES ? 2 : 4;
  return form <= HALVES && rows <= 3 ? 2 : 1;
#else
  (void)form, (void)rows;
  return 1;
#endif
}

/* Of 16 outputs of one group of inputs: w = code * scale + least, code from 0 on but of bytes. Code times scale is exact,
 * and so is the whole where a kind has an offset, as (code - 8) * scale; so w has the bits of the published formula. */
typedef struct {
  f16x scale, least;
  f16x raised; /* 2^-24 of the scale: for a code that stands 24 bits higher, which gives the same product */
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
  } else {
    g->scale = load_half16(at), at += 32;
    if (kind == Q4_1 || kind == Q5_1) {
      g->least = load_half16(at), at += 32;
    } else {
      g->least = mul16(all16(kind == Q4_0 ? -8.0f : kind == Q5_0 ? -16.0f : -0.0f), g->scale);
    }
  }
  g->raised = mul16(g->scale, all16(0x1p-24f));
  return at;
}

inlined int group_of(int form) { return form == SIXES ? 16 : 32; }
inlined int code_bytes(int form) { return form == BYTES ? 512 : form == NIBBLES ? 256 : form == FIVES ? 320 : 192; }

inlined int high_bits(int form) { return form == FIVES ? 1 : form == SIXES ? 2 : 0; } /* beside four low ones */

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
      const int more = high_bits(form);
      code = add16(code, low_bits(codes->high, more, 16.0f));
      codes->high = shift_right(codes->high, more);
    }
  }
  return fma16(code, g->scale, g->least);
}

/* Whether codes are taken from memory one by one, where they are not bytes. */
#if defined(TARGET_AVX2)
enum { READS_CODES = 1 };
#else
enum { READS_CODES = 0 };
#endif

/* The weights of input j of the eight whose words begin at `words`, and whose high bits are the lowest of `high`: a load
 * that begins some bytes earlier has the byte of the code on top, so that nothing stays in a register from one input to
 * the next. Up to 3 bytes before the words are read, which are the group's own scales or codes, and none behind them. */
inlined f16x read_weights(const int form, const group_scales *g, const uint8_t *words, u16x high, const int j) {
  const int bits = high_bits(form), place = j % 2 ? 4 : 28, up = place - bits * j;
  const uint8_t *from = words - 3 + j / 2;
#if defined(TARGET_AVX2)
  __asm__("" : "+r"(from)); /* read for each code anew: registers are for sums */
#endif
  u16x code = load_words(from);
  f16x number;
  EACH {
    code.of[part] = j % 2 ? code.of[part] >> 28 : code.of[part] & 0x0f000000;
    if (bits) {
      high.of[part] = up >= 0 ? high.of[part] << (uint32_t)up : high.of[part] >> (uint32_t)-up;
      code.of[part] |= high.of[part] & (((1u << bits) - 1) << place);
    }
    number.of[part] = __builtin_convertvector((ints)code.of[part], floats);
  }
  return fma16(number, j % 2 ? g->scale : g->raised, g->least);
}

inlined f16x plain_weights(int form, const uint8_t *block, int64_t input) {
  f16x w;
  if (form == BRAINS) return load_brain16(block + 32 * input);
  if (form == HALVES) return load_half16(block + 32 * input);
  memcpy(&w, block + 64 * input, sizeof w);
  return w;
}

inlined void fetch_ahead(const uint8_t *at, int bytes, int64_t ahead) {
  UNROLLED for (int line = 0; line < bytes; line += 64) {
    __builtin_prefetch((const void *)((uintptr_t)at + (uintptr_t)(ahead + line)), 0, 2);
  }
}

#define EACH_BLOCK UNROLLED for (int b = 0; b < num_blocks; b++)
#define EACH_ROW UNROLLED for (int r = 0; r < num_rows; r++)

/* Add products to sums[row][block][16]; form, num_rows and num_blocks are constants of each variant. */
inlined void tile(const int form, const int num_rows, const int num_blocks, int64_t kind, const uint8_t *const *block,
                  int64_t inputs, const float *rows, int64_t stride, float *sums) {
  f16x sum[MAX_ROWS][MAX_BLOCKS], w[MAX_BLOCKS];
  EACH_ROW EACH_BLOCK sum[r][b] = load16(sums + 16 * (r * num_blocks + b));
  const int64_t next = num_blocks > 1 ? num_blocks * (block[1] - block[0]) : AHEAD;
  const int64_t ahead = next > FAR_AHEAD ? AHEAD : next;
#define ADD_INPUT(input)                                         \
  EACH_ROW {                                                     \
    const f16x x = all16(rows[r * stride + (input)]);            \
    EACH_BLOCK sum[r][b] = fma16(x, w[b], sum[r][b]);            \
  }
  if (form <= HALVES) {
    const int bytes = form <= FLOATS ? 64 : 32; /* of one input */
    for (int64_t i = 0; i < inputs; i++) {
      if (form != KEPT && (form == FLOATS || i % 2 == 0)) EACH_BLOCK fetch_ahead(block[b] + bytes * i, 64, ahead);
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
        fetch_ahead(at[b], code_bytes(form) + 64, ahead);
        at[b] = read_scales(kind, &scales[b], at[b], first);
        if (form > NIBBLES) codes[b].high = load_words(at[b] + 8 * group);
      }
      int i = 0;
      if (form >= NIBBLES && READS_CODES) {
        for (; i + 8 <= count; i += 8) {
          UNROLLED for (int j = 0; j < 8; j++) {
            EACH_BLOCK w[b] = read_weights(form, &scales[b], at[b] + 8 * i, codes[b].high, j);
            ADD_INPUT(first + i + j)
          }
          if (form > NIBBLES) EACH_BLOCK codes[b].high = shift_right(codes[b].high, 8 * high_bits(form));
        }
      }
      for (; i < count; i += 8) { /* a word has the codes of 8 inputs */
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
  FEW_ROWS(form, X) X(form, 2, 4) X(form, 3, 4) X(form, 4, 2) X(form, 4, 4) X(form, 5, 1) X(form, 5, 2)         \
  X(form, 5, 4) X(form, 6, 1) X(form, 6, 2) X(form, 6, 4) X(form, 7, 1) X(form, 7, 2) X(form, 8, 1)             \
  X(form, 8, 2) X(form, 9, 1) X(form, 9, 2) X(form, 10, 1) X(form, 10, 2) X(form, 11, 1) X(form, 11, 2)         \
  X(form, 12, 1) X(form, 12, 2) X(form, 13, 1) X(form, 14, 1) X(form, 15, 1) X(form, 16, 1)
#elif WIDTH == 8 || defined(__aarch64__)
#define ALL_ROWS(form, X) FEW_ROWS(form, X) X(form, 5, 1) X(form, 6, 1)
#else
#define ALL_ROWS(form, X) X(form, 1, 1) X(form, 2, 1) X(form, 3, 1) X(form, 4, 1)
#endif
#define ALL_VARIANTS(X)                                                                                         \
  ALL_ROWS(KEPT, X) ALL_ROWS(FLOATS, X) ALL_ROWS(BRAINS, X) ALL_ROWS(HALVES, X) ALL_ROWS(BYTES, X)              \
  ALL_ROWS(NIBBLES, X) ALL_ROWS(FIVES, X) ALL_ROWS(SIXES, X)
#define ENTRY(form, num_rows, num_blocks) [form][num_rows][num_blocks] = tile_##form##_##num_rows##_##num_blocks,

ALL_VARIANTS(VARIANT)
static tile_fn *const tiles[NUM_FORMS][MAX_ROWS + 1][MAX_BLOCKS + 1] = {ALL_VARIANTS(ENTRY)};

/* A block that is decoded from its first input on, some at a time. */
typedef struct {
  const uint8_t *at;
  int64_t input; /* the next one */
  group_scales scales;
} reading;

/* The next inputs as float32 [count][16]. All but the last ones of a block are whole groups; behind these, numbers up to
 * the next multiple of 8 inputs have no meaning. */
inlined void decode_kind(const int kind, reading *block, int64_t count, float *to) {
  const int form = form_of(kind), group = group_of(form);
  const uint8_t *at = block->at;
  if (form <= HALVES) {
    const int bytes = form == FLOATS ? 64 : 32;
    for (int64_t i = 0; i < count; i++) {
      if (i % 2 == 0) fetch_ahead(at + bytes * i, 64, AHEAD);
      store16(to + 16 * i, plain_weights(form, at, i));
    }
    block->at = at + bytes * count;
    return;
  }
  group_scales scales = block->scales;
  for (int64_t first = 0; first < count; first += group) {
    const int some = count - first < group ? (int)(count - first) : group;
    code_words codes = {0};
    fetch_ahead(at, code_bytes(form) + 64, AHEAD);
    at = read_scales(kind, &scales, at, block->input + first);
    if (form > NIBBLES) codes.high = load_words(at + 8 * group);
    for (int i = 0; i < some; i += 8) {
      if (form != BYTES) codes.low = load_words(at + 8 * i);
      UNROLLED for (int j = 0; j < 8; j++) {
        const f16x w = form >= NIBBLES && READS_CODES ? read_weights(form, &scales, at + 8 * i, codes.high, j)
                                                      : next_weights(form, &scales, &codes, at + 16 * (i + j));
        store16(to + 16 * (first + i + j), w);
      }
      if (form > NIBBLES && READS_CODES) codes.high = shift_right(codes.high, 8 * high_bits(form));
    }
    at += code_bytes(form);
  }
  block->at = at, block->input += count, block->scales = scales;
}

static void decode(int64_t kind, reading *block, int64_t count, float *to) {
  switch (kind) {
#define CASE(kind) case kind: decode_kind(kind, block, count, to); break;
    CASE(FLOAT32) CASE(BFLOAT16) CASE(FLOAT16) CASE(Q8_0) CASE(Q4_0) CASE(Q4_1) CASE(Q5_0) CASE(Q5_1) CASE(Q4_K)
    CASE(Q5_K) CASE(Q6_K)
#undef CASE
  }
}

inlined int64_t at_most(int64_t count, int64_t most) { return count < most ? count : most; }

/* ---- Rows in 8 bits: products of whole numbers, of the kinds that are NIBBLES or BYTES ---- */

enum { GROUP = 32, MAX_INTEGER_ROWS = WIDTH == 16 ? 8 : 4 };

/* 32 inputs of a row: input = code * scale. */
typedef struct {
  int8_t codes[GROUP]; /* of NIBBLES each eight with the even ones first, as a word's shifted halves have them */
  float scale, sum;    /* sum: of the codes, times scale */
} rounded;

/* Codes from -127 to 127, the nearest to input / scale, of two the even one; scale is the greatest size / 127. Where an
 * input is no number, or infinite, the scale is no number, and then no result is. */
inlined rounded round_group(const int form, const float *from, int64_t count) {
  f16x x[2] = {load_some(from, count), load_some(from + 16, count - 16)};
  int32_t sizes[16], codes[GROUP], sum = 0;
  rounded to;
  EACH {
    const ints a = (ints)x[0].of[part] & 0x7fffffff, b = (ints)x[1].of[part] & 0x7fffffff, is_less = (ints)(a < b);
    const ints greater = (b & is_less) | (a & ~is_less); /* sizes ascend as whole numbers: numbers, infinity, none */
    memcpy(sizes + WIDTH * part, &greater, sizeof greater);
  }
  UNROLLED for (int half = 8; half; half /= 2) {
    UNROLLED for (int i = 0; i < half; i++) sizes[i] = sizes[i] > sizes[i + half] ? sizes[i] : sizes[i + half];
  }
  if (sizes[0] >= 0x7f800000) sizes[0] = 0x7fc00000;
  memcpy(&to.scale, sizes, 4);
  to.scale /= 127.0f;
  if (!(to.scale > 0)) {
    memset(to.codes, 0, sizeof to.codes);
    to.sum = to.scale;
    return to;
  }
  UNROLLED for (int half = 0; half < 2; half++) EACH {
    const floats most = 127.0f - (floats){0};
    floats code = x[half].of[part] / to.scale; /* beyond 127 where the scale has lost bits: below 2^-126 */
    code = choose((ints)(code > most), most, code);
    code = choose((ints)(code < -most), -most, code);
    const ints whole = __builtin_convertvector((code + 12582912.0f) - 12582912.0f, ints); /* rounds to a whole number */
    memcpy(codes + 16 * half + WIDTH * part, &whole, sizeof whole);
  }
  UNROLLED for (int i = 0; i < GROUP; i++) {
    const int j = i % 8, place = form == NIBBLES ? i - j + j % 2 * 4 + j / 2 : i;
    to.codes[place] = (int8_t)codes[i];
    sum += codes[i];
  }
  to.sum = to.scale * (float)sum;
  return to;
}

typedef struct {
  const float *rows; /* [num_rows, inputs] */
  rounded *to;       /* [num_rows, groups] */
  int64_t inputs;
  int form;
} rounding_job;

static void round_rows(void *given, int64_t first, int64_t count) {
  const rounding_job *job = given;
  const int64_t inputs = job->inputs, num_groups = (inputs + GROUP - 1) / GROUP;
  for (int64_t row = first; row < first + count; row++) {
    const float *from = job->rows + row * inputs;
    rounded *to = job->to + row * num_groups;
    for (int64_t g = 0; g < num_groups; g++) {
      const int64_t left = inputs - GROUP * g;
      to[g] = job->form == NIBBLES ? round_group(NIBBLES, from + GROUP * g, left)
                                   : round_group(BYTES, from + GROUP * g, left);
    }
  }
}

/* Sums [num_rows][16] of a block. Each takes its groups in ascending order: first the product of whole numbers times
 * both scales, then the codes' sum times what each weight has beside its code. Every step is rounded, none fused, so that
 * the bits are the same on every target. form and num_rows are constants of each variant. */
inlined void integer_tile(const int form, const int num_rows, int64_t kind, const uint8_t *at, int64_t num_groups,
                          const rounded *rows, float *sums) {
  group_scales scales;
  for (int64_t g = 0; g < num_groups; g++) {
    i16x whole[MAX_INTEGER_ROWS];
    fetch_ahead(at, code_bytes(form) + 64, AHEAD);
    at = read_scales(kind, &scales, at, GROUP * g);
    EACH_ROW EACH whole[r].of[part] = (ints){0};
    if (form == NIBBLES) { /* 8 pairs of products fit into 16 bits: 8 * 2 * 15 * 127 < 2^15 */
      u16x pairs[MAX_INTEGER_ROWS];
      EACH_ROW EACH pairs[r].of[part] = (words){0};
      UNROLLED for (int i = 0; i < GROUP; i += 8) {
        u16x low = load_words(at + 8 * i), high = shift_right(low, 4);
        EACH low.of[part] &= 0x0f0f0f0f, high.of[part] &= 0x0f0f0f0f;
        EACH_ROW {
          const int8_t *codes = rows[r * num_groups + g].codes + i;
          pairs[r] = add_products(pairs[r], low, codes, 0);
          pairs[r] = add_products(pairs[r], high, codes + 4, 0);
        }
      }
      EACH_ROW whole[r] = add_pairs(whole[r], pairs[r]);
    } else {
      UNROLLED for (int i = 0; i < GROUP; i += 4) {
        const u16x four = load_fours(at + 16 * i);
        u16x none;
        EACH none.of[part] = (words){0};
        EACH_ROW {
          whole[r] = add_pairs(whole[r], add_products(none, four, rows[r * num_groups + g].codes + i, 1));
        }
      }
    }
    at += code_bytes(form);
    EACH_ROW {
      const rounded *row = rows + r * num_groups + g;
      f16x sum = load16(sums + 16 * r);
      sum = add16(sum, mul16(floats_of(whole[r]), mul16(scales.scale, all16(row->scale))));
      if (form == NIBBLES) sum = add16(sum, mul16(scales.least, all16(row->sum)));
      store16(sums + 16 * r, sum);
    }
  }
}

typedef void integer_fn(int64_t kind, const uint8_t *at, int64_t num_groups, const rounded *rows, float *sums);

#define INTEGERS(form, num_rows)                                                                                 \
  static void integers_##form##_##num_rows(int64_t kind, const uint8_t *at, int64_t num_groups, const rounded *rows, \
                                           float *sums) {                                                        \
    integer_tile(form, num_rows, kind, at, num_groups, rows, sums);                                              \
  }
#define INTEGERS_ENTRY(form, num_rows) [form == BYTES][num_rows] = integers_##form##_##num_rows,
#if WIDTH == 16
#define INTEGER_ROWS(form, X) \
  X(form, 1) X(form, 2) X(form, 3) X(form, 4) X(form, 5) X(form, 6) X(form, 7) X(form, 8)
#else
#define INTEGER_ROWS(form, X) X(form, 1) X(form, 2) X(form, 3) X(form, 4)
#endif
INTEGER_ROWS(NIBBLES, INTEGERS)
INTEGER_ROWS(BYTES, INTEGERS)
static integer_fn *const integers[2][MAX_INTEGER_ROWS + 1] = {INTEGER_ROWS(NIBBLES, INTEGERS_ENTRY)
                                                                  INTEGER_ROWS(BYTES, INTEGERS_ENTRY)};

int run_lookup(const lookup_args *args, int64_t num_rows) {
  const matrix *m = args->packed;
  float panel[CHUNK * LANES] __attribute__((aligned(64)));
  for (int64_t r = 0; r < num_rows; r++) {
    const int64_t output = args->outputs[r];
    if (output < 0 || output >= m->outputs) return NO_SUCH_OUTPUT;
    reading block = {.at = m->data + output / LANES * m->block_bytes};
    for (int64_t first = 0; first < m->inputs; first += CHUNK) {
      const int64_t count = at_most(m->inputs - first, CHUNK);
      decode(m->kind, &block, count, panel);
      for (int64_t i = 0; i < count; i++) args->out[r * m->inputs + first + i] = panel[LANES * i + output % LANES];
    }
  }
  return 0;
}

typedef struct {
  const matrix *packed;
  const float *rows; /* [num_rows, inputs] */
  float *out;        /* [num_rows, outputs] */
  int64_t num_rows;
  const ending *end; /* NULL: only the bias */
  const rounded *codes; /* [num_rows, groups] where rows are rounded, else NULL */
  int64_t num_blocks, tile_blocks, item_blocks; /* of the matrix, of a tile, and of an item of the job */
  float *parts; /* where each part of the result is noted, for its totals, or NULL */
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

/* As many rows as decode in a tile. */
static void multiply_few(const product_job *job, int64_t first, int64_t num_blocks) {
  const matrix *m = job->packed;
  float sums[MAX_ROWS * MAX_BLOCKS * LANES] __attribute__((aligned(64)));
  const uint8_t *block[MAX_BLOCKS];
  for (int64_t b = 0; b < num_blocks; b++) block[b] = m->data + (first + b) * m->block_bytes;
  memset(sums, 0, (size_t)(job->num_rows * num_blocks * LANES) * sizeof *sums);
  tiles[form_of(m->kind)][job->num_rows][num_blocks](m->kind, block, m->inputs, job->rows, m->inputs, sums);
  write_sums(job, first, num_blocks, 0, job->num_rows, sums);
}

/* Some of more rows than that: tiles of about the same size, which share each chunk of the blocks, as it lies or decoded. */
static void multiply_band(const product_job *job, int64_t block, int64_t num_blocks, int64_t row, int64_t num_rows) {
  const matrix *m = job->packed;
  const int64_t inputs = m->inputs, num_tiles = (num_rows + BAND_ROWS - 1) / BAND_ROWS;
  const int is_plain = m->kind == FLOAT32;
  float sums[BAND * BAND_BLOCKS * LANES] __attribute__((aligned(64)));
  float panels[BAND_BLOCKS][CHUNK * LANES] __attribute__((aligned(64)));
  const uint8_t *weights[BAND_BLOCKS];
  reading now[BAND_BLOCKS] = {0};
  for (int64_t b = 0; b < num_blocks; b++) now[b].at = m->data + (block + b) * m->block_bytes;
  memset(sums, 0, (size_t)(num_rows * num_blocks * LANES) * sizeof *sums);
  for (int64_t first = 0; first < inputs; first += CHUNK) {
    const int64_t count = at_most(inputs - first, CHUNK);
    const float *rows = job->rows + row * inputs + first;
    for (int64_t b = 0; b < num_blocks; b++) {
      weights[b] = is_plain ? now[b].at + 64 * first : (const uint8_t *)panels[b];
      if (!is_plain) decode(m->kind, &now[b], count, panels[b]);
    }
    for (int64_t t = 0, done = 0, some; t < num_tiles; t++, done += some) {
      some = (num_rows - done + num_tiles - t - 1) / (num_tiles - t);
      tile_fn *multiply = tiles[is_plain && t == 0 ? FLOATS : KEPT][some][num_blocks];
      multiply(FLOAT32, weights, count, rows + done * inputs, inputs, sums + LANES * num_blocks * done);
    }
  }
  write_sums(job, block, num_blocks, row, num_rows, sums);
}

/* Rounded rows: tiles of about the same size, each of which reads the block. */
static void multiply_rounded(const product_job *job, int64_t block) {
  const matrix *m = job->packed;
  const int64_t num_groups = (m->inputs + GROUP - 1) / GROUP, most = MAX_INTEGER_ROWS;
  const int64_t num_rows = job->num_rows, num_tiles = (num_rows + most - 1) / most;
  float sums[MAX_INTEGER_ROWS * LANES] __attribute__((aligned(64)));
  for (int64_t t = 0, done = 0, some; t < num_tiles; t++, done += some) {
    some = (num_rows - done + num_tiles - t - 1) / (num_tiles - t);
    memset(sums, 0, (size_t)(some * LANES) * sizeof *sums);
    integer_fn *multiply = integers[form_of(m->kind) == BYTES][some];
    multiply(m->kind, m->data + block * m->block_bytes, num_groups, job->codes + done * num_groups, sums);
    write_sums(job, block, 1, done, some, sums);
  }
}

static void multiply_blocks(const product_job *job, int64_t first, int64_t count) {
  const int64_t num_rows = job->num_rows;
  if (job->codes) {
    for (int64_t b = first; b < first + count; b++) multiply_rounded(job, b);
    return;
  }
  const int are_few = num_rows <= most_rows(form_of(job->packed->kind));
  for (int64_t done = 0, step; done < count; done += step) {
    const int64_t left = count - done, wide = job->tile_blocks;
    step = left >= wide ? wide : left >= 2 && wide >= 2 ? 2 : 1;
    if (are_few) {
      multiply_few(job, first + done, step);
      continue;
    }
    for (int64_t row = 0; row < num_rows; row += BAND) {
      multiply_band(job, first + done, step, row, at_most(num_rows - row, BAND));
    }
  }
}

/* Items are whole tiles, so that only the matrix's last blocks are ever by themselves; where totals are wanted, whole
 * parts. */
static void multiply(void *given, int64_t first, int64_t count) {
  const product_job *job = given;
  const int64_t begin = first * job->item_blocks, end = (first + count) * job->item_blocks;
  multiply_blocks(job, begin, at_most(job->num_blocks, end) - begin);
  for (int64_t part = first; job->parts && part < first + count; part++) {
    for (int64_t row = 0; row < job->num_rows; row++) note_part(job->parts, job->out, job->packed->outputs, row, part);
  }
}

/* out = rows @ packed.T + bias, and what follows where it needs no whole row. Returns 0, or that memory is missing.
 * `parts` is where parts of the result are noted, or NULL. */
static int product(const matrix *packed, const float *rows, float *out, const ending *end, float *parts,
                   int64_t num_rows, team *team) {
  if (!num_rows) return 0;
  const int64_t num_blocks = (packed->outputs + LANES - 1) / LANES;
  const int64_t blocks = packed->rounds_rows ? 1 : most_blocks(form_of(packed->kind), num_rows);
  rounded *codes = NULL;
  if (packed->rounds_rows) {
    const int64_t num_groups = (packed->inputs + GROUP - 1) / GROUP;
    codes = scratch(SCRATCH_CODES, num_rows * num_groups * (int64_t)sizeof *codes);
    if (!codes) return NO_MEMORY;
    rounding_job rounding = {rows, codes, packed->inputs, form_of(packed->kind)};
    run_job(round_rows, &rounding, num_rows, 1, num_rows * packed->inputs < 8192 ? NULL : team);
  }
  const int64_t item = parts ? PART / LANES : blocks, piece = parts ? 1 : MAX_BLOCKS / blocks;
  product_job job = {packed, rows, out, num_rows, end, codes, num_blocks, blocks, item, parts};
  run_job(multiply, &job, (num_blocks + item - 1) / item, piece, team);
  return 0;
}

static const float *normed(const norm *how, const float *rows, int64_t num_rows, team *team) {
  if (!how) return rows;
  float *to = scratch(SCRATCH_ROWS, 4 * num_rows * how->size);
  if (to) norm_rows(how, rows, to, num_rows, team);
  return to;
}

/* A product and all that follows it. */
static int ended_product(const matrix *packed, const float *rows, const ending *end, int64_t num_rows, team *team) {
  if (!end->after) return product(packed, rows, end->out, end, NULL, num_rows, team);
  float *to = scratch(SCRATCH_PRODUCT, 4 * num_rows * packed->outputs); /* out may be the residual */
  if (!to || product(packed, rows, to, NULL, NULL, num_rows, team)) return NO_MEMORY;
  end_rows(end, to, packed->outputs, num_rows, team);
  return 0;
}

int run_linear(const linear_args *args, int64_t num_rows, team *team) {
  const float *rows = normed(args->norm, args->rows, num_rows, team);
  if (!rows) return NO_MEMORY;
  if (!args->totals) return ended_product(args->packed, rows, &args->end, num_rows, team);
  const int64_t size = args->packed->outputs;
  float *parts = room_for_parts(num_rows, size);
  if (!parts || product(args->packed, rows, args->end.out, &args->end, parts, num_rows, team)) return NO_MEMORY;
  join_parts(parts, args->end.out, num_rows, size, args->totals);
  return 0;
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
      const f16x x = load_some(gate + i, size - i);
      const f16x y = job->is_gated ? gated16(job->activation, x, load_some(gate + size + i, size - i))
                                   : activate16(job->activation, x);
      store_some(job->to + row * size + i, y, size - i);
    }
  }
}

int run_mlp(const mlp_args *args, int64_t num_rows, team *team) {
  const int64_t size = args->outer->inputs, width = args->inner->outputs;
  float *hidden = scratch(SCRATCH_HIDDEN, 4 * num_rows * (width + size));
  const float *rows = normed(args->norm, args->rows, num_rows, team);
  if (!hidden || !rows || product(args->inner, rows, hidden, NULL, NULL, num_rows, team)) return NO_MEMORY;
  float *activated = hidden + num_rows * width;
  activation_job job = {hidden, activated, size, args->activation, width != size};
  run_job(activate, &job, num_rows, 1, num_rows * size < 8192 ? NULL : team);
  return ended_product(args->outer, activated, &args->end, num_rows, team);
}
