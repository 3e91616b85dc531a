"""The algorithm on one page: a decode step, stage by stage."""

from __future__ import annotations

from collections.abc import Iterator

import attrs

from dynatree_core.engine.commit import commit
from dynatree_core.engine.draft import draft
from dynatree_core.engine.feedback import feedback
from dynatree_core.engine.lane import Lane, timed, without_tracking
from dynatree_core.engine.observer import Prefill
from dynatree_core.engine.prune import prune
from dynatree_core.engine.verify import verify
from dynatree_core.tree.flatten import flatten
from dynatree_core.tree.verdict import StepReport

__all__ = ["decode_step", "prefill", "prefill_chunks"]


def prefill(lane: Lane) -> None:
    """Fill both caches with the prompt but its last token, which is the first tree's root.

    What the prefix cache knows is copied. Rows that are there already stay: in a session that goes on after a break
    there is nothing left to fill.
    """
    for _ in prefill_chunks(lane):
        pass


def prefill_chunks(lane: Lane) -> Iterator[int]:
    """Likewise, each chunk when the next one is asked for, so that others may go on between; yields its tokens."""
    if lane.observer is None:
        yield from _fill_caches(lane)
        return
    begun = Prefill(
        (*lane.prompt_ids, *lane.new_token_ids),
        len(lane.prompt_ids),
        str(lane.stack),
        lane.drafter_name,
        lane.limits,
        lane.stack,
        lane.settings,
    )
    lane.observer.tell(begun)
    lane.clock.lap()
    yield from _fill_caches(lane)
    seconds = lane.clock.lap()
    lane.observer.tell(attrs.evolve(begun, num_reused_tokens=lane.num_reused_tokens, seconds=seconds))


def _fill_caches(lane: Lane) -> Iterator[int]:
    chunks = _chunks(lane)
    while True:
        with lane.clock.measure("prefill", on_device=True), lane.without_gradients():
            num_tokens = next(chunks, None)
        if num_tokens is None:
            return
        yield num_tokens


def _chunks(lane: Lane) -> Iterator[int]:
    lane.reuse_prefix()
    yield from lane.target.prefill_chunks(lane.committed_ids[lane.cache.length : -1], lane.cache)
    if lane.draft_state is not None:
        with lane.blame_drafter():
            lane.draft_state.prefill(lane.committed_ids[:-1])


@timed("decode")
@without_tracking
def decode_step(lane: Lane) -> StepReport:
    """Commit 1 to depth + 1 tokens, exactly those that the target itself would have chosen."""
    tree = draft(lane)  # rooted at the last committed token
    tree = prune(lane, tree)  # what the policies think worth verifying
    flat = flatten([tree], [lane.cache.next_place], **lane.pass_shape)  # ids, positions, who sees whom
    output = lane.target.forward(flat, lane.cache, stage="verify")  # a row a node, and padding
    verdict = verify(lane, tree, output.logits[0, : tree.num_nodes])  # accepted path and bonus token, up to a stop
    report = commit(lane, tree, verdict)  # keep the path's cache rows, append the tokens
    return feedback(lane, report)  # tell the policies
