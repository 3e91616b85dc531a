"""The operators in C: `source` is compiled when the package is installed, `library` loads what fits the CPU."""

from dynatree_core.ops.native.calls import linear, mlp, norm, rope_write, tree_attention
from dynatree_core.ops.native.loading import Library, library, reason_unavailable, runnable_targets

__all__ = [
    "Library",
    "library",
    "linear",
    "mlp",
    "norm",
    "reason_unavailable",
    "rope_write",
    "runnable_targets",
    "tree_attention",
]
