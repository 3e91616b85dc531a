"""What a drafter is worth: how often it is right, whether it knows how often, what that is for trees, and its cost.

All but the cost is measured on texts that the student was not trained on, position by position, with the target's own
text before it: what the drafter says there is compared with what the target said.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Sequence
from typing import Any

import attrs
import torch
from torch import Tensor
from transformers import PreTrainedModel

from dynatree_bench.distill.teacher import Shard
from dynatree_bench.distill.train import batches_of, collate, scored_logits
from dynatree_bench.report.formulas import chain_tokens, fixed_tokens
from dynatree_bench.report.tables import Spread
from dynatree_bench.run.passes import CONTEXT, filled, pass_seconds
from dynatree_bench.run.progress import in_rounds
from dynatree_core.models.architectures import max_positions

NUM_RANKS = 16
NUM_BINS = 10


@attrs.frozen
class Agreement:
    """A drafter against its target, over positions that both were asked about."""

    num_positions: int
    top1: float  # share of positions where the drafter's first choice is the target's
    top3: float  # share where the target's choice is among the drafter's first three
    covered: float  # share where the target's choice is a token that the drafter can say
    rank_acceptance: tuple[float, ...]  # share of positions where the target's choice has this rank
    confidence: tuple[float, ...]  # mean probability of the drafter's first choice, for each tenth of its range
    accuracy: tuple[float, ...]  # share of them that were right; a drafter that knows itself has the two equal
    counts: tuple[int, ...]  # positions in each tenth
    calibration_error: float  # |confidence − accuracy|, averaged over positions (Guo et al. 2017, equation 3)

    def chain(self, length: int) -> float:
        """Expected tokens of an iteration with a chain, were positions independent."""
        return chain_tokens(self.top1, length)

    def tree(self, depth: int, branch: int) -> float:
        """The same with a full tree."""
        return fixed_tokens(self.rank_acceptance, depth, branch)


@attrs.frozen
class LevelCost:
    """Drafting one level of a tree, relative to a target pass over one row, measured in turns."""

    width: int
    ratio: Spread
    milliseconds: float  # median


@torch.inference_mode()
def agreement(
    student: PreTrainedModel, shards: Sequence[Shard], dtype: torch.dtype, max_tokens: int = 4096
) -> Agreement:
    """Compare the student, computing in `dtype`, with what the target said in these shards."""
    head: Any = student.get_output_embeddings()
    known = head.token_ids
    hits = torch.zeros(NUM_RANKS, dtype=torch.int64)
    num_positions = num_covered = 0
    confidences: list[Tensor] = []
    rights: list[Tensor] = []
    for texts in batches_of(shards, max_tokens):
        batch = collate(shards, texts, student.device)
        with torch.autocast(student.device.type, dtype=dtype, enabled=dtype != torch.float32):
            logits = scored_logits(student, batch)
        wanted = batch.top_ids[:, 0]
        top = logits.topk(min(NUM_RANKS, logits.shape[-1]), dim=-1)
        is_hit = known[top.indices] == wanted[:, None]
        hits[: is_hit.shape[1]] += is_hit.sum(dim=0).cpu()
        num_positions += batch.num_scored
        num_covered += int(torch.isin(wanted, known).sum())
        confidences.append((top.values[:, 0] - logits.logsumexp(dim=-1)).exp().cpu())
        rights.append(is_hit[:, 0].cpu())
    confidence, is_right = torch.cat(confidences).double(), torch.cat(rights).double()
    tenth = (confidence * NUM_BINS).long().clamp(max=NUM_BINS - 1)
    counts = torch.bincount(tenth, minlength=NUM_BINS)
    mean_confidence = torch.bincount(tenth, confidence, NUM_BINS) / counts.clamp(min=1)
    accuracy = torch.bincount(tenth, is_right, NUM_BINS) / counts.clamp(min=1)
    ranks = (hits / num_positions).tolist()
    return Agreement(
        num_positions=num_positions,
        top1=ranks[0],
        top3=sum(ranks[:3]),
        covered=num_covered / num_positions,
        rank_acceptance=tuple(ranks),
        confidence=tuple(mean_confidence.tolist()),
        accuracy=tuple(accuracy.tolist()),
        counts=tuple(counts.tolist()),
        calibration_error=float(((mean_confidence - accuracy).abs() * counts).sum() / num_positions),
    )


@torch.inference_mode()
def level_costs(
    student: PreTrainedModel,
    target: PreTrainedModel,
    widths: Sequence[int],
    *,
    context: int = CONTEXT,
    repeats: int = 15,
) -> list[LevelCost]:
    """Time levels of these widths and a target pass over one row, in turns, behind a context of so many tokens.

    The context is shorter where the target has no positions for it.
    """
    context = max(min(context, (max_positions(target) or math.inf) - max(widths)), 1)
    step, level = (filled(model, "auto", context) for model in (target, student))
    found: dict[int, list[tuple[float, float]]] = {width: [] for width in widths}

    def job(width: int, turn: int) -> None:
        both = pass_seconds(*level, width, device=target.device), pass_seconds(*step, 1, device=target.device)
        if turn:
            found[width].append(both)

    in_rounds([functools.partial(job, width) for width in widths], repeats)
    return [
        LevelCost(
            width,
            Spread.of([of_level / of_step for of_level, of_step in pairs], digits=3),
            1000 * statistics.median(of_level for of_level, _ in pairs),
        )
        for width, pairs in found.items()
    ]
