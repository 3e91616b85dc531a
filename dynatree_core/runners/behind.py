"""Passes over rows that stand behind a prefix of which only the device knows how long it is.

A CUDA graph has every number of the host's in it for good, so what is recorded must not depend on where its rows
stand. Whoever lays rows out sees a cache without a prefix here, and counts places from the prefix's end. What rows see
of the prefix, their positions and the slots that they go to are put together on the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dynatree_core.cache.base import KeyValueCache
from dynatree_core.runners.base import PassOutput
from dynatree_core.runners.cudagraph import SlotCache
from dynatree_core.runners.eager import EagerRunner
from dynatree_core.tree.flatten import FlatTrees

__all__ = ["PassesBehind", "RowsBehind"]


class RowsBehind:
    """A cache as those see it who lay rows out behind its prefix, which is as if it had none.

    Attributes:
        length: rows behind the prefix that are committed.
        block_len: undecided rows behind those.
    """

    def __init__(self) -> None:
        self.length, self.block_len = 0, 0

    def commit(self, paths: Sequence[Sequence[int]]) -> None:
        """Keep the whole block; nothing has to be moved for that."""
        (path,) = paths
        assert [*path] == [*range(self.block_len)], f"only the whole block of {self.block_len} rows, got {path}"
        self.length, self.block_len = self.length + self.block_len, 0


class PassesBehind:
    """Passes of a model, to be recorded, whose rows go behind the first slots of a cache.

    It takes the place of `Passes`. One is made for each recording, and within it.

    Args:
        plain: computes the passes.
        cache: whose buffers they write to; the host's counts of its rows stay as they are.
        slots: that the passes see, enough for all rows.
        start: [1] int64 on the device: the slots of the prefix.
    """

    def __init__(self, plain: EagerRunner, cache: KeyValueCache, slots: int, start: Tensor) -> None:
        self._plain, self._start = plain, start
        self._keys, self._values = cache.keys, cache.values
        self._every = torch.arange(slots, device=start.device)
        self._is_prefix = self._every < start  # [slots] bool

    def forward(
        self, flat: FlatTrees, cache: RowsBehind, *, stage: str, last_row_only: bool = False, hidden: bool = False
    ) -> PassOutput:
        """One pass, as `Passes.forward`, over rows that count from the prefix's end."""
        rows, seen = flat.num_rows, cache.length + cache.block_len + flat.num_rows
        assert flat.visible.shape[-1] == seen, f"rows see {seen} places behind the prefix, got {flat.visible.shape}"
        assert seen <= self._every.numel(), f"a pass sees {self._every.numel()} slots, got {seen} places"
        places = self._every[:seen] + self._start  # [places] int64: the slots behind the prefix
        visible = self._is_prefix.repeat(rows, 1).index_copy_(1, places, flat.visible[0])
        placed = FlatTrees(
            flat.token_ids,
            flat.position_ids + self._start,
            visible[None],
            lambda: self._every.index_copy(0, places, flat.slot_positions[0] + self._start)[None],
            flat.num_places,
        )
        slots = SlotCache(self._keys, self._values, self._every.numel(), places[seen - rows :])
        output = self._plain.forward(placed, slots, hidden=hidden, last_row_only=last_row_only)
        cache.block_len += rows
        return output
