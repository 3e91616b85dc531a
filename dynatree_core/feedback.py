"""Feedback: tell the policies how their tree did."""

from __future__ import annotations

from dynatree_core.records import StepReport, StepStats, Verdict
from dynatree_core.session import Session
from dynatree_core.tree import TokenTree

__all__ = ["feedback"]


def feedback(session: Session, tree: TokenTree, verdict: Verdict, token_ids: tuple[int, ...]) -> StepReport:
    """Record the step, then call the policies' `on_iteration_end`.

    The record comes first: should a policy fail, the step's tokens are committed and counted.
    """
    report = StepReport(
        iteration=session.num_iterations,
        tree=tree,
        verdict=verdict,
        token_ids=token_ids,
        num_accepted=min(len(verdict.path), len(token_ids)),
    )
    session.steps.append(
        StepStats(
            num_drafted=tree.num_drafted,
            depth=tree.max_depth,
            num_accepted=report.num_accepted,
            num_committed=len(token_ids),
        )
    )
    session.last_report = report
    session.stack.on_iteration_end(report)
    return report
