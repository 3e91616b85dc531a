"""What drafting is worth in theory, from acceptance by rank and the costs of a pass.

The acceptance of rank r is the probability that a node's child of rank r (0 is the drafter's first choice) carries the
token that the target says there; ranks exclude each other, so they sum to 1 at most. Texts are taken as if each token's
rank were drawn anew: measured acceptances depend on each other, which is why the report prints both.

Sources: Leviathan, Kalman, Matias 2023, equation 1 (chains) and theorem 3.8 (their speedup); Chen et al. 2024, Sequoia
(trees from acceptance by rank); Li et al. 2024, EAGLE-2, and Wang et al. 2024, OPT-Tree (the best nodes by path
probability form the best tree of their number).
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence

import attrs
import numpy as np


@attrs.frozen
class RankTree:
    """The shape of a tree: for each drafted node its parent (−1: the root) and its rank among that one's children.

    Parents stand before their children.
    """

    parent: tuple[int, ...]
    rank: tuple[int, ...]

    @property
    def num_nodes(self) -> int:
        """Drafted nodes, the root not counted."""
        return len(self.parent)

    def depths(self) -> list[int]:
        """The depth of each node; 1 below the root."""
        depths: list[int] = []
        for parent in self.parent:
            depths.append(1 if parent < 0 else depths[parent] + 1)
        return depths

    @property
    def depth(self) -> int:
        """Levels below the root, each of which costs a pass of the drafter."""
        return max(self.depths(), default=0)


@attrs.frozen
class Worth:
    """The best tree for some costs, and its speedup over autoregressive decoding."""

    tree: RankTree
    speedup: float


def chain_tokens(acceptance: float, length: int) -> float:
    """Expected tokens of an iteration with a chain: (1 − α^(K+1)) ÷ (1 − α) (Leviathan et al. 2023, equation 1)."""
    if acceptance == 1:
        return length + 1.0
    return (1 - acceptance ** (length + 1)) / (1 - acceptance)


def fixed_tokens(rank_acceptance: Sequence[float], depth: int, branch: int) -> float:
    """Expected tokens of an iteration with the full tree of one depth and branch factor.

    A level is passed when any of its ranks is accepted, so the tree behaves as a chain of their sum.
    """
    return chain_tokens(sum(rank_acceptance[:branch]), depth)


def path_products(tree: RankTree, rank_acceptance: Sequence[float]) -> list[float]:
    """The probability of each node that it is accepted: the product of the ranks' acceptances along its path."""
    products: list[float] = []
    for parent, rank in zip(tree.parent, tree.rank, strict=True):
        own = rank_acceptance[rank] if rank < len(rank_acceptance) else 0.0
        products.append(own * (1.0 if parent < 0 else products[parent]))
    return products


def tree_tokens(tree: RankTree, rank_acceptance: Sequence[float]) -> float:
    """Expected tokens of an iteration: 1 for the bonus token, and each node's probability to be accepted."""
    return 1.0 + sum(path_products(tree, rank_acceptance))


def speedup(tokens: float, depth: int, num_nodes: int, *, level_cost: float, node_cost: float) -> float:
    """Tokens of an iteration ÷ its time, in autoregressive steps: E ÷ (1 + c·depth + s·nodes).

    Args:
        tokens: expected tokens of the iteration.
        depth: levels, each drafted in one pass.
        num_nodes: drafted nodes, each verified in a row of the target's pass.
        level_cost: c, the time of one drafter pass relative to an autoregressive step of the target.
        node_cost: s, what a further row adds to the target's pass, relative to the same.
    """
    return tokens / (1 + level_cost * depth + node_cost * num_nodes)


def best_tree(rank_acceptance: Sequence[float], num_nodes: int, *, max_depth: int | None = None) -> RankTree:
    """The tree of so many nodes with the most expected tokens: the nodes of the highest path products.

    A child's product is at most its parent's and its earlier sibling's, so the best nodes are a tree. Acceptances have
    to descend, as those of a drafter that puts its children in order do; nodes that are never accepted are left out.
    """
    if any(later > earlier for earlier, later in itertools.pairwise(rank_acceptance)):
        raise ValueError(f"the acceptances of the ranks must descend, got {list(rank_acceptance)}")
    parents: list[int] = []
    ranks: list[int] = []
    depths: list[int] = []
    # (−product, place, parent, rank): what may come next, the best first, the earliest found among equals
    waiting = [(-rank_acceptance[0], 0, -1, 0)] if rank_acceptance and max_depth != 0 else []
    found = 1
    while waiting and len(parents) < num_nodes and waiting[0][0] < 0:
        product, _, parent, rank = heapq.heappop(waiting)
        node = len(parents)
        parents.append(parent)
        ranks.append(rank)
        depths.append(1 if parent < 0 else depths[parent] + 1)
        if rank + 1 < len(rank_acceptance):
            sibling = product / rank_acceptance[rank] * rank_acceptance[rank + 1]
            heapq.heappush(waiting, (sibling, found, parent, rank + 1))
        if max_depth is None or depths[-1] < max_depth:
            heapq.heappush(waiting, (product * rank_acceptance[0], found + 1, node, 0))
        found += 2
    return RankTree(tuple(parents), tuple(ranks))


def best_chain(acceptance: float, *, level_cost: float, node_cost: float, max_depth: int = 64) -> Worth:
    """The chain with the highest speedup, up to a depth."""
    worths = []
    for depth in range(max_depth + 1):
        tokens = chain_tokens(acceptance, depth)
        chain = RankTree(tuple(range(-1, depth - 1)), (0,) * depth)
        worths.append(Worth(chain, speedup(tokens, depth, depth, level_cost=level_cost, node_cost=node_cost)))
    return max(worths, key=lambda worth: worth.speedup)


def best_tree_speedup(
    rank_acceptance: Sequence[float], *, level_cost: float, node_cost: float, max_nodes: int = 256, max_depth: int = 16
) -> Worth:
    """The tree with the highest speedup of all trees up to a number of nodes and a depth.

    For a depth and a number of nodes the best tree is known; both are tried.
    """
    best = Worth(RankTree((), ()), 1.0)
    for depth in range(1, max_depth + 1):
        largest = best_tree(rank_acceptance, max_nodes, max_depth=depth)
        # the best tree of n nodes is the first n of the largest; one that does not reach the depth was tried before
        tokens = 1 + np.cumsum(path_products(largest, rank_acceptance))
        nodes = np.arange(1, largest.num_nodes + 1)
        levels = np.maximum.accumulate(largest.depths())
        speedups = tokens / (1 + level_cost * levels + node_cost * nodes)
        place = int(speedups.argmax())
        if speedups[place] > best.speedup:
            tree = RankTree(largest.parent[: place + 1], largest.rank[: place + 1])
            best = Worth(tree, float(speedups[place]))
    return best
