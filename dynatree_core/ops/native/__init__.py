"""The operators in C: `source` is compiled when the package is installed, `library` loads what fits the CPU."""

from dynatree_core.ops.native.calls import (
    Recording,
    experts,
    is_recording,
    linear,
    lookup,
    mlp,
    norm,
    recorded,
    rope_write,
    totals,
    tree_attention,
)
from dynatree_core.ops.native.loading import Library, library, reason_missing, reason_unavailable, runnable_targets

__all__ = [
    "Library",
    "Recording",
    "experts",
    "is_recording",
    "library",
    "linear",
    "lookup",
    "mlp",
    "norm",
    "reason_missing",
    "reason_unavailable",
    "recorded",
    "rope_write",
    "runnable_targets",
    "totals",
    "tree_attention",
]
