"""How likely a drafted token is to be accepted, given that its parent is: the drafter's word, corrected by experience.

A beta-binomial estimate in three steps, each of which takes the one before it as its prior: nodes of a like draft
probability, of these the nodes of the same rank among their siblings, of these the nodes of a like depth. With h of n
such nodes accepted and a prior mean m it is (w·m + h) / (w + n), the mean of the posterior if the prior weighs as much
as w observations. Where nothing was observed it is the drafter's own probability.
"""

from __future__ import annotations

import bisect
import functools
import json
import math
from pathlib import Path

import attrs
import torch
from torch import Tensor

from dynatree_core.errors import InputError
from dynatree_core.files.writing import unreadable, write_text
from dynatree_core.tree.verdict import StepReport

__all__ = ["KEPT", "AcceptanceEstimator"]

KEPT = 64.0  # observations of a cell that a file can stand for
_FORMAT = 1

# borders between draft probabilities that are alike, on a scale that is even in ln(p / (1 − p))
_BORDERS = tuple(math.log(p) for p in (0.01, 0.03, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.97))
_DEEP = (1, 2, 4)
_RANKS, _DEPTHS = 4, 4  # told apart: rank 0, 1, 2 and beyond; depth 1, 2, 3 to 4, and beyond
_BINS = len(_BORDERS) + 1
_STEPS = ((_BINS,), (_BINS, _RANKS), (_BINS, _RANKS, _DEPTHS))
# with cells before them for what is impossible, which nobody observes, so that its estimate stays at 0
_ALL_STEPS = [(1 + bins, *others) for bins, *others in _STEPS]
_SIZES = [math.prod(shape) for shape in _ALL_STEPS]


def _no_counts() -> Tensor:
    return torch.zeros(2, sum(_SIZES), dtype=torch.float32)


@attrs.define(eq=False)
class AcceptanceEstimator:
    """Learns from verdicts, and predicts for children that may be drafted.

    A policy keeps one in a field of its own: `attrs.field(factory=AcceptanceEstimator, init=False)`.
    """

    # of each step's prior, in observations
    weights: tuple[float, float, float] = attrs.field(default=(8.0, 16.0, 16.0), converter=tuple)
    # [2, cells]: accepted and judged, of all steps one behind the other, so that one operation serves them all
    _counts: Tensor = attrs.field(factory=_no_counts, init=False, repr=False)
    # [2, cells]: slope and offset of the estimate over the draft probability, which follow from the counts; None: anew
    _line: Tensor | None = attrs.field(default=None, init=False, repr=False)

    @property
    def counts(self) -> list[Tensor]:
        """Of each step: accepted, judged."""
        of_steps = zip(torch.split(self._counts, _SIZES, dim=1), _ALL_STEPS, strict=True)
        return [own.view(2, *shape)[:, 1:] for own, shape in of_steps]

    def predict(self, logprob: Tensor, rank: Tensor | None, depth: Tensor | int) -> Tensor:
        """Probabilities that nodes are accepted if their parents are.

        Args:
            logprob: natural log of the draft probability given the parent, of any shape; -inf gives 0.
            rank: place among the siblings from 0 on, of a shape that fits; None: the place in the last dimension.
            depth: of the nodes, 1 for children of the root.
        """
        if self._line is None or self._line.device != logprob.device:
            self._line = self._estimate().to(logprob.device)
        slope, offset = self._line[:, self._cell(logprob, rank, depth)]
        return torch.addcmul(offset, slope, logprob.exp().clamp(max=1))

    def observe(self, report: StepReport) -> None:
        """Count a step's verdict: the target has judged the children of each accepted node.

        A step in which the generation stops is left out, since nothing is known of what would have come.
        """
        tree = report.tree
        if tree.num_drafted == 0 or report.verdict.stop_reason is not None:
            return
        last = report.verdict.path[-1] if report.verdict.path else 0
        is_accepted = tree.ancestor_mask[last].float()
        judged = is_accepted[tree.parent[1:]]  # 1 for the children of accepted nodes
        cell = self._cell(tree.logprob[1:], tree.rank[1:], tree.depth[1:])
        outcomes = torch.stack([judged * is_accepted[1:], judged])
        finer, first = _places_on(tree.device)
        places = cell.div(finer, rounding_mode="floor").add_(first)  # [steps, nodes]
        self._counts = self._counts.to(tree.device).index_add_(1, places.flatten(), outcomes.repeat(1, len(_STEPS)))
        self._line = None

    def save(self, path: Path) -> None:
        """Keep what was observed in a file (JSON), which is there whole or not at all.

        Raises:
            OSError: it cannot be written.
        """
        counts = [counts.tolist() for counts in self.counts]
        write_text(path, json.dumps({"format": _FORMAT, "counts": counts}) + "\n")

    def load(self, path: Path) -> None:
        """Begin with what `save` has kept: cells that were judged more than `KEPT` times count as if that often.

        So the share that was accepted is remembered, and another text is noticed within some `KEPT` verdicts.

        Raises:
            InputError: the file is not one of these.
        """
        if (closed := unreadable(path)) is not None:
            raise InputError(f"acceptance counts must be in a file that may be read, got {closed}; `chmod a+r` it")
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            counts = [torch.tensor(step, dtype=torch.float32) for step in found["counts"]]
            is_ours = found["format"] == _FORMAT and [step.shape for step in counts] == [
                (2, *shape) for shape in _STEPS
            ]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path} must hold acceptance counts that were saved before, got {error!r}; delete it to begin anew"
            ) from error
        if not is_ours or not all(bool((step >= 0).all() and (step[0] <= step[1]).all()) for step in counts):
            raise InputError(f"{path} must hold acceptance counts of this version, got others; delete it to begin anew")
        self._counts, self._line = _no_counts(), None
        for own, step in zip(self.counts, counts, strict=True):
            own.copy_(step * (KEPT / step[1].clamp(min=KEPT)))

    def _estimate(self) -> Tensor:
        """[2, cells]: each step takes the mean before it to (w·mean + accepted) / (w + judged), so all are a line."""
        accepted, judged = self._counts
        weights = _weights_on(self.weights, self._counts.device)
        total = weights + judged
        shares, offsets = (torch.split(of_all / total, _SIZES) for of_all in (weights, accepted))
        slope, offset = shares[0], offsets[0]
        for shape, share, own in zip(_ALL_STEPS[1:], shares[1:], offsets[1:], strict=True):
            share = share.view(shape)
            slope, offset = share * slope[..., None], share * offset[..., None] + own.view(shape)
        return torch.stack([slope.flatten(), offset.flatten()])

    def _cell(self, logprob: Tensor, rank: Tensor | None, depth: Tensor | int) -> Tensor:
        """Which nodes are alike by draft probability, rank and depth: the number of a cell of the last step."""
        borders, deep = _on(logprob.device)
        alike = torch.bucketize(logprob.contiguous(), borders)
        if isinstance(depth, Tensor):
            depth_class: Tensor | int = torch.bucketize(depth, deep)
        else:
            depth_class = bisect.bisect_left(_DEEP, depth)
        if rank is None and isinstance(depth_class, int):
            place = _ranked(logprob.shape[-1], depth_class, logprob.device)
        else:
            place = _place(_ranks(logprob.shape[-1], logprob.device) if rank is None else rank, depth_class)
        return torch.add(place, alike, alpha=_RANKS * _DEPTHS)


def _place(rank: Tensor, depth_class: Tensor | int) -> Tensor:
    """Of nodes among those of like draft probability, of a shape that fits."""
    return torch.add(depth_class, rank.clamp(max=_RANKS - 1), alpha=_DEPTHS)


@functools.cache
def _ranks(number: int, device: torch.device) -> Tensor:
    """[number] int64: 0, 1, 2, …"""
    return torch.arange(number, device=device)


@functools.cache
def _ranked(number: int, depth_class: int, device: torch.device) -> Tensor:
    """[number] int64: `_place` of siblings."""
    return _place(_ranks(number, device), depth_class)


@functools.cache
def _on(device: torch.device) -> tuple[Tensor, Tensor]:
    """The borders between probabilities, impossible ones before the first, and between depths, where the trees are."""
    borders = (torch.finfo(torch.float32).min, *_BORDERS)
    return torch.tensor(borders, dtype=torch.float32, device=device), torch.tensor(_DEEP, device=device)


@functools.cache
def _places_on(device: torch.device) -> tuple[Tensor, Tensor]:
    """[steps, 1] int64 each: cells of the last step that are one of each step, and where a step's cells begin."""
    finer = [[_RANKS * _DEPTHS], [_DEPTHS], [1]]
    first = [[sum(_SIZES[:step])] for step in range(len(_SIZES))]
    return torch.tensor(finer, device=device), torch.tensor(first, device=device)


@functools.cache
def _weights_on(weights: tuple[float, ...], device: torch.device) -> Tensor:
    """[cells] float32: of all steps."""
    each = [weight for weight, size in zip(weights, _SIZES, strict=True) for _ in range(size)]
    return torch.tensor(each, dtype=torch.float32, device=device)
