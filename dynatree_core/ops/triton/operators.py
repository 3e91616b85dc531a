"""The operators by Triton: the third implementation, for GPUs. No GPU has run it yet; its interpreter has, on CPUs.

They are those of `dynatree_core.ops`, but for matrices, which are the module's own parameters (`StackedMatrix`), and
for what is given as `out`. Each is one kernel, an MLP two; a norm behind a product is one more, since it looks at the
whole row. Rows between the kernels are float32. A product has its factors in the matrix's dtype and sums in float32,
and so has attention, with the cache's.

A row's result depends on that row alone, to the last bit, as `dynatree_core.ops.signature` asks. The order is another
one than the library's:

*Linear*: a program has 16 rows, filled up with zeros, and up to 32 outputs, and takes the inputs in blocks, whose size
follows from the matrix alone. Blocks ascend in one accumulator; there are no splits of a sum, and no atomics. Within a
block the order is that of the product of two tiles, whose shapes never change.

*Norm*: blocks as of the product, each summed over its inputs; the sums ascend.

*Attention*: the slots in the order of the row's text, in blocks of `BLOCK_SLOTS` positions counted from the first that
it sees, with the running maximum of flash attention. A row has programs of its own.

What the host does launches and allocates only: it waits for nothing, and reads no number of the device. So a CUDA graph
can hold it, and nothing is checked that lies on the device: slots and lanes must be right. `rope_write` writes to none
outside of the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from triton.runtime import JITFunction

from dynatree_core.errors import InputError
from dynatree_core.ops.signature import Activation, Norm, Rotary, Slabs, Visible
from dynatree_core.ops.triton import kernels
from dynatree_core.ops.triton.matrix import StackedMatrix

__all__ = ["Launch", "TritonOperators", "is_interpreted", "launched"]

BLOCK_ROWS = 16  # the least that a tensor core takes
BLOCK_OUTPUTS = 32
BLOCK_SLOTS = {2: 64, 4: 32}  # by the bytes of a number in the cache
BLOCK_BYTES = 256  # of the inputs of a weight's block

# launches a kernel with a grid, its arguments and its constants
Launch = Callable[..., None]


def launched(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Launch a kernel."""
    kernel[grid](*arguments, **constants)


def is_interpreted() -> bool:
    """Whether Triton interprets kernels, on the CPU: TRITON_INTERPRET was 1 when it was imported."""
    return not isinstance(kernels.linear_kernel, JITFunction)


def _power(number: int) -> int:
    """The next power of 2."""
    return 1 << max(number - 1, 0).bit_length()


def _block(number: int, most: int) -> int:
    """The size of a tile along a dimension: of 16 at least."""
    return max(16, min(most, _power(number)))


def _unit(head_dim: int) -> int:
    """The power of 2, up to 16, of which all steps in a cache are multiples."""
    return min(head_dim & -head_dim, 16)


def _contiguous(**tensors: Tensor | None) -> None:
    """Raise InputError unless all are contiguous float32."""
    for name, tensor in tensors.items():
        if tensor is not None and (tensor.dtype != torch.float32 or not tensor.is_contiguous()):
            raise InputError(f"{name} must be contiguous float32, got {tensor.dtype} with strides {tensor.stride()}")


def _shaped(**shapes: tuple[Tensor | None, tuple[int, ...]]) -> None:
    """Raise InputError unless tensors have their shapes."""
    for name, (tensor, shape) in shapes.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise InputError(f"{name} must be {list(shape)}, got {list(tensor.shape)}")


class TritonOperators:
    """The operators.

    Args:
        launch: what launches a kernel.
    """

    def __init__(self, launch: Launch = launched) -> None:
        self._launch = launch
        self._is_interpreted = is_interpreted()

    def norm(
        self, rows: Tensor, norm: Norm, *, residual: Tensor | None = None, scale: float = 1.0, out: Tensor | None = None
    ) -> Tensor:
        """As `dynatree_core.ops.norm`, with `scale` on the normed rows; `out` may be `residual`, but not `rows`.

        Raises:
            InputError: shapes or dtypes that do not fit; so with all operators.
        """
        num_rows, size = rows.shape
        out = torch.empty_like(rows) if out is None else out
        _contiguous(rows=rows, residual=residual, out=out, weight=norm.weight, bias=norm.bias)
        _shaped(residual=(residual, (num_rows, size)), out=(out, (num_rows, size)))
        _shaped(weight=(norm.weight, (size,)), bias=(norm.bias, (size,)))
        self._launch(
            kernels.norm_kernel,
            (num_rows,),
            *(rows, norm.weight, norm.bias, residual, out, size, norm.eps, norm.offset, scale),
            KIND=norm.kind,
            BLOCK_K=_block(size, 1024),
        )
        return out

    def linear(
        self,
        rows: Tensor,
        matrix: StackedMatrix,
        *,
        norm: Norm | None = None,
        after: Norm | None = None,
        residual: Tensor | None = None,
        scale: float = 1.0,
        soft_cap: float | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """As `dynatree_core.ops.linear`: one kernel, and one more for `after`, beside which there is no `soft_cap`."""
        num_rows, size = rows.shape
        shape = (num_rows, matrix.num_outputs)
        _contiguous(rows=rows, residual=residual, out=out)
        _shaped(rows=(rows, (num_rows, matrix.num_inputs)), residual=(residual, shape), out=(out, shape))
        if after is not None:
            if soft_cap is not None:
                raise InputError("a product is normed or has a soft cap, got both")
            product = self.linear(rows, matrix, norm=norm)
            return self.norm(product, after, residual=residual, scale=scale, out=out)
        out = rows.new_empty(shape) if out is None else out
        weight, bias, kind, eps, offset = _fields(norm, size)
        parts = [*matrix.parts, *(matrix.parts[:1] * (3 - len(matrix.parts)))]
        sizes = [len(part) for part in matrix.parts] if matrix.order is None else [matrix.num_outputs]
        sizes += [0] * (3 - len(sizes))
        blocks = _blocks(matrix)
        self._launch(
            kernels.linear_kernel,
            (-(-num_rows // BLOCK_ROWS), sum(-(-number // blocks["BLOCK_N"]) for number in sizes)),
            *(rows, *parts, matrix.order, matrix.bias, weight, bias, residual, out),
            *(num_rows, size, *sizes, *matrix.parts[0].stride(), eps, offset, scale, soft_cap),
            KIND=kind,
            IS_INTERPRETED=self._is_interpreted,
            **blocks,
        )
        return out

    def mlp(
        self,
        rows: Tensor,
        inner: StackedMatrix,
        outer: StackedMatrix,
        *,
        activation: Activation,
        norm: Norm | None = None,
        after: Norm | None = None,
        residual: Tensor | None = None,
        scale: float = 1.0,
        out: Tensor | None = None,
    ) -> Tensor:
        """As `dynatree_core.ops.mlp`: two kernels, and one more for `after`."""
        num_rows, size = rows.shape
        if inner.num_outputs == 2 * outer.num_inputs:
            gate, up = inner.halves()
        elif inner.num_outputs == outer.num_inputs and len(inner.parts) == 1 and inner.order is None:
            gate, up = None, inner.parts[0]
        else:
            raise InputError(
                f"the inner matrix must have the outer one's {outer.num_inputs} inputs as outputs, or twice as many "
                f"with a gate, got {inner.num_outputs}"
            )
        _contiguous(rows=rows)
        _shaped(rows=(rows, (num_rows, inner.num_inputs)))
        weight, bias, kind, eps, offset = _fields(norm, size)
        num_hidden = len(up)
        gate_bias = inner.bias if gate is not None else None
        up_bias = inner.bias if gate is None or inner.bias is None else inner.bias[num_hidden:]
        hidden = rows.new_empty(num_rows, num_hidden)
        blocks = _blocks(inner)
        self._launch(
            kernels.mlp_kernel,
            (-(-num_rows // BLOCK_ROWS), -(-num_hidden // blocks["BLOCK_N"])),
            *(rows, gate, up, gate_bias, up_bias, weight, bias, hidden),
            *(num_rows, size, num_hidden, *up.stride(), eps, offset),
            KIND=kind,
            ACTIVATION=activation,
            IS_INTERPRETED=self._is_interpreted,
            **blocks,
        )
        return self.linear(hidden, outer, after=after, residual=residual, scale=scale, out=out)

    def rope_write(
        self,
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
        """As `dynatree_core.ops.rope_write`, into a cache of any of the dtypes; its table is on the rows' device."""
        num_rows, key_heads, head_dim, value_dim = rows.shape[0], slabs.num_key_heads, slabs.head_dim, slabs.value_dim
        width = (num_heads + key_heads) * head_dim + key_heads * value_dim
        out = rows.new_empty(num_rows, num_heads, head_dim) if out is None else out
        cos, sin = (None, None) if rotary is None else (rotary.cos, rotary.sin)
        half = 1 if rotary is None else rotary.cos.shape[1]
        _contiguous(rows=rows, cos=cos, sin=sin, growth=growth, out=out)
        _shaped(rows=(rows, (num_rows, width)), out=(out, (num_rows, num_heads, head_dim)))
        _shaped(lanes=(lanes, (num_rows,)), slots=(slots, (num_rows,)), growth=(growth, (num_rows,)))
        _shaped(cos=(cos, (num_rows, half)), sin=(sin, (num_rows, half)))
        query, key = _HeadNorm(query_norm, num_heads, head_dim), _HeadNorm(key_norm, key_heads, head_dim)
        self._launch(
            kernels.rope_write_kernel,
            (num_rows, 3),
            *(rows, slabs.table, _like(slabs), lanes, slots, cos, sin, growth, out),
            *(query.weight, query.bias, key.weight, key.bias, query.step, key.step),
            *(num_heads, key_heads, head_dim, value_dim, half, clip, query.eps, query.offset, key.eps, key.offset),
            QUERY_KIND=query.kind,
            KEY_KIND=key.kind,
            IS_QUERY_WHOLE=query.is_whole,
            IS_KEY_WHOLE=key.is_whole,
            IS_INTERLEAVED=rotary is not None and rotary.is_interleaved,
            BLOCK_HEADS=_power(num_heads),
            BLOCK_KEY_HEADS=_power(key_heads),
            BLOCK_DIM=_power(head_dim),
            BLOCK_VALUE=_power(value_dim),
        )
        return out

    def tree_attention(
        self,
        queries: Tensor,
        slabs: Slabs,
        visible: Visible,
        *,
        scale: float,
        soft_cap: float | None = None,
        sinks: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """As `dynatree_core.ops.tree_attention`."""
        num_rows, num_heads, head_dim = queries.shape
        key_heads, value_dim = slabs.num_key_heads, slabs.value_dim
        out = queries.new_empty(num_rows, num_heads * value_dim) if out is None else out
        if num_heads % key_heads or head_dim != slabs.head_dim:
            raise InputError(
                f"queries must be [rows, a multiple of {key_heads}, {slabs.head_dim}], got {list(queries.shape)}"
            )
        _contiguous(queries=queries, sinks=sinks, out=out)
        _shaped(out=(out, (num_rows, num_heads * value_dim)), sinks=(sinks, (num_heads,)))
        _shaped(lanes=(visible.lanes, (num_rows,)), own_start=(visible.own_start, (num_rows + 1,)))
        self._launch(
            kernels.attention_kernel,
            (num_rows, key_heads),
            *(queries, slabs.table, _like(slabs)),
            *(visible.lanes, visible.start, visible.end, visible.own_start, visible.own, sinks, out),
            *(num_heads, key_heads, head_dim, value_dim, scale, soft_cap),
            BLOCK_HEADS=_block(num_heads // key_heads, 1 << 30),
            BLOCK_SLOTS=BLOCK_SLOTS[slabs.dtype.itemsize],
            BLOCK_DIM=_block(head_dim, 1 << 30),
            BLOCK_VALUE=_block(value_dim, 1 << 30),
            KEY_UNIT=_unit(head_dim),
            VALUE_UNIT=_unit(value_dim),
            IS_INTERPRETED=self._is_interpreted,
        )
        return out

    def angles(self, positions: Tensor, inv_freq: Tensor, scaling: float, is_interleaved: bool) -> Rotary:
        """Cosines and sines of a rotary embedding.

        Args:
            positions: [rows] int64
            inv_freq: [frequencies] float32
            scaling: cosine and sine are multiplied by it.
            is_interleaved: see `Rotary`.
        """
        num_rows, half = positions.numel(), inv_freq.numel()
        cos, sin = (inv_freq.new_empty(num_rows, half) for _ in range(2))
        arguments = (positions, inv_freq, cos, sin, half, scaling)
        self._launch(kernels.angles_kernel, (num_rows,), *arguments, BLOCK=_power(half))
        return Rotary(cos, sin, is_interleaved)

    def growth(self, positions: Tensor, beta: float, length: float) -> Tensor:
        """[rows] float32: 1 + beta * log(1 + floor(position / length)), by which queries grow."""
        out = torch.empty(positions.shape, dtype=torch.float32, device=positions.device)
        self._launch(kernels.growth_kernel, (positions.numel(),), positions, out, float(beta), float(length))
        return out


def _blocks(matrix: StackedMatrix) -> dict[str, int]:
    """The tiles of a product, which follow from its matrix alone."""
    size = matrix.parts[0].element_size()
    return {
        "BLOCK_M": BLOCK_ROWS,
        "BLOCK_N": _block(max(map(len, matrix.parts)), BLOCK_OUTPUTS),
        "BLOCK_K": _block(matrix.num_inputs, BLOCK_BYTES // size),
    }


def _fields(norm: Norm | None, size: int) -> tuple[Tensor | None, Tensor | None, str | None, float, float]:
    """Weight, bias, kind, eps and offset of a norm, or of none."""
    if norm is None:
        return None, None, None, 0.0, 0.0
    _contiguous(weight=norm.weight, bias=norm.bias)
    _shaped(weight=(norm.weight, (size,)), bias=(norm.bias, (size,)))
    return norm.weight, norm.bias, norm.kind, norm.eps, norm.offset


class _HeadNorm:
    """A norm of heads as its kernel takes it."""

    def __init__(self, norm: Norm | None, num_heads: int, head_dim: int) -> None:
        self.weight = self.bias = self.kind = None
        self.eps = self.offset = 0.0
        self.step, self.is_whole = 0, False
        if norm is None:
            return
        if norm.weight is None or tuple(norm.weight.shape) not in (
            (head_dim,), (num_heads, head_dim), (num_heads * head_dim,)
        ):  # fmt: skip
            raise InputError(
                f"the norm of {num_heads} heads of {head_dim} must have a weight for one head or for all, got "
                f"{None if norm.weight is None else list(norm.weight.shape)}"
            )
        _contiguous(weight=norm.weight, bias=norm.bias)
        self.weight, self.bias, self.kind, self.eps, self.offset = (
            norm.weight, norm.bias, norm.kind, norm.eps, norm.offset
        )  # fmt: skip
        is_one_head = norm.weight.numel() == head_dim
        self.is_whole = norm.weight.dim() == 1 and not is_one_head
        self.step = 0 if is_one_head and norm.weight.dim() == 1 else head_dim


def _like(slabs: Slabs) -> Tensor:
    """A tensor of the cache's dtype."""
    return slabs.keys[0]


def slab_table(keys: Sequence[Sequence[Tensor]], values: Sequence[Sequence[Tensor]]) -> Tensor:
    """What kernels know of caches: addresses, strides of a head and a slot, and capacity, of each layer and lane.

    Args:
        keys: of each layer, of each cache, [lanes, key heads, capacity, head_dim]; a head's dimensions side by side.
        values: likewise, of value_dim.

    Returns:
        [layers, lanes of all caches, 8] int64 on the host.

    Raises:
        InputError: shapes, strides or dtypes that do not fit.
    """
    layers = []
    for of_keys, of_values in zip(keys, values, strict=True):
        lanes = []
        for one, other in zip(of_keys, of_values, strict=True):
            alike = one.dim() == other.dim() == 4 and one.shape[:3] == other.shape[:3] and one.dtype == other.dtype
            if not alike or one.stride(3) != 1 or other.stride(3) != 1 or one.shape[1] != of_keys[0].shape[1]:
                raise InputError(
                    "keys and values must be [lanes, key heads, capacity, dims] of one dtype, with a head's dimensions "
                    f"side by side, got {list(one.shape)} {one.dtype} {one.stride()} and {list(other.shape)} "
                    f"{other.dtype} {other.stride()}"
                )
            for tensor in (one, other):
                unit = _unit(tensor.shape[3])
                if any(step % unit for step in tensor.stride()[:3]) or tensor.data_ptr() % (unit * one.element_size()):
                    raise InputError(
                        f"heads of {tensor.shape[3]} numbers must lie at multiples of {unit} numbers, got strides "
                        f"{tensor.stride()} from address {tensor.data_ptr()}"
                    )
            first, second, size = one.data_ptr(), other.data_ptr(), one.element_size()
            for lane in range(len(one)):
                addresses = (first + size * lane * one.stride(0), second + size * lane * other.stride(0))
                lanes.append([*addresses, *one.stride()[1:3], *other.stride()[1:3], one.shape[2], 0])
        layers.append(lanes)
    return torch.tensor(layers, dtype=torch.int64)
