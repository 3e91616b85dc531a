"""The tensors of a native pass: rows from layer to layer, and what all layers of the pass have in common.

Operators that are written down (`dynatree_core.ops.recorded`) keep the addresses of their tensors, so those of a
workspace stay where they are, and a pass writes into them what is its own: `Workspace.load`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dynatree_core.cache.base import KeyValueCache
from dynatree_core.errors import CacheError
from dynatree_core.models.blueprint import Blueprint, Layer, Rope
from dynatree_core.ops import PackedMatrix, Rotary, Slabs, Visible
from dynatree_core.ops.signature import runs_of_mask
from dynatree_core.runners.base import Rows
from dynatree_core.tree.flatten import FlatTrees

__all__ = ["Angles", "Placed", "Size", "Workspace", "joined"]

# positions whose angles are computed together. A position's are always computed in the same place of the same vector:
# torch rounds the last elements of a vector otherwise than the others
ANGLES = 256

Arrays = Sequence[npt.NDArray[np.int32]]  # the numbers of a `Visible`, in its order


@attrs.frozen
class Size:
    """What a workspace has room for."""

    rows: int
    lanes: int  # of all caches
    own: int  # slots of all rows' lists, see `Visible`

    def holds(self, other: Size) -> bool:
        return self.rows >= other.rows and self.lanes >= other.lanes and self.own >= other.own

    def joined(self, other: Size) -> Size:
        """Room for either, so that prefills and iterations that take turns have one workspace."""
        return Size(max(self.rows, other.rows), max(self.lanes, other.lanes), max(self.own, other.own))

    def rounded(self) -> Size:
        """Room for more, so that passes that differ a little have one workspace."""
        return Size(_power(self.rows, 32), _power(self.lanes, 4), _power(self.own, 512))


def _power(number: int, least: int) -> int:
    """The next power of 2."""
    return 1 << (max(least, number) - 1).bit_length()


@attrs.define(eq=False)
class Placed:
    """The rows of one cache in a pass: where they go, and what they see."""

    cache: KeyValueCache
    positions: Tensor  # [rows] int64: what the model is told
    slots: npt.NDArray[np.int32]  # [rows]: where their keys and values go
    num_lanes: int
    _flat: FlatTrees
    _visible: dict[int | None, Arrays] = attrs.field(factory=dict)

    @classmethod
    def of(cls, part: Rows, keys: Sequence[Tensor], values: Sequence[Tensor]) -> Placed:
        """Get a cache ready for rows; `keys` and `values` say of each layer which buffers it needs."""
        flat, cache = part.flat, part.cache
        if not cache.can_record:
            raise CacheError(
                f"the native runner writes its rows into a cache that can_record, got a {type(cache).__name__}; use "
                "another runner beside it"
            )
        lanes, num_rows = flat.token_ids.shape
        first_slots = np.array(cache.next_slots(num_rows), dtype=np.int32)
        cache.allocate(keys, values)
        told = flat.position_ids if flat.model_positions is None else flat.model_positions
        slots: npt.NDArray[np.int32] = np.add.outer(first_slots, np.arange(num_rows, dtype=np.int32)).reshape(-1)
        return cls(cache, told.reshape(-1), slots, lanes, flat)

    @property
    def num_rows(self) -> int:
        return self.positions.numel()

    def visible(self, window: int | None) -> Arrays:
        """The slots that each row sees within a window: the numbers of a `Visible`."""
        if window not in self._visible:
            mask = self._flat.visible
            if window is not None:
                distance = self._flat.position_ids[:, :, None] - self._flat.slot_positions[:, None, :]
                mask = mask & (distance < window)
            self._visible[window] = runs_of_mask(mask)
        return self._visible[window]


class Workspace:
    """Room for a pass of a blueprint.

    Args:
        blueprint: what the pass consists of.
        angles: of its rotary embeddings, by `id`.
        dtype: of its rows.
        size: of the greatest pass.
    """

    def __init__(self, blueprint: Blueprint, angles: dict[int, Angles], dtype: torch.dtype, size: Size) -> None:
        self.size = size
        self._angles = angles
        self._layers = blueprint.layers
        layers = blueprint.layers
        matrix = layers[0].qkv
        assert isinstance(matrix, PackedMatrix), "a workspace is for a packed blueprint"
        hidden = matrix.num_inputs
        self.rows = torch.zeros(size.rows, hidden, dtype=dtype)  # what goes into a layer, and comes out
        self.mixed = torch.zeros(size.rows, hidden, dtype=dtype)  # what attention leaves
        heads = max(layer.num_heads * layer.head_dim for layer in layers)
        both = max((layer.num_heads + 2 * layer.num_key_heads) * layer.head_dim for layer in layers)
        self._fused = torch.zeros(size.rows * both, dtype=dtype)
        self._queries = torch.zeros(size.rows * heads, dtype=dtype)
        self._seen = torch.zeros(size.rows * heads, dtype=dtype)
        self.lanes = torch.zeros(size.rows, dtype=torch.int32)
        self.slots = torch.zeros(size.rows, dtype=torch.int32)
        self.visible = {window: _nothing(size) for window in {layer.window for layer in layers}}
        self.rotary = {key: one.room(size.rows) for key, one in angles.items()}
        growths = {layer.query_growth for layer in layers if layer.query_growth is not None}
        self.growth = {growth: torch.zeros(size.rows, dtype=dtype) for growth in growths}
        self.slabs = [_slabs(layer, size.lanes, dtype) for layer in layers]
        # the same numbers as arrays: numpy writes a few of them in less time than torch
        self._lanes, self._slots = self.lanes.numpy(), self.slots.numpy()
        self._visible = {window: _arrays(visible) for window, visible in self.visible.items()}
        self._rotary = {key: (one.cos.numpy(), one.sin.numpy()) for key, one in self.rotary.items()}

    def fused(self, layer: Layer) -> Tensor:
        """[rows, …]: queries, keys and values of a layer."""
        width = (layer.num_heads + 2 * layer.num_key_heads) * layer.head_dim
        return self._fused[: self.size.rows * width].view(-1, width)

    def queries(self, layer: Layer) -> Tensor:
        """[rows, heads, head_dim]"""
        width = layer.num_heads * layer.head_dim
        return self._queries[: self.size.rows * width].view(-1, layer.num_heads, layer.head_dim)

    def seen(self, layer: Layer) -> Tensor:
        """[rows, heads * head_dim]: what heads have found."""
        width = layer.num_heads * layer.head_dim
        return self._seen[: self.size.rows * width].view(-1, width)

    def load(self, rows: Tensor, placed: Sequence[Placed]) -> None:
        """Fill in a pass.

        Args:
            rows: [rows, hidden]: embeddings, those of one cache below those of the other.
            placed: of each cache.
        """
        positions = joined([part.positions for part in placed])
        num_rows = len(rows)
        self.rows[:num_rows] = rows
        np.concatenate([part.slots for part in placed], out=self._slots[:num_rows])
        first_lanes = [0]
        for part in placed:
            first_lanes.append(first_lanes[-1] + part.num_lanes)
        for window, visible in self._visible.items():
            _load_visible(visible, [part.visible(window) for part in placed], first_lanes)
            self._lanes[:num_rows] = visible[0][:num_rows]
        for key, (cos, sin) in self._rotary.items():
            cos[:num_rows], sin[:num_rows] = self._angles[key].at(positions.numpy())
        for (beta, length), growth in self.growth.items():
            # one position a vector: torch rounds a number by its place in one
            factors = [1 + beta * torch.log(1 + torch.floor(position / length)) for position in positions]
            growth[:num_rows] = torch.stack(factors)
        for index, slabs in enumerate(self.slabs):
            slabs.hold([part.cache.keys[index] for part in placed], [part.cache.values[index] for part in placed])

    def release(self) -> None:
        """Hold nobody's keys and values any longer."""
        for slabs in self.slabs:
            slabs.release()


def _slabs(layer: Layer, num_lanes: int, dtype: torch.dtype) -> Slabs:
    table = torch.zeros(num_lanes, 8, dtype=torch.int64)
    return Slabs(layer.num_key_heads, layer.head_dim, layer.head_dim, dtype, table)


def _nothing(size: Size) -> Visible:
    def zeros(number: int) -> Tensor:
        return torch.zeros(number, dtype=torch.int32)

    return Visible(zeros(size.rows), zeros(size.rows), zeros(size.rows), zeros(size.rows + 1), zeros(size.own))


def _arrays(visible: Visible) -> Arrays:
    parts = visible.lanes, visible.start, visible.end, visible.own_start, visible.own
    return [part.numpy() for part in parts]


def _load_visible(room: Arrays, parts: Sequence[Arrays], first_lanes: Sequence[int]) -> None:
    """Write down what the rows of several caches see, one behind the other."""
    lanes, start, end, own_start, own = room
    row = place = 0
    for part, first_lane in zip(parts, first_lanes, strict=False):
        part_lanes, part_start, part_end, part_own_start, part_own = part
        to, own_to = row + len(part_lanes), place + len(part_own)
        np.add(part_lanes, first_lane, out=lanes[row:to])
        start[row:to] = part_start
        end[row:to] = part_end
        np.add(part_own_start, place, out=own_start[row : to + 1])
        own[place:own_to] = part_own
        row, place = to, own_to


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Tensors one behind the other; one alone is not copied."""
    return parts[0].contiguous() if len(parts) == 1 else torch.cat(list(parts))


class Angles:
    """Cosines and sines of one rotary embedding, by the position."""

    def __init__(self, rope: Rope, dtype: torch.dtype) -> None:
        self._rope = rope
        self._dtype = dtype
        self._tables = self._computed(range(1))

    def room(self, num_rows: int) -> Rotary:
        """Angles of so many rows, which are yet to be written."""
        cos, sin = (torch.zeros(num_rows, self._rope.inv_freq.numel(), dtype=self._dtype) for _ in range(2))
        return Rotary(cos, sin, self._rope.is_interleaved)

    def at(self, positions: npt.NDArray[np.int64]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """Cosines and sines of rows at positions [rows], [rows, frequencies] each."""
        tables = self._tables
        last = int(positions.max())
        if last >= len(tables[0]):
            tables = self._tables = self._computed(range(last // ANGLES + 1))
        return tables[0][positions], tables[1][positions]

    def _computed(self, blocks: Sequence[int]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """[positions, frequencies] each, of whole blocks of positions."""
        cosines, sines = [], []
        for block in blocks:
            positions = torch.arange(block * ANGLES, (block + 1) * ANGLES)
            turned = positions[:, None].float() * self._rope.inv_freq
            cosines.append((turned.cos() * self._rope.scaling).to(self._dtype))
            sines.append((turned.sin() * self._rope.scaling).to(self._dtype))
        return torch.cat(cosines).numpy(), torch.cat(sines).numpy()
