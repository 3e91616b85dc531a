"""The algorithm on one page: a decode step, stage by stage."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import attrs

from dynatree_core.drafters.base import prefilling_of
from dynatree_core.engine.commit import commit
from dynatree_core.engine.draft import draft
from dynatree_core.engine.faults import Faults
from dynatree_core.engine.feedback import feedback
from dynatree_core.engine.lane import Lane
from dynatree_core.engine.observer import Prefill
from dynatree_core.engine.prune import prune
from dynatree_core.engine.verify import verify, wants_totals
from dynatree_core.runners.base import PassOutput
from dynatree_core.runners.passes import AskedPass, computed
from dynatree_core.tree.flatten import flatten
from dynatree_core.tree.padded import PaddedRows
from dynatree_core.tree.token_tree import TokenTree
from dynatree_core.tree.verdict import StepReport, Verdict

__all__ = ["decode_step", "decode_steps", "prefill", "prefill_chunks"]


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
    if lane.draft_state is None:
        return
    with lane.blame_drafter():
        parts = prefilling_of(lane.draft_state, lane.tree_ids[:-1])
    while True:
        with lane.blame_drafter():
            num_tokens = next(parts, None)
        if num_tokens is None:
            return
        yield num_tokens


def decode_step(lane: Lane) -> StepReport:
    """Commit 1 to depth + 1 tokens of one sequence.

    Raises:
        Exception: what went wrong.
    """
    (outcome,) = decode_steps([lane]).values()
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def decode_steps(lanes: Sequence[Lane]) -> dict[Lane, StepReport | Exception]:
    """Commit 1 to depth + 1 tokens of each sequence, exactly those that the target itself would have chosen."""
    faults = Faults()  # who fails in a stage is in no later one
    with timed(lanes), without_gradients(lanes):
        steps = replayed(lanes, faults)  # the next four stages by two launches, where a GPU has recorded them
        if steps is None:
            drafted = draft(lanes, faults)  # rooted at the last committed tokens
            trees = faults.each(prune, drafted)  # what the policies think worth verifying
            outputs = forward(trees, faults)  # one pass: ids, positions, who sees whom
            steps = verify(trees, outputs, faults)  # accepted paths and bonus tokens, up to a stop
        note_rows_beside(steps)
        reports = faults.each(commit, steps)  # keep the paths' cache rows, append the tokens
        return {**faults.each(feedback, reports), **faults.errors}  # tell the policies


def replayed(lanes: Sequence[Lane], faults: Faults) -> dict[Lane, tuple[TokenTree, Verdict]] | None:
    """What `verify` says of a step that a GPU has recorded; None where it is to be launched stage by stage."""
    if len(lanes) != 1 or lanes[0].device.type == "cpu":
        return None
    from dynatree_core.engine import recorded  # a command on a CPU starts without what records graphs

    return recorded.replayed(lanes[0], faults)


def forward(trees: Mapping[Lane, TokenTree | PaddedRows], faults: Faults) -> dict[Lane, PassOutput]:
    """What the target says at the nodes of each tree, [1, nodes, ...], by one pass for all that may share one."""
    asked = faults.each(_asked_pass, trees)
    outputs = {}
    for lane, output in zip(asked, computed([*asked.values()]), strict=True):
        if isinstance(output, Exception):
            faults.errors[lane] = output
        else:
            outputs[lane] = output.first_rows(trees[lane].num_nodes)  # a row a node, and padding
    return outputs


def note_rows_beside(steps: Mapping[Lane, tuple[TokenTree, Verdict]]) -> None:
    """Tell each sequence how many nodes of others' trees were verified beside its own."""
    num_rows = sum(tree.num_nodes for tree, _ in steps.values())
    for lane, (tree, _) in steps.items():
        lane.rows_beside = num_rows - tree.num_nodes


def _asked_pass(lane: Lane, tree: TokenTree | PaddedRows) -> AskedPass:
    if isinstance(tree, TokenTree) and tree.device != lane.device:  # it has grown on the host
        tree = tree.to(lane.device)
    flat = flatten([tree], [lane.cache.next_place], **lane.pass_shape, wants_totals=wants_totals(lane))
    return AskedPass(lane.target, flat, lane.cache, "verify", can_be_shared=not lane.request.is_fixed_width)


@contextmanager
def timed(lanes: Sequence[Lane]) -> Iterator[None]:
    """The block's time is that of a decode step of each lane."""
    with ExitStack() as clocks:
        for lane in lanes:
            clocks.enter_context(lane.clock.measure("decode"))
        yield


def without_gradients(lanes: Sequence[Lane]) -> AbstractContextManager[object]:
    """A context for passes of these lanes, which are of one engine."""
    return lanes[0].without_gradients() if lanes else nullcontext()
