"""The cache: preallocated keys and values, and the only module that knows how transformers lays them out.

Each batch row holds `lengths[row]` committed rows and behind them a block of rows that is still undecided.
A forward pass appends to the block; `commit` gathers the accepted rows of the block into place and forgets
the rest; `rollback` forgets all of it. The cost of a commit follows the path's length, not the context's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from dynatree_core.errors import CacheError
from dynatree_core.tree.flatten import FlatTrees

__all__ = ["TreeCache"]


class TreeCache(Cache):
    """Keys and values of one model, [batch, heads, capacity, head_dim] a layer.

    Models use it through their public forward. Buffers are allocated by the first forward pass, which is the first to
    know heads, sizes and dtype.

    Args:
        capacity: rows per batch row, committed and undecided ones together.
        batch: number of batch rows; a session has one.
        is_zeroed: whether slots that were never written may be shown to a pass, see `min_slots`.
    """

    def __init__(self, capacity: int, *, batch: int = 1, is_zeroed: bool = False) -> None:
        super().__init__(layers=[])
        self.capacity = capacity
        self.min_slots = 0  # slots of the next pass's view at least
        self._is_zeroed = is_zeroed or batch > 1
        self.lengths = [0] * batch  # committed rows of each batch row
        self.keys: list[Tensor] = []  # per layer, [batch, heads, capacity, head_dim]
        self.values: list[Tensor] = []
        self._block_lens: list[int] = []  # per layer: rows appended since the last commit

    @property
    def length(self) -> int:
        """Committed rows of the longest batch row."""
        return max(self.lengths)

    @property
    def block_len(self) -> int:
        """Undecided rows behind the committed ones."""
        return self._block_lens[0] if self._block_lens else 0

    @property
    def next_place(self) -> int:
        """Where the next token stands inside the cache; positions count on from there."""
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
        """Append rows [batch, heads, rows, head_dim] to a layer's block; called by the model's attention.

        Returns:
            All keys and values that the pass may look at, [batch, heads, slots, head_dim]. A batch row that
            is shorter than the longest has undefined rows at its end, which the mask hides.

        Raises:
            CacheError: the rows do not fit.
        """
        while len(self._block_lens) <= layer_idx:
            self._add_layer(key_states, value_states)
        keys, values, block_len = self.keys[layer_idx], self.values[layer_idx], self._block_lens[layer_idx]
        rows = key_states.shape[2]
        self._check_room(block_len, rows)
        for row, length in enumerate(self.lengths):
            start = length + block_len
            keys[row, :, start : start + rows] = key_states[row]
            values[row, :, start : start + rows] = value_states[row]
        self._block_lens[layer_idx] = block_len + rows
        slots = max(self.length + block_len + rows, self.min_slots)
        return keys[:, :, :slots], values[:, :, :slots]

    @torch.inference_mode()
    def reserve(self, rows: int) -> int:
        """Get ready for a pass that writes so many rows into the buffers itself, and is followed by `append`.

        Slots that were never written are zeroed, once, since such a pass may be shown more than the rows that there
        are.

        Returns:
            The slot of its first row.

        Raises:
            CacheError: the rows do not fit.
        """
        self._check_room(self.block_len, rows)
        start = self.length + self.block_len
        if not self._is_zeroed:
            for buffer in self.keys + self.values:
                buffer[:, :, start:] = 0
            self._is_zeroed = True
        return start

    def append(self, rows: int) -> None:
        """Count so many rows behind the block, which a pass has written, as undecided."""
        self._block_lens = [block_len + rows for block_len in self._block_lens]

    @torch.inference_mode()
    def commit(self, paths: Sequence[Sequence[int]]) -> None:
        """Keep the given rows of the block, one path a batch row, and forget the others.

        A commit that fails keeps nothing: the block may have been moved in some layers only, and is forgotten.

        Args:
            paths: block rows to keep, ascending, counted from 0 at the first undecided row.

        Raises:
            CacheError: a path that does not ascend or leaves the block, which stays as it is.
        """
        for row, path in enumerate(paths):
            if any(b <= a for a, b in zip([-1, *path], path, strict=False)) or (path and path[-1] >= self.block_len):
                raise CacheError(
                    f"a path must ascend within the block of {self.block_len} rows, "
                    f"got {list(path)} for batch row {row}"
                )
        try:
            for row, path in enumerate(paths):
                self._gather(row, path)
            self.lengths = [length + len(path) for length, path in zip(self.lengths, paths, strict=True)]
        finally:
            self.rollback()

    def rollback(self) -> None:
        """Forget the block."""
        self._block_lens = [0] * len(self._block_lens)

    @torch.inference_mode()
    def wipe(self) -> None:
        """Forget the block and clear the slots behind the committed rows, where NaN would go through any mask."""
        self.rollback()
        for buffer in self.keys + self.values:
            for row, length in enumerate(self.lengths):
                buffer[row, :, length:] = 0

    def truncate(self, length: int) -> None:
        """Forget the block, and the committed rows of every batch row beyond the first `length`."""
        self.lengths = [min(length, old) for old in self.lengths]
        self.rollback()

    @property
    def row_bytes(self) -> int:
        """What one row of one batch row takes up, over all layers."""
        return sum(buffer.shape[1] * buffer.shape[3] * buffer.element_size() for buffer in (*self.keys, *self.values))

    def copied(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Copies of the committed keys and values, a layer each [batch, heads, rows, head_dim]."""
        return self._copied(self.keys), self._copied(self.values)

    @torch.inference_mode()
    def load(self, keys: Sequence[Tensor], values: Sequence[Tensor], length: int) -> None:
        """Forget everything, and begin with copies of the first `length` of these rows as committed ones.

        Args:
            keys: as `copied` gives them.
            values: likewise.
            length: at most the capacity.
        """
        assert length <= self.capacity, f"{length} rows do not fit a cache of {self.capacity}"
        own_keys, own_values = self._loaded(keys, length), self._loaded(values, length)
        # nothing but assignments, between which no signal arrives
        self.keys, self.values, self._block_lens = own_keys, own_values, [0] * len(own_keys)
        self.lengths = [length] * len(self.lengths)

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

    def _add_layer(self, key_states: Tensor, value_states: Tensor) -> None:
        keys, values = [*self.keys, self._allocate(key_states)], [*self.values, self._allocate(value_states)]
        # all or nothing: a layer without its values, where memory ended, would shift the layers behind it
        self.keys, self.values, self._block_lens = keys, values, [*self._block_lens, 0]

    def _copied(self, buffers: Sequence[Tensor]) -> tuple[Tensor, ...]:
        rows = (buffer[:, :, : self.length] for buffer in buffers)
        return tuple(states.clone(memory_format=torch.contiguous_format) for states in rows)

    def _loaded(self, rows: Sequence[Tensor], length: int) -> list[Tensor]:
        buffers = [self._allocate(states) for states in rows]
        for buffer, states in zip(buffers, rows, strict=True):
            buffer[:, :, :length] = states[:, :, :length]
        return buffers

    def _allocate(self, states: Tensor) -> Tensor:
        with torch.inference_mode(False):  # so that passes in and outside of that mode may write into it
            buffer = states.new_empty(len(self.lengths), states.shape[1], self.capacity, states.shape[3])
        if self._is_zeroed:
            # a batch row that is shorter than the longest, and a view that is longer than its rows, show slots that
            # were never written. They are hidden, with weight 0 in attention, but 0 × NaN would be NaN. Otherwise no
            # such slot is shown, and leaving the buffer untouched keeps the pages of trees that are never drafted out
            # of memory.
            buffer.zero_()
        return buffer

    def _gather(self, row: int, path: Sequence[int]) -> None:
        in_place = next((i for i, source in enumerate(path) if i != source), len(path))
        moved = path[in_place:]
        if not moved:
            return
        start = self.lengths[row]
        source = torch.tensor(moved, device=self.keys[0].device) + start
        target = slice(start + in_place, start + len(path))
        for buffer in (*self.keys, *self.values):
            buffer[row, :, target] = buffer[row].index_select(1, source)
