"""What an iteration takes on a machine, in seconds: the cost model that policies are given."""

from __future__ import annotations

import bisect
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


_OLD_COSTS = {"verify": "target_pass_seconds", "draft": "drafter_level_seconds"}


@attrs.frozen
class CostModel:
    """What an iteration takes on this machine, in seconds."""

    target_pass_seconds: StepFunction  # by the rows of the pass: drafted nodes and the root
    drafter_level_seconds: StepFunction  # by the nodes of the level, whose children the drafter proposes
    rest_seconds: float  # making, laying out and committing a small tree

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


# for frontiers that no session has made: a row adds a hundredth of a pass, and a level takes a tenth
NOMINAL_COSTS = CostModel(
    StepFunction(tuple(range(1, 129)), tuple(0.99 + 0.01 * rows for rows in range(1, 129))),
    StepFunction((128,), (0.1,)),
    0.0,
)
