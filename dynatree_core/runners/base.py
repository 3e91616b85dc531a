"""The contract of a runner: one way to compute the passes of one model.

A runner holds nothing of a generation, so that one generation after another may use it. What a generation adds, such as
its clock, stands in `dynatree_core.runners.passes`. Runners are registered under the entry-point group
`dynatree.runners`, the built-in ones like anyone else's; `dynatree_core.runners.choice` finds and makes them.
"""

from __future__ import annotations

import abc
import threading
from collections.abc import Callable, Hashable, MutableMapping, Sequence
from typing import Any

import attrs
from torch import Tensor, nn

from dynatree_core.cache.base import KeyValueCache
from dynatree_core.cache.tree_cache import TreeCache
from dynatree_core.models.state import state_of
from dynatree_core.tree.flatten import FlatTrees

__all__ = ["Kept", "PassOutput", "Rows", "Runner", "kept_copy"]

# what is kept of one model from generation to generation, such as packed copies; it must not hold the model
Kept = MutableMapping[Hashable, Any]


@attrs.frozen(eq=False)
class PassOutput:
    """What a pass says."""

    logits: Tensor  # [lanes, rows, vocab]; [lanes, 1, vocab] where only the last row's were asked for
    hidden: Tensor | None = None  # [lanes, rows, hidden]: what goes into the head, where asked for
    # [lanes, rows, 3] float32: `ops.totals` of these very logits, where the pass has made them on its way. Tokens are
    # taken from them, so they count for a class only that says `gives_totals` itself
    totals: Tensor | None = None

    def first_rows(self, num_rows: int) -> PassOutput:
        """The logits of the first rows and their totals."""
        return PassOutput(self.logits[:, :num_rows], totals=None if self.totals is None else self.totals[:, :num_rows])


@attrs.frozen(eq=False)
class Rows:
    """One sequence's rows in a pass over those of several."""

    flat: FlatTrees  # one lane, as the cache's `prepare` has returned it
    cache: KeyValueCache  # the sequence's own, with one lane; the rows are appended to its undecided block


class Runner(abc.ABC):
    """One way to compute the passes of one model.

    The class says which models it is for, and makes the runner of one. Threads may share a runner.

    Attributes, of the class:
        name: of its entry point.
        has_own_cache: whether its passes take no other cache than that of `new_cache`.
        takes_any_cache: whether they take every `KeyValueCache`, rather than only one that `can_record`.
        has_equal_bits: whether a row's logits depend, to the last bit, on its text alone: not on the rows beside it,
            nor on their number. Then what is decoded with trees equals what is decoded without, in any precision.
        num_layers: that its passes cache, where it knows; the buffers of a cache are made together then.
        gives_totals: whether its passes add `PassOutput.totals` where they serve. It is not inherited: a class whose
            logits may be others than those of the class above has to say it again.
    """

    name: str
    has_own_cache: bool = False
    takes_any_cache: bool = True
    has_equal_bits: bool = False
    num_layers: int = 1
    gives_totals: bool = False

    @classmethod
    def reason_against(cls, model: nn.Module) -> str | None:
        """Why it cannot run a model here, behind "the NAME runner", such as "is for CPUs, got cuda"; None: it can."""
        return None

    @classmethod
    def reason_for_eager(cls, model: nn.Module) -> str | None:
        """Why the `eager` runner takes the place of this one, with a warning; None: it does not."""
        return None

    @classmethod
    def preference(cls, model: nn.Module, kept: Kept) -> int:
        """How good it is for a model that it can run: "auto" takes the runner with the most, and none with 0.

        `eager` has 1, `packed` 2 and `native` 3 where their copies fit.
        """
        return 0

    @classmethod
    @abc.abstractmethod
    def make(cls, model: nn.Module, kept: Kept) -> Runner:
        """The runner of a model as it is now; called when a generation begins.

        Args:
            model: the model; it is not changed.
            kept: what earlier generations have left, and where to leave what is dear to make. It may be out of date:
                compare `dynatree_core.models.state.state_of(model)`.

        Raises:
            ParameterError: it cannot be made after all. Where "auto" has chosen it, `eager` takes its place.
        """

    def new_cache(self, capacity: int, *, lanes: int = 1, is_zeroed: bool = False) -> KeyValueCache:
        """A cache for its passes; the arguments are those of `TreeCache`."""
        return TreeCache(capacity, lanes=lanes, is_zeroed=is_zeroed, num_layers=self.num_layers)

    @abc.abstractmethod
    def forward(
        self,
        flat: FlatTrees,
        cache: KeyValueCache,
        *,
        hidden: bool = False,
        last_row_only: bool = False,
        is_prompt: bool = False,
    ) -> PassOutput:
        """One pass; the rows' keys and values are appended to the cache's undecided block.

        Args:
            flat: rows as the cache's `prepare` has returned them.
            cache: the model's cache.
            hidden: the hidden states of all rows are wanted too.
            last_row_only: only the last row's logits are wanted.
            is_prompt: it is part of a prefill, so no pass of its shape may come again.

        Raises:
            Exception: whatever the model raises.
        """

    def forward_together(
        self, parts: Sequence[Rows], *, hidden: bool = False, last_row_only: bool = False
    ) -> list[PassOutput]:
        """One pass over the rows of several sequences; here a pass each, one after the other.

        Args:
            parts: two at least, each with a cache of its own.
            hidden: as for `forward`.
            last_row_only: only the logits of each sequence's last row are wanted.

        Returns:
            For each sequence what `forward` says of its rows alone, up to rounding; [1, rows, ...].

        Raises:
            Exception: whatever the model raises. Caches may have been appended to by then, layers of them even.
        """
        return [self.forward(part.flat, part.cache, hidden=hidden, last_row_only=last_row_only) for part in parts]

    @property
    def computed_by(self) -> str:
        """The name for reports: its own, or that of the runner that computes its passes by now."""
        return self.name


_lock = threading.Lock()  # two threads that begin with one model copy it once


def kept_copy(name: str, kept: Kept, model: nn.Module, make: Callable[[], Any]) -> Any:
    """What a runner has made of a model as it is now: that of an earlier generation where it still holds, or a new one.

    It is made anew when weights were changed in place or are others, when a module was replaced, when a plain attribute
    of a module or the configuration was changed, and when another attention was chosen; what may be missed says
    `dynatree_core.models.state`.

    Args:
        name: of the runner, under which it is kept.
        kept: what earlier generations have left.
        model: the model.
        make: makes it.
    """
    with _lock:
        state = state_of(model)
        if name not in kept or kept[name][0] != state:
            kept[name] = state, make()
        return kept[name][1]
