"""Some rows of a packed matrix as a packed matrix, with the same codes: of a head that says some tokens only."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dynatree_core.ops.layout import CHUNK, KINDS, LANES, SUPER, Kind
from dynatree_core.ops.matrix import DTYPES, PackedMatrix

__all__ = ["selected"]


def selected(packed: PackedMatrix, outputs: Tensor) -> PackedMatrix:
    """Some of a matrix's rows, in this order.

    Args:
        packed: the matrix.
        outputs: [n] int64, each below its num_outputs; at least one.
    """
    num_outputs = outputs.numel()
    places = _lane_bytes(packed.kind, packed.num_inputs)  # [16, bytes of a lane]
    rows = outputs.numpy()
    filled = np.concatenate([rows, np.repeat(rows[-1:], -num_outputs % LANES)])  # the last block is filled up
    data = packed.data.numpy()
    chosen = np.empty((len(filled) // LANES, data.shape[1]), np.uint8)
    for first in range(0, len(chosen), CHUNK):  # an index has 8 bytes for each byte
        some = filled[first * LANES : (first + CHUNK) * LANES]
        taken = data[some[:, None] // LANES, places[some % LANES]]  # [outputs, bytes of a lane]
        chosen[first : first + CHUNK, places] = taken.reshape(-1, *places.shape)
    bias = None
    if packed.bias is not None:
        bias = packed.bias[torch.from_numpy(filled)]
        bias[num_outputs:] = 0
    return PackedMatrix(packed.kind, num_outputs, packed.num_inputs, torch.from_numpy(chosen), bias, packed.activations)


def _lane_bytes(kind: str, num_inputs: int) -> npt.NDArray[np.int64]:
    """[16, bytes]: where the bytes of each of a block's outputs are."""
    sizes = [DTYPES[kind].itemsize] * num_inputs if kind in DTYPES else _sizes(KINDS[kind], num_inputs)
    places, start = [], 0
    for size in sizes:
        places.append(start + np.arange(LANES * size).reshape(LANES, size))
        start += LANES * size
    return np.concatenate(places, axis=1)


def _sizes(kind: Kind, num_inputs: int) -> list[int]:
    """The bytes of one output's numbers, in the order in which a block has them."""
    num_scales = 2 if kind.has_min else 1
    group = [1 if kind.is_two_level else 2] * num_scales
    group += [1] * kind.group if kind.bits == 8 else [4] * (kind.group // 8)
    group += [4] if 4 < kind.bits < 8 else []
    num_groups = -(-num_inputs // kind.group)
    if not kind.is_two_level:
        return group * num_groups
    return ([2] * num_scales + group * (SUPER // kind.group)) * (num_inputs // SUPER)
