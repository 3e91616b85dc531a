"""The contract of a cache: keys and values of committed tokens, and behind them a block that is still undecided.

Stages, drafters, prefix cache and runners know no other cache than this one. What a cache can do beyond it, it says by
a flag. A runner may bring a cache with a layout of its own (`Runner.new_cache`).
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from dynatree_core.errors import CacheError
from dynatree_core.tree.flatten import FlatTrees

__all__ = ["KeyValueCache"]


class KeyValueCache(abc.ABC):
    """Keys and values of one model's passes. Each lane, a sequence's place in the batch, has its own rows.

    Attributes:
        capacity: slots of a lane, for committed and undecided rows together.
        keys: per layer, [lanes, heads, capacity, head_dim], of a cache that `can_record`.
        values: likewise.
    """

    # whether `copied` and `load` give and take the rows of all committed tokens, as transformers lays them out
    has_all_rows: ClassVar[bool] = False
    # whether a pass may write its rows into `keys` and `values` itself, between `reserve` and `append`
    can_record: ClassVar[bool] = False
    # whether `grow` gives it more slots
    can_grow: ClassVar[bool] = False

    capacity: int
    keys: list[Tensor]
    values: list[Tensor]

    @property
    @abc.abstractmethod
    def length(self) -> int:
        """Committed tokens of the longest lane."""

    @property
    @abc.abstractmethod
    def block_len(self) -> int:
        """Undecided rows behind the committed ones."""

    @property
    @abc.abstractmethod
    def next_place(self) -> int:
        """Where the next token of the longest lane stands inside the cache; positions count on from there."""

    @property
    @abc.abstractmethod
    def max_places(self) -> int:
        """Places that the rows of the next pass may have."""

    @abc.abstractmethod
    def prepare(self, flat: FlatTrees) -> FlatTrees:
        """Get ready for a pass over these rows, which is to be computed with what is returned."""

    @abc.abstractmethod
    def commit(self, paths: Sequence[Sequence[int]]) -> None:
        """Keep the given rows of the block, one path a lane, and forget the others.

        A commit that fails keeps nothing of the block.

        Args:
            paths: block rows to keep, ascending, counted from 0 at the first undecided row.

        Raises:
            CacheError: a path that does not ascend or leaves the block, which stays as it is.
        """

    @abc.abstractmethod
    def rollback(self) -> None:
        """Forget the block."""

    def cut_block(self, rows: int) -> None:
        """Forget what a pass that failed has appended, in some layers perhaps, behind the first rows of the block.

        Args:
            rows: of the block, those that were there before the pass.

        Raises:
            CacheError: some were, and this cache cannot tell them from the others.
        """
        if rows > 0:
            raise CacheError(
                f"the block can be forgotten only as a whole, got {rows} rows to stay in a {type(self).__name__}"
            )
        self.rollback()

    @abc.abstractmethod
    def wipe(self) -> None:
        """Forget the block and clear the slots behind the committed rows, where NaN would go through any mask."""

    @abc.abstractmethod
    def truncate(self, length: int, lane: int | None = None) -> None:
        """Forget the block, and the committed rows beyond the first `length`.

        Args:
            length: rows that stay, of a lane that has so many.
            lane: whose rows; None: those of every lane.

        Raises:
            CacheError: one of several lanes is to be cut while there is a block, which belongs to all of them; or
                rows are to stay that may be gone.
        """

    @abc.abstractmethod
    def join(self) -> int:
        """Take a lane that nobody has taken, for one more sequence.

        Raises:
            CacheError: all are taken.
        """

    @abc.abstractmethod
    def free(self, lane: int) -> None:
        """Forget the rows of a lane, and give it back.

        Raises:
            CacheError: there is a block, and it is not the only lane.
        """

    @property
    def num_bytes(self) -> int:
        """What its buffers take up by now."""
        return sum(buffer.numel() * buffer.element_size() for buffer in (*self.keys, *self.values))

    def grow(self, capacity: int) -> None:
        """Have at least so many slots in each lane, between two steps; rows stay.

        Raises:
            CacheError: it cannot.
        """
        raise self._cannot("can_grow")

    # of a cache that has all rows

    @property
    def row_bytes(self) -> int:
        """What one row of one lane takes up, over all layers."""
        raise self._cannot("has_all_rows")

    def copied(self, lane: int = 0) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Copies of a lane's committed keys and values, a layer each [1, heads, rows, head_dim]."""
        raise self._cannot("has_all_rows")

    def load(self, keys: Sequence[Tensor], values: Sequence[Tensor], length: int, lane: int = 0) -> None:
        """Forget a lane's rows, and begin it with copies of the first `length` of these as committed ones.

        Args:
            keys: as `copied` gives them.
            values: likewise.
            length: at most the capacity.
            lane: which one.

        Raises:
            CacheError: there is a block, and it is not the only lane.
        """
        raise self._cannot("has_all_rows")

    # of a cache that can be recorded

    def reserve(self, rows: int) -> int:
        """Get ready for a pass that writes so many rows into the buffers itself, and is followed by `append`.

        Slots that were never written are zeroed, once, since such a pass may be shown more than the rows that there
        are.

        Returns:
            The slot of its first row.

        Raises:
            CacheError: the rows do not fit.
        """
        raise self._cannot("can_record")

    def allocate(self, keys: Sequence[Tensor], values: Sequence[Tensor]) -> None:
        """Make the buffers, unless a pass has made them before.

        Args:
            keys: a layer each [lanes, heads, any number, head_dim], of the heads, size, dtype and device to make.
            values: likewise.
        """
        raise self._cannot("can_record")

    def next_slots(self, rows: int) -> list[int]:
        """The slot of each lane's first row, for a pass that writes so many rows a lane itself and then calls `append`.

        Unlike `reserve` it clears nothing: such a pass looks at no slot that was never written.

        Raises:
            CacheError: the rows do not fit.
        """
        raise self._cannot("can_record")

    def append(self, rows: int) -> None:
        """Count so many rows behind the block, which a pass has written, as undecided."""
        raise self._cannot("can_record")

    def _cannot(self, flag: str) -> CacheError:
        return CacheError(f"this needs a cache with {flag}, got a {type(self).__name__}; ask for the flag before")
