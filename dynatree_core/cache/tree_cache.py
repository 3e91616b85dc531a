"""The cache: preallocated keys and values, and the only module that knows how transformers lays them out.

Each lane holds `lengths[lane]` committed rows, and behind them a block of undecided rows, of the same number in every
lane. A forward pass appends to the block; `commit` gathers the accepted rows of the block into place and forgets the
rest; `rollback` forgets all of it. The cost of a commit follows the path's length, not the context's.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from dynatree_core.cache.base import KeyValueCache
from dynatree_core.errors import CacheError
from dynatree_core.tree.flatten import FlatTrees

__all__ = ["TreeCache"]

_Place = tuple[int, int]  # a shelf, and a buffer on it


class TreeCache(Cache, KeyValueCache):
    """Keys and values of one model, [lanes, heads, capacity, head_dim] a layer.

    Models use it through their public forward. Buffers are allocated by the first forward pass, which is the first to
    know heads, sizes and dtype.

    Args:
        capacity: slots of a lane, for committed and undecided rows together.
        lanes: how many there are; a session has one.
        is_zeroed: whether slots that were never written may be shown to a pass, see `min_slots`.
        num_layers: of the model, where they are known: their buffers are then parts of one, so that a row moves in all
            of them by one operation.
    """

    has_all_rows = True
    can_record = True
    can_grow = True

    def __init__(self, capacity: int, *, lanes: int = 1, is_zeroed: bool = False, num_layers: int = 1) -> None:
        super().__init__(layers=[])
        self.capacity = capacity
        self.min_slots = 0  # slots of the next pass's view at least
        self._is_always_zeroed = is_zeroed or lanes > 1
        self._is_zeroed = self._is_always_zeroed
        self.lengths = [0] * lanes  # committed rows of each lane
        self.keys = []
        self.values = []
        self._num_layers = num_layers
        self._shelves: list[Tensor] = []  # [buffers, lanes, heads, capacity, head_dim] each: what layers are parts of
        self._places: list[tuple[_Place, _Place]] = []  # of each layer's keys and values
        self._taken: set[int] = set()  # lanes that somebody has joined
        self._block_lens: list[int] = []  # per layer: rows appended since the last commit

    @property
    def length(self) -> int:
        """Committed rows of the longest lane."""
        return max(self.lengths)

    @property
    def block_len(self) -> int:
        """Undecided rows behind the committed ones, in each lane; a layer that a model passes over has none."""
        return max(self._block_lens, default=0)

    @property
    def next_place(self) -> int:
        """Where the next token of the longest lane stands; the place of a row is its position."""
        return self.length

    @property
    def max_places(self) -> int:
        """Places that the rows of the next pass may have."""
        return self.capacity - self.length

    def prepare(self, flat: FlatTrees) -> FlatTrees:
        """Get ready for a pass over these rows.

        Returns:
            The rows with the slots that they see in `update`: here all of them, as they are.
        """
        self.min_slots = flat.visible.shape[-1]  # the mask has to span the view
        return flat

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append rows [lanes, heads, rows, head_dim] to a layer's block; called by the model's attention.

        Returns:
            All keys and values that the pass may look at, [lanes, heads, slots, head_dim]. A lane that is shorter
            than the longest has slots at its end that are not its own, which the mask hides.

        Raises:
            CacheError: the rows do not fit.
        """
        while len(self._block_lens) <= layer_idx:
            self._add_layer(key_states, value_states)
        keys, values, block_len = self.keys[layer_idx], self.values[layer_idx], self._block_lens[layer_idx]
        rows = key_states.shape[2]
        self._check_room(block_len, rows)
        for lane, length in enumerate(self.lengths):
            start = length + block_len
            keys[lane, :, start : start + rows] = key_states[lane]
            values[lane, :, start : start + rows] = value_states[lane]
        self._block_lens[layer_idx] = block_len + rows
        slots = max(self.length + block_len + rows, self.min_slots)
        return keys[:, :, :slots], values[:, :, :slots]

    @torch.inference_mode()
    def reserve(self, rows: int) -> int:
        """Get ready for a pass that writes so many rows itself, as `KeyValueCache.reserve`."""
        self._check_room(self.block_len, rows)
        start = self.length + self.block_len
        if not self._is_zeroed:
            for shelf in self._shelves:  # buffers of layers that are yet to come among them
                shelf[..., start:, :] = 0
            self._is_zeroed = True
        return start

    def allocate(self, keys: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        """Make the buffers, unless there are some, as `KeyValueCache.allocate`."""
        self._num_layers = max(self._num_layers, len(keys))
        for layer in range(len(self.keys), len(keys)):
            self._add_layer(keys[layer], values[layer])

    def next_slots(self, rows: int) -> list[int]:
        """The slot of each lane's first row of a pass that writes its rows itself, as `KeyValueCache.next_slots`."""
        self._check_room(self.block_len, rows)
        return [length + self.block_len for length in self.lengths]

    def append(self, rows: int) -> None:
        """Count so many rows behind the block, which a pass has written, as undecided."""
        self._block_lens = [block_len + rows for block_len in self._block_lens]

    @torch.inference_mode()
    def commit(self, paths: Sequence[Sequence[int]]) -> None:
        """Keep the given rows of the block, one path a lane, and forget the others, as `KeyValueCache.commit`.

        Where it fails, the block may have been moved in some layers only, and is forgotten.
        """
        for lane, path in enumerate(paths):
            if any(b <= a for a, b in zip([-1, *path], path, strict=False)) or (path and path[-1] >= self.block_len):
                raise CacheError(
                    f"a path must ascend within the block of {self.block_len} rows, got {list(path)} for lane {lane}"
                )
        try:
            for lane, path in enumerate(paths):
                self._gather(lane, path)
            self.lengths = [length + len(path) for length, path in zip(self.lengths, paths, strict=True)]
        finally:
            self.rollback()

    def rollback(self) -> None:
        """Forget the block."""
        self._block_lens = [0] * len(self._block_lens)
        self.min_slots = 0

    def cut_block(self, rows: int) -> None:
        """Forget what a pass that failed has appended behind the first rows of the block, as `KeyValueCache`."""
        self._block_lens = [min(rows, block_len) for block_len in self._block_lens]
        self.min_slots = 0

    @torch.inference_mode()
    def wipe(self) -> None:
        """Forget the block and clear the slots behind the committed rows, where NaN would go through any mask."""
        self.rollback()
        for buffer in self.keys + self.values:
            for lane, length in enumerate(self.lengths):
                buffer[lane, :, length:] = 0

    def truncate(self, length: int, lane: int | None = None) -> None:
        """Forget the block, and the committed rows beyond the first `length`, of one lane or of all."""
        if lane is None:
            self.lengths = [min(length, old) for old in self.lengths]
            self.rollback()
            if length == 0:  # another text begins: what the last one has left, NaN perhaps, must not be shown
                self._is_zeroed = self._is_always_zeroed
        else:
            self._forget_own_block()
            self.lengths[lane] = min(length, self.lengths[lane])

    def join(self) -> int:
        """Take the first lane that nobody has taken.

        Raises:
            CacheError: all are taken.
        """
        lane = next((lane for lane in range(len(self.lengths)) if lane not in self._taken), None)
        if lane is None:
            raise CacheError(f"the cache has {len(self.lengths)} lanes, and all are taken; free one, or make more")
        self._taken.add(lane)
        return lane

    def free(self, lane: int) -> None:
        """Forget the rows of a lane, and give it back."""
        self.truncate(0, lane)
        self._taken.discard(lane)

    @property
    def row_bytes(self) -> int:
        """What one row of one lane takes up, over all layers."""
        return sum(buffer.shape[1] * buffer.shape[3] * buffer.element_size() for buffer in (*self.keys, *self.values))

    def copied(self, lane: int = 0) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Copies of a lane's committed keys and values, a layer each [1, heads, rows, head_dim]."""
        return self._copied(self.keys, lane), self._copied(self.values, lane)

    @torch.inference_mode()
    def load(self, keys: Sequence[Tensor], values: Sequence[Tensor], length: int, lane: int = 0) -> None:
        """Begin a lane with copies of the first `length` of these rows, as `KeyValueCache.load`.

        The buffers that there are stay: a recorded pass goes on writing to them.
        """
        assert length <= self.capacity, f"{length} rows do not fit a cache of {self.capacity}"
        self._forget_own_block()
        self.lengths[lane] = 0  # should this be broken off, the lane is empty
        self.allocate(keys, values)
        for buffer, rows in zip((*self.keys, *self.values), (*keys, *values), strict=True):
            buffer[lane, :, :length] = rows[0, :, :length]
        self.lengths[lane] = length

    @torch.inference_mode()
    def grow(self, capacity: int) -> None:
        """Have more slots, as `KeyValueCache.grow`: rows move to larger buffers."""
        if self.block_len > 0:
            raise CacheError(f"a cache grows between two steps, got a block of {self.block_len} rows; commit it first")
        if capacity <= self.capacity:
            return
        shelves = [self._allocate(shelf[0], len(shelf), capacity) for shelf in self._shelves]
        for larger, shelf in zip(shelves, self._shelves, strict=True):
            larger[..., : self.length, :] = shelf[..., : self.length, :]
        self.capacity, self._shelves = capacity, shelves  # all or nothing, where memory ends
        self.keys = [self._shelves[index][place] for (index, place), _ in self._places]
        self.values = [self._shelves[index][place] for _, (index, place) in self._places]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Rows that the next pass finds before its own; asked by models that are given no positions."""
        return self.length + (self._block_lens[layer_idx] if layer_idx < len(self._block_lens) else 0)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Length and offset of the keys of the next pass; asked by models that are given no 4-D mask."""
        return self.get_seq_length(layer_idx) + query_length, 0

    def _check_room(self, block_len: int, rows: int) -> None:
        if self.length + block_len + rows > self.capacity:
            raise CacheError(
                f"the cache has room for {self.capacity} rows, got {self.length} committed, {block_len} undecided "
                f"and {rows} new ones; make it larger, or commit or roll back first"
            )

    def _forget_own_block(self) -> None:
        """Forget the block where it belongs to one lane; refuse where it belongs to several."""
        if len(self.lengths) == 1:
            self.rollback()
        elif self.block_len > 0:
            raise CacheError(
                f"the rows of one lane change between two steps only, got a block of {self.block_len} undecided rows, "
                "which belongs to all lanes; commit it or roll it back first"
            )

    def _add_layer(self, key_states: Tensor, value_states: Tensor) -> None:
        are_alike = key_states.shape == value_states.shape
        num_buffers = (2 if are_alike else 1) * max(self._num_layers - len(self._places), 1)
        taken = [place for places in self._places for place in places]
        of_keys = self._free_place(key_states, num_buffers, taken)
        places = of_keys, self._free_place(value_states, num_buffers, [*taken, of_keys])
        keys, values = (self._shelves[index][place] for index, place in places)
        # all or nothing: a layer without its values, where memory ended, would shift the layers behind it
        self._places, self.keys, self.values = [*self._places, places], [*self.keys, keys], [*self.values, values]
        self._block_lens = [*self._block_lens, 0]

    def _free_place(self, states: Tensor, num_buffers: int, taken: Sequence[_Place]) -> _Place:
        """A buffer for such rows; where none is free, so many are made, for the layers to come too."""
        for index, shelf in enumerate(self._shelves):
            are_alike = (shelf.dtype, shelf.device) == (states.dtype, states.device)
            are_alike = are_alike and shelf.shape[2::2] == states.shape[1::2]
            num_taken = sum(of_shelf == index for of_shelf, _ in taken)
            if are_alike and num_taken < len(shelf):
                return index, num_taken
        self._shelves = [*self._shelves, self._allocate(states, num_buffers, self.capacity)]
        return len(self._shelves) - 1, 0

    def _copied(self, buffers: Sequence[Tensor], lane: int) -> tuple[Tensor, ...]:
        rows = (buffer[lane : lane + 1, :, : self.lengths[lane]] for buffer in buffers)
        return tuple(states.clone(memory_format=torch.contiguous_format) for states in rows)

    def _allocate(self, states: Tensor, num_buffers: int, capacity: int) -> Tensor:
        """[buffers, lanes, heads, capacity, head_dim] for rows [lanes, heads, any number, head_dim]."""
        capacity = min(capacity, sys.maxsize)  # more slots fit into no integer, and so many into no memory
        with torch.inference_mode(False):  # so that passes in and outside of that mode may write into it
            buffer = states.new_empty(num_buffers, len(self.lengths), states.shape[1], capacity, states.shape[3])
        if self._is_zeroed:
            # A lane that is shorter than the longest, and a view that is longer than its rows, show slots that were
            # never written. They are hidden, with weight 0 in attention, but 0 × NaN would be NaN. Otherwise no such
            # slot is shown, and an untouched buffer takes no memory for trees that are never drafted.
            buffer.zero_()
        return buffer

    def _gather(self, lane: int, path: Sequence[int]) -> None:
        """Move rows of the block to its front, in all layers. Slices need nothing of a GPU's host but to be named."""
        start = self.lengths[lane]
        for source, target, num_rows in _runs(path):
            for shelf in self._shelves:
                block = shelf[:, lane, :, start:]
                rows = block[:, :, source : source + num_rows]
                block[:, :, target : target + num_rows] = rows if num_rows <= source - target else rows.clone()


def _runs(path: Sequence[int]) -> list[tuple[int, int, int]]:
    """What of an ascending path does not stand in its place: source, target and number of rows that are neighbours."""
    runs: list[tuple[int, int, int]] = []
    for target, source in enumerate(path):
        if source == target:
            continue
        if runs and runs[-1][0] + runs[-1][2] == source:
            runs[-1] = (*runs[-1][:2], runs[-1][2] + 1)
        else:
            runs.append((source, target, 1))
    return runs
