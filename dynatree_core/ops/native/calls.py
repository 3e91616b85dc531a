"""Calling the library: each operator is a record of 8-byte fields, as `source/ops.h` has them."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, get_args

import torch
from torch import Tensor

from dynatree_core.errors import InputError
from dynatree_core.ops.layout import KINDS, PLAIN
from dynatree_core.ops.matrix import PackedMatrix
from dynatree_core.ops.native.loading import library
from dynatree_core.ops.signature import (
    NO_SUCH_OUTPUT,
    NO_SUCH_SLOTS,
    Activation,
    Experts,
    Norm,
    Rotary,
    Slabs,
    Visible,
)

__all__ = [
    "Recording",
    "experts",
    "is_recording",
    "linear",
    "lookup",
    "mlp",
    "norm",
    "recorded",
    "rope_write",
    "totals",
    "tree_attention",
]

RECORD = 256  # bytes
NO_MEMORY, NO_SUCH_SLOT, NO_SUCH_OUT = 1, 2, 3  # what the library answers where something is wrong
NORM, LINEAR, MLP, ROPE_WRITE, ATTENTION, LOOKUP, EXPERTS, TOTALS = range(8)
KIND_CODES = {name: code for code, name in enumerate((*PLAIN, *KINDS))}
ACTIVATION_CODES = {name: code for code, name in enumerate(get_args(Activation))}

_matrix_fields = struct.Struct("=7q")
_norm_fields = struct.Struct("=4q2d")
_norm_record = struct.Struct("=q qq qddqq q 184x")
_linear_record = struct.Struct("=q qq qddqq qq 176x")
_mlp_record = struct.Struct("=q qq qddqq qqq 168x")
_rope_record = struct.Struct("=q 3q 5q 2q 2q 2q 4q dq 88x")
_attention_record = struct.Struct("=q 4q 5q 5q q 2d 112x")
_lookup_record = struct.Struct("=q 3q 224x")
_experts_record = struct.Struct("=q 4q 2q 4q 168x")
_totals_record = struct.Struct("=q 3q 224x")
_products = (_norm_record, _linear_record, _mlp_record, _experts_record, _lookup_record, _totals_record)
_records = (*_products, _rope_record, _attention_record)
assert all(record.size == RECORD for record in _records)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _describe(kept: dict[Any, Any], key: Hashable, fields: bytes) -> None:
    """Keep a description and its address. The first stays: another thread may have written that address down."""
    buffer = ctypes.create_string_buffer(fields, len(fields))
    kept.setdefault(key, (buffer, ctypes.addressof(buffer)))


def _matrix_address(packed: PackedMatrix) -> int:
    """Of the matrix's description, which is written once and kept with it."""
    kept = packed.kept
    if "described" not in kept:
        fields = _matrix_fields.pack(
            KIND_CODES[packed.kind],
            packed.num_outputs,
            packed.num_inputs,
            packed.data.shape[1],
            packed.activations == "int8",
            packed.data.data_ptr(),
            _address(packed.bias),
        )
        _describe(kept, "described", fields)
    address: int = kept["described"][1]
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
        _describe(kept, size, fields)
    address: int = kept[size][1]
    return address


class Recording:
    """Operators written down by `recorded`, and what they need: the tensors that they were called with must live on."""

    def __init__(self) -> None:
        self._records = bytearray()
        self._rows: list[int] = []  # that the tensors of each operator have

    def add(self, record: bytes, num_rows: int) -> None:
        self._records += record
        self._rows.append(num_rows)

    def run(self, num_rows: int) -> None:
        """Compute them one behind the other, each for the first rows of its tensors, as many as are asked for.

        Raises:
            InputError: slots that are not in the cache, or more rows than the tensors have.
        """
        if num_rows > min(self._rows, default=num_rows):
            raise InputError(
                f"operators are computed for as many rows at most as their tensors have, {min(self._rows)} here, got "
                f"{num_rows}; write them down with larger ones"
            )
        _compute(bytes(self._records), len(self._records) // RECORD, num_rows)


_recording: ContextVar[Recording | None] = ContextVar("dynatree_recording", default=None)


@contextmanager
def recorded() -> Iterator[Recording]:
    """Write down the operators of the block, whose results must be given as `out`, instead of computing them.

    Numbers of rows are not written down, but what tensors are: their addresses. So what changes from one time to the
    next is written into the same tensors.
    """
    recording = Recording()
    token = _recording.set(recording)
    try:
        yield recording
    finally:
        _recording.reset(token)


def is_recording() -> bool:
    """Whether operators are written down just now instead of computed."""
    return _recording.get() is not None


def _run(record: bytes, num_rows: int) -> None:
    recording = _recording.get()
    if recording is None:
        _compute(record, 1, num_rows)
    else:
        recording.add(record, num_rows)


def _result(out: Tensor | None, make: Callable[[], Tensor]) -> Tensor:
    """Where a result is written: what was given, or a new tensor."""
    if out is None and is_recording():
        raise InputError(
            "the result of an operator that is written down must be given as `out`, got none; a new tensor would be "
            "gone before it is written to"
        )
    return make() if out is None else out


def _compute(records: bytes, count: int, num_rows: int) -> None:
    wrong = library().run(records, count, num_rows, torch.get_num_threads())
    if wrong == NO_MEMORY:
        raise MemoryError("there is no memory for the intermediate results of an operator")
    if wrong == NO_SUCH_SLOT:
        raise InputError(NO_SUCH_SLOTS)
    if wrong == NO_SUCH_OUT:
        raise InputError(NO_SUCH_OUTPUT)


def norm(rows: Tensor, norm: Norm, *, residual: Tensor | None, out: Tensor | None) -> Tensor:
    num_rows, size = rows.shape
    out = _result(out, lambda: torch.empty_like(rows))
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
    totals: Tensor | None,
) -> Tensor:
    num_rows, num_inputs = rows.shape
    out = _result(out, lambda: rows.new_empty(num_rows, packed.num_outputs))
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
            _address(totals),
        ),
        num_rows,
    )
    return out


def lookup(packed: PackedMatrix, outputs: Tensor, *, out: Tensor | None) -> Tensor:
    num_rows = outputs.numel()
    out = _result(out, lambda: torch.empty(num_rows, packed.num_inputs, dtype=packed.dtype, device="cpu"))
    _run(_lookup_record.pack(LOOKUP, _matrix_address(packed), outputs.data_ptr(), out.data_ptr()), num_rows)
    return out


def totals(rows: Tensor, *, out: Tensor | None) -> Tensor:
    num_rows, size = rows.shape
    out = _result(out, lambda: rows.new_empty(num_rows, 3))
    _run(_totals_record.pack(TOTALS, rows.data_ptr(), out.data_ptr(), size), num_rows)
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
    out = _result(out, lambda: rows.new_empty(num_rows, outer.num_outputs))
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


def _experts_address(experts: Experts) -> int:
    """Of the list of all experts' matrices, which is written once and kept with them."""
    kept = experts.kept
    if "described" not in kept:
        pairs = zip(experts.inner, experts.outer, strict=True)
        addresses = [_matrix_address(matrix) for pair in pairs for matrix in pair]
        _describe(kept, "described", struct.pack(f"={len(addresses)}q", *addresses))
    address: int = kept["described"][1]
    return address


def experts(
    rows: Tensor, experts: Experts, *, norm: Norm | None, residual: Tensor | None, out: Tensor | None
) -> Tensor:
    num_rows, size = rows.shape
    out = _result(out, lambda: torch.empty_like(rows))
    _run(
        _experts_record.pack(
            EXPERTS,
            *(rows.data_ptr(), _norm_address(norm, size), _address(residual), out.data_ptr()),
            *(_matrix_address(experts.router), _experts_address(experts)),
            *(experts.num_routed, experts.num_chosen, experts.adds_up, ACTIVATION_CODES[experts.activation]),
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
    slabs: Slabs,
    lanes: Tensor,
    slots: Tensor,
    *,
    num_heads: int,
    rotary: Rotary | None,
    query_norm: Norm | None,
    key_norm: Norm | None,
    clip: float | None,
    growth: Tensor | None,
    out: Tensor | None,
) -> Tensor:
    num_rows, key_heads, head_dim = rows.shape[0], slabs.num_key_heads, slabs.head_dim
    out = _result(out, lambda: rows.new_empty(num_rows, num_heads, head_dim))
    query_norm_at, query_norm_heads = _head_norm(query_norm, num_heads, head_dim)
    key_norm_at, key_norm_heads = _head_norm(key_norm, key_heads, head_dim)
    cos, sin, half, is_interleaved = 0, 0, 0, False
    if rotary is not None:
        cos, sin, half = rotary.cos.data_ptr(), rotary.sin.data_ptr(), rotary.cos.shape[1]
        is_interleaved = rotary.is_interleaved
    _run(
        _rope_record.pack(
            ROPE_WRITE,
            *(rows.data_ptr(), out.data_ptr(), slabs.table.data_ptr()),
            *(len(slabs.table), num_heads, key_heads, head_dim, slabs.value_dim),
            *(lanes.data_ptr(), slots.data_ptr(), cos, sin, half, is_interleaved),
            *(query_norm_at, key_norm_at, query_norm_heads, key_norm_heads),
            *(clip or 0.0, _address(growth)),
        ),
        num_rows,
    )
    return out


def tree_attention(
    queries: Tensor,
    slabs: Slabs,
    visible: Visible,
    *,
    scale: float,
    soft_cap: float | None,
    sinks: Tensor | None,
    out: Tensor | None,
) -> Tensor:
    num_rows, heads, head_dim = queries.shape
    out = _result(out, lambda: queries.new_empty(num_rows, heads * slabs.value_dim))
    seen = (visible.lanes, visible.start, visible.end, visible.own_start, visible.own)
    _run(
        _attention_record.pack(
            ATTENTION,
            *(queries.data_ptr(), _address(sinks), out.data_ptr(), slabs.table.data_ptr()),
            *(len(slabs.table), heads, slabs.num_key_heads, head_dim, slabs.value_dim),
            *map(Tensor.data_ptr, seen),
            visible.own.numel(),
            scale,
            soft_cap or 0.0,
        ),
        num_rows,
    )
    return out
