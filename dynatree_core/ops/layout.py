"""How weights lie in memory: blocks of 16 outputs, inputs ascending, and the codes of quantised weights as published.

One block holds 16 rows of a matrix [outputs, inputs]; the last block is filled up with zeros. In a block the 16
numbers of one input lie side by side, so a kernel loads them at once, multiplies them with that input of a row, and
adds them to 16 sums. Inputs ascend, so a block is read from its first byte to its last.

Quantised kinds keep the codes and the scales of llama.cpp's blocks and only order them anew. A group is the inputs that
share a scale; `w` is a float32, computed as `gguf.dequantize` does, and to the same bits:

| kind       | bits  | group | scale of a group               | weight                |
| ---------- | ----- | ----- | ------------------------------ | --------------------- |
| q8_0       | 8.5   | 32    | d float16                      | w = d*q               |
| q4_0, q5_0 | 4.5, 5.5 | 32 | d float16                      | w = d*(q-8), d*(q-16) |
| q4_1, q5_1 | 5, 6  | 32    | d, m float16                   | w = d*q + m           |
| q4_k, q5_k | 4.6, 5.6 | 32 | D, M float16 of 256; s, t 8 bit | w = (D*s)*q - (M*t)   |
| q6_k       | 6.6   | 16    | D float16 of 256; s int8       | w = (D*s)*(q-32)      |

All products with a code are exact in float32, so a fused multiply-add gives what a product and a sum give.

A group in memory, each field for 16 outputs side by side: its scales; then, for 8 bits, an int8 an input; for fewer
bits, the low 4 bits of 8 inputs as one uint32, lowest bits first, and then the high bits of all the group's inputs as
one uint32. The scales of 256 inputs stand before their first group.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import attrs
import numpy as np
import numpy.typing as npt

__all__ = ["KINDS", "LANES", "PLAIN", "Codes", "Kind", "decode", "encode", "read_blocks"]

LANES = 16  # outputs of a block
SUPER = 256  # inputs that share the scales of scales, in the kinds of two levels
PLAIN = ("float32", "bfloat16", "float16")
CHUNK = 64  # blocks that are ordered at once, so that the work takes little memory beside the matrix

Array = npt.NDArray[Any]


@attrs.frozen
class Kind:
    """A quantised kind."""

    name: str
    bits: int
    group: int  # inputs
    is_two_level: bool
    has_min: bool
    offset: int  # what is taken from a code
    published_bytes: int  # of llama.cpp's block, of `published` inputs
    published: int

    @property
    def group_bytes(self) -> int:
        """Bytes of one group of 16 outputs, without the scales of 256 inputs."""
        num_scales = 2 if self.has_min else 1
        scale_bytes = LANES * num_scales * (1 if self.is_two_level else 2)
        if self.bits == 8:
            return scale_bytes + self.group * LANES
        return scale_bytes + self.group // 8 * 4 * LANES + (4 * LANES if self.bits > 4 else 0)

    @property
    def super_bytes(self) -> int:
        """Bytes of the scales of 256 inputs."""
        return 2 * LANES * (2 if self.has_min else 1) if self.is_two_level else 0

    def block_bytes(self, num_inputs: int) -> int:
        """Bytes of 16 outputs; inputs are filled up to whole groups."""
        num_groups = -(-num_inputs // self.group)
        num_supers = -(-num_inputs // SUPER) if self.is_two_level else 0
        return num_groups * self.group_bytes + num_supers * self.super_bytes


KINDS = {
    kind.name: kind
    for kind in (
        Kind("q8_0", 8, 32, False, False, 0, 34, 32),
        Kind("q4_0", 4, 32, False, False, 8, 18, 32),
        Kind("q4_1", 4, 32, False, True, 0, 20, 32),
        Kind("q5_0", 5, 32, False, False, 16, 22, 32),
        Kind("q5_1", 5, 32, False, True, 0, 24, 32),
        Kind("q4_k", 4, 32, True, True, 0, 144, 256),
        Kind("q5_k", 5, 32, True, True, 0, 176, 256),
        Kind("q6_k", 6, 16, True, False, 32, 210, 256),
    )
}


@attrs.frozen(eq=False)
class Codes:
    """A quantised matrix taken apart."""

    kind: Kind
    num_inputs: int
    codes: Array  # [outputs, inputs filled up to whole groups] uint8, of q8_0 int8
    scales: Array  # [outputs, groups] float16, or int8 or uint8 where there are two levels
    mins: Array | None  # as scales
    super_scales: Array | None  # [outputs, inputs / 256] float16
    super_mins: Array | None

    def weights(self) -> Array:
        """[outputs, inputs] float32, each the number that gguf.dequantize gives."""
        scale = self._by_group(self.scales, self.super_scales)
        codes = self.codes.astype(np.float32).reshape(*scale.shape, self.kind.group)
        weights = (codes - np.float32(self.kind.offset)) * scale[..., None]
        if self.mins is not None:
            least = self._by_group(self.mins, self.super_mins)[..., None]
            weights = weights - least if self.kind.is_two_level else weights + least
        whole: Array = weights.reshape(len(codes), -1)[:, : self.num_inputs]
        return whole

    def in_groups(self) -> tuple[Array, Array | None]:
        """What a group's weights have in common: w = code * scale + least.

        Returns:
            Scale [outputs, groups] float32, and least, or None where that is 0 in the kind.
        """
        scale = self._by_group(self.scales, self.super_scales)
        if self.mins is not None:
            least = self._by_group(self.mins, self.super_mins)
            return scale, -least if self.kind.is_two_level else least
        return scale, np.float32(-self.kind.offset) * scale if self.kind.offset else None

    def _by_group(self, scales: Array, of_scales: Array | None) -> Array:
        """[outputs, groups] float32"""
        wide: Array = scales.astype(np.float32)
        if of_scales is None:
            return wide
        repeated = np.repeat(of_scales.astype(np.float32), SUPER // self.kind.group, axis=1)
        product: Array = repeated[:, : wide.shape[1]] * wide
        return product


def read_blocks(kind: Kind, blocks: Array, num_inputs: int) -> Codes:
    """Take llama.cpp's blocks apart.

    Args:
        kind: of the blocks.
        blocks: [outputs, bytes of an output] uint8, as `gguf.GGUFReader` gives them.
        num_inputs: a multiple of the inputs of a block.
    """
    outputs = len(blocks)
    blocks = blocks.reshape(outputs, num_inputs // kind.published, kind.published_bytes)
    if kind.name == "q6_k":
        return _read_q6_k(kind, blocks, num_inputs)
    if kind.is_two_level:
        return _read_k(kind, blocks, num_inputs)
    fields = _fields(blocks, [2, 2 if kind.has_min else 0, 4 if kind.bits == 5 else 0])
    scales, mins, high, codes = fields
    codes = codes.view(np.int8) if kind.bits == 8 else np.concatenate([codes & 15, codes >> 4], axis=-1)
    if kind.bits == 5:
        codes = codes | np.unpackbits(high, axis=-1, bitorder="little") << 4
    return Codes(
        kind,
        num_inputs,
        codes=codes.reshape(outputs, -1),
        scales=scales.view(np.float16)[..., 0],
        mins=mins.view(np.float16)[..., 0] if kind.has_min else None,
        super_scales=None,
        super_mins=None,
    )


def _fields(blocks: Array, sizes: list[int]) -> list[Array]:
    """Fields [outputs, blocks, size] one behind the other, and the rest."""
    return [np.ascontiguousarray(field) for field in np.split(blocks, np.cumsum(sizes), axis=-1)]


def _read_k(kind: Kind, blocks: Array, num_inputs: int) -> Codes:
    outputs, num_blocks = blocks.shape[:2]
    super_scales, super_mins, packed, high, low = _fields(blocks, [2, 2, 12, 32 if kind.bits == 5 else 0])
    # eight scales and minima of six bits in twelve bytes: four of each, and the high bits of these hold the others'
    first, second, rest = np.split(packed, 3, axis=-1)  # [outputs, blocks, 4]
    scales = np.concatenate([first & 63, (rest & 15) | (first >> 2 & 48)], axis=-1)
    mins = np.concatenate([second & 63, (rest >> 4) | (second >> 2 & 48)], axis=-1)
    low = low.reshape(outputs, num_blocks, 4, 1, 32)
    codes = np.concatenate([low & 15, low >> 4], axis=-2).reshape(outputs, num_blocks, 8, 32)
    if kind.bits == 5:
        codes = codes | (high[:, :, None, :] >> np.arange(8, dtype=np.uint8)[:, None] & 1) << 4
    return Codes(
        kind,
        num_inputs,
        codes=codes.reshape(outputs, -1),
        scales=scales.reshape(outputs, -1),
        mins=mins.reshape(outputs, -1),
        super_scales=super_scales.view(np.float16)[..., 0],
        super_mins=super_mins.view(np.float16)[..., 0],
    )


def _read_q6_k(kind: Kind, blocks: Array, num_inputs: int) -> Codes:
    outputs, num_blocks = blocks.shape[:2]
    low, high, scales, super_scales = _fields(blocks, [128, 64, 16])
    low = low.reshape(outputs, num_blocks, 2, 1, 64)
    low = np.concatenate([low & 15, low >> 4], axis=-2).reshape(outputs, num_blocks, 8, 32)
    high = high.reshape(outputs, num_blocks, 2, 1, 32)
    high = np.concatenate([high >> shift & 3 for shift in (0, 2, 4, 6)], axis=-2).reshape(outputs, num_blocks, 8, 32)
    return Codes(
        kind,
        num_inputs,
        codes=(low | high << 4).reshape(outputs, -1),
        scales=scales.view(np.int8).reshape(outputs, -1),
        mins=None,
        super_scales=super_scales.view(np.float16)[..., 0],
        super_mins=None,
    )


def encode(matrix: Codes) -> Array:
    """The bytes of a quantised matrix [blocks, bytes of a block] uint8, in the order that this page describes."""
    kind, outputs = matrix.kind, len(matrix.codes)
    num_blocks = -(-outputs // LANES)
    data = np.empty((num_blocks, kind.block_bytes(matrix.num_inputs)), np.uint8)
    for first in range(0, num_blocks, CHUNK):
        some = slice(first * LANES, min((first + CHUNK) * LANES, outputs))
        data[first : first + CHUNK] = _encode_some(matrix, some)
    return data


def _encode_some(matrix: Codes, some: slice) -> Array:
    kind = matrix.kind
    scales = _scale_bytes(matrix.scales[some])  # [blocks, groups, bytes]
    fields = [scales] if matrix.mins is None else [scales, _scale_bytes(matrix.mins[some])]
    codes = _in_blocks(matrix.codes[some]).reshape(len(scales), LANES, -1, kind.group)  # [blocks, lanes, groups, k]
    if kind.bits == 8:
        fields.append(codes.transpose(0, 2, 3, 1).reshape(*scales.shape[:2], -1).view(np.uint8))
    else:
        words = codes.astype(np.uint32).reshape(*codes.shape[:3], -1, 8)
        fields.append(_word_bytes(words & 15, 4))
        if kind.bits > 4:
            fields.append(_word_bytes(codes.astype(np.uint32)[..., None, :] >> 4, kind.bits - 4))
    groups = np.concatenate(fields, axis=-1)
    if matrix.super_scales is None:
        return groups.reshape(len(groups), -1)
    above = [_scale_bytes(part[some]) for part in (matrix.super_scales, matrix.super_mins) if part is not None]
    supers = [*above, groups.reshape(len(groups), matrix.super_scales.shape[1], -1)]
    return np.concatenate(supers, axis=-1).reshape(len(groups), -1)


def _in_blocks(rows: Array) -> Array:
    """[outputs, n] as [blocks, 16, n], filled up with zeros."""
    missing = -len(rows) % LANES
    whole = np.concatenate([rows, np.zeros((missing, *rows.shape[1:]), rows.dtype)]) if missing else rows
    return whole.reshape(-1, LANES, *rows.shape[1:])


def _scale_bytes(scales: Array) -> Array:
    """[outputs, n] as [blocks, n, bytes of 16 lanes]"""
    lanes_last = np.ascontiguousarray(_in_blocks(scales).transpose(0, 2, 1))
    return lanes_last.view(np.uint8)


def _word_bytes(codes: Array, bits: int) -> Array:
    """Codes [blocks, lanes, groups, words, codes of a word] uint32 as [blocks, groups, bytes]"""
    shifts = np.arange(codes.shape[-1], dtype=np.uint32) * np.uint32(bits)
    words = np.bitwise_or.reduce(codes << shifts, axis=-1).transpose(0, 2, 3, 1)  # [blocks, groups, words, lanes]
    return np.ascontiguousarray(words).reshape(*words.shape[:2], -1).astype("<u4").view(np.uint8)


def decode(kind: Kind, data: Array, num_inputs: int) -> Iterator[Codes]:
    """Take the bytes of `encode` apart again, 64 blocks at a time."""
    for first in range(0, len(data), CHUNK):
        yield _decode_some(kind, data[first : first + CHUNK], num_inputs)


def _decode_some(kind: Kind, data: Array, num_inputs: int) -> Codes:
    num_blocks = len(data)
    above: list[Array] = []
    groups = data.reshape(num_blocks, 1, -1)
    if kind.is_two_level:
        num_supers = num_inputs // SUPER
        sizes = [2 * LANES] * (2 if kind.has_min else 1)
        *above, groups = _fields(data.reshape(num_blocks, num_supers, -1), sizes)
    groups = groups.reshape(num_blocks, -1, kind.group_bytes)
    size = LANES * (1 if kind.is_two_level else 2)
    low_bytes = LANES * (kind.group if kind.bits == 8 else kind.group // 2)
    scales, mins, low, high = _fields(groups, [size, size if kind.has_min else 0, low_bytes])
    if kind.bits == 8:
        codes = low.view(np.int8).reshape(num_blocks, -1, kind.group, LANES).transpose(0, 3, 1, 2)
    else:
        codes = _read_words(low, 4, 8)
        if kind.bits > 4:
            codes = codes | _read_words(high, kind.bits - 4, kind.group) << 4
    dtype: Any = (np.uint8 if kind.has_min else np.int8) if kind.is_two_level else np.float16
    return Codes(
        kind,
        num_inputs,
        codes=codes.reshape(num_blocks * LANES, -1),
        scales=_by_output(scales, dtype),
        mins=_by_output(mins, dtype) if kind.has_min else None,
        super_scales=_by_output(above[0], np.float16) if above else None,
        super_mins=_by_output(above[1], np.float16) if len(above) > 1 else None,
    )


def _by_output(field: Array, dtype: Any) -> Array:
    """[blocks, n, bytes] as [outputs, n]"""
    scales: Array = field.view(dtype).transpose(0, 2, 1)
    return scales.reshape(-1, scales.shape[2])


def _read_words(field: Array, bits: int, num_codes: int) -> Array:
    """Bytes [blocks, groups, bytes] as codes [blocks, lanes, groups, inputs of a group] uint8"""
    words = field.view("<u4").reshape(*field.shape[:2], -1, LANES).transpose(0, 3, 1, 2)
    shifts = np.arange(num_codes, dtype=np.uint32) * np.uint32(bits)
    codes: Array = (words[..., None] >> shifts & np.uint32((1 << bits) - 1)).astype(np.uint8)
    return codes.reshape(*words.shape[:3], -1)
