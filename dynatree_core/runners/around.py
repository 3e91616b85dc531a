"""A runner around another one, for those who measure, price or count passes; it is not registered."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import final

from torch import nn

from dynatree_core.cache.base import KeyValueCache
from dynatree_core.runners.base import Kept, PassOutput, Rows, Runner
from dynatree_core.runners.eager import EagerRunner
from dynatree_core.tree.flatten import FlatTrees

__all__ = ["EachPass", "RunnerAround"]

# given the rows of each sequence in a pass, and whether it is part of a prefill; the pass runs inside its result
EachPass = Callable[[Sequence[Rows], bool], AbstractContextManager[None]]


@final
class RunnerAround(Runner):
    """Computes passes by another runner, each inside of a context, and is that runner in all else.

    Args:
        runner: computes the passes.
        each_pass: makes the context of a pass. The caches of its rows are as they are before the pass.
    """

    def __init__(self, runner: Runner, each_pass: EachPass) -> None:
        self.name = runner.name
        self.has_own_cache = runner.has_own_cache
        self.takes_any_cache = runner.takes_any_cache
        self.has_equal_bits = runner.has_equal_bits
        self.runner = runner
        self.each_pass = each_pass

    @classmethod
    def make(cls, model: nn.Module, kept: Kept) -> RunnerAround:
        """The plain runner with nothing around it."""
        return cls(EagerRunner(model), lambda parts, is_prompt: nullcontext())

    def new_cache(self, capacity: int, *, lanes: int = 1, is_zeroed: bool = False) -> KeyValueCache:
        return self.runner.new_cache(capacity, lanes=lanes, is_zeroed=is_zeroed)

    def forward(
        self,
        flat: FlatTrees,
        cache: KeyValueCache,
        *,
        hidden: bool = False,
        last_row_only: bool = False,
        is_prompt: bool = False,
    ) -> PassOutput:
        with self.each_pass([Rows(flat, cache)], is_prompt):
            return self.runner.forward(flat, cache, hidden=hidden, last_row_only=last_row_only, is_prompt=is_prompt)

    def forward_together(
        self, parts: Sequence[Rows], *, hidden: bool = False, last_row_only: bool = False
    ) -> list[PassOutput]:
        with self.each_pass(parts, False):
            return self.runner.forward_together(parts, hidden=hidden, last_row_only=last_row_only)

    @property
    def computed_by(self) -> str:
        return self.runner.computed_by
