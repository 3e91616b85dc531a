"""What a drafter is worth: how often it is right, whether it knows how often, what that is for trees, and its cost.

All but the cost is measured on texts that the student was not trained on, position by position, with the target's own
text before it: what the drafter says there is compared with what the target said.
"""

from __future__ import annotations

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
from dynatree_bench.run.machine import now
from dynatree_core.clock import StageClock
from dynatree_core.models.architectures import max_positions
from dynatree_core.runners.choice import made_runner
from dynatree_core.runners.passes import Passes
from dynatree_core.tree.flatten import flatten_chain

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
    ratio: float  # median
    low: float  # quartiles
    high: float
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
    student: PreTrainedModel, target: PreTrainedModel, widths: Sequence[int], *, context: int = 256, repeats: int = 15
) -> list[LevelCost]:
    """Time levels of these widths and a target pass over one row, in turns, behind a context of so many tokens.

    The context is shorter where the target has no positions for it.
    """
    device = target.device
    context = max(min(context, (max_positions(target) or math.inf) - max(widths)), 1)
    generator = torch.Generator().manual_seed(0)
    head: Any = student.get_output_embeddings()
    words = head.token_ids.cpu()

    def text(num_tokens: int) -> Tensor:
        return words[torch.randint(words.numel(), (num_tokens,), generator=generator)].to(device)

    runners = [made_runner(model, "auto") for model in (target, student)]
    both = [Passes(runner, StageClock(device)) for runner in runners]
    caches = [runner.new_cache(context + max(*widths, 1)) for runner in runners]
    for passes, cache in zip(both, caches, strict=True):
        passes.prefill(text(context), cache)

    def seconds(which: int, width: int) -> float:
        flat = flatten_chain(text(width), context)
        start = now(device)
        both[which].forward(flat, caches[which], stage="measured")
        spent = now(device) - start
        caches[which].rollback()
        return spent

    timings: dict[int, list[tuple[float, float]]] = {width: [] for width in widths}
    for turn in range(repeats + 2):
        for width in widths:
            pair = seconds(0, 1), seconds(1, width)
            if turn >= 2:  # the first passes are slower
                timings[width].append(pair)
    costs = []
    for width, pairs in timings.items():
        ratios = statistics.quantiles([level / step for step, level in pairs], n=4)
        milliseconds = 1000 * statistics.median(level for _, level in pairs)
        costs.append(LevelCost(width, ratios[1], ratios[0], ratios[2], milliseconds))
    return costs
