"""The model card of a drafter: what it was made from, how and where, and what it is worth; with two figures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from matplotlib.figure import Figure

from dynatree_bench.distill.evaluate import Agreement, LevelCost
from dynatree_bench.distill.train import TrainingPlan
from dynatree_bench.report.style import BLUE, GREY, VERMILION
from dynatree_bench.run.machine import provenance
from dynatree_core.files.writing import whole_file, write_text

CHAIN, DEPTH, BRANCH = 6, 5, 2  # the chain and the tree whose tokens are foretold


@attrs.frozen(eq=False)
class Report:
    """All that a model card tells, as `report.json` has it."""

    command: str
    target: str
    layers: Sequence[int]
    num_outputs: int
    texts: Sequence[str]  # names of files
    tokens_learnt_from: int  # tokens that the target judged
    training: TrainingPlan
    before: Agreement
    after: Agreement
    level_costs: Sequence[LevelCost]
    course: Sequence[dict[str, float]]

    @property
    def provenance(self) -> dict[str, Any]:
        """Where and with what it was made."""
        device = torch.device("cuda") if torch.cuda.is_available() else None
        return provenance(self.command, device)


def write_card(folder: Path, report: Report) -> None:
    """Write README.md, report.json and the figures into the drafter's folder."""
    numbers = {**report.provenance, **attrs.asdict(report)}
    write_text(folder / "report.json", json.dumps(numbers, indent=1) + "\n")
    write_text(folder / "README.md", card_text(report))
    draw_calibration(report, folder / "calibration.png")
    draw_course(report, folder / "training.png")


def card_text(report: Report) -> str:
    """The model card in Markdown."""
    after, before, said = report.after, report.before, report.provenance
    costs = "\n".join(f"| {cost.width} | {cost.ratio} | {cost.milliseconds:.1f} |" for cost in report.level_costs)
    training = report.training
    versions = ", ".join(f"{name} {number}" for name, number in said["versions"].items())
    return f"""# A drafter for {report.target}

A student for tree speculative decoding, made by `dynatree distill`. It proposes; the target decides. So it changes how
fast the target's output comes, and never what it is.

| | |
| --- | --- |
| target | {report.target} |
| layers | {len(report.layers)}, begun as the target's layers {", ".join(map(str, report.layers))} |
| input embeddings | the target's own, shared |
| head | the target's rows for {report.num_outputs:,} tokens, frozen |
| learnt from | {report.tokens_learnt_from:,} tokens that the target judged |
| plain text | {", ".join(report.texts) or "none"} |
| trained | {training.num_epochs} epochs, AdamW, learning rate {training.learning_rate:g} |
| made on | {said["device"]}, {said["date"]} |
| versions | {versions} |
| commit | {said["commit"]} |

    {report.command}

## What it is worth

On {after.num_positions:,} positions of text that was kept apart, each with the target's own text before it:

| measure | before training | after |
| --- | --- | --- |
| top-1 agreement | {before.top1:.3f} | {after.top1:.3f} |
| top-3 coverage | {before.top3:.3f} | {after.top3:.3f} |
| the target's choice is a token that it can say | {before.covered:.3f} | {after.covered:.3f} |
| calibration error | {before.calibration_error:.3f} | {after.calibration_error:.3f} |
| expected tokens/iteration, chain of {CHAIN} | {before.chain(CHAIN):.2f} | {after.chain(CHAIN):.2f} |
| expected tokens/iteration, `fixed(depth={DEPTH},branch={BRANCH})` | {before.tree(DEPTH, BRANCH):.2f} | \
{after.tree(DEPTH, BRANCH):.2f} |

The expected tokens treat positions as independent; in real text easy ones come together, which helps.

![calibration](calibration.png)
![training](training.png)

What a level of a tree costs, relative to a target pass over one row (median and quartiles, measured in turns):

| width | ratio | ms |
| --- | --- | --- |
{costs}
"""


def draw_calibration(report: Report, file: Path) -> None:
    """Is a probability of 0.8 right 80 % of the time? Before and after training, and how often each is given."""
    figure, (top, bottom) = _axes(2, height_ratios=[3, 1])
    top.plot([0, 1], [0, 1], color=GREY, linestyle=":", label="right as often as it says")
    for found, colour, marker, name in (
        (report.before, VERMILION, "s", "before training"),
        (report.after, BLUE, "o", "after training"),
    ):
        seen = [index for index, count in enumerate(found.counts) if count >= 20]  # fewer say nothing
        top.plot(
            [found.confidence[i] for i in seen],
            [found.accuracy[i] for i in seen],
            color=colour,
            marker=marker,
            label=name,
        )
    shares = [count / report.after.num_positions for count in report.after.counts]
    width = 1 / len(shares)
    bottom.bar([(index + 0.5) * width for index in range(len(shares))], shares, width=0.9 * width, color=BLUE)
    top.set(ylabel="share that was right", xlim=(0, 1), ylim=(0, 1))
    bottom.set(xlabel="the drafter's probability of its first choice", ylabel="share of\npositions", xlim=(0, 1))
    top.legend(frameon=False)
    _save(figure, file, report, f"{report.after.num_positions:,} positions kept apart")


def draw_course(report: Report, file: Path) -> None:
    """The loss over the steps of the training."""
    figure, (axes,) = _axes(1)
    steps = [entry["step"] for entry in report.course]
    axes.plot(steps, [entry["loss"] for entry in report.course], color=BLUE)
    axes.set(xlabel="training step", ylabel="KL(target ‖ drafter), nats per token", ylim=(0, None))
    _save(figure, file, report, f"{report.training.num_epochs} epochs")


def _axes(rows: int, **ratios: Any) -> tuple[Any, Sequence[Any]]:
    figure = Figure(figsize=(5.4, 4.6 if rows > 1 else 3.4), layout="constrained", dpi=150)
    axes = figure.subplots(rows, 1, squeeze=False, gridspec_kw=ratios)[:, 0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Any, file: Path, report: Report, what: str) -> None:
    found = report.provenance
    caption = f"{report.target}, {what}\ndynatree {found['versions']['dynatree']}, {found['device']}, {found['date']}"
    figure.supxlabel(caption, fontsize=7, color=GREY)
    with whole_file(file) as draft:
        figure.savefig(draft)
