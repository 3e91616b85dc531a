"""The algorithm on one page: a decode step, stage by stage."""

from __future__ import annotations

import attrs

from dynatree_core.engine.commit import commit
from dynatree_core.engine.draft import draft
from dynatree_core.engine.feedback import feedback
from dynatree_core.engine.observer import Prefill
from dynatree_core.engine.prune import prune
from dynatree_core.engine.session import Session, timed, without_tracking
from dynatree_core.engine.verify import verify
from dynatree_core.tree.flatten import flatten
from dynatree_core.tree.verdict import StepReport

__all__ = ["decode_step", "prefill"]


def prefill(session: Session) -> None:
    """Fill both caches with the prompt but its last token, which is the first tree's root.

    What the prefix cache knows is copied. Rows that are there already stay: in a session that goes on after a break
    there is nothing left to fill.
    """
    if session.observer is None:
        _fill_caches(session)
        return
    begun = Prefill(
        (*session.prompt_ids, *session.new_token_ids),
        len(session.prompt_ids),
        str(session.stack),
        session.drafter_name,
        session.limits,
    )
    session.observer.tell(begun)
    session.clock.lap()
    _fill_caches(session)
    seconds = session.clock.lap()
    session.observer.tell(attrs.evolve(begun, num_reused_tokens=session.num_reused_tokens, seconds=seconds))


@timed("prefill", on_device=True)
@without_tracking
def _fill_caches(session: Session) -> None:
    session.reuse_prefix()
    session.target.prefill(session.committed_ids[session.cache.length : -1], session.cache)
    if session.draft_state is not None:
        with session.blame_drafter():
            session.draft_state.prefill(session.committed_ids[:-1])


@timed("decode")
@without_tracking
def decode_step(session: Session) -> StepReport:
    """Commit 1 to depth + 1 tokens, exactly those that the target itself would have chosen."""
    tree = draft(session)  # rooted at the last committed token
    tree = prune(session, tree)  # what the policies think worth verifying
    flat = flatten([tree], [session.cache.next_place], **session.pass_shape)  # ids, positions, who sees whom
    output = session.target.forward(flat, session.cache, stage="verify")  # a row a node, and padding
    verdict = verify(session, tree, output.logits[0, : tree.num_nodes])  # accepted path and bonus token, up to a stop
    report = commit(session, tree, verdict)  # keep the path's cache rows, append the tokens
    return feedback(session, report)  # tell the policies
