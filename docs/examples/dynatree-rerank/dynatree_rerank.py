"""`rerank`: grow generously, verify only the best (the reranking step of EAGLE-2, Li et al. 2024, arXiv 2406.16858).

It says nothing about how the tree grows: compose it with policies that do.
"""

from __future__ import annotations

import attrs
import torch
from torch import Tensor

from dynatree_core import TokenTree, count, hookimpl


@attrs.define
class Rerank:
    """Verify the `nodes` drafted nodes with the highest path probability, and no others.

    If draft probabilities were acceptance probabilities, a tree would yield one token plus the sum of its nodes'
    path probabilities in expectation. No subtree of that size has a larger sum.
    """

    nodes: int = count(24)

    @hookimpl
    def keep_nodes(self, tree: TokenTree) -> Tensor | None:
        if tree.num_drafted <= self.nodes:
            return None
        # stable and breadth first: of equals the shallower stays, so a child of probability 1 brings its parent
        order = tree.cum_logprob[1:].argsort(descending=True, stable=True)
        keep = torch.zeros(tree.num_nodes, dtype=torch.bool, device=tree.device)
        keep[order[: self.nodes] + 1] = True
        return keep
