"""`history`: parameters follow the recent acceptance (the published DynaTree's phase 3).

It adjusts the policies beside it in the stack: `confidence`'s threshold `high` and `dynamic_depth`'s `base_depth`.
Alone it changes nothing.

The published text of the step rule contradicts itself about the sign. Its first sentence states the intent, "low
acceptance explores more", and that is what is done here: a node gets `min_branch` children when its confidence is
above `high`, so *raising* `high` gives more nodes more branches. Low acceptance raises it, high acceptance lowers it.

In the window rule the published signs are used as they stand: high acceptance deepens the tree and lowers `high` (a
deeper, narrower tree), low acceptance makes it shallower and wider.
"""

from __future__ import annotations

from collections import deque
from typing import ClassVar

import attrs

from dynatree_core import PolicyStack, StepReport, choice, count, fraction, hookimpl

# published bounds of what is adjusted
HIGH_BOUNDS = (0.5, 0.95)
BASE_DEPTH_BOUNDS = (2, 10)
WINDOW_HIGH_STEP = 0.05
MIN_HISTORY = 5  # the window rule waits for so many acceptances


@attrs.define
class History:
    """Adjust the policies beside it from the recent path acceptance.

    Rule "step": every iteration, the average below `target_accept_rate` moves `confidence.high` up by
    `learning_rate`, above it down. Rule "window": the average more than `margin` above the target makes
    `dynamic_depth.base_depth` one larger and `confidence.high` 0.05 lower, more than `margin` below the reverse;
    nothing happens before 5 acceptances are known. The average is over the last `history_window` iterations that
    drafted anything.
    """

    rule: str = choice("step", ("step", "window"))
    target_accept_rate: float = fraction(0.85)
    learning_rate: float = fraction(0.01)
    history_window: int = count(10)
    margin: float = fraction(0.1)
    recent: deque[float] = attrs.field(factory=deque, init=False, repr=False)  # path acceptances, latest last

    variants: ClassVar = {"plan": {"rule": "window", "target_accept_rate": 0.7}}
    is_capturable: ClassVar = True

    @hookimpl
    def on_iteration_end(self, report: StepReport, stack: PolicyStack) -> None:
        if report.path_acceptance is None:
            return
        self.recent.append(report.path_acceptance)
        while len(self.recent) > self.history_window:
            self.recent.popleft()
        excess = sum(self.recent) / len(self.recent) - self.target_accept_rate
        if self.rule == "step":
            self._move_high(stack, -self.learning_rate * _sign(excess))
        elif len(self.recent) >= MIN_HISTORY and abs(excess) > self.margin:
            self._move_high(stack, -WINDOW_HIGH_STEP * _sign(excess))
            self._move_base_depth(stack, _sign(excess))

    def _move_high(self, stack: PolicyStack, step: float) -> None:
        confidence = stack.find("confidence")
        if confidence is not None and step:
            confidence.high = _moved(confidence.high, step, HIGH_BOUNDS)

    def _move_base_depth(self, stack: PolicyStack, step: int) -> None:
        dynamic_depth = stack.find("dynamic_depth")
        if dynamic_depth is not None:
            dynamic_depth.base_depth = int(_moved(dynamic_depth.base_depth, step, BASE_DEPTH_BOUNDS))


def _sign(number: float) -> int:
    return (number > 0) - (number < 0)


def _moved(value: float, step: float, bounds: tuple[float, float]) -> float:
    """The value after a step towards a bound, which it does not pass; one beyond it already stays where it is."""
    lowest, highest = bounds
    return max(value, min(value + step, highest)) if step > 0 else min(value, max(value + step, lowest))
