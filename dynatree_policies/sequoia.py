"""`sequoia`: the static tree that yields most for given rank acceptances (Sequoia, Chen et al. 2024, arXiv 2402.12374).

Let p[k] be the probability that the k-th child of an accepted node is the accepted one, whatever the node (the paper's
positional acceptance). A tree then yields the sum over its nodes, the root included, of the product of p along the
path, in expectation. With c(n, l) the most that n nodes in at most l levels can yield,

    c(1, l) = 1,    c(n, l) = 1 + f(n - 1, l, 1)
    f(m, l, k) = max over s = 1…m of  p[k] · c(s, l - 1) + f(m - s, l, k + 1),    f(0, l, k) = 0

where f(m, l, k) is the most that m nodes below one node yield when the children of rank k and beyond share them, and s
is the size of the subtree under the child of rank k. Unlike taking the most probable paths one by one this is exact
where p rises somewhere: a child that is worth little may be needed to reach the next one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Hashable, Sequence
from typing import ClassVar

import attrs
import torch
from torch import Tensor

from dynatree_core import CostModel, Frontier, StepReport, TokenTree, choice, count, fraction, hookimpl

# Before anything is known the child of rank k has 0.6 / k², near what is published for pairs of models of one family,
# and that counts as much as 4 observations.
PRIOR_FIRST, PRIOR_WEIGHT = 0.6, 4.0


@attrs.define
class Sequoia:
    """The best static tree of up to `nodes` drafted nodes, `depth` levels and `branch` children.

    With `size='costs'` it is the tree that yields most tokens a second by the measured costs, with `size='full'` the
    one that yields most tokens.

    `acceptance` gives the rank acceptances, such as '0.6,0.15,0.07'. Empty: they are counted while decoding, and the
    tree is planned anew after 1, 2, 4, 8, … iterations.
    """

    nodes: int = count(32)
    depth: int = count(6)
    branch: int = count(8)
    size: str = choice("costs", ("costs", "full"))
    acceptance: str = attrs.field(default="")
    tau: float = fraction(0.0)
    num_iterations: int = attrs.field(default=0, init=False, repr=False)
    # [2, branch + 1] int64, where the trees are: by rank, verdicts about such a child, and those that accepted it; last
    # those of higher rank. Only a new plan needs to know them, so no iteration waits for them
    counts: Tensor | None = attrs.field(default=None, init=False, repr=False, eq=False)
    plan: Plan | None = attrs.field(default=None, init=False, repr=False, eq=False)
    _found: _Found | None = attrs.field(default=None, init=False, repr=False, eq=False)

    is_capturable: ClassVar = True

    @property
    def is_recordable(self) -> bool:
        """Whether there is a plan: to make one, numbers are read."""
        return self.plan is not None

    @property
    def graph_key(self) -> Hashable:
        """What its answers follow from, beside what a hook is shown."""
        return None if self.plan is None else self.plan.shape

    @acceptance.validator
    def _check_acceptance(self, attribute: attrs.Attribute[str], value: str) -> None:
        try:
            rates = given_rates(value)
        except (AttributeError, ValueError):
            rates = [math.nan]
        if not (all(0 <= rate <= 1 for rate in rates) and sum(rates) <= 1 + 1e-6):
            raise ValueError(
                "Sequoia's parameter 'acceptance' must be empty or numbers from 0 to 1 between commas, of sum 1 at "
                f"most, such as '0.6,0.15,0.07', got {value!r}"
            )

    @property
    def max_nodes(self) -> int:
        return self.nodes

    @property
    def max_width(self) -> int | tuple[int, ...]:
        """Nodes of a level at most, of each as soon as there is a plan."""
        return self.nodes if self.plan is None else tuple(sum(widths) for widths in self.plan.shape[:-1])

    @hookimpl
    def should_expand(self, frontier: Frontier) -> bool:
        if self.plan is None:
            self.plan = self._planned(frontier)
        return frontier.depth < self.plan.depth

    @hookimpl
    def branch_factor(self, frontier: Frontier) -> Tensor:
        assert self.plan is not None, "should_expand() is asked before"
        before, sizes = self._found, frontier.tree.level_sizes
        is_parent = before is not None and before.iteration == frontier.iteration and before.sizes == sizes[:-1]
        nodes = self.plan.nodes(frontier.tree, before.nodes if is_parent and before is not None else None)
        self._found = _Found(frontier.iteration, sizes, nodes)
        return self.plan.num_children.index_select(0, nodes)

    @hookimpl
    def on_iteration_end(self, report: StepReport) -> None:
        if self.acceptance:
            return
        self._count(report)
        self.num_iterations += 1
        if self.num_iterations & (self.num_iterations - 1) == 0:
            self.plan = None

    def rates(self, num_ranks: int) -> list[float]:
        """The acceptance of each rank: as given, else as counted, with the prior."""
        if self.acceptance:
            return given_rates(self.acceptance)[:num_ranks]
        counted = self.counts.tolist() if self.counts is not None else [[], []]
        trials, hits = ((of_rank + [0] * num_ranks)[:num_ranks] for of_rank in counted)
        return [
            (PRIOR_WEIGHT * PRIOR_FIRST / (rank + 1) ** 2 + hits[rank]) / (PRIOR_WEIGHT + trials[rank])
            for rank in range(num_ranks)
        ]

    def _planned(self, frontier: Frontier) -> Plan:
        planner = Planner(self.rates(min(self.branch, frontier.max_branch)), self.nodes + 1, self.depth + 1)
        size = planner.fastest(frontier.costs) if self.size == "costs" else planner.largest()
        return Plan.of_shape(planner.shape(*size), frontier.tree.device)

    def _count(self, report: StepReport) -> None:
        """Each node of the accepted path says which of its children was accepted, if any."""
        if (
            report.verdict.stop_reason is not None or report.tree.num_drafted == 0
        ):  # what came after the stop is not known
            return
        tree = report.tree
        if self.counts is None:
            self.counts = torch.zeros(2, self.branch + 1, dtype=torch.int64, device=tree.device)
        last = report.verdict.path[-1] if report.verdict.path else 0
        is_accepted = tree.ancestor_mask[last]
        is_judged = is_accepted.index_select(0, tree.parent[1:])
        outcomes = torch.stack([is_judged, is_judged & is_accepted[1:]]).long()
        self.counts = self.counts.index_add(1, tree.rank[1:].clamp(max=self.branch), outcomes)


def given_rates(text: str) -> list[float]:
    """Numbers between commas."""
    return [float(number) for number in text.split(",")] if text else []


@attrs.frozen(eq=False)
class _Found:
    """Where the last level of a growing tree is in the plan."""

    iteration: int
    sizes: tuple[int, ...]  # of the tree's levels
    nodes: Tensor  # [width] int64: the planned nodes that its nodes are


@attrs.frozen(eq=False)
class Plan:
    """A tree's shape, to be looked up on the device. The last of its nodes stands for all that are not planned."""

    depth: int
    num_children: Tensor  # [planned + 1] int64
    child: Tensor  # [planned + 1, ranks + 1] int64: the planned node that the child of each rank is
    shape: tuple[tuple[int, ...], ...]  # the children of each node, by level

    @classmethod
    def of_shape(cls, shape: Sequence[Sequence[int]], device: torch.device) -> Plan:
        """The plan of a tree that is given as the children of each node, by level and breadth first."""
        widths = [width for level in shape for width in level]
        unplanned, ranks = len(widths), max(widths, default=0)
        child = torch.full((unplanned + 1, ranks + 1), unplanned)
        next_node = 1
        for node, width in enumerate(widths):
            child[node, :width] = torch.arange(next_node, next_node + width)
            next_node += width
        num_children = torch.tensor([*widths, 0]).to(device)
        return cls(len(shape) - 1, num_children, child.to(device), tuple(map(tuple, shape)))

    def nodes(self, tree: TokenTree, above: Tensor | None = None) -> Tensor:
        """[width] int64: the planned node that each node of the tree's last level is.

        A node is found by its path of ranks, so a tree that lacks nodes of the plan keeps to the rest of it.

        Args:
            above: those of the level before, if they are known.
        """
        found = torch.zeros(1, dtype=torch.int64, device=tree.device) if above is None else above
        first = 0 if above is None else max(tree.max_depth - 1, 0)
        start = sum(tree.level_sizes[:first])  # of the level whose nodes are found
        for size, width in itertools.pairwise(tree.level_sizes[first:]):
            level = slice(start + size, start + size + width)
            rank = tree.rank[level].clamp(max=self.child.shape[1] - 1)
            found = self.child[found.index_select(0, tree.parent[level] - start), rank]
            start += size
        return found


class Planner:
    """The tables c and f of one acceptance vector, up to a size and a number of levels.

    Args:
        acceptance: p[0], p[1], …: of the first child, the second, and so on.
        size: nodes at most, the root included.
        levels: levels at most, the root's included.
    """

    def __init__(self, acceptance: Sequence[float], size: int, levels: int) -> None:
        self.acceptance = acceptance
        share = torch.arange(size)
        self._left = share[:, None] - share  # [size, size]: nodes left of m (row) when a child's subtree has s (column)
        nothing = torch.full((size,), -torch.inf, dtype=torch.float64)
        one = nothing.clone()  # c(·, 1), by size − 1
        one[0] = 1.0
        self.best = [one]  # by level: [size] float64, c(n, l) at n − 1; -inf where n nodes do not fit l levels
        self._split: list[list[Tensor]] = [[]]  # by level and rank: [size] int64, the best s for each m
        for _ in range(1, levels):
            self._add_level()

    def _add_level(self) -> None:
        child, size = self.best[-1], len(self._left)
        below = torch.full((size,), -torch.inf, dtype=torch.float64)  # f(·, l, k + 1)
        below[0] = 0.0
        splits = []
        for p in reversed(self.acceptance):
            of_rest = torch.where(self._left >= 0, below[self._left.clamp(min=0)], -torch.inf)  # [m, s]
            of_child = torch.full((size,), -torch.inf, dtype=torch.float64)  # by s; -inf where it does not fit
            of_child[1:] = torch.where(child[:-1] > -torch.inf, p * child[:-1], -torch.inf)
            value, split = (of_rest + of_child).max(dim=1)
            value[0] = 0.0
            below = value
            splits.append(split)
        self.best.append(1 + below)
        self._split.append(splits[::-1])

    def value(self, size: int, levels: int) -> float:
        """c(size, levels): the tokens that the best tree of exactly that size yields; -inf if there is none."""
        return self.best[levels - 1][size - 1].item()

    def largest(self) -> tuple[int, int]:
        """Size and levels of the tree that yields most, the smallest of equals; it has one drafted node at least."""
        return self._best_by(lambda size, levels: 1.0)

    def fastest(self, costs: CostModel) -> tuple[int, int]:
        """Size and levels of the tree that yields most for the time it takes; it has one drafted node at least.

        Its levels are taken to be of one width, the root's apart.
        """

        def seconds(size: int, levels: int) -> float:
            width = math.ceil((size - 1) / (levels - 1))
            return costs.iteration_seconds(size - 1, [1] + [width] * (levels - 2))

        return self._best_by(seconds)

    def _best_by(self, seconds: Callable[[int, int], float]) -> tuple[int, int]:
        sizes, depths = range(2, len(self._left) + 1), range(2, len(self.best) + 1)
        options = [(self.value(size, levels), size, levels) for levels in depths for size in sizes]
        feasible = [(value / seconds(size, levels), -size, -levels) for value, size, levels in options if value > 0]
        _, size, levels = max(feasible)
        return -size, -levels

    def shape(self, size: int, levels: int) -> list[list[int]]:
        """The best tree of that size: the children of each node, for each level from the root's on, breadth first."""
        level = [size]
        shape: list[list[int]] = []
        while level:
            subtrees = [self._subtrees(nodes, levels - len(shape)) for nodes in level]
            shape.append([len(of_node) for of_node in subtrees])
            level = [nodes for of_node in subtrees for nodes in of_node]
        return shape

    def _subtrees(self, size: int, levels: int) -> list[int]:
        """Sizes of the subtrees under the root of the best tree of that size."""
        sizes: list[int] = []
        left = size - 1
        while left:
            sizes.append(int(self._split[levels - 1][len(sizes)][left]))
            left -= sizes[-1]
        return sizes
