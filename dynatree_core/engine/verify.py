"""Verify: which drafted nodes the target agrees with, and where the generation stops."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from dynatree_core.engine.faults import Faults, transferred
from dynatree_core.engine.lane import Lane
from dynatree_core.engine.logprobs import with_logprobs
from dynatree_core.engine.observer import Verification
from dynatree_core.engine.padded import NUM_CHECKS, checks_of, known_tree
from dynatree_core.errors import NonFiniteLogitsError
from dynatree_core.runners.base import PassOutput
from dynatree_core.tree.padded import PaddedRows
from dynatree_core.tree.token_tree import TokenTree
from dynatree_core.tree.verdict import Verdict

__all__ = ["follow", "longest_match", "outcome_of", "told", "verify", "wants_totals"]

NOT_A_NUMBER = -1  # in the place of a token


def verify(
    trees: Mapping[Lane, TokenTree | PaddedRows], outputs: Mapping[Lane, PassOutput], faults: Faults
) -> dict[Lane, tuple[TokenTree, Verdict]]:
    """For each tree the path that the target follows in it, with its tokens, up to where the generation stops.

    Args:
        trees: the trees that were verified, or the rows of padded ones.
        outputs: what the target says of each, [1, nodes, ...] in the tree's order.
        faults: gets the error of who fails, such as a `NonFiniteLogitsError` for NaN on the path.

    Returns:
        The trees, and the verdicts, without those of who fails. What greedy decoding chooses costs one transfer to the
        host for all, and so does what has to be known of padded trees.
    """
    greedy = {lane: output for lane, output in outputs.items() if _is_greedy(lane)}
    outcomes = transferred({lane: outcome_of(lane, trees[lane], output) for lane, output in greedy.items()})

    def verdict_of(lane: Lane, output: PassOutput) -> tuple[TokenTree, Verdict]:
        tree, own_logits = trees[lane], output.logits[0]
        if _is_greedy(lane):
            tree, verdict = told(lane, tree, outcomes[lane])
        else:
            assert isinstance(tree, TokenTree), "padded trees are of greedy decoding"
            verdict = follow(lane, tree, own_logits)
        if lane.request.num_logprobs is not None:
            verdict = with_logprobs(verdict, own_logits, lane.request.num_logprobs)
        if lane.observer is not None:
            wanted = own_logits if lane.observer.wants_logits else None
            totals = None if wanted is None or output.totals is None else output.totals[0]
            lane.observer.tell(Verification(lane.num_iterations, tree, verdict, wanted, totals=totals))
        return tree, verdict

    return faults.each(verdict_of, outputs)


def wants_totals(lane: Lane) -> bool:
    """Whether `PassOutput.totals` serve: greedy decoding takes tokens from them, and an observer probabilities."""
    return _is_greedy(lane) or (lane.observer is not None and lane.observer.wants_logits)


def _is_greedy(lane: Lane) -> bool:
    """Whether the greatest logit decides, rather than processors or chance, which choose tokens one by one."""
    return not lane.request.logits_processors and lane.sampler is None


def outcome_of(lane: Lane, tree: TokenTree | PaddedRows, output: PassOutput) -> Tensor:
    """[numbers] int64: all that the host has to know of a tree to walk down it, for `told`.

    That is a number a node, column by column: the target's token, and where there is a choice the node's own token, its
    parent, and its place when it was drafted, unless the host has the tree. Of a padded tree the levels and what was
    checked come behind.
    """
    logits, is_known = output.logits[0], tree.num_nodes == 1 or tree.device != output.logits.device
    columns = [_greatest(logits, output.totals), *([] if is_known else _of_nodes(tree))]
    if isinstance(tree, PaddedRows):
        columns += [tree.reach, *checks_of(lane, tree)]
    return columns[0] if len(columns) == 1 else torch.cat(columns)


def _of_nodes(tree: TokenTree | PaddedRows) -> list[Tensor]:
    is_cut = isinstance(tree, PaddedRows) or tree.is_cut
    return [tree.token_ids, tree.parent, *([tree.draft_index] if is_cut else [])]


def told(lane: Lane, tree: TokenTree | PaddedRows, outcome: Sequence[int]) -> tuple[TokenTree, Verdict]:
    """The tree without padding, and the verdict on it, by what `outcome_of` says.

    Raises:
        NonFiniteLogitsError: a logit on the accepted path is NaN.
    """
    rows = tree.num_nodes
    if isinstance(tree, PaddedRows):
        outcome, checks = outcome[:-NUM_CHECKS], outcome[-NUM_CHECKS:]
    best, *columns = [outcome[first : first + rows] for first in range(0, len(outcome), rows)]
    if isinstance(tree, PaddedRows):
        tree = known_tree(lane, tree, columns.pop(), checks)
        columns = [column[: tree.num_nodes] for column in columns]  # nobody has padding as a child
    elif not columns and tree.num_drafted:  # it has grown on the host
        columns = [column.tolist() for column in _of_nodes(tree)]
    return tree, _until_stop(lane, _along(best, columns))


def _until_stop(lane: Lane, verdict: Verdict) -> Verdict:
    """The verdict, cut after the first token at which the generation stops."""
    for end in range(1, len(verdict.token_ids) + 1):
        reason = lane.sequence.reason_to_stop(verdict.token_ids[:end])
        if reason is not None:
            return Verdict(verdict.path[:end], verdict.draft_path[:end], verdict.token_ids[:end], reason)
    return verdict


def follow(lane: Lane, tree: TokenTree, logits: Tensor) -> Verdict:
    """Walk down from the root, choosing a token at each node as generate() would, while a child carries it.

    Logits processors see each node with its own path, and are called for each emitted token once, in order, with one
    row, as by generate(): what they count or remember stays right. It costs a transfer to the host for each token.
    A token that was chosen in a step that was broken off is not chosen again.
    """
    choices = lane.sequence.pending.choices

    def choose(node: int, before: list[int]) -> int:
        if len(before) == len(choices):
            choices.append(_choose(lane, before, logits[node : node + 1]))
        return choices[len(before)]

    columns = torch.stack(_of_nodes(tree)).tolist() if tree.num_drafted else []
    return _walk(columns, choose, lane.sequence.reason_to_stop)


def _walk(
    columns: Sequence[Sequence[int]],
    choose: Callable[[int, list[int]], int],
    reason_to_stop: Callable[[list[int]], str | None],
) -> Verdict:
    """Go down from the root while a child carries the token that is chosen, up to where the generation stops.

    Args:
        columns: of all nodes their tokens, parents and, of a tree that was cut, places when drafted; none for a root.
        choose: says the token behind a node, given those that were chosen before it.
        reason_to_stop: why the generation ends with the last of some tokens; None: it goes on.
    """
    token_ids, parents, *draft_index = columns or [[], []]
    # of siblings with one token the first: they carry the same text
    children = {(parents[node], token_ids[node]): node for node in reversed(range(1, len(parents)))}
    path: list[int] = []
    chosen: list[int] = []
    child: int | None = 0
    reason = None
    while child is not None and reason is None:
        chosen.append(choose(child, chosen))
        child = children.get((child, chosen[-1]))
        path += [] if child is None else [child]
        reason = reason_to_stop(chosen)
    draft_path = [draft_index[0][node] for node in path] if draft_index else path
    return Verdict(tuple(path), tuple(draft_path), tuple(chosen), reason)


def _choose(lane: Lane, before: list[int], logits: Tensor) -> int:
    """The token behind these new ones, by the target's logits [1, vocab] there, processors, and chance where asked."""
    own_logits = logits.to(torch.float32, copy=True)  # a processor may write into it
    text = lane.sequence.text_with(before)  # [1, tokens]
    scores = lane.request.logits_processors(text, own_logits)  # type: ignore[arg-type]  # transformers says LongTensor
    top_score, token = scores.max(dim=-1)
    # where nothing is possible, or something infinitely likely, there is no law to draw from
    is_broken = top_score.isnan() if lane.sampler is None else ~top_score.isfinite()
    is_nan, best = torch.cat([is_broken.long(), token]).tolist()
    _check_number(bool(is_nan))
    if lane.sampler is None:
        return int(best)
    lane.sequence.pending.draws[len(before) :] = [lane.sampler.state()]
    return int(lane.sampler.draw(scores))


def longest_match(tree: TokenTree, logits: Tensor) -> Verdict:
    """Accept the path of which every token is the target's argmax at its parent.

    Args:
        tree: the tree that was verified.
        logits: [nodes, vocab], the target's output at each node, in the tree's order.

    Returns:
        The accepted path and its tokens, with the target's argmax after the last of them as bonus token.

    Raises:
        NonFiniteLogitsError: a logit on the accepted path is NaN. Off the path it does no harm: a wrong draft may
            overflow where the target's own text never goes.
    """
    best, *columns = torch.stack([_greatest(logits), *_of_nodes(tree)]).tolist()
    return _along(best, columns)


def _along(best: Sequence[int], columns: Sequence[Sequence[int]]) -> Verdict:
    """Go down along the target's tokens, one for each node."""
    verdict = _walk(columns, lambda node, _: best[node], lambda chosen: None)
    _check_number(NOT_A_NUMBER in verdict.token_ids)
    return verdict


def _greatest(logits: Tensor, totals: Tensor | None = None) -> Tensor:
    """[nodes] int64: the token of the greatest logit, of equals the first; `NOT_A_NUMBER` where one of them is NaN.

    Args:
        logits: [nodes, vocab]
        totals: [1, nodes, 3] of these, where the pass has given them.
    """
    if logits.dtype == torch.float64:
        # generate() chooses in float32; two float64 logits that are one float32 number tie there, and must tie here
        logits = logits.float()
    if type(logits) is Tensor and logits.device.type == "cpu" and logits.dtype == torch.float32:
        rows = logits.detach().numpy()  # whose search takes a tenth of the time of torch's
        # all put NaN above every number
        tokens = rows.argmax(axis=-1) if totals is None else totals[0].numpy()[:, 2].astype(np.int64)
        tokens[np.isnan(rows[np.arange(len(rows)), tokens])] = NOT_A_NUMBER
        return torch.from_numpy(tokens)
    top_logit, top_token = logits.max(dim=-1)
    return top_token.masked_fill_(top_logit.isnan(), NOT_A_NUMBER)


def _check_number(is_nan: bool) -> None:
    if is_nan:
        raise NonFiniteLogitsError(
            "the target's logits must be numbers, got NaN or, when sampling, nothing finite at the top; its weights "
            "may be damaged, a processor may leave no token, or half precision overflows: try float32 or bfloat16"
        )
