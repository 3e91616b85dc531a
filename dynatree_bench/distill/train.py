"""Train: many passes over what the target said, until the student says the same.

The loss is the divergence of the student's next-token distribution from the target's, KL(target ‖ student), over the
target's best tokens one by one and all the others as one outcome (forward KL on the target's own text: Zhou et al.
2024, "DistillSpec", section 4). A token that the student's restricted head lacks belongs to the others.

A run can be interrupted at any time and goes on from its last checkpoint; it then ends with the same weights as one
that was not, since the order of the texts follows from the seed and the step alone and there is no dropout. A
checkpoint's name has the training's fingerprint, so that other trainings keep theirs beside it.
"""

from __future__ import annotations

import hashlib
import json
import math
import pickle
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedModel

from dynatree_bench.distill.teacher import Shard
from dynatree_core.errors import ModelLoadError
from dynatree_core.files.writing import whole_file


@attrs.frozen
class TrainingPlan:
    """How a student is trained."""

    num_epochs: int  # passes over all texts
    batch_tokens: int = 4096  # tokens of a step, padding included
    learning_rate: float = 1e-3  # at its highest, after the warm-up; falls to 0 along a cosine
    warm_up: float = 0.05  # share of the steps
    weight_decay: float = 0.01
    max_gradient: float = 1.0  # norm beyond which gradients are scaled down
    seed: int = 0
    checkpoint_seconds: float = 120.0


@attrs.frozen(eq=False)
class Batch:
    """Texts of similar length side by side."""

    token_ids: Tensor  # [texts, tokens] int64, padded behind
    is_scored: Tensor  # [texts, tokens] bool
    top_ids: Tensor  # [scored, k] int64, in the order of `is_scored`
    top_logprobs: Tensor  # [scored, k] float32

    @property
    def num_scored(self) -> int:
        return self.top_ids.shape[0]


def frequent_tokens(shards: Sequence[Shard], vocab_size: int, num_outputs: int) -> Tensor:
    """[outputs] int64, ascending: the tokens that the target expects most often, by the sum of their probabilities.

    Of tokens that it never expected the lower ids come first: a byte-pair vocabulary is in the order of its merges.
    """
    weight = torch.linspace(1e-6, 0, vocab_size, dtype=torch.float64)
    for shard in shards:
        probs = shard.top_logprobs[shard.is_scored].double().exp()
        weight.index_add_(0, shard.top_ids[shard.is_scored].flatten().long(), probs.flatten())
    return weight.topk(min(num_outputs, vocab_size)).indices.sort().values


def batches_of(shards: Sequence[Shard], max_tokens: int) -> list[list[tuple[int, int]]]:
    """Which (shard, text) go together: neighbours in length, as many as fit."""
    texts = [
        (shard.text(index).stop - shard.text(index).start, number, index)
        for number, shard in enumerate(shards)
        for index in range(shard.num_texts)
        if shard.is_scored[shard.text(index)].any()
    ]
    batches: list[list[tuple[int, int]]] = []
    room = 0
    for length, number, index in sorted(texts, reverse=True):
        if room < 1:
            batches.append([])
            room = max(max_tokens // length, 1)  # the first is the longest
        batches[-1].append((number, index))
        room -= 1
    return batches


def collate(shards: Sequence[Shard], texts: Sequence[tuple[int, int]], device: torch.device) -> Batch:
    """The texts of one batch, on the device."""
    spans = [(shards[number], shards[number].text(index)) for number, index in texts]
    length = max(span.stop - span.start for _, span in spans)

    def padded(tensor: Tensor) -> Tensor:
        return torch.nn.functional.pad(tensor, (0, length - tensor.numel()))

    is_scored = torch.stack([padded(shard.is_scored[span]) for shard, span in spans])
    return Batch(
        torch.stack([padded(shard.token_ids[span]) for shard, span in spans]).long().to(device),
        is_scored.to(device),
        torch.cat([shard.top_ids[span][shard.is_scored[span]] for shard, span in spans]).long().to(device),
        torch.cat([shard.top_logprobs[span][shard.is_scored[span]] for shard, span in spans]).float().to(device),
    )


def scored_logits(student: PreTrainedModel, batch: Batch) -> Tensor:
    """[scored, outputs] float32: the student's logits where the target was asked."""
    # by the model's own forward, since some families scale or cap what their head says
    asked = batch.is_scored.any(dim=0).nonzero()[:, 0]  # [places] where any text is scored
    logits: Tensor = student(batch.token_ids, use_cache=False, logits_to_keep=asked).logits
    return logits[batch.is_scored[:, asked]].float()


def divergence(logits: Tensor, output_of: Tensor, top_ids: Tensor, top_logprobs: Tensor) -> Tensor:
    """KL(target ‖ student), nats, averaged over positions.

    Args:
        logits: [scored, outputs] the student's.
        output_of: [vocab] which output says a token, −1 where none does.
        top_ids, top_logprobs: [scored, k] the target's best tokens.
    """
    outputs = output_of[top_ids]
    is_known = outputs >= 0
    student_logprobs = logits.log_softmax(dim=-1).gather(1, outputs.clamp(min=0))
    target_probs = torch.where(is_known, top_logprobs.exp(), 0)
    student_probs = torch.where(is_known, student_logprobs.exp(), 0)
    target_tail = (1 - target_probs.sum(dim=1)).clamp(min=1e-6)
    student_tail = (1 - student_probs.sum(dim=1)).clamp(min=1e-6)
    named = torch.where(is_known, target_probs * (top_logprobs - student_logprobs), 0).sum(dim=1)
    return (named + target_tail * (target_tail.log() - student_tail.log())).mean()


def fingerprint(student: PreTrainedModel, shards: Sequence[Shard], plan: TrainingPlan) -> str:
    """A hash of what a training's result depends on: the student as it begins, what the target said, and the plan."""
    head: Any = student.get_output_embeddings()
    tensors = [*student.state_dict().items(), ("token_ids", head.token_ids)]
    for shard in shards:
        tensors += attrs.asdict(shard, recurse=False).items()
    # how often a training is stored does not change it
    settings = attrs.asdict(plan, filter=attrs.filters.exclude("checkpoint_seconds"))
    digest = hashlib.sha256(json.dumps(settings).encode())
    for name, tensor in tensors:
        digest.update(save({name: tensor.contiguous()}))
    return digest.hexdigest()[:16]


def train(
    student: PreTrainedModel,
    shards: Sequence[Shard],
    vocab_size: int,
    plan: TrainingPlan,
    folder: Path,
    progress: Callable[[int, int, float], None],
) -> list[dict[str, float]]:
    """Train the student in place.

    Args:
        student: from `new_student`; only its layers are trained.
        shards: what the target said.
        vocab_size: tokens that the target knows.
        plan: how long and how fast.
        folder: where the checkpoint is kept, made if need be; it is there already where a run goes on.
        progress: called after each step with (steps done, steps in all, the step's loss).

    Returns:
        The course of the training: step, loss (mean since the last entry), learning rate.
    """
    device = student.device
    head: Any = student.get_output_embeddings()
    output_of = torch.full((vocab_size,), -1, device=device)
    output_of[head.token_ids] = torch.arange(head.token_ids.numel(), device=device)
    groups = batches_of(shards, plan.batch_tokens)
    num_steps = plan.num_epochs * len(groups)
    trained = [weight for weight in student.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=plan.learning_rate, weight_decay=plan.weight_decay, betas=(0.9, 0.95))
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / f"checkpoint-{fingerprint(student, shards, plan)}.pt"
    course: list[dict[str, float]] = []
    start = 0
    if checkpoint.exists():
        state = load_checkpoint(checkpoint, device)
        student.load_state_dict(state["student"])
        optimizer.load_state_dict(state["optimizer"])
        start, course = state["step"], state["course"]
    saved = time.monotonic()
    losses: list[float] = []
    # without dropout, whose draws would differ in a run that goes on
    student.eval()  # type: ignore[no-untyped-call]  # transformers leaves it unannotated
    for step in range(start, num_steps):
        epoch, place = divmod(step, len(groups))
        if place == 0 or step == start:
            order = list(range(len(groups)))
            random.Random(f"{plan.seed}/{epoch}").shuffle(order)
        batch = collate(shards, groups[order[place]], device)
        rate = learning_rate(step, num_steps, plan)
        for group in optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast(device.type, dtype=torch.bfloat16):
            logits = scored_logits(student, batch)
        loss = divergence(logits, output_of, batch.top_ids, batch.top_logprobs)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        torch.nn.utils.clip_grad_norm_(trained, plan.max_gradient)
        optimizer.step()
        losses.append(loss.item())
        last_loss = losses[-1]
        is_last = step + 1 == num_steps
        if (step + 1) % 20 == 0 or is_last:
            course.append({"step": step + 1, "loss": sum(losses) / len(losses), "learning_rate": rate})
            losses = []
        if is_last or (not losses and time.monotonic() - saved > plan.checkpoint_seconds):
            state = {"student": student.state_dict(), "optimizer": optimizer.state_dict(), "course": course}
            _save({**state, "step": step + 1}, checkpoint)
            saved = time.monotonic()
        progress(step + 1, num_steps, last_loss)
    return course


def learning_rate(step: int, num_steps: int, plan: TrainingPlan) -> float:
    """Rises in a line during the warm-up, then falls to 0 along a cosine."""
    num_warm_up = max(int(plan.warm_up * num_steps), 1)
    if step < num_warm_up:
        return plan.learning_rate * (step + 1) / num_warm_up
    share = (step - num_warm_up) / max(num_steps - num_warm_up, 1)
    return plan.learning_rate * 0.5 * (1 + math.cos(math.pi * share))


def _save(state: dict[str, Any], file: Path) -> None:
    with whole_file(file) as draft:
        torch.save(state, draft)


def load_checkpoint(file: Path, device: torch.device) -> dict[str, Any]:
    """A checkpoint.

    Raises:
        ModelLoadError: it is damaged.
    """
    try:
        found = torch.load(file, map_location=device, weights_only=True)
        return {name: found[name] for name in ("student", "optimizer", "step", "course")}
    except (OSError, EOFError, RuntimeError, KeyError, TypeError, pickle.UnpicklingError) as error:
        raise ModelLoadError(
            f"{file} must hold a checkpoint of this training, got {type(error).__name__}: {error}; delete it, and the "
            "training begins anew"
        ) from error
