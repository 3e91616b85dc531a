"""Commit: keep the accepted path's rows in both caches, forget the rest, append the tokens.

Generation may stop inside an accepted path: at an end-of-sequence token or at the last allowed token. Then
exactly the tokens up to there are committed.
"""

from __future__ import annotations

from dynatree_core.records import StepReport, Verdict
from dynatree_core.session import Session
from dynatree_core.tree import TokenTree

__all__ = ["commit"]


def commit(session: Session, tree: TokenTree, verdict: Verdict) -> StepReport:
    """Make the verdict permanent, up to where generation stops.

    The drafter comes last: should it fail, the tokens are committed and counted.
    """
    token_ids = _until_stop(session, verdict.token_ids)
    # the root and all new tokens but the last are cached now; the last one is the next root
    num_cached = len(token_ids) - 1
    report = StepReport(
        iteration=session.num_iterations,
        tree=tree,
        verdict=verdict,
        token_ids=token_ids,
        num_accepted=min(len(verdict.path), len(token_ids)),
    )
    # tokens first: should this be broken off, a cache that lacks rows is filled again when the session goes on
    session.record(report)
    session.cache.commit([[0, *verdict.path[:num_cached]]])
    if session.draft_state is not None:
        with session.blame_drafter():
            session.draft_state.commit(verdict.draft_path[:num_cached])
    return report


def _until_stop(session: Session, token_ids: tuple[int, ...]) -> tuple[int, ...]:
    token_ids = token_ids[: session.num_tokens_left]
    for i, token_id in enumerate(token_ids):
        if token_id in session.eos_token_ids:
            return token_ids[: i + 1]
    return token_ids
