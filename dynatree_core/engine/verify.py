"""Verify: which drafted nodes the target agrees with, and where the generation stops."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from dynatree_core.engine.faults import Faults, transferred
from dynatree_core.engine.lane import Lane
from dynatree_core.engine.logprobs import with_logprobs
from dynatree_core.engine.observer import Verification
from dynatree_core.engine.padded import known_tree, what_to_know
from dynatree_core.errors import NonFiniteLogitsError
from dynatree_core.tree.padded import PaddedRows
from dynatree_core.tree.token_tree import TokenTree
from dynatree_core.tree.verdict import Verdict

__all__ = ["follow", "longest_match", "outcome_of", "told", "verify"]

NOT_A_NUMBER = -1  # in the place of a token


def verify(
    trees: Mapping[Lane, TokenTree | PaddedRows], logits: Mapping[Lane, Tensor], faults: Faults
) -> dict[Lane, tuple[TokenTree, Verdict]]:
    """For each tree the path that the target follows in it, with its tokens, up to where the generation stops.

    Args:
        trees: the trees that were verified, or the rows of padded ones.
        logits: [nodes, vocab] for each, the target's output at each node, in the tree's order.
        faults: gets the error of who fails, such as a `NonFiniteLogitsError` for NaN on the path.

    Returns:
        The trees, and the verdicts, without those of who fails. What greedy decoding chooses costs one transfer to the
        host for all, and so does what has to be known of padded trees.
    """
    outcomes = transferred({lane: outcome_of(lane, trees[lane], logits[lane]) for lane in logits if _is_greedy(lane)})

    def verdict_of(lane: Lane, own_logits: Tensor) -> tuple[TokenTree, Verdict]:
        tree, outcome = trees[lane], outcomes.get(lane, [])
        if _is_greedy(lane):
            tree, verdict = told(lane, tree, outcome)
        else:
            assert isinstance(tree, TokenTree), "padded trees are of greedy decoding"
            verdict = follow(lane, tree, own_logits)
        if lane.request.num_logprobs is not None:
            verdict = with_logprobs(verdict, own_logits, lane.request.num_logprobs)
        if lane.observer is not None:
            wanted = own_logits if lane.observer.wants_logits else None
            lane.observer.tell(Verification(lane.num_iterations, tree, verdict, wanted))
        return tree, verdict

    return faults.each(verdict_of, logits)


def _is_greedy(lane: Lane) -> bool:
    """Whether the greatest logit decides, rather than processors or chance, which choose tokens one by one."""
    return not lane.request.logits_processors and lane.sampler is None


def outcome_of(lane: Lane, tree: TokenTree | PaddedRows, logits: Tensor) -> Tensor:
    """[numbers] int64: what `_matched` says, and behind it of a padded tree what `known_tree` has to know."""
    behind = what_to_know(lane, tree) if isinstance(tree, PaddedRows) else []
    return _matched(tree, logits, behind)


def told(lane: Lane, tree: TokenTree | PaddedRows, outcome: Sequence[int]) -> tuple[TokenTree, Verdict]:
    """The tree without padding, and the verdict on it, by what `outcome_of` says."""
    if isinstance(tree, PaddedRows):
        num_matched = 3 * (1 + tree.max_depth)
        tree, outcome = known_tree(lane, tree, outcome[num_matched:]), outcome[:num_matched]
    return tree, _until_stop(lane, _verdict(outcome))


def follow(lane: Lane, tree: TokenTree, logits: Tensor) -> Verdict:
    """Walk down from the root, choosing a token at each node as generate() would, while a child carries it.

    Logits processors see each node with its own path, and are called for each emitted token once, in order, with one
    row, as by generate(): what they count or remember stays right. It costs a transfer to the host for each token.
    A token that was chosen in a step that was broken off is not chosen again.
    """
    parents, token_ids, draft_index = torch.stack([tree.parent, tree.token_ids, tree.draft_index]).tolist()
    children = {(parent, token): node for node, (parent, token) in enumerate(zip(parents, token_ids, strict=True))}
    path: list[int] = []
    chosen: list[int] = []
    node = 0
    while True:
        choices = lane.sequence.pending.choices
        if len(chosen) == len(choices):
            choices.append(_choose(lane, chosen, logits[node : node + 1]))
        chosen.append(choices[len(chosen)])
        child = children.get((node, chosen[-1]))
        if child is not None:
            path.append(child)
        reason = lane.sequence.reason_to_stop(chosen)
        if child is None or reason is not None:
            return Verdict(tuple(path), tuple(draft_index[i] for i in path), tuple(chosen), reason)
        node = child


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


def _until_stop(lane: Lane, verdict: Verdict) -> Verdict:
    """The verdict, cut after the first token at which the generation stops."""
    for end in range(1, len(verdict.token_ids) + 1):
        reason = lane.sequence.reason_to_stop(verdict.token_ids[:end])
        if reason is not None:
            return Verdict(verdict.path[:end], verdict.draft_path[:end], verdict.token_ids[:end], reason)
    return verdict


def longest_match(tree: TokenTree, logits: Tensor) -> Verdict:
    """Accept the deepest path of which every token is the target's argmax at its parent.

    A node is alive when it and all its ancestors match: one comparison and one reduction with the
    ancestor mask, no loop over nodes. Greedy decoding leaves one alive node a level at most, since siblings
    have different tokens; were there two, either carries the same text.

    Args:
        tree: the tree that was verified.
        logits: [nodes, vocab], the target's output at each node, in the tree's order.

    Returns:
        The accepted path and its tokens, with the target's argmax after the last of them as bonus token.

    Raises:
        NonFiniteLogitsError: a logit on the accepted path is NaN.
    """
    return _verdict(_matched(tree, logits).tolist())


def _matched(tree: TokenTree | PaddedRows, logits: Tensor, behind: Sequence[Tensor] = ()) -> Tensor:
    """[3 · levels] int64: the path's nodes from the root on, behind its end the root again; the places that they had
    when drafted; and the target's tokens at them, which are what is committed. Behind them whatever else the host is to
    be told, [numbers] int64 each.

    Nothing is indexed by a number that the host would have to be told. What is NaN has the token −1: it is no child's,
    so no path goes on from there. Off the path it does no harm: a wrong draft may overflow where the target's own text
    never goes.
    """
    if logits.dtype == torch.float64:
        # generate() chooses in float32; two float64 logits that are one float32 number tie there, and must tie here
        logits = logits.float()
    top_token = _greatest(logits)
    if tree.num_nodes == 1:
        matched = torch.nn.functional.pad(top_token, (2, 0))
        return torch.cat([matched, *behind]) if behind else matched
    matches = tree.token_ids[1:] == top_token.index_select(0, tree.parent[1:])
    is_alive = (tree.ancestor_mask[:, 1:] <= matches).all(dim=1)  # who is an ancestor matches
    reach = tree.reach if isinstance(tree, PaddedRows) else tree.depth
    deepest = (reach * is_alive).argmax(dim=0, keepdim=True)  # of equals the first: the root, if nothing matches
    on_path = tree.ancestor_mask.index_select(0, deepest)[0]
    path = torch.nonzero_static(on_path, size=tree.max_depth + 1, fill_value=0)[:, 0]
    return torch.cat([path, tree.draft_index.index_select(0, path), top_token.index_select(0, path), *behind])


def _greatest(logits: Tensor) -> Tensor:
    """[nodes] int64: the token of the greatest logit, of equals the first; `NOT_A_NUMBER` where one of them is NaN."""
    if type(logits) is Tensor and logits.device.type == "cpu" and logits.dtype == torch.float32:
        rows = logits.detach().numpy()  # whose search takes a tenth of the time of torch's
        tokens = rows.argmax(axis=-1)  # both put NaN above every number
        tokens[np.isnan(rows[np.arange(len(rows)), tokens])] = NOT_A_NUMBER
        return torch.from_numpy(tokens)
    top_logit, top_token = logits.max(dim=-1)
    return top_token.masked_fill_(top_logit.isnan(), NOT_A_NUMBER)


def _verdict(outcome: Sequence[int]) -> Verdict:
    levels = len(outcome) // 3
    nodes, draft_nodes, token_ids = (tuple(outcome[i * levels :][:levels]) for i in range(3))
    num_accepted = sum(node > 0 for node in nodes)
    token_ids = token_ids[: num_accepted + 1]
    _check_number(NOT_A_NUMBER in token_ids)
    return Verdict(nodes[1 : num_accepted + 1], draft_nodes[1 : num_accepted + 1], token_ids)


def _check_number(is_nan: bool) -> None:
    if is_nan:
        raise NonFiniteLogitsError(
            "the target's logits must be numbers, got NaN or, when sampling, nothing finite at the top; its weights "
            "may be damaged, a processor may leave no token, or half precision overflows: try float32 or bfloat16"
        )
