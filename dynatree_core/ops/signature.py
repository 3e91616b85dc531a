"""What the operators take and give, and in which order they add: the contract of every implementation.

Arithmetic is float32, whatever the bits of the weights; the reference computes in float64 too. Rows are contiguous
tensors on the CPU. A row's result depends on that row alone, to the last bit: not on how many rows stand beside it, or
which, and not on the number of threads. Threads split outputs, rows or heads, never a sum. So each sum has one order:

*Linear*: out = scale * (sum + bias) (+ residual). The sum of an output begins at 0 and takes its inputs in ascending
order, one fused multiply-add each.

*Linear with rows in 8 bits* (`with_activations`): every 32 inputs of a row, a group, become whole numbers from -127 to
127, input / scale rounded to the nearest, of two to the even one; scale is the group's greatest size / 127. An output's
sum begins at 0 and takes the groups in ascending order: first the products of whole numbers, whose sum is exact, times
both scales, sum + whole * (scale of the weights * scale of the row); then, where the kind's weights are not multiples
of their scale, sum + least * (scale of the row * the codes' sum). None of this is fused, so that all targets and the
reference have the same bits. A group with a NaN or an infinite input makes NaN of all the row's outputs; one of zeros,
or so small that its scale is 0 in float32, adds nothing.

*Norm*: sums over a row have 16 lanes: element i is added to lane i % 16, ascending. Then lane j takes lane j + 8, then
j + 4, j + 2, j + 1. What is missing in the last 16 is 0. With r = 1 / sqrt(sum / n + eps), RMS is (x * r) * (offset +
weight) for the sum of squares, and layer is ((x - mean) * r) * weight + bias for that of squared differences.

*Attention*: scores of a row and a head in the order of the slots that the row sees; a score is a sum over the head's
dimensions in 16 lanes as of a norm, with fused multiply-adds, then scaled, then capped. The greatest score is taken
from all; the sum of the exponentials has 16 lanes over the slots' order, and a sink comes last; each dimension of the
values begins at 0 and takes the slots in their order, one fused multiply-add each, and is divided by the sum at last.
So what counts is a slot's place among those that the row sees: where it lies in the cache, and whether it is given in
the run or in the list, changes no bit.

*Experts*: a softmax of a row's scores, as of attention, gives each expert's share. The greatest are taken, of equal
ones that with the lower number first, and a row's weights are their shares, or those divided by their sum, from the
greatest on. The sum of a row begins at 0 and takes its experts by number, the shared one last: each result times its
weight, rounded, then added.

*Totals*: each 128 elements are a part, whose exponentials, less the part's greatest, have 16 lanes as of a norm. The
sums of the parts, each times the exponential of its greatest less that of all, have 16 lanes over the parts' order.

*exp, tanh, erf* are polynomials of the library, the same for every element wherever it stands.

On CPUs without fused multiply-adds (x86-64 before 2013) a product is rounded before it is added, so the bits are others
than elsewhere, but for rows in 8 bits; for any number of rows they are equal there too.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any, Literal, get_args

import attrs
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dynatree_core.errors import InputError
from dynatree_core.ops.matrix import PackedMatrix

__all__ = [
    "ACTIVATIONS",
    "NO_SUCH_OUTPUT",
    "NO_SUCH_SLOTS",
    "Activation",
    "Experts",
    "Norm",
    "Rotary",
    "Slabs",
    "Visible",
    "check_attention",
    "check_experts",
    "check_linear",
    "check_lookup",
    "check_mlp",
    "check_norm",
    "check_rope_write",
    "check_slots",
    "check_totals",
    "check_visible",
]

Activation = Literal["silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "relu2", "clipped_swiglu"]
NO_SUCH_OUTPUT = "rows of a matrix that are looked up must be below its number of outputs, and not below 0"
NO_SUCH_SLOTS = (
    "lanes and slots must be in the cache, and a row's run and list must not end before they begin or lie outside of "
    "what is given; the tensors of the call say otherwise"
)

_slab = struct.Struct("=8q")  # of source/ops.h: addresses, strides of a head and a slot, capacity

# by the names of transformers' configurations
ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "relu2": "relu2",
}


@attrs.frozen(eq=False)
class Norm:
    """A norm of rows, with transformers' order of operations.

    Of queries and keys (`rope_write`) the weight says what is one row: [head_dim] is one for each head, with the same
    weights for all; [heads, head_dim] has weights for each; [heads * head_dim] is all heads together.
    """

    kind: Literal["rms", "layer"]
    weight: Tensor | None  # float32 (float64), contiguous; None: ones
    eps: float
    bias: Tensor | None = None  # of a layer norm
    offset: float = 0.0  # is added to the weight: Gemma's 1
    kept: dict[Any, Any] = attrs.field(factory=dict, init=False, repr=False)  # what an implementation has of it


@attrs.frozen(eq=False)
class Experts:
    """Feed-forward blocks of which each row goes to some."""

    router: PackedMatrix  # an output for each expert: its score; of the shared one the weight, before a sigmoid
    inner: tuple[PackedMatrix, ...]  # of each expert, as of `mlp`
    outer: tuple[PackedMatrix, ...]
    activation: Activation
    num_chosen: int  # experts of a row, the shared one not counted
    adds_up: bool  # whether the weights of these add up to 1, rather than to the shares that they have of all
    has_shared: bool = False  # whether every row goes to the last one as well
    kept: dict[Any, Any] = attrs.field(factory=dict, init=False, repr=False)  # what an implementation has of it

    @property
    def num_routed(self) -> int:
        """Experts that a row may go to, the shared one not counted."""
        return len(self.inner) - self.has_shared


@attrs.frozen(eq=False)
class Rotary:
    """Angles of the rows of one pass."""

    cos: Tensor  # [rows, rotated dimensions / 2] float32, times the attention's scaling where a family has one
    sin: Tensor  # the same
    is_interleaved: bool = False  # pairs are neighbours (GPT-J), else half the rotated dimensions apart (NeoX)


@attrs.define(eq=False)
class Slabs:
    """Keys and values of a layer, in one cache or several: lanes of the second count on from those of the first."""

    num_key_heads: int
    head_dim: int
    value_dim: int
    dtype: torch.dtype
    table: Tensor  # [lanes at most, 8] int64: what `slab` of source/ops.h says of each; zeros where there is none
    keys: tuple[Tensor, ...] = ()  # of each cache [lanes, key heads, capacity, head_dim]
    values: tuple[Tensor, ...] = ()  # likewise, of value_dim
    _described: list[Any] = attrs.field(factory=list, init=False)

    @classmethod
    def of(cls, keys: Tensor, values: Tensor) -> Slabs:
        """Of one cache.

        Args:
            keys: [lanes, key heads, capacity, head_dim], to be written in place; any strides but the last, which is 1.
            values: the same, of value_dim.

        Raises:
            InputError: shapes, dtypes or devices that do not fit.
        """
        table = torch.zeros(len(keys), _slab.size // 8, dtype=torch.int64)
        slabs = cls(keys.shape[1], keys.shape[3], values.shape[3], keys.dtype, table)
        slabs.hold([keys], [values])
        return slabs

    def hold(self, keys: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        """Keys and values of each cache from now on, in the same table; as of `of`.

        Raises:
            InputError: they do not fit, or have more lanes than the table.
        """
        self.keys, self.values = tuple(keys), tuple(values)
        described = [(one.data_ptr(), one.shape, one.stride(), one.dtype) for one in (*keys, *values)]
        if described != self._described:
            self._described = []  # should this be broken off, the table is written anew
            self._describe(keys, values)
            self._described = described

    def _describe(self, keys: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        lanes = sum(map(len, keys))
        if lanes > len(self.table):
            raise InputError(f"there must be room in the table for all lanes, which is {len(self.table)}, got {lanes}")
        place, numbers = 0, self.table.numpy().data
        for one, other in zip(keys, values, strict=True):
            _check_slabs(self, one, other)
            (key_lane, *key_strides), (value_lane, *value_strides) = one.stride()[:3], other.stride()[:3]
            first, second, size = one.data_ptr(), other.data_ptr(), one.element_size()
            for lane in range(len(one)):
                addresses = first + size * lane * key_lane, second + size * lane * value_lane
                _slab.pack_into(numbers, place, *addresses, *key_strides, *value_strides, one.shape[2], 0)
                place += _slab.size
        self.table[lanes:] = 0

    def release(self) -> None:
        """Keep keys and values in memory no longer than others do."""
        self.keys = self.values = ()

    def lane(self, number: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a lane, each [key heads, capacity, dims]."""
        for keys, values in zip(self.keys, self.values, strict=True):
            if 0 <= number < len(keys):
                return keys[number], values[number]
            number -= len(keys)
        raise InputError(NO_SUCH_SLOTS)


@attrs.frozen(eq=False)
class Visible:
    """Which slots each row sees, in the order of its text: a run, then a list of its own.

    int32 on the CPU. A row that sees nothing gets zeros.
    """

    lanes: Tensor  # [rows] the lane whose slots they are
    start: Tensor  # [rows] the run's first slot
    end: Tensor  # [rows] behind the run's last
    own_start: Tensor  # [rows + 1] where each row's list begins in `own`; the last is its length
    own: Tensor  # [all lists' slots] one list behind the other

    @property
    def num_rows(self) -> int:
        return self.lanes.numel()

    @property
    def num_seen(self) -> Tensor:
        """[rows]: how many slots a row sees."""
        return self.end - self.start + self.own_start.diff()

    @classmethod
    def of_mask(cls, mask: Tensor) -> Visible:
        """From a mask [lanes, rows, slots] bool, whose slots ascend with the text; the first lane's rows come first."""
        return cls(*map(torch.from_numpy, runs_of_mask(mask)))

    def last(self, window: int) -> Visible:
        """Only the last `window` slots of each row: a sliding window, where a row's slots have one position each."""
        own_lens = self.own_start.diff()
        kept = own_lens.clamp(max=window)
        start = torch.maximum(self.start, self.end - (window - kept))
        own_start = torch.zeros_like(self.own_start)
        own_start[1:] = kept.cumsum(0)
        row = torch.arange(self.num_rows).repeat_interleave(own_lens.long())
        place = torch.arange(self.own.numel()) - self.own_start[:-1].long().repeat_interleave(own_lens.long())
        own = self.own[place >= (own_lens - kept)[row]]
        return Visible(self.lanes, start, self.end, own_start, own)


def runs_of_mask(mask: Tensor) -> list[npt.NDArray[np.int32]]:
    """The numbers of `Visible.of_mask`, in its order. For so few of them numpy takes a fraction of torch's time."""
    lanes, rows, slots = mask.shape
    seen = np.zeros((lanes * rows, slots + 1), dtype=np.bool_)  # nobody sees the last one
    seen[:, :slots] = mask.numpy().reshape(lanes * rows, slots)
    places = np.arange(slots + 1)
    start = seen.argmax(axis=1)  # the first that is seen
    end = (~seen & (places >= start[:, None])).argmax(axis=1)  # the first behind it that is not
    is_own = seen & (places >= end[:, None])
    own_start = np.zeros(lanes * rows + 1, dtype=np.int32)
    own_start[1:] = is_own.sum(axis=1).cumsum()
    numbers = np.arange(lanes).repeat(rows), start, end, own_start, is_own.nonzero()[1]
    return [one.astype(np.int32, copy=False) for one in numbers]


def _check(name: str, tensor: Tensor, shape: tuple[int | None, ...], dtype: torch.dtype) -> None:
    """Raise unless a tensor is contiguous on the CPU in a shape; None stands for any size."""
    fits = tensor.dim() == len(shape) and tensor.dtype == dtype and tensor.is_contiguous() and tensor.is_cpu
    for size, wanted in zip(tensor.shape, shape, strict=False):
        fits = fits and wanted in (None, size)
    if fits:
        return
    sizes = ", ".join("any" if size is None else str(size) for size in shape)
    raise InputError(
        f"{name} must be contiguous [{sizes}] {dtype} on the CPU, got {list(tensor.shape)} {tensor.dtype} on "
        f"{tensor.device}{'' if tensor.is_contiguous() else ', not contiguous'}"
    )


def _check_norm(name: str, norm: Norm, size: int, dtype: torch.dtype) -> None:
    for part, tensor in (("weight", norm.weight), ("bias", norm.bias)):
        if tensor is not None:
            _check(f"the {part} of {name}", tensor, (size,), dtype)
    if norm.kind not in ("rms", "layer") or (norm.kind == "rms" and norm.bias is not None):
        raise InputError(f"{name} must be 'rms', without a bias, or 'layer', got {norm.kind!r}")


def check_norm(rows: Tensor, norm: Norm, residual: Tensor | None, out: Tensor | None) -> None:
    """Raise InputError unless `norm` can be computed as it is called."""
    dtype = rows.dtype
    _check("rows", rows, (None, None), dtype)
    _check_norm("the norm", norm, rows.shape[1], dtype)
    for name, tensor in (("residual", residual), ("out", out)):
        if tensor is not None:
            _check(name, tensor, (rows.shape[0], rows.shape[1]), dtype)


def check_linear(
    rows: Tensor,
    packed: PackedMatrix,
    norm: Norm | None,
    after: Norm | None,
    residual: Tensor | None,
    out: Tensor | None,
    totals: Tensor | None = None,
) -> None:
    """Raise InputError unless `linear` can be computed as it is called."""
    dtype = packed.dtype
    _check("rows", rows, (None, packed.num_inputs), dtype)
    if norm is not None:
        _check_norm("the norm", norm, packed.num_inputs, dtype)
    if after is not None:
        _check_norm("the norm after", after, packed.num_outputs, dtype)
    for name, tensor in (("residual", residual), ("out", out)):
        if tensor is not None:
            _check(name, tensor, (rows.shape[0], packed.num_outputs), dtype)
    if totals is not None:
        _check_totals(rows.shape[0], packed.num_outputs, dtype, totals)
        if after is not None:
            raise InputError("totals are of a product without a norm after it; call `totals` on the result")


def check_lookup(outputs: Tensor, packed: PackedMatrix, out: Tensor | None) -> None:
    """Raise InputError unless `lookup` can be computed as it is called."""
    _check("outputs", outputs, (None,), torch.int64)
    if out is not None:
        _check("out", out, (outputs.numel(), packed.num_inputs), packed.dtype)


def check_totals(rows: Tensor, out: Tensor | None) -> None:
    """Raise InputError unless `totals` can be computed as it is called."""
    dtype = torch.float64 if rows.dtype == torch.float64 else torch.float32
    _check("rows", rows, (None, None), dtype)
    _check_totals(rows.shape[0], rows.shape[1], dtype, out)


def _check_totals(num_rows: int, size: int, dtype: torch.dtype, totals: Tensor | None) -> None:
    if not 0 < size < 1 << 24:  # so that each place is a float32
        raise InputError(f"totals are of rows of 1 to {(1 << 24) - 1} numbers, got {size}")
    if totals is not None:
        _check("totals", totals, (num_rows, 3), dtype)


def check_mlp(
    rows: Tensor,
    inner: PackedMatrix,
    outer: PackedMatrix,
    activation: str,
    norm: Norm | None,
    after: Norm | None,
    residual: Tensor | None,
    out: Tensor | None,
) -> None:
    """Raise InputError unless `mlp` can be computed as it is called."""
    if activation not in get_args(Activation):
        raise InputError(f"an activation must be one of {', '.join(get_args(Activation))}, got {activation!r}")
    if activation == "clipped_swiglu" and inner.num_outputs != 2 * outer.num_inputs:
        raise InputError(
            f"clipped_swiglu is for a gate: the inner matrix must have {2 * outer.num_inputs} outputs, got "
            f"{inner.num_outputs}"
        )
    if inner.num_outputs not in (outer.num_inputs, 2 * outer.num_inputs) or inner.dtype != outer.dtype:
        raise InputError(
            f"the inner matrix must have the outer one's {outer.num_inputs} inputs as outputs, or twice as many with a "
            f"gate, got {inner.num_outputs} outputs"
        )
    check_linear(rows, inner, norm, None, None, None)
    if after is not None:
        _check_norm("the norm after", after, outer.num_outputs, outer.dtype)
    for name, tensor in (("residual", residual), ("out", out)):
        if tensor is not None:
            _check(name, tensor, (rows.shape[0], outer.num_outputs), outer.dtype)


def check_experts(
    rows: Tensor, experts: Experts, norm: Norm | None, residual: Tensor | None, out: Tensor | None
) -> None:
    """Raise InputError unless `experts` can be computed as it is called."""
    num_experts, size = len(experts.inner), rows.shape[-1]
    if experts.router.num_outputs != num_experts or len(experts.outer) != num_experts:
        raise InputError(
            f"there must be an output of the router and two matrices for each expert, got {experts.router.num_outputs} "
            f"outputs, {num_experts} inner and {len(experts.outer)} outer matrices"
        )
    if not 1 <= experts.num_chosen <= experts.num_routed:
        raise InputError(
            f"a row goes to 1 to {experts.num_routed} of {experts.num_routed} experts, got {experts.num_chosen}"
        )
    check_linear(rows, experts.router, norm, None, None, None)
    for inner, outer in zip(experts.inner, experts.outer, strict=True):
        check_mlp(rows, inner, outer, experts.activation, None, None, residual, out)
        if outer.num_outputs != size:
            raise InputError(f"an outer matrix must have the rows' {size} outputs, got {outer.num_outputs}")


def _check_slabs(slabs: Slabs, keys: Tensor, values: Tensor) -> None:
    """Raise InputError unless keys and values are [lanes, key heads, capacity, dims] with whole rows."""
    for name, slab, dim in (("keys", keys, slabs.head_dim), ("values", values, slabs.value_dim)):
        shape = slab.shape
        fits = len(shape) == 4 and shape[1] == slabs.num_key_heads and shape[3] == dim and shape[:3] == keys.shape[:3]
        if not fits or slab.dtype != slabs.dtype or not slab.is_cpu or slab.stride(3) != 1:
            raise InputError(
                f"{name} must be [lanes, {slabs.num_key_heads}, capacity, {dim}] {slabs.dtype} on the CPU, with a "
                f"head's dimensions side by side, got {list(shape)} {slab.dtype} with strides {slab.stride()}"
            )


def check_slots(slabs: Slabs, lanes: Tensor, slots: Tensor) -> None:
    """Raise InputError unless all slots are in the cache. The library looks itself, which takes no time there."""
    for lane, slot in zip(lanes.tolist(), slots.tolist(), strict=True):
        if not 0 <= slot < slabs.lane(lane)[0].shape[1]:
            raise InputError(NO_SUCH_SLOTS)


def check_visible(slabs: Slabs, visible: Visible) -> None:
    """The same of the slots that rows see."""
    own_start = visible.own_start.tolist()
    if min(own_start) < 0 or sorted(own_start) != own_start or own_start[-1] > visible.own.numel():
        raise InputError(NO_SUCH_SLOTS)
    for row, (lane, start, end) in enumerate(
        zip(visible.lanes.tolist(), visible.start.tolist(), visible.end.tolist(), strict=True)
    ):
        own = visible.own[own_start[row] : own_start[row + 1]].tolist()
        capacity = slabs.lane(lane)[0].shape[1]
        if not 0 <= start <= end <= capacity or any(not 0 <= slot < capacity for slot in own):
            raise InputError(NO_SUCH_SLOTS)


def check_rope_write(
    rows: Tensor,
    slabs: Slabs,
    lanes: Tensor,
    slots: Tensor,
    num_heads: int,
    rotary: Rotary | None,
    norms: tuple[Norm | None, Norm | None],
    clip: float | None,
    growth: Tensor | None,
    out: Tensor | None,
) -> None:
    """Raise InputError unless `rope_write` can be computed as it is called."""
    dtype, key_heads, head_dim = slabs.dtype, slabs.num_key_heads, slabs.head_dim
    width = (num_heads + key_heads) * head_dim + key_heads * slabs.value_dim
    _check("rows", rows, (None, width), dtype)
    if clip is not None and clip <= 0:
        raise InputError(f"queries, keys and values are clipped to a size above 0, got {clip}")
    if growth is not None:
        _check("growth", growth, (rows.shape[0],), dtype)
    num_rows = rows.shape[0]
    for name, index in (("lanes", lanes), ("slots", slots)):
        _check(name, index, (num_rows,), torch.int32)
    if rotary is not None:
        half = rotary.cos.shape[-1]
        for name, tensor in (("cos", rotary.cos), ("sin", rotary.sin)):
            _check(name, tensor, (num_rows, half), dtype)
        if 2 * half > head_dim:
            raise InputError(f"at most {head_dim} dimensions of a head can be rotated, got {2 * half}")
    for name, norm, heads in (("queries", norms[0], num_heads), ("keys", norms[1], key_heads)):
        if norm is None:
            continue
        sizes = {(head_dim,), (heads, head_dim), (heads * head_dim,)}
        for part in (norm.weight, norm.bias):
            if part is not None and tuple(part.shape) not in sizes:
                raise InputError(f"the norm of {name} must have a weight in one of {sizes}, got {list(part.shape)}")
            if part is not None:
                _check(f"the norm of {name}", part, tuple(part.shape), dtype)
        if norm.weight is None:
            raise InputError(f"the norm of {name} must have a weight: its shape says what is one row")
    if out is not None:
        _check("out", out, (num_rows, num_heads, head_dim), dtype)


def check_attention(
    queries: Tensor,
    slabs: Slabs,
    visible: Visible,
    sinks: Tensor | None,
    out: Tensor | None,
) -> None:
    """Raise InputError unless `tree_attention` can be computed as it is called."""
    dtype, key_heads = slabs.dtype, slabs.num_key_heads
    _check("queries", queries, (None, None, slabs.head_dim), dtype)
    num_rows, heads = queries.shape[:2]
    if heads % key_heads:
        raise InputError(f"query heads must be a multiple of the key heads, got {heads} for {key_heads}")
    for name, size in (("lanes", num_rows), ("start", num_rows), ("end", num_rows), ("own_start", num_rows + 1)):
        _check(f"visible.{name}", getattr(visible, name), (size,), torch.int32)
    _check("visible.own", visible.own, (None,), torch.int32)
    if sinks is not None:
        _check("sinks", sinks, (heads,), dtype)
    if out is not None:
        _check("out", out, (num_rows, heads * slabs.value_dim), dtype)
