"""What an iteration takes on a machine, in seconds: the cost model that policies are given."""

from __future__ import annotations

import bisect
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import attrs

from dynatree_core.renamed import under_new_names, warn_of_old_name

__all__ = ["NOMINAL_COSTS", "CostModel", "StepFunction"]


@attrs.frozen
class StepFunction:
    """A step function, in seconds.

    Between measured counts it has the value of the next larger count; beyond the last it is proportional to the count.
    """

    at: tuple[int, ...]  # ascending
    seconds: tuple[float, ...]  # non-decreasing

    def __call__(self, count: int) -> float:
        """The seconds of `count` rows or nodes; 0.0 for none."""
        if count <= 0:
            return 0.0
        place = bisect.bisect_left(self.at, count)
        if place < len(self.at):
            return self.seconds[place]
        return self.seconds[-1] * count / self.at[-1]

    def table(self, count: int) -> list[float]:
        """The seconds of 0, 1, 2, … rows or nodes, up to `count` at least."""
        return _table(self, 1 << count.bit_length())

    def on_line(self, count: int) -> float:
        """The same, but that between measured counts, and between none and the first, it rises in a straight line."""
        place = bisect.bisect_left(self.at, count)
        if count <= 0 or place == len(self.at):
            return self(count)
        low, at_low = (self.at[place - 1], self.seconds[place - 1]) if place else (0, 0.0)
        return at_low + (self.seconds[place] - at_low) * (count - low) / (self.at[place] - low)


@functools.lru_cache(maxsize=64)
def _table(step: StepFunction, count: int) -> list[float]:
    return [step(number) for number in range(count + 1)]


_OLD_COSTS = {"verify": "target_pass_seconds", "draft": "drafter_level_seconds"}


@attrs.frozen
class CostModel:
    """What an iteration takes on this machine, in seconds."""

    target_pass_seconds: StepFunction  # by the rows of the pass: drafted nodes and the root
    drafter_level_seconds: StepFunction  # by the nodes of the level, whose children the drafter proposes
    rest_seconds: float  # making, laying out and committing a small tree, of one sequence after the other
    # by the tokens that the drafter follows in the pass that proposes for a root behind them: what they add to that. If
    # None, what as many nodes add to a level, which is no less, since a level has probabilities computed for each node
    drafter_follow_seconds: StepFunction | None = None

    if not TYPE_CHECKING:  # a type checker knows the new names only

        def __init__(self, *args: Any, **named: Any) -> None:
            self.__attrs_init__(*args, **under_new_names(named, _OLD_COSTS, "CostModel"))

    def plain_step_seconds(self) -> float:
        """A step without drafting."""
        return self.target_pass_seconds(1) + self.rest_seconds

    def iteration_seconds(self, num_drafted: int, level_widths: Sequence[int]) -> float:
        """An iteration: the drafter looks at levels of so many nodes each, the target verifies the drafted nodes."""
        drafting = sum(map(self.drafter_level_seconds, level_widths))
        return self.target_pass_seconds(1 + num_drafted) + drafting + self.rest_seconds

    def catch_up_seconds(self, num_tokens: int) -> float:
        """What it takes the drafter to follow so many tokens, in the pass that proposes for a root behind them."""
        if self.drafter_follow_seconds is not None:
            return self.drafter_follow_seconds.on_line(num_tokens)
        return self.drafter_level_seconds(num_tokens + 1) - self.drafter_level_seconds(1)

    def beside(self, num_sequences: int, rows: int, width: int) -> CostModel:
        """What a sequence is charged that shares its passes with others.

        Each second that its tree adds to a pass delays every one of them, so it counts for each. What all take anyway,
        a pass over the others' rows and its own root, and the rest of each, counts once. Who maximises tokens a second
        by these costs does so for all: E − λ·T with the rate of one sequence and T charged is E − Λ·ΔT with the rate Λ
        of all. For one sequence alone they are the costs themselves.

        All decide at the same time, each knowing what the others had last. If only that counted, all would take the
        rows that are cheap beside it, and find together that they were not. So a tree is charged no less than its share
        of what is added where everybody has one like it.

        Args:
            num_sequences: that share the pass, this one among them.
            rows: of the target's pass, those of the others.
            width: nodes of a drafter's level, those of the others; 0: nobody else has a level looked at.
        """
        if num_sequences == 1:
            return self
        return _charged(self, num_sequences, _coarse(rows), _coarse(width))

    @property
    def verify(self) -> StepFunction:
        """Old name of `target_pass_seconds`."""
        warn_of_old_name("CostModel.verify", "target_pass_seconds")
        return self.target_pass_seconds

    @property
    def draft(self) -> StepFunction:
        """Old name of `drafter_level_seconds`."""
        warn_of_old_name("CostModel.draft", "drafter_level_seconds")
        return self.drafter_level_seconds

    def plain_seconds(self) -> float:
        """Old name of `plain_step_seconds`."""
        warn_of_old_name("CostModel.plain_seconds", "plain_step_seconds")
        return self.plain_step_seconds()

    def tree_seconds(self, num_drafted: int, widths: Sequence[int]) -> float:
        """Old name of `iteration_seconds`."""
        warn_of_old_name("CostModel.tree_seconds", "iteration_seconds")
        return self.iteration_seconds(num_drafted, widths)


def _coarse(count: int) -> int:
    """Up to a multiple of 4 beyond 8: so that a load that moves a little is charged by the same tables."""
    return count if count <= 8 else -(-count // 4) * 4


@functools.lru_cache(maxsize=256)
def _charged(costs: CostModel, num_sequences: int, rows: int, width: int) -> CostModel:
    target, level = costs.target_pass_seconds, costs.drafter_level_seconds
    last_row, last_node = target.at[-1], level.at[-1]
    of_rows = target.table(max(rows + last_row, num_sequences * last_row))
    of_level = level.table(max(width + last_node, num_sequences * last_node))
    shared, alike = of_rows[rows + 1], of_rows[num_sequences]
    charged_rows = [
        shared + max(num_sequences * (of_rows[rows + own] - shared), of_rows[num_sequences * own] - alike)
        for own in range(1, last_row + 1)
    ]
    charged_level = [
        max(num_sequences * (of_level[width + own] - of_level[width]), of_level[num_sequences * own])
        for own in range(1, last_node + 1)
    ]
    follow = costs.drafter_follow_seconds
    if follow is not None:  # a text that nobody else reads
        follow = StepFunction(follow.at, tuple(num_sequences * seconds for seconds in follow.seconds))
    return CostModel(
        StepFunction(tuple(range(1, last_row + 1)), tuple(charged_rows)),
        StepFunction(tuple(range(1, last_node + 1)), tuple(charged_level)),
        num_sequences * costs.rest_seconds,
        follow,
    )


# for frontiers that no session has made: a row adds a hundredth of a pass, and a level takes a tenth
NOMINAL_COSTS = CostModel(
    StepFunction(tuple(range(1, 129)), tuple(0.99 + 0.01 * rows for rows in range(1, 129))),
    StepFunction((128,), (0.1,)),
    0.0,
)
