"""The kernel of `levels`: a program writes one node.

Each of them finds out anew which proposals are chosen, so none waits for another one. Triton compiles one version for
all levels of a width: numbers that differ from level to level are marked.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["level_kernel"]

_NUMBERS = ["num_nodes", "first", "old", "size", "max_nodes", "last_id", "least", "logprob_step", "id_step"]


@triton.jit
def _key(i, scores, logprobs, expand, branch, num_nodes, first, least, logprob_step, K: tl.constexpr):
    """The log-probabilities of the paths to these proposals; -inf for those that are not admitted."""
    node, rank = i // K, i % K
    is_there = node < num_nodes
    above = tl.load(scores + 2 * (first + node) + 1, mask=is_there, other=float("-inf"))
    path = above + tl.load(logprobs + node * logprob_step + rank, mask=is_there, other=float("-inf"))
    is_wanted = (rank < tl.load(branch + node, mask=is_there, other=0)) & (
        tl.load(expand + node, mask=is_there, other=0) != 0
    )
    return tl.where(is_wanted & (path >= least), path, float("-inf"))


@triton.jit(do_not_specialize=_NUMBERS)
def level_kernel(
    packed, mask, logprobs, token_ids, expand, branch,
    num_nodes, first, old, size, max_nodes, last_id, least, logprob_step, id_step,
    K: tl.constexpr, WIDTH: tl.constexpr, PROPOSED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A node of the new level a program."""
    place = tl.program_id(0)
    scores = (packed + 2 * size).to(tl.pointer_type(tl.float32), bitcast=True)
    num_live = 0
    for start in range(0, old, BLOCK):
        node = start + tl.arange(0, BLOCK)
        path = tl.load(scores + 2 * node + 1, mask=node < old, other=float("-inf"))
        num_live += tl.sum((path > float("-inf")).to(tl.int32), axis=0)

    i = tl.arange(0, PROPOSED)
    key = _key(i, scores, logprobs, expand, branch, num_nodes, first, least, logprob_step, K)
    num_better = tl.zeros([PROPOSED], tl.int32)
    for start in range(0, PROPOSED, BLOCK):
        j = start + tl.arange(0, BLOCK)
        other = _key(j, scores, logprobs, expand, branch, num_nodes, first, least, logprob_step, K)
        is_better = (other[None, :] > key[:, None]) | ((other[None, :] == key[:, None]) & (j[None, :] < i[:, None]))
        num_better += tl.sum(is_better.to(tl.int32), axis=1)  # of equals the first is better
    num_places = tl.minimum(WIDTH, max_nodes + 1 - num_live)
    is_chosen = (key > float("-inf")) & (num_better < num_places)
    is_mine = is_chosen & (tl.cumsum(is_chosen.to(tl.int32), axis=0) == place + 1)
    is_live = tl.sum(is_mine.to(tl.int32), axis=0) > 0

    mine = tl.sum(tl.where(is_mine, i, 0), axis=0)
    node, rank = mine // K, mine % K  # both 0 for padding
    token = tl.load(token_ids + node * id_step + rank)
    token = tl.minimum(tl.maximum(token, 0), last_id)
    logprob = tl.load(logprobs + node * logprob_step + rank)
    path = tl.load(scores + 2 * (first + node) + 1) + logprob
    parent = first + tl.where(is_live, node, num_nodes - 1)  # padding is a child of the last one, so parents ascend
    column = old + place
    tl.store(packed + column, tl.where(is_live, token, 0))
    tl.store(packed + size + column, parent)
    tl.store(scores + 2 * column, tl.where(is_live, logprob, float("-inf")))
    tl.store(scores + 2 * column + 1, tl.where(is_live, path, float("-inf")))
    tl.store(packed + 3 * size + column, rank)
    for start in range(0, old, BLOCK):
        seen = start + tl.arange(0, BLOCK)
        row = tl.load(mask + parent * size + seen, mask=seen < old, other=0)
        tl.store(mask + column * size + seen, row, mask=seen < old)
