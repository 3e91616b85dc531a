"""Fused operators for passes of few rows on a CPU: what a layer of a model is put together from.

`signature` says what each takes and gives, and in which order it adds. There are two implementations under the same
names: `reference` in plain torch, which is the oracle, and `native` in C. A third, for GPUs, takes the weights as they
lie in a module (`dynatree_core.ops.triton.operators`). What is called here goes to the C library, or
to the reference where that is asked for (`using("reference")`), where tensors are float64, or where the library cannot
be used, for which `reason_unavailable` says why. Only the library promises equal bits for any number of rows.

Weights are laid out once, by `pack`, `pack_blocks` or `quantise`. Operators that follow each other again and again, as
those of a model's pass, may be written down once and then computed in one call of the library: `recorded`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal

import torch
from torch import Tensor

from dynatree_core.errors import InputError
from dynatree_core.ops import native, reference
from dynatree_core.ops.matrix import (
    INTEGER_KINDS,
    Activations,
    PackedMatrix,
    pack,
    pack_blocks,
    quantise,
    with_activations,
)
from dynatree_core.ops.native import Recording, reason_missing, reason_unavailable, recorded
from dynatree_core.ops.signature import (
    ACTIVATIONS,
    Activation,
    Experts,
    Norm,
    Rotary,
    Slabs,
    Visible,
    check_attention,
    check_experts,
    check_linear,
    check_lookup,
    check_mlp,
    check_norm,
    check_rope_write,
    check_totals,
)

__all__ = [
    "ACTIVATIONS",
    "INTEGER_KINDS",
    "Activation",
    "Activations",
    "Experts",
    "Norm",
    "PackedMatrix",
    "Recording",
    "Rotary",
    "Slabs",
    "Visible",
    "can_record",
    "experts",
    "linear",
    "lookup",
    "mlp",
    "norm",
    "pack",
    "pack_blocks",
    "quantise",
    "reason_missing",
    "reason_unavailable",
    "recorded",
    "rope_write",
    "totals",
    "tree_attention",
    "using",
    "with_activations",
]

Implementation = Literal["native", "reference"]
_asked: ContextVar[Implementation | None] = ContextVar("dynatree_ops", default=None)


@contextmanager
def using(implementation: Implementation) -> Iterator[None]:
    """Compute all operators of the block by one implementation.

    Raises:
        InputError: the library was asked for and cannot be used.
    """
    if implementation == "native" and (reason := reason_unavailable()) is not None:
        raise InputError(f"the operators' library cannot be used: {reason}")
    token = _asked.set(implementation)
    try:
        yield
    finally:
        _asked.reset(token)


def _of(dtype: torch.dtype) -> Any:
    """The module that computes for rows of a dtype."""
    if can_record(dtype):
        return native
    if native.is_recording():
        raise InputError(
            f"only operators that the library computes can be written down, got {dtype} rows for the reference; call "
            "them outside of `recorded`"
        )
    return reference


def can_record(dtype: torch.dtype) -> bool:
    """Whether operators for rows of a dtype are computed by the library, so that `recorded` serves."""
    return _asked.get() != "reference" and dtype != torch.float64 and reason_unavailable() is None


def norm(rows: Tensor, norm: Norm, *, residual: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """Norm rows, and add them to a residual.

    Args:
        rows: [rows, size]
        norm: which.
        residual: [rows, size], or None.
        out: [rows, size], where the result is written; may be `rows` or `residual`.

    Returns:
        [rows, size]

    Raises:
        InputError: shapes, dtypes or devices that do not fit; so with all operators.
    """
    check_norm(rows, norm, residual, out)
    result: Tensor = _of(rows.dtype).norm(rows, norm, residual=residual, out=out)
    return result


def linear(
    rows: Tensor,
    packed: PackedMatrix,
    *,
    norm: Norm | None = None,
    after: Norm | None = None,
    residual: Tensor | None = None,
    scale: float = 1.0,
    soft_cap: float | None = None,
    out: Tensor | None = None,
    totals: Tensor | None = None,
) -> Tensor:
    """Multiply rows with a matrix: residual + scale * after(norm(rows) @ matrix.T + bias).

    Args:
        rows: [rows, inputs]
        packed: the matrix.
        norm: of the rows, before; None: none.
        after: of the product; None: none.
        residual: [rows, outputs], or None.
        scale: of the product.
        soft_cap: cap * tanh(product / cap), as of Gemma 2's logits, before the residual; None: none.
        out: [rows, outputs], where the result is written; may be `residual`, but not `rows`.
        totals: [rows, 3], where `totals` of the result is written, while the result is in the caches. Not with `after`.

    Returns:
        [rows, outputs]
    """
    check_linear(rows, packed, norm, after, residual, out, totals)
    result: Tensor = _of(rows.dtype).linear(
        rows,
        packed,
        norm=norm,
        after=after,
        residual=residual,
        scale=scale,
        soft_cap=soft_cap,
        out=out,
        totals=totals,
    )
    return result


def lookup(packed: PackedMatrix, outputs: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Some rows of a matrix, as of an embedding that is tied to the head.

    Args:
        packed: the matrix.
        outputs: [rows] int64, each below its num_outputs.
        out: [rows, inputs], where they are written.

    Returns:
        [rows, inputs]
    """
    check_lookup(outputs, packed, out)
    result: Tensor = _of(packed.dtype).lookup(packed, outputs, out=out)
    return result


def totals(rows: Tensor, *, out: Tensor | None = None) -> Tensor:
    """What a softmax of each row divides by: log-probabilities are a row less the first two of these numbers.

    Args:
        rows: [rows, size], less than 2^24 numbers each.
        out: [rows, 3], where the result is written.

    Returns:
        [rows, 3]: the greatest number of each row; the logarithm of Σ exp(number - greatest); and the place of the
        first that is the greatest. Where a row has what is no number, the second is none, and the place is that of
        the first such.
    """
    check_totals(rows, out)
    result: Tensor = _of(rows.dtype).totals(rows, out=out)
    return result


def mlp(
    rows: Tensor,
    inner: PackedMatrix,
    outer: PackedMatrix,
    *,
    activation: Activation,
    norm: Norm | None = None,
    after: Norm | None = None,
    residual: Tensor | None = None,
    scale: float = 1.0,
    out: Tensor | None = None,
) -> Tensor:
    """A feed-forward block: residual + scale * after(outer(activation(gate) * up)), gate and up of the normed rows.

    Args:
        rows: [rows, inputs]
        inner: the gate's matrix above the other, twice the outer one's inputs; or one without a gate, whose product is
            activated itself.
        outer: the matrix that leads back.
        activation: by name; `ACTIVATIONS` has transformers' names for them.
        norm, after, residual, scale, out: as of `linear`; out and residual may be `rows`.

    Returns:
        [rows, outputs of `outer`]
    """
    check_mlp(rows, inner, outer, activation, norm, after, residual, out)
    result: Tensor = _of(rows.dtype).mlp(
        rows, inner, outer, activation=activation, norm=norm, after=after, residual=residual, scale=scale, out=out
    )
    return result


def experts(
    rows: Tensor,
    experts: Experts,
    *,
    norm: Norm | None = None,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """A mixture of experts: residual + the sum of a row's experts, each `mlp` of the normed row times its weight.

    Args:
        rows: [rows, size]
        experts: the blocks and their router, which reads the normed rows, too.
        norm, residual, out: as of `mlp`.

    Returns:
        [rows, size]
    """
    check_experts(rows, experts, norm, residual, out)
    result: Tensor = _of(rows.dtype).experts(rows, experts, norm=norm, residual=residual, out=out)
    return result


def rope_write(
    rows: Tensor,
    slabs: Slabs,
    lanes: Tensor,
    slots: Tensor,
    *,
    num_heads: int,
    rotary: Rotary | None = None,
    query_norm: Norm | None = None,
    key_norm: Norm | None = None,
    clip: float | None = None,
    growth: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Norm and rotate queries and keys, and write keys and values into the cache.

    Args:
        rows: [rows, (heads + key heads) * head_dim + key heads * value_dim]: queries, keys and values of each row, from
            one product.
        slabs: keys and values of the cache, which are written in place.
        lanes: [rows] int32: the lane of a row.
        slots: [rows] int32: where its keys and values go. No two rows have the same slot of a lane.
        num_heads: of queries.
        rotary: angles; None: none are rotated.
        query_norm, key_norm: see `Norm`.
        clip: queries, keys and values are cut to this size, above 0, before anything else; None: they are not.
        growth: [rows]: what a row's queries are multiplied with at last; None: nothing.
        out: [rows, heads, head_dim], where the queries are written.

    Returns:
        The queries, [rows, heads, head_dim].
    """
    check_rope_write(rows, slabs, lanes, slots, num_heads, rotary, (query_norm, key_norm), clip, growth, out)
    queries: Tensor = _of(rows.dtype).rope_write(
        rows,
        slabs,
        lanes,
        slots,
        num_heads=num_heads,
        rotary=rotary,
        query_norm=query_norm,
        key_norm=key_norm,
        clip=clip,
        growth=growth,
        out=out,
    )
    return queries


def tree_attention(
    queries: Tensor,
    slabs: Slabs,
    visible: Visible,
    *,
    scale: float,
    soft_cap: float | None = None,
    sinks: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Attend from each row to the slots that it sees.

    Args:
        queries: [rows, heads, head_dim]; heads / key heads neighbours share a key head.
        slabs: as of `rope_write`, with the rows' own keys and values written already.
        visible: the slots, in the order of each row's text.
        scale: of a score.
        soft_cap: cap * tanh(score / cap); None: none.
        sinks: [heads], a score each that takes its share and gives nothing (gpt-oss); None: none.
        out: [rows, heads * value_dim], where the result is written.

    Returns:
        [rows, heads * value_dim]; zeros where a row sees nothing.
    """
    check_attention(queries, slabs, visible, sinks, out)
    result: Tensor = _of(queries.dtype).tree_attention(
        queries, slabs, visible, scale=scale, soft_cap=soft_cap, sinks=sinks, out=out
    )
    return result
