"""Calling the library: each operator is a record of 8-byte fields, as `source/ops.h` has them."""

from __future__ import annotations

import ctypes
import struct
from typing import get_args

import torch
from torch import Tensor

from dynatree_core.errors import InputError
from dynatree_core.ops.layout import KINDS, PLAIN
from dynatree_core.ops.matrix import PackedMatrix
from dynatree_core.ops.native.loading import library
from dynatree_core.ops.signature import NO_SUCH_SLOTS, Activation, Norm, Rotary, Visible

__all__ = ["linear", "mlp", "norm", "rope_write", "tree_attention"]

RECORD = 256  # bytes
NO_MEMORY, NO_SUCH_SLOT = 1, 2  # what the library answers where something is wrong
NORM, LINEAR, MLP, ROPE_WRITE, ATTENTION = range(5)
KIND_CODES = {name: code for code, name in enumerate((*PLAIN, *KINDS))}
ACTIVATION_CODES = {name: code for code, name in enumerate(get_args(Activation))}

_matrix_fields = struct.Struct("=6q")
_norm_fields = struct.Struct("=4q2d")
_norm_record = struct.Struct("=q qq qddqq q 184x")
_linear_record = struct.Struct("=q qq qddqq q 184x")
_mlp_record = struct.Struct("=q qq qddqq qqq 168x")
_rope_record = struct.Struct("=q 4q 4q 6q 2q 2q 2q 2q 2q 2q 40x")
_attention_record = struct.Struct("=q 5q 4q 6q 3q 5q 2d 48x")
assert all(
    record.size == RECORD for record in (_norm_record, _linear_record, _mlp_record, _rope_record, _attention_record)
)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _matrix_address(packed: PackedMatrix) -> int:
    """Of the matrix's description, which is written once and kept with it."""
    kept = packed.kept
    if not kept:
        fields = _matrix_fields.pack(
            KIND_CODES[packed.kind],
            packed.num_outputs,
            packed.num_inputs,
            packed.data.shape[1],
            packed.data.data_ptr(),
            _address(packed.bias),
        )
        buffer = ctypes.create_string_buffer(fields, len(fields))
        kept["buffer"], kept["address"] = buffer, ctypes.addressof(buffer)
    address: int = kept["address"]
    return address


def _norm_address(norm: Norm | None, size: int) -> int:
    """Of the norm's description for rows of a size, kept with it."""
    if norm is None:
        return 0
    kept = norm.kept
    if size not in kept:
        fields = _norm_fields.pack(
            1 if norm.kind == "rms" else 2, size, _address(norm.weight), _address(norm.bias), norm.eps, norm.offset
        )
        buffer = ctypes.create_string_buffer(fields, len(fields))
        kept[size] = buffer, ctypes.addressof(buffer)
    address: int = kept[size][1]
    return address


def _run(record: bytes, num_rows: int) -> None:
    wrong = library().run(record, 1, num_rows, torch.get_num_threads())
    if wrong == NO_MEMORY:
        raise MemoryError("there is no memory for the intermediate results of an operator")
    if wrong == NO_SUCH_SLOT:
        raise InputError(NO_SUCH_SLOTS)


def norm(rows: Tensor, norm: Norm, *, residual: Tensor | None, out: Tensor | None) -> Tensor:
    num_rows, size = rows.shape
    out = torch.empty_like(rows) if out is None else out
    ending = 0, 1.0, 0.0, _address(residual), out.data_ptr()
    _run(_norm_record.pack(NORM, rows.data_ptr(), _norm_address(norm, size), *ending, size), num_rows)
    return out


def linear(
    rows: Tensor,
    packed: PackedMatrix,
    *,
    norm: Norm | None,
    after: Norm | None,
    residual: Tensor | None,
    scale: float,
    soft_cap: float | None,
    out: Tensor | None,
) -> Tensor:
    num_rows, num_inputs = rows.shape
    out = rows.new_empty(num_rows, packed.num_outputs) if out is None else out
    _run(
        _linear_record.pack(
            LINEAR,
            rows.data_ptr(),
            _norm_address(norm, num_inputs),
            _norm_address(after, packed.num_outputs),
            scale,
            soft_cap or 0.0,
            _address(residual),
            out.data_ptr(),
            _matrix_address(packed),
        ),
        num_rows,
    )
    return out


def mlp(
    rows: Tensor,
    inner: PackedMatrix,
    outer: PackedMatrix,
    *,
    activation: Activation,
    norm: Norm | None,
    after: Norm | None,
    residual: Tensor | None,
    scale: float,
    out: Tensor | None,
) -> Tensor:
    num_rows, num_inputs = rows.shape
    out = rows.new_empty(num_rows, outer.num_outputs) if out is None else out
    _run(
        _mlp_record.pack(
            MLP,
            rows.data_ptr(),
            _norm_address(norm, num_inputs),
            _norm_address(after, outer.num_outputs),
            scale,
            0.0,
            _address(residual),
            out.data_ptr(),
            _matrix_address(inner),
            _matrix_address(outer),
            ACTIVATION_CODES[activation],
        ),
        num_rows,
    )
    return out


def _head_norm(norm: Norm | None, heads: int, head_dim: int) -> tuple[int, int]:
    """A norm of heads: its description, and how many heads have weights of their own."""
    if norm is None:
        return 0, 1
    assert norm.weight is not None
    is_whole = norm.weight.dim() == 1 and norm.weight.numel() != head_dim
    return _norm_address(norm, heads * head_dim if is_whole else head_dim), heads if norm.weight.dim() == 2 else 1


def rope_write(
    rows: Tensor,
    keys: Tensor,
    values: Tensor,
    lanes: Tensor,
    slots: Tensor,
    *,
    num_heads: int,
    rotary: Rotary | None,
    query_norm: Norm | None,
    key_norm: Norm | None,
    out: Tensor | None,
) -> Tensor:
    num_rows, (_, key_heads, _, head_dim) = rows.shape[0], keys.shape
    out = rows.new_empty(num_rows, num_heads, head_dim) if out is None else out
    query_norm_at, query_norm_heads = _head_norm(query_norm, num_heads, head_dim)
    key_norm_at, key_norm_heads = _head_norm(key_norm, key_heads, head_dim)
    cos, sin, half, is_interleaved = 0, 0, 0, False
    if rotary is not None:
        cos, sin, half = rotary.cos.data_ptr(), rotary.sin.data_ptr(), rotary.cos.shape[1]
        is_interleaved = rotary.is_interleaved
    _run(
        _rope_record.pack(
            ROPE_WRITE,
            *(rows.data_ptr(), out.data_ptr(), keys.data_ptr(), values.data_ptr()),
            *(num_heads, key_heads, head_dim, values.shape[3]),
            *keys.stride()[:3],
            *values.stride()[:3],
            *(keys.shape[0], keys.shape[2]),
            *(lanes.data_ptr(), slots.data_ptr(), cos, sin, half, is_interleaved),
            *(query_norm_at, key_norm_at, query_norm_heads, key_norm_heads),
        ),
        num_rows,
    )
    return out


def tree_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    visible: Visible,
    *,
    scale: float,
    soft_cap: float | None,
    sinks: Tensor | None,
    out: Tensor | None,
) -> Tensor:
    num_rows, heads, head_dim = queries.shape
    out = queries.new_empty(num_rows, heads * values.shape[3]) if out is None else out
    seen = (visible.lanes, visible.start, visible.end, visible.own_start, visible.own)
    _run(
        _attention_record.pack(
            ATTENTION,
            *(queries.data_ptr(), keys.data_ptr(), values.data_ptr(), _address(sinks), out.data_ptr()),
            *(heads, keys.shape[1], head_dim, values.shape[3]),
            *keys.stride()[:3],
            *values.stride()[:3],
            *(keys.shape[0], keys.shape[2], visible.own.numel()),
            *map(Tensor.data_ptr, seen),
            scale,
            soft_cap or 0.0,
        ),
        num_rows,
    )
    return out
