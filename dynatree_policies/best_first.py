"""`best_first`: the nodes with the highest path probability, wherever in the tree they stand.

If the target accepts a node whose parent it has accepted with the probability c that the drafter gives it, it accepts
the node v with probability V(v), the product of c along the path to v, and a tree T yields

    E[tokens] = 1 + Σ V(v) over the drafted nodes v of T

in expectation (the objective of OPT-Tree, Wang et al. 2025; the 1 is the bonus token). V only falls along a path, so
the N nodes of highest V are a tree, and no tree of N nodes yields more. They are found as in EAGLE-2 (Li et al. 2024,
arXiv 2406.16858): each level expands the nodes of highest V, and what was drafted is ranked once more before it is
verified. With a beam as wide as N it is the tree that DySpec (Xiong et al. 2024, arXiv 2410.11744) builds node by node
from a heap.
"""

from __future__ import annotations

from typing import ClassVar

import attrs
import torch
from torch import Tensor

from dynatree_core import Frontier, TokenTree, count, fraction, hookimpl

LEAST = torch.finfo(torch.float32).min  # of the log-probability of a path that is possible


@attrs.define
class BestFirst:
    """Verify the `nodes` drafted nodes of highest path probability.

    A level expands its `beam` most probable nodes, each with up to `branch` children, of which those are grown that
    are among the best `nodes` so far: no other can be among them later. The tree ends at `depth`, or where the paths
    that could go on have no more than `min_gain` of the probability between them, which bounds the tokens that
    another level can yield.
    """

    nodes: int = count(32)
    depth: int = count(8)
    beam: int = count(10)
    branch: int = count(16)
    min_gain: float = fraction(0.0)
    tau: float = fraction(0.0)
    # the tree whose level was last looked at, and which nodes of the level are not expanded
    _beyond: tuple[TokenTree, Tensor] | None = attrs.field(default=None, init=False, repr=False, eq=False)

    is_recordable: ClassVar = True

    @property
    def max_nodes(self) -> int:
        """Drafted nodes at most, before they are ranked: a level has no more than can be verified."""
        return self.nodes * self.depth

    @property
    def is_capturable(self) -> bool:
        """Whether nothing is read from the device; what is to save passes of the drafter is."""
        return self.min_gain == 0

    @property
    def reads_on_host(self) -> bool:
        """Whether something is."""
        return not self.is_capturable

    @property
    def max_width(self) -> int:
        """Nodes of a level at most."""
        return self.nodes

    @property
    def max_kept(self) -> int:
        """Drafted nodes that are verified at most."""
        return self.nodes

    @hookimpl
    def should_expand(self, frontier: Frontier) -> Tensor | bool:
        if frontier.depth >= self.depth:
            return False
        is_beyond = self._beyond_beam(frontier)
        if self.min_gain > 0:  # a wait for the device, which may save a drafter pass
            paths = frontier.cum_logprob.exp()
            gain = paths.sum() if is_beyond is None else paths.masked_fill(is_beyond, 0).sum()
            if gain <= self.min_gain:
                return False
        return True if is_beyond is None else ~is_beyond

    @hookimpl
    def branch_factor(self, frontier: Frontier) -> Tensor:
        scores = frontier.cum_logprob[:, None] + frontier.top_logprobs[:, : self.branch]
        is_beyond = self._beyond_beam(frontier)
        if is_beyond is not None:
            scores.masked_fill_(is_beyond[:, None], -torch.inf)
        rivals = torch.cat([frontier.tree.cum_logprob[1:], scores.flatten()])
        least = rivals.topk(min(self.nodes, rivals.numel())).values[-1]
        return (scores >= least.clamp(min=LEAST)).sum(dim=1)

    @hookimpl
    def keep_nodes(self, tree: TokenTree) -> Tensor | None:
        self._beyond = None  # the tree is grown
        if tree.num_drafted <= self.nodes:
            return None
        # stable and breadth first: of equals the shallower stays, so a child of probability 1 brings its parent
        order = tree.cum_logprob[1:].argsort(descending=True, stable=True)
        keep = torch.zeros(tree.num_nodes, dtype=torch.bool, device=tree.device)
        return keep.index_fill_(0, order[: self.nodes] + 1, True)

    def _beyond_beam(self, frontier: Frontier) -> Tensor | None:
        """[width] bool: all but the most probable nodes of the level; None: no node. Both hooks ask for it."""
        tree = frontier.tree
        if frontier.width <= self.beam:
            return None
        if self._beyond is None or self._beyond[0] is not tree:
            # stable: of equals the first
            best = frontier.cum_logprob.argsort(descending=True, stable=True)[: self.beam]
            is_beyond = torch.ones(frontier.width, dtype=torch.bool, device=tree.device).index_fill_(0, best, False)
            self._beyond = tree, is_beyond
        return self._beyond[1]
