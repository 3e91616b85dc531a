#include "ops.h"

typedef struct { const op *ops; int64_t count, rows; int failed; } call;

static void run_all(void *given, team *team) {
  call *c = given;
  for (int64_t i = 0; i < c->count && !c->failed; i++) {
    const op *one = c->ops + i;
    switch (one->code) {
      case OP_NORM: c->failed = run_norm(&one->of.norm, c->rows, team); break;
      case OP_LINEAR: c->failed = run_linear(&one->of.linear, c->rows, team); break;
      case OP_MLP: c->failed = run_mlp(&one->of.mlp, c->rows, team); break;
      case OP_ROPE_WRITE: c->failed = run_rope_write(&one->of.rope, c->rows, team); break;
      case OP_ATTENTION: c->failed = run_attention(&one->of.attention, c->rows, team); break;
      case OP_LOOKUP: c->failed = run_lookup(&one->of.lookup, c->rows); break;
      case OP_EXPERTS: c->failed = run_experts(&one->of.experts, c->rows, team); break;
      case OP_TOTALS: c->failed = run_totals(&one->of.totals, c->rows, team); break;
    }
  }
}

int dynatree_run(const op *ops, int64_t count, int64_t rows, int64_t threads) {
  call c = {ops, count, rows, 0};
  if (rows > 0) with_team(run_all, &c, threads);
  return c.failed;
}

const char *dynatree_source(void) { return SOURCE_DIGEST; }
