"""Commit: keep the accepted path's rows in both caches, forget the rest, append the tokens."""

from __future__ import annotations

import attrs

from dynatree_core.engine.lane import Lane
from dynatree_core.engine.observer import Commit
from dynatree_core.tree.token_tree import TokenTree
from dynatree_core.tree.verdict import StepReport, Verdict

__all__ = ["commit"]


def commit(lane: Lane, step: tuple[TokenTree, Verdict]) -> StepReport:
    """Make the verdict on a tree permanent.

    The drafter comes last: should it fail, the tokens are committed and counted.
    """
    tree, verdict = step
    report = StepReport(
        lane.num_iterations,
        tree,
        verdict,
        measure=lane.measure_costs,
        num_sequences=1 + len(lane.beside),
        rows_beside=lane.rows_beside,
    )
    # the root and all new tokens but the last are cached now; the last one is the next root
    num_cached = len(verdict.token_ids) - 1
    # tokens first: should this be broken off, a cache that lacks rows is filled again when the session goes on
    lane.sequence.record(report)
    lane.cache.commit([[0, *verdict.path[:num_cached]]])
    if lane.observer is not None:
        so_far = attrs.evolve(report, seconds=lane.clock.since("decode"))
        lane.observer.tell(Commit(so_far, lane.clock.lap()))
    if lane.draft_state is not None:
        with lane.blame_drafter():
            lane.draft_state.commit(verdict.draft_path[:num_cached])
    return report
