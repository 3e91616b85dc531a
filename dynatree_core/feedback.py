"""Feedback: tell the policies how their tree did."""

from __future__ import annotations

from dynatree_core.records import StepReport
from dynatree_core.session import Session

__all__ = ["feedback"]


def feedback(session: Session, report: StepReport) -> StepReport:
    """Call the policies' `on_iteration_end`. The step is committed and counted already, should one of them fail."""
    session.stack.on_iteration_end(report)
    return report
