#include "ops.h"

int dynatree_run(const op *ops, int64_t count, int64_t rows, int64_t threads) {
  int failed = 0;
  if (rows <= 0) return 0;
  for (int64_t i = 0; i < count && !failed; i++) {
    switch (ops[i].code) {
      case OP_NORM: failed = run_norm(&ops[i].of.norm, rows, threads); break;
      case OP_LINEAR: failed = run_linear(&ops[i].of.linear, rows, threads); break;
      case OP_MLP: failed = run_mlp(&ops[i].of.mlp, rows, threads); break;
      case OP_ROPE_WRITE: failed = run_rope_write(&ops[i].of.rope, rows, threads); break;
      case OP_ATTENTION: failed = run_attention(&ops[i].of.attention, rows, threads); break;
    }
  }
  return failed;
}

const char *dynatree_source(void) { return SOURCE_DIGEST; }
