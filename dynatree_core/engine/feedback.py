"""Feedback: tell the policies how their tree did."""

from __future__ import annotations

import attrs

from dynatree_core.engine.lane import Lane
from dynatree_core.engine.observer import Feedback
from dynatree_core.tree.verdict import StepReport

__all__ = ["feedback"]


def feedback(lane: Lane, report: StepReport) -> StepReport:
    """Call the policies' `on_iteration_end`. The step is committed and counted already, should one of them fail.

    The verdict was read from the device, so the host's clock has seen all of the step's passes.
    """
    report = attrs.evolve(report, seconds=lane.clock.since("decode"))
    lane.sequence.replace_last_report(report)
    lane.stack.on_iteration_end(report)
    if lane.observer is not None:
        lane.observer.tell(Feedback(report, lane.stack))
    return report
