"""The operators in plain torch: what the kernels are tested against, in float32 and float64. Slow, and easy to read.

The numbers are those of `dynatree_core.ops.signature`; the order of sums is torch's own, so results agree to rounding.
Products of rows in 8 bits alone have the order that is said there, and agree to the last bit.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from dynatree_core.errors import InputError
from dynatree_core.ops.matrix import Activations, PackedMatrix
from dynatree_core.ops.signature import (
    NO_SUCH_OUTPUT,
    Activation,
    Experts,
    Norm,
    Rotary,
    Slabs,
    Visible,
    check_slots,
    check_visible,
)

GROUP = 32  # inputs of a row that are rounded with one scale

__all__ = ["MatrixLike", "experts", "linear", "lookup", "mlp", "norm", "rope_write", "totals", "tree_attention"]


class MatrixLike(Protocol):
    """What is asked of a matrix here: of a `PackedMatrix`, and of those that other implementations have laid out."""

    @property
    def num_outputs(self) -> int: ...

    @property
    def num_inputs(self) -> int: ...

    @property
    def bias(self) -> Tensor | None:
        """[outputs or more], or None."""

    @property
    def activations(self) -> Activations:
        """How the rows are taken that it multiplies; "int8" of a `PackedMatrix` only."""

    def unpacked(self) -> Tensor:
        """[outputs, inputs] float32 (float64)."""


def norm(rows: Tensor, norm: Norm, *, residual: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    return _kept(_add(_normed(rows, norm), residual), out)


def linear(
    rows: Tensor,
    packed: MatrixLike,
    *,
    norm: Norm | None = None,
    after: Norm | None = None,
    residual: Tensor | None = None,
    scale: float = 1.0,
    soft_cap: float | None = None,
    out: Tensor | None = None,
    totals: Tensor | None = None,
) -> Tensor:
    rows = _normed(rows, norm)
    bias = None if packed.bias is None else packed.bias[: packed.num_outputs]
    if packed.activations == "int8":
        assert isinstance(packed, PackedMatrix), "nothing else has codes of whole numbers"
        product = _add(_integer_product(rows, packed), bias)
    else:
        product = functional.linear(rows, packed.unpacked(), bias)
    product = _normed(product, after) * scale
    if soft_cap is not None:
        product = torch.tanh(product / soft_cap) * soft_cap
    product = _add(product, residual)
    if totals is not None:
        totals.copy_(_totals(product))
    return _kept(product, out)


def lookup(packed: PackedMatrix, outputs: Tensor, *, out: Tensor | None = None) -> Tensor:
    if outputs.numel() and not 0 <= int(outputs.min()) <= int(outputs.max()) < packed.num_outputs:
        raise InputError(NO_SUCH_OUTPUT)
    return _kept(packed.lookup(outputs), out)


def totals(rows: Tensor, *, out: Tensor | None = None) -> Tensor:
    return _kept(_totals(rows), out)


def mlp(
    rows: Tensor,
    inner: MatrixLike,
    outer: MatrixLike,
    *,
    activation: Activation,
    norm: Norm | None = None,
    after: Norm | None = None,
    residual: Tensor | None = None,
    scale: float = 1.0,
    out: Tensor | None = None,
) -> Tensor:
    hidden = linear(rows, inner, norm=norm)
    if activation == "clipped_swiglu":
        gate, up = hidden.chunk(2, dim=1)
        hidden = _activated(gate.clamp(max=7.0), "quick_gelu") * (up.clamp(-7.0, 7.0) + 1)
    elif inner.num_outputs == 2 * outer.num_inputs:
        gate, up = hidden.chunk(2, dim=1)
        hidden = _activated(gate, activation) * up
    else:
        hidden = _activated(hidden, activation)
    return linear(hidden, outer, after=after, residual=residual, scale=scale, out=out)


def experts(
    rows: Tensor,
    experts: Experts,
    *,
    norm: Norm | None = None,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    normed = _normed(rows, norm)
    scores = linear(normed, experts.router)
    shares = scores[:, : experts.num_routed].softmax(dim=1)
    ordered = shares.sort(dim=1, descending=True, stable=True)
    weights, chosen = ordered.values[:, : experts.num_chosen], ordered.indices[:, : experts.num_chosen]
    if experts.adds_up:
        weights = weights / weights.sum(dim=1, keepdim=True)
    all_weights = torch.zeros_like(scores).scatter(1, chosen, weights)  # [rows, experts]
    if experts.has_shared:
        all_weights[:, -1] = scores[:, -1].sigmoid()
    total = torch.zeros_like(rows)
    for expert, (inner, outer) in enumerate(zip(experts.inner, experts.outer, strict=True)):
        goes = (chosen == expert).any(dim=1) | (expert == experts.num_routed)
        result = mlp(normed[goes], inner, outer, activation=experts.activation)
        total[goes] += result * all_weights[goes, expert, None]
    return _kept(_add(total, residual), out)


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
    check_slots(slabs, lanes, slots)
    key_heads, head_dim = slabs.num_key_heads, slabs.head_dim
    num_rows = rows.shape[0]
    if clip is not None:
        rows = rows.clamp(-clip, clip)
    q, k, v = torch.split(rows, [num_heads * head_dim, key_heads * head_dim, key_heads * slabs.value_dim], dim=1)
    queries = _rotated(_headwise(q.reshape(num_rows, num_heads, head_dim), query_norm), rotary)
    new_keys = _rotated(_headwise(k.reshape(num_rows, key_heads, head_dim), key_norm), rotary)
    for row, (lane, slot) in enumerate(zip(lanes.tolist(), slots.tolist(), strict=True)):
        keys, values = slabs.lane(lane)
        keys[:, slot] = new_keys[row]
        values[:, slot] = v[row].view(key_heads, -1)
    return _kept((queries if growth is None else queries * growth[:, None, None]).contiguous(), out)


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
    check_visible(slabs, visible)
    num_rows, heads, _ = queries.shape
    repeats = heads // slabs.num_key_heads
    result = queries.new_zeros(num_rows, heads * slabs.value_dim)
    for row in range(num_rows):
        keys, values = slabs.lane(int(visible.lanes[row]))
        start, end = int(visible.start[row]), int(visible.end[row])
        own = visible.own[int(visible.own_start[row]) : int(visible.own_start[row + 1])].long()
        slots = torch.cat([torch.arange(start, end), own])  # in the order of the row's text
        if not slots.numel():
            continue
        seen_keys = keys[:, slots].repeat_interleave(repeats, dim=0)  # [heads, seen, head_dim]
        seen_values = values[:, slots].repeat_interleave(repeats, dim=0)
        scores = (seen_keys @ queries[row][:, :, None])[..., 0] * scale  # [heads, seen]
        if soft_cap is not None:
            scores = torch.tanh(scores / soft_cap) * soft_cap
        if sinks is not None:
            scores = torch.cat([scores, sinks[:, None]], dim=1)
        shares = scores.softmax(dim=1)[:, : slots.numel()]
        result[row] = (shares[:, None] @ seen_values).flatten()
    return _kept(result, out)


def _integer_product(rows: Tensor, packed: PackedMatrix) -> Tensor:
    """[rows, outputs]: products of rows that are rounded to 8 bits, group by group."""
    codes, scales, sums = _rounded(rows)
    parts = []
    for some in packed.codes():
        own = [torch.from_numpy(part) for part in some.in_groups() if part is not None]
        weights = torch.from_numpy(some.codes.astype(np.float64)).view(len(some.codes), -1, GROUP)
        product = rows.new_zeros(len(rows), len(weights))
        for group in range(codes.shape[1]):
            whole = codes[:, group].double() @ weights[:, group].t()  # exact
            product = product + whole.float() * (own[0][:, group] * scales[:, group, None])
            for least in own[1:]:
                product = product + least[:, group] * sums[:, group, None]
        parts.append(product)
    return torch.cat(parts, dim=1)[:, : packed.num_outputs]


def _rounded(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows in 8 bits.

    Returns:
        Codes [rows, groups, 32], and [rows, groups] each the scale and the codes' sum times that.
    """
    groups = functional.pad(rows, (0, -rows.shape[1] % GROUP)).view(len(rows), -1, GROUP)
    greatest = groups.abs().amax(dim=-1)
    scales = torch.where(greatest.isfinite(), greatest, torch.nan) / 127
    nearest = (groups / scales[..., None]).clamp(-127, 127).round()
    codes = torch.where(scales[..., None] > 0, nearest, 0.0)
    return codes, scales, scales * codes.sum(dim=-1)


def _totals(rows: Tensor) -> Tensor:
    greatest, place = rows.max(dim=-1, keepdim=True)  # max() puts what is no number above every number
    total = (rows - greatest).exp().sum(dim=-1, keepdim=True)
    return torch.cat([greatest, total.log(), place.to(rows.dtype)], dim=-1)


def _kept(result: Tensor, out: Tensor | None) -> Tensor:
    return result if out is None else out.copy_(result)


def _add(rows: Tensor, residual: Tensor | None) -> Tensor:
    return rows if residual is None else residual + rows


def _normed(rows: Tensor, norm: Norm | None) -> Tensor:
    """Rows [..., size], each normed over the last dimension."""
    if norm is None:
        return rows
    if norm.kind == "rms":
        rows = rows * torch.rsqrt(rows.pow(2).mean(-1, keepdim=True) + norm.eps)
    else:
        rows = rows - rows.mean(-1, keepdim=True)
        rows = rows * torch.rsqrt(rows.pow(2).mean(-1, keepdim=True) + norm.eps)
    if norm.weight is not None:
        rows = rows * (norm.offset + norm.weight)
    return rows if norm.bias is None else rows + norm.bias


def _headwise(heads: Tensor, norm: Norm | None) -> Tensor:
    """[rows, heads, head_dim], normed over each head, or over all of them together."""
    if norm is None:
        return heads
    assert norm.weight is not None
    is_whole = norm.weight.dim() == 1 and norm.weight.numel() != heads.shape[2]
    return _normed(heads.flatten(1), norm).view_as(heads) if is_whole else _normed(heads, norm)


def _rotated(heads: Tensor, rotary: Rotary | None) -> Tensor:
    """[rows, heads, head_dim] with the first dimensions rotated by the row's angles."""
    if rotary is None:
        return heads
    cos, sin = rotary.cos[:, None], rotary.sin[:, None]
    half = cos.shape[-1]
    turned, rest = heads[..., : 2 * half], heads[..., 2 * half :]
    if rotary.is_interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]
    else:
        first, second = turned[..., :half], turned[..., half:]
    first, second = first * cos + -second * sin, second * cos + first * sin
    if rotary.is_interleaved:
        turned = torch.stack([first, second], dim=-1).flatten(-2)
    else:
        turned = torch.cat([first, second], dim=-1)
    return torch.cat([turned, rest], dim=-1)


def _activated(rows: Tensor, activation: Activation) -> Tensor:
    if activation == "silu":
        return functional.silu(rows)
    if activation == "gelu":
        return functional.gelu(rows)
    if activation == "gelu_tanh":
        return functional.gelu(rows, approximate="tanh")
    if activation == "quick_gelu":
        return rows * torch.sigmoid(1.702 * rows)
    rows = functional.relu(rows)
    return rows.square() if activation == "relu2" else rows
