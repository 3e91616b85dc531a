"""Verify: which drafted nodes the target agrees with. Pure functions of a tree and the target's logits."""

from __future__ import annotations

import torch
from torch import Tensor

from dynatree_core.errors import NonFiniteLogitsError
from dynatree_core.records import Verdict
from dynatree_core.tree import TokenTree

__all__ = ["verify"]


def verify(tree: TokenTree, logits: Tensor) -> Verdict:
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
    if logits.dtype == torch.float64:
        # generate() chooses in float32; two float64 logits that are one float32 number tie there, and must tie here
        logits = logits.float()
    top_logit, top_token = logits.max(dim=-1)  # [nodes]; max() puts NaN above every number
    matches = torch.ones_like(tree.token_ids, dtype=torch.bool)
    matches[1:] = tree.token_ids[1:] == top_token[tree.parent[1:]]
    is_alive = ~(tree.ancestor_mask & ~matches).any(dim=1)
    deepest = torch.where(is_alive, tree.depth, -1).argmax()
    # a stable sort brings the path's nodes to the front, by depth, without asking the device how many they are
    levels = tree.max_depth + 1
    path = torch.argsort((~tree.ancestor_mask[deepest]).byte(), stable=True)[:levels]
    # off the path NaN does no harm: a wrong draft may overflow where the target's own text never goes
    has_nan = (top_logit.isnan() & tree.ancestor_mask[deepest]).any()
    outcome = torch.cat(
        [
            torch.stack([tree.depth[deepest], top_token[deepest], has_nan]),
            path,
            tree.draft_index[path],
            tree.token_ids[path],
        ]
    ).tolist()  # the one transfer to the host
    num_accepted, bonus_token_id, is_broken = outcome[:3]
    if is_broken:
        raise NonFiniteLogitsError(
            "the target's logits must be numbers, got NaN; its weights may be damaged, or half precision "
            "overflows: try float32 or bfloat16"
        )
    nodes, draft_nodes, token_ids = (outcome[3 + i * levels :][1 : num_accepted + 1] for i in range(3))
    return Verdict(tuple(nodes), tuple(draft_nodes), (*token_ids, bonus_token_id))
