/* Mixtures of experts: each row goes through some of the feed-forward blocks, and their results are added by weight.
 *
 * Experts are computed one by one, each for all rows that chose it, so that its matrices are read once. A row's sum takes
 * its experts by their numbers, whoever computes which rows. */
#include "elementary.h"
#include "ops.h"

typedef struct {
  float *rows;                        /* [rows, size], normed */
  float *scores;                      /* [rows, outputs of the router] */
  float *shares;                      /* [experts, filled up to sixteens] of one row */
  float *weights;                     /* [rows, chosen] */
  float *gathered, *products, *sums;  /* [rows, size] */
  int32_t *chosen;                    /* [rows, chosen] */
  int32_t *places;                    /* [rows]: which rows one expert has */
  float *place_weights;               /* [rows]: and their weights */
} room;

/* Pieces of one piece of memory; without any, how many numbers they are. */
static int64_t lay_out(const experts_args *a, int64_t rows, room *r, float *memory) {
  const int64_t size = a->experts[0]->inputs, whole = (a->num_experts + 15) / 16 * 16;
  int64_t used = 0;
#define PIECE(name, count) r->name = memory ? (void *)(memory + used) : NULL, used += ((count) + 15) / 16 * 16
  PIECE(rows, a->norm ? rows * size : 0);
  PIECE(scores, rows * a->router->outputs);
  PIECE(shares, whole);
  PIECE(weights, rows * a->num_chosen);
  PIECE(gathered, rows * size);
  PIECE(products, rows * size);
  PIECE(sums, rows * size);
  PIECE(chosen, rows * a->num_chosen);
  PIECE(places, rows);
  PIECE(place_weights, rows);
#undef PIECE
  return used;
}

/* shares = softmax(scores) */
static void make_shares(const float *scores, int64_t num, float *shares) {
  f16x sum = all16(0.0f);
  float most = scores[0];
  for (int64_t i = 0; i < num; i++) {
    shares[i] = scores[i];
    if (scores[i] > most) most = scores[i];
  }
  for (int64_t i = num; i % 16; i++) shares[i] = -__builtin_inff();
  for (int64_t i = 0; i < num; i += 16) {
    const f16x x = exp16(sub16(load16(shares + i), all16(most)));
    store16(shares + i, x);
    sum = add16(sum, x);
  }
  const f16x total = all16(sum16(sum));
  for (int64_t i = 0; i < num; i += 16) store16(shares + i, div16(load16(shares + i), total));
}

/* The experts of one row, those of the greatest shares, the lower number first among equals, and their weights. Where a
 * share is no number, all of them are, and some expert is taken. */
static void choose_experts(const experts_args *a, float *shares, int32_t *chosen, float *weights) {
  enum { TAKEN = -1 };
  float total = 0.0f;
  for (int64_t k = 0; k < a->num_chosen; k++) {
    int64_t best = TAKEN;
    for (int64_t e = 0; e < a->num_experts; e++) {
      if (shares[e] != TAKEN && (best == TAKEN || shares[e] > shares[best])) best = e;
    }
    chosen[k] = (int32_t)best;
    weights[k] = shares[best];
    total += weights[k];
    shares[best] = TAKEN;
  }
  for (int64_t k = 0; a->adds_up && k < a->num_chosen; k++) weights[k] /= total;
}

static float sigmoid(float x) {
  float all[16];
  store16(all, div16(all16(1.0f), add16(all16(1.0f), exp16(all16(-x)))));
  return all[0];
}

/* Which rows an expert has, and by what their results are multiplied; returns how many. */
static int64_t rows_of(const experts_args *a, int64_t expert, int64_t rows, const room *r) {
  const int64_t k = a->num_chosen;
  int64_t found = 0;
  if (expert == a->num_experts) { /* the shared one */
    for (int64_t row = 0; row < rows; row++) {
      r->places[row] = (int32_t)row;
      r->place_weights[row] = sigmoid(r->scores[row * a->router->outputs + expert]);
    }
    return rows;
  }
  for (int64_t i = 0; i < rows * k; i++) {
    if (r->chosen[i] != expert) continue;
    r->places[found] = (int32_t)(i / k);
    r->place_weights[found++] = r->weights[i];
  }
  return found;
}

int run_experts(const experts_args *a, int64_t rows, team *team) {
  const int64_t size = a->experts[0]->inputs, outputs = a->router->outputs;
  room r;
  float *memory = scratch(SCRATCH_EXPERTS, 4 * lay_out(a, rows, &r, NULL));
  if (!memory) return NO_MEMORY;
  lay_out(a, rows, &r, memory);
  const float *from = a->rows;
  if (a->norm) norm_rows(a->norm, a->rows, r.rows, rows, team), from = r.rows;
  const linear_args routing = {from, NULL, {NULL, 1.0, 0.0, NULL, r.scores}, a->router};
  int failed = run_linear(&routing, rows, team);
  for (int64_t row = 0; row < rows; row++) {
    make_shares(r.scores + row * outputs, a->num_experts, r.shares);
    choose_experts(a, r.shares, r.chosen + row * a->num_chosen, r.weights + row * a->num_chosen);
  }
  memset(r.sums, 0, (size_t)(4 * rows * size));
  for (int64_t e = 0; e < outputs && !failed; e++) {
    const int64_t count = rows_of(a, e, rows, &r);
    if (!count) continue;
    for (int64_t i = 0; i < count; i++) memcpy(r.gathered + i * size, from + r.places[i] * size, (size_t)(4 * size));
    const mlp_args block = {r.gathered, NULL, {NULL, 1.0, 0.0, NULL, r.products},
                            a->experts[2 * e], a->experts[2 * e + 1], a->activation};
    failed = run_mlp(&block, count, team);
    for (int64_t i = 0; i < count; i++) {
      const f16x weight = all16(r.place_weights[i]);
      float *sum = r.sums + r.places[i] * size;
      for (int64_t d = 0; d < size; d += 16) {
        const f16x x = mul16(load_some(r.products + i * size + d, size - d), weight);
        store_some(sum + d, add16(load_some(sum + d, size - d), x), size - d);
      }
    }
  }
  for (int64_t i = 0; i < rows * size; i += 16) {
    f16x x = load_some(r.sums + i, rows * size - i);
    if (a->residual) x = add16(load_some(a->residual + i, rows * size - i), x);
    store_some(a->out + i, x, rows * size - i);
  }
  return failed;
}
