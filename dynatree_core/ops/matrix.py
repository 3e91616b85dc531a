"""Weights laid out once for the kernels: `pack`, `pack_blocks`, `quantise`, and the `PackedMatrix` that they make.

`with_activations` says how the rows are taken that a matrix multiplies."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args

import attrs
import numpy as np
import torch
from torch import Tensor

from dynatree_core.errors import InputError
from dynatree_core.ops.layout import CHUNK, KINDS, LANES, Codes, decode, encode, read_blocks

__all__ = ["INTEGER_KINDS", "Activations", "PackedMatrix", "pack", "pack_blocks", "quantise", "with_activations"]

Activations = Literal["full", "int8"]
INTEGER_KINDS = ("q8_0", "q4_0", "q4_1", "q4_k")  # whose codes have 8 or 4 bits, and a scale for every 32 inputs

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
HUGE_PAGE = 2 << 20


@attrs.frozen(eq=False)
class PackedMatrix:
    """A matrix [outputs, inputs] in the layout of `dynatree_core.ops.layout`, and a bias or none.

    Several matrices that multiply the same rows are one below the other.
    """

    kind: str  # float32, bfloat16, float16, a quantised kind such as q4_1, or float64, which only the reference takes
    num_outputs: int
    num_inputs: int
    data: Tensor  # [blocks of 16 outputs, bytes of a block] uint8, contiguous
    bias: Tensor | None  # [outputs filled up to whole blocks] float32, or float64
    activations: Activations = "full"  # int8: rows are rounded to 8 bits, see `with_activations`
    kept: dict[Any, Any] = attrs.field(factory=dict, init=False, repr=False)  # what an implementation has of it

    @property
    def num_bytes(self) -> int:
        """What the matrix takes up, in bytes, without its bias."""
        return self.data.numel()

    @property
    def num_blocks(self) -> int:
        return self.data.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """What it is computed in: float32, or float64."""
        return torch.float64 if self.kind == "float64" else torch.float32

    def unpacked(self) -> Tensor:
        """[outputs, inputs] float32 (float64): every weight exactly as the kernels compute with it."""
        return self._decoded(self.data)[: self.num_outputs]

    def codes(self) -> Iterator[Codes]:
        """A quantised matrix as published: codes and scales of some hundred outputs at a time, with those filled up."""
        return decode(KINDS[self.kind], self.data.numpy(), self.num_inputs)

    def lookup(self, outputs: Tensor) -> Tensor:
        """Some rows of the matrix, as of an embedding that is tied to the head.

        Args:
            outputs: [n] int64, each below num_outputs.

        Returns:
            [n, inputs] float32 (float64).
        """
        parts = [torch.empty(0, self.num_inputs, dtype=self.dtype)]
        for some in torch.split(outputs, CHUNK * LANES):
            blocks = self._decoded(self.data[some // LANES]).view(-1, LANES, self.num_inputs)
            parts.append(blocks[torch.arange(len(some)), some % LANES])
        return torch.cat(parts)

    def _decoded(self, data: Tensor) -> Tensor:
        """Blocks [n, bytes] as [16 * n, inputs]."""
        if self.kind in DTYPES:
            weights = data.view(DTYPES[self.kind]).view(-1, self.num_inputs, LANES).transpose(1, 2)
            return weights.to(self.dtype).reshape(-1, self.num_inputs)
        parts = [some.weights() for some in decode(KINDS[self.kind], data.numpy(), self.num_inputs)]
        return torch.cat([torch.from_numpy(part) for part in parts] or [torch.empty(0, self.num_inputs)])


def pack(weight: Tensor | Sequence[Tensor], bias: Tensor | Sequence[Tensor] | None = None) -> PackedMatrix:
    """Lay out a matrix in the bits that it has.

    Args:
        weight: [outputs, inputs] float32, bfloat16 or float16 on the CPU; several of one dtype and as many inputs are
            stacked. float64 is for the reference.
        bias: [outputs], or one for each matrix, or None.

    Raises:
        InputError: a matrix of another shape, dtype or device.
    """
    weights = [weight] if isinstance(weight, Tensor) else list(weight)
    names = {dtype: name for name, dtype in DTYPES.items()}
    for one in weights:
        if one.dim() != 2 or one.dtype not in names or one.device.type != "cpu" or one.numel() == 0:
            raise InputError(
                f"a matrix must be [outputs, inputs] of {', '.join(DTYPES)} on the CPU, got {list(one.shape)} "
                f"{one.dtype} on {one.device}; convert it first"
            )
    if len({(one.dtype, one.shape[1]) for one in weights}) != 1:
        raise InputError(
            "matrices of one product must have one dtype and as many inputs, got "
            f"{[(str(one.dtype), one.shape[1]) for one in weights]}; pack them one by one"
        )
    num_inputs, dtype = weights[0].shape[1], weights[0].dtype
    whole = weights[0] if len(weights) == 1 else torch.cat([one.detach() for one in weights])
    num_outputs = len(whole)
    num_blocks = -(-num_outputs // LANES)
    data = _allocate(num_blocks, num_inputs * LANES * dtype.itemsize)
    blocks = data.view(dtype).view(num_blocks, num_inputs, LANES)
    num_whole = num_outputs // LANES
    blocks[:num_whole] = whole.detach()[: num_whole * LANES].view(num_whole, LANES, num_inputs).transpose(1, 2)
    if num_whole < num_blocks:
        blocks[num_whole:] = 0
        blocks[num_whole, :, : num_outputs - num_whole * LANES] = whole.detach()[num_whole * LANES :].t()
    return PackedMatrix(names[dtype], num_outputs, num_inputs, data, _whole_bias(bias, num_outputs, dtype))


def pack_blocks(
    blocks: Tensor | Sequence[Tensor], kind: str, num_inputs: int, bias: Tensor | Sequence[Tensor] | None = None
) -> PackedMatrix:
    """Lay out a quantised matrix of a GGUF file without losing or adding a bit.

    Args:
        blocks: [outputs, bytes of an output] uint8; several are stacked.
        kind: llama.cpp's name of the quantisation, such as "Q4_1".
        num_inputs: weights of an output.
        bias: as of `pack`.

    Raises:
        InputError: a kind that is not known here, or bytes that do not fit it.
    """
    name = kind.lower()
    if name not in KINDS:
        raise InputError(
            f"a quantisation must be one of {', '.join(map(str.upper, KINDS))}, got {kind!r}; dequantise it"
        )
    spec = KINDS[name]
    parts = [blocks] if isinstance(blocks, Tensor) else list(blocks)
    width = num_inputs // spec.published * spec.published_bytes
    for part in parts:
        is_whole = part.dtype == torch.uint8 and part.dim() == 2 and part.shape[1] == width
        if num_inputs % spec.published or not is_whole or not len(part):
            raise InputError(
                f"blocks of {kind} must be uint8 [outputs, {width}] for {num_inputs} inputs, a multiple of "
                f"{spec.published}, got {list(part.shape)} {part.dtype}"
            )
    whole = np.concatenate([part.numpy() for part in parts])
    return _packed(read_blocks(spec, whole, num_inputs), bias)


def quantise(
    weight: Tensor | Sequence[Tensor],
    bits: int,
    group: int = 32,
    bias: Tensor | Sequence[Tensor] | None = None,
) -> PackedMatrix:
    """Round a matrix to fewer bits, weights only, a scale for every 32 inputs of an output.

    Eight bits become the kind q8_0: w = d*q, q from -127 to 127. Four bits become q4_1: w = d*q + m, q from 0 to 15. d
    and m are float16; codes are chosen for d and m as they were rounded.

    Args:
        weight: [outputs, inputs] floating point; several are stacked.
        bits: 8 or 4.
        group: inputs that share a scale: 32.
        bias: as of `pack`.

    Raises:
        InputError: other bits, another group, weights that are not finite or beyond the range of float16.
    """
    if bits not in (4, 8) or group != 32:
        raise InputError(f"weights are rounded to 8 or 4 bits in groups of 32, got {bits} bits in groups of {group}")
    weights = [weight] if isinstance(weight, Tensor) else list(weight)
    whole = torch.cat([one.detach().float() for one in weights]).numpy()
    if not np.isfinite(whole).all() or np.abs(whole).max(initial=0) > np.finfo(np.float16).max:
        raise InputError("weights must be finite and within the range of float16 to be rounded to fewer bits")
    outputs, num_inputs = whole.shape
    missing = -num_inputs % group
    edge = whole[:, -1:].repeat(missing, axis=1)  # the last weight again: it widens no group's range
    groups = np.concatenate([whole, edge], axis=1).reshape(outputs, -1, group)
    mins = None
    if bits == 8:
        scales = (np.abs(groups).max(axis=-1) / 127).astype(np.float16)
        codes = _divided(groups, scales).clip(-127, 127).astype(np.int8)
    else:
        mins = groups.min(axis=-1).astype(np.float16)
        groups = groups - mins.astype(np.float32)[..., None]
        scales = (groups.max(axis=-1).clip(min=0) / 15).astype(np.float16)
        codes = _divided(groups, scales).clip(0, 15).astype(np.uint8)
    spec = KINDS["q8_0" if bits == 8 else "q4_1"]
    return _packed(Codes(spec, num_inputs, codes.reshape(outputs, -1), scales, mins, None, None), bias)


def with_activations(packed: PackedMatrix, activations: Activations) -> PackedMatrix:
    """The same matrix, whose products take their rows otherwise.

    Args:
        packed: the matrix; the result shares its data.
        activations: "full": rows in float32. "int8": every 32 inputs of a row are rounded to 8 bits with a scale of
            their own, and multiplied as whole numbers (`dynatree_core.ops.signature`). A matrix of another kind than
            INTEGER_KINDS has float32 products in any case and is returned as it is.

    Raises:
        InputError: other activations.
    """
    if activations not in get_args(Activations):
        raise InputError(f"activations must be one of {', '.join(get_args(Activations))}, got {activations!r}")
    if activations == packed.activations or packed.kind not in INTEGER_KINDS:
        return packed
    return attrs.evolve(packed, activations=activations)


def _divided(groups: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The nearest codes; 0 where the scale is."""
    wide = scales.astype(np.float32)[..., None]
    nearest: np.ndarray = np.rint(np.divide(groups, wide, out=np.zeros_like(groups), where=wide != 0))
    return nearest


def _packed(matrix: Codes, bias: Tensor | Sequence[Tensor] | None) -> PackedMatrix:
    num_outputs = len(matrix.codes)
    encoded = encode(matrix)
    data = _allocate(*encoded.shape)
    data.numpy()[:] = encoded
    whole = _whole_bias(bias, num_outputs, torch.float32)
    return PackedMatrix(matrix.kind.name, num_outputs, matrix.num_inputs, data, whole)


def _allocate(num_blocks: int, block_bytes: int) -> Tensor:
    """[blocks, bytes] uint8 at a page's beginning; of 2 MB where Linux has such pages, which are read faster."""
    size = num_blocks * block_bytes
    if size < HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        room = torch.empty(size + 64, dtype=torch.uint8)
        start = -room.data_ptr() % 64
        return room[start : start + size].view(num_blocks, block_bytes)
    pages = mmap.mmap(-1, size + HUGE_PAGE)
    pages.madvise(mmap.MADV_HUGEPAGE)
    room = torch.frombuffer(pages, dtype=torch.uint8)  # keeps the pages
    start = -room.data_ptr() % HUGE_PAGE
    return room[start : start + size].view(num_blocks, block_bytes)


def _whole_bias(bias: Tensor | Sequence[Tensor] | None, num_outputs: int, dtype: torch.dtype) -> Tensor | None:
    if bias is None:
        return None
    given = bias if isinstance(bias, Tensor) else torch.cat([one.detach() for one in bias])
    if given.shape != (num_outputs,):
        raise InputError(f"a bias must be [outputs], here [{num_outputs}], got {list(given.shape)}")
    whole = torch.zeros(
        -(-num_outputs // LANES) * LANES, dtype=torch.float64 if dtype == torch.float64 else torch.float32
    )
    whole[:num_outputs] = given.detach()
    return whole
