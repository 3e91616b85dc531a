"""A whole distillation: teach, train, evaluate, and write the drafter's folder."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

import attrs
import torch
from rich.console import Console

from dynatree_bench.distill.card import Report, write_card
from dynatree_bench.distill.evaluate import Agreement, agreement, level_costs
from dynatree_bench.distill.teach import TEACHING, Material, Taught, TeachingPlan, is_request, teach
from dynatree_bench.distill.teacher import read_shard
from dynatree_bench.distill.train import TrainingPlan, frequent_tokens, train
from dynatree_bench.run.progress import bar
from dynatree_core.drafters.distilled import fast_dtype
from dynatree_core.errors import InputError
from dynatree_core.files.outputs import check_out
from dynatree_core.models import embedded
from dynatree_core.models.architectures import vocab_size
from dynatree_core.models.load import DEFAULT_MODEL, LoadedModel, load_config, load_model, resolve_device
from dynatree_core.models.student import config_of_layers, load_student, new_student, read_card, save_student

WIDTHS = (1, 2, 4, 8, 16)
WORK = "work"  # in the drafter's folder: what an interrupted run goes on with


@attrs.frozen
class Request:
    """A whole distillation."""

    target: str | None
    device: str | None
    threads: int | None
    teaching: TeachingPlan
    num_batches: int | None  # of the teaching; None: all
    layers: tuple[int, ...]
    num_outputs: int
    training: TrainingPlan


def make_drafter(request: Request, out: Path) -> Agreement:
    """Make a drafter in `out`, going on from what is there.

    Returns:
        How the drafter agrees with its target on text that was kept apart.

    Raises:
        InputError: the folder belongs to another request, the target lacks a layer, or there is too little to learn
            from.
    """
    console = Console(stderr=True, highlight=False)
    if request.threads is not None:
        torch.set_num_threads(request.threads)
    check_out(out, "`dynatree distill`", lambda folder: _is_own(folder, request))
    material = request.teaching.read()
    _check_layers(request)
    work = out / WORK
    work.mkdir(parents=True, exist_ok=True)
    device = resolve_device(request.device)
    # the teacher reads and writes much faster where the device multiplies in bfloat16
    teacher = load_model(request.target, device=request.device, dtype=str(fast_dtype(device)).removeprefix("torch."))
    taught = _taught(teacher, request, material, work)
    if taught.num_too_long:
        console.print(f"{taught.num_too_long} of {len(material.prompts)} prompts are left out: the target has no room")
    lessons, apart = [read_shard(file) for file in taught.to_learn], [read_shard(file) for file in taught.apart]
    size = vocab_size(teacher.model)
    student = new_student(teacher.model, request.layers, frequent_tokens(lessons, size, request.num_outputs))
    before = agreement(student, apart, torch.bfloat16)
    console.print(
        f"{sum(s.num_scored for s in lessons):,} tokens to learn from, {before.num_positions:,} kept apart; "
        f"before training the student agrees on {before.top1:.1%}"
    )
    with bar("training") as show:
        course = train(
            student, lessons, size, request.training, work,
            lambda done, total, loss: show(completed=done, total=total, note=f"loss {loss:.3f}"),
        )  # fmt: skip
    after = agreement(student, apart, torch.bfloat16)
    console.print(f"after it on {after.top1:.1%}; the target's choice is among the first three on {after.top3:.1%}")
    name = _told_target(teacher.name)
    made: dict[str, Any] = {"target": name, "layers": list(request.layers), "num_outputs": request.num_outputs}
    save_student(student, out, torch.bfloat16, made)
    target = load_model(request.target, device=request.device)
    costs = level_costs(load_student(out, target.model, fast_dtype(device)), target.model, WIDTHS)
    command = shlex.join(["dynatree", *sys.argv[1:]])
    report = Report(
        **made, command=command, texts=[text.name for text in request.teaching.texts], training=request.training,
        tokens_learnt_from=sum(shard.num_scored for shard in lessons), before=before, after=after, level_costs=costs,
        course=course,
    )  # fmt: skip
    write_card(out, report)
    drafter = f"distilled(path={str(out)!r})+prompt_lookup"
    console.print(f'the drafter is in {out}; use it with --drafter "{drafter}"', soft_wrap=True)  # to be copied whole
    return after


def _is_own(folder: Path, request: Request) -> bool:
    """Whether a folder holds a distillation: what a run goes on with, or a drafter of the same target."""
    if is_request(folder / WORK / TEACHING):
        return True  # which request it is, is seen to before anything is written
    card = read_card(folder)
    return card is not None and card.get("target") == _told_target(request.target)


def _told_target(name: str | None) -> str:
    """A target's name on a drafter's card."""
    return f"{embedded.NAME} (the embedded default model)" if name in (None, DEFAULT_MODEL) else str(name)


def _check_layers(request: Request) -> None:
    """Refuse layers that no student can have, before the target is loaded."""
    config = load_config(request.target)
    num_layers = int(config.num_hidden_layers)
    if not all(0 <= layer < num_layers for layer in request.layers):
        name = DEFAULT_MODEL if request.target is None else request.target
        raise InputError(f"--layers must be from 0 to {num_layers - 1} for '{name}', got {list(request.layers)}")
    try:
        config_of_layers(request.layers, config)
    except ValueError as error:
        raise InputError(f"--layers: {error}") from error


def _taught(teacher: LoadedModel, request: Request, material: Material, work: Path) -> Taught:
    with bar("asking the target") as show:
        return teach(
            teacher, request.teaching, work / TEACHING,
            lambda done, total, tokens: show(completed=done, total=total, note=f"{tokens:,} tokens"),
            num_batches=request.num_batches, material=material,
        )  # fmt: skip
