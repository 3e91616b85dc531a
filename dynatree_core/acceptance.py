"""How likely a drafted token is to be accepted, given that its parent is: the drafter's word, corrected by experience.

A beta-binomial estimate in three steps, each of which takes the one before it as its prior: nodes of a like draft
probability, of these the nodes of the same rank among their siblings, of these the nodes of a like depth. With h of n
such nodes accepted and a prior mean m it is (w·m + h) / (w + n), the mean of the posterior if the prior weighs as much
as w observations. Where nothing was observed it is the drafter's own probability.
"""

from __future__ import annotations

import math

import attrs
import torch
from torch import Tensor

from dynatree_core.records import StepReport

__all__ = ["AcceptanceEstimator"]

# borders between draft probabilities that are alike, on a scale that is even in ln(p / (1 − p))
_BORDERS = tuple(math.log(p) for p in (0.01, 0.03, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.97))
_RANKS, _DEPTHS = 4, 4  # told apart: rank 0, 1, 2 and beyond; depth 1, 2, 3 to 4, and beyond
_STEPS = ((len(_BORDERS) + 1,), (len(_BORDERS) + 1, _RANKS), (len(_BORDERS) + 1, _RANKS, _DEPTHS))


def _no_counts() -> list[Tensor]:
    return [torch.zeros(2, *shape) for shape in _STEPS]


@attrs.define(eq=False)
class AcceptanceEstimator:
    """Learns from verdicts, and predicts for children that may be drafted.

    A policy keeps one in a field of its own: `attrs.field(factory=AcceptanceEstimator, init=False)`.
    """

    weight: float = 4.0  # of each prior, in observations
    counts: list[Tensor] = attrs.field(factory=_no_counts, init=False, repr=False)  # of each step: accepted, judged

    def predict(self, logprob: Tensor, rank: Tensor, depth: Tensor | int) -> Tensor:
        """Probabilities that nodes are accepted if their parents are.

        Args:
            logprob: natural log of the draft probability given the parent, of any shape; -inf gives 0.
            rank: place among the siblings from 0 on, of a shape that fits.
            depth: of the nodes, 1 for children of the root.
        """
        cell = self._cell(logprob, rank, depth)
        estimate = logprob.exp().clamp(max=1)
        for step, (accepted, judged) in enumerate(self._counts_on(logprob.device), start=1):
            place = cell[:step]
            estimate = (self.weight * estimate + accepted[place]) / (self.weight + judged[place])
        return torch.where(logprob > -torch.inf, estimate, 0)

    def observe(self, report: StepReport) -> None:
        """Count a step's verdict: the target has judged the children of each accepted node.

        A step in which the generation stops is left out, since nothing is known of what would have come.
        """
        tree = report.tree
        if tree.num_drafted == 0 or report.verdict.stop_reason is not None:
            return
        is_accepted = torch.zeros(tree.num_nodes, device=tree.device)
        is_accepted[[0, *report.verdict.path]] = 1
        judged = is_accepted[tree.parent[1:]]  # 1 for the children of accepted nodes
        cell = self._cell(tree.logprob[1:], tree.rank[1:], tree.depth[1:])
        outcomes = torch.stack([judged * is_accepted[1:], judged])
        for step, counts in enumerate(self._counts_on(tree.device), start=1):
            place = torch.zeros_like(cell[0])
            for index, size in zip(cell[:step], counts.shape[1:], strict=True):
                place = place * size + index
            counts.flatten(1).index_add_(1, place, outcomes)

    def _counts_on(self, device: torch.device) -> list[Tensor]:
        """The counts, where the trees are."""
        self.counts = [counts.to(device) for counts in self.counts]
        return self.counts

    def _cell(self, logprob: Tensor, rank: Tensor, depth: Tensor | int) -> tuple[Tensor, Tensor, Tensor]:
        """Which nodes are alike: by draft probability, rank and depth."""
        borders = torch.tensor(_BORDERS, device=logprob.device)
        alike = torch.bucketize(logprob.contiguous(), borders)
        deep = torch.as_tensor(depth, device=logprob.device)
        depth_class = torch.bucketize(deep, torch.tensor([1, 2, 4], device=logprob.device))
        shape = torch.broadcast_shapes(alike.shape, rank.shape, depth_class.shape)  # type: ignore[no-untyped-call]
        return alike.expand(shape), rank.clamp(max=_RANKS - 1).expand(shape), depth_class.expand(shape)
