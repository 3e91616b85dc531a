"""`dynatree distill`: make a drafter for a target. What takes seconds to import is imported when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from dynatree_core.advice import pip_install
from dynatree_core.cli.option_types import FiniteRange, Typed
from dynatree_core.cli.options import DEVICE, PICK_OPTIONS, TARGET, with_options
from dynatree_core.cli.prompts import PromptPicks
from dynatree_core.errors import PluginLoadError

QUESTIONS = (
    "Summarize the following text: {text}",
    "{text}\n\nWhat is this text about?",
    "Translate the following text to German: {text}",
    "{text}\n\nWho is mentioned in this text, and what do they do?",
    "Rewrite this in simple words: {text}",
    "Continue this text: {text}",
    "Give three questions about this text and answer them: {text}",
    "Use the following passage to answer the question. Passage: {text}\nQuestion: What happened, and why?",
)
OPENINGS = (
    "", "", "How many", "What is the", "Write a Python function", "Who", "Explain", "If I have", "Calculate",
    "Write a short story about", "Why", "Compose an email", "Where is", "When did", "Translate the following sentence",
    "A store sells",
)  # fmt: skip
COUNT, ONE_OR_MORE = click.IntRange(min=0), click.IntRange(min=1)


@click.command()
@TARGET
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
    help="The drafter's folder. A run that was interrupted goes on when it is given again.",
)
@click.option(
    "--text",
    "texts",
    type=click.Path(path_type=Path),
    multiple=True,
    help="A file or folder of text, read by the target and asked about; may be repeated.",
)
@click.option(
    "--prompts",
    metavar="FILE|-",
    multiple=True,
    help="A file of prompts of your own of any kind (docs/files.md), answered by the target; may be repeated.",
)
@with_options(*PICK_OPTIONS)
@click.option(
    "--read", "num_text_tokens", type=COUNT, default=250_000, show_default=True, help="Tokens of text the target reads."
)
@click.option(
    "--continue", "num_continued", type=COUNT, default=576, show_default=True, help="Passages that it goes on with."
)
@click.option(
    "--ask", "num_asked", type=COUNT, default=768, show_default=True, help="Questions about passages that it answers."
)
@click.option(
    "--self-prompts",
    "num_self_prompts",
    type=COUNT,
    default=1152,
    show_default=True,
    help="Questions that it thinks up itself.",
)
@click.option(
    "--question",
    "questions",
    type=Typed(),
    multiple=True,
    callback=lambda context, option, given: _with_places(given),
    help="With {text} where a passage goes.  [default: eight]",
)
@click.option(
    "--opening", "openings", type=Typed(), multiple=True, help="How it begins questions of its own.  [default: sixteen]"
)
@click.option(
    "--new-tokens", "num_new", type=ONE_OR_MORE, default=192, show_default=True, help="Tokens of an answer at most."
)
@click.option("--batches", type=click.IntRange(min=2), help="Ask so many batches and no more.")
@click.option("--layers", default="0,1", show_default=True, help="The target's layers that the drafter begins as.")
@click.option(
    "--outputs",
    "num_outputs",
    type=ONE_OR_MORE,
    default=16384,
    show_default=True,
    help="Tokens that the drafter can say.",
)
@click.option(
    "--epochs", "num_epochs", type=ONE_OR_MORE, default=10, show_default=True, help="Passes over what the target said."
)
@click.option("--batch-tokens", type=ONE_OR_MORE, default=2048, show_default=True, help="Tokens of a training step.")
@click.option(
    "--learning-rate", type=FiniteRange(min=0, min_open=True), default=2e-3, show_default=True, help="At its highest."
)
@click.option("--seed", default=0, show_default=True, help="Of the sampling of answers, and of the training.")
@DEVICE
@click.option("--threads", type=click.IntRange(min=1), help="Of the CPU.  [default: all]")
def distill(
    target: str | None,
    out: Path,
    texts: tuple[Path, ...],
    prompts: tuple[str, ...],
    column: str | None,
    categories: tuple[str, ...],
    num_prompts: int | str | None,
    questions: tuple[str, ...],
    openings: tuple[str, ...],
    batches: int | None,
    layers: str,
    num_outputs: int,
    num_epochs: int,
    batch_tokens: int,
    learning_rate: float,
    seed: int,
    device: str | None,
    threads: int | None,
    **asked: Any,
) -> None:
    """Make a small drafter for a target, from what the target itself says.

    The target reads text, goes on with it, answers questions about it, prompts of yours and questions that it thinks up
    itself; all of that is stored once. Then a student with a few of its layers learns to say the same, in many passes.
    The folder holds the drafter, a model card with what it is worth, and, under work/, what an interrupted run goes on
    with.

    \b
    Examples:
      dynatree distill --out drafter --text book.txt
      dynatree distill --out drafter --prompts questions.jsonl --self-prompts 0
      dynatree distill --target ./model --out drafter --text book.txt --self-prompts 0 --epochs 3
      dynatree generate --drafter "distilled(path='drafter')+prompt_lookup" "Why is the sky blue?"
    """
    try:
        from dynatree_bench.distill.run import Request, make_drafter
        from dynatree_bench.distill.teach import TeachingPlan
        from dynatree_bench.distill.train import TrainingPlan
    except ModuleNotFoundError as error:
        raise PluginLoadError(
            f"`dynatree distill` needs {error.name}, which is not installed: {pip_install('dynatree[bench]')}"
        ) from error

    try:
        chosen = tuple(int(layer) for layer in layers.split(","))
    except ValueError as error:
        raise click.BadParameter(f"must be numbers joined by commas, got '{layers}'", param_hint="--layers") from error
    if not texts:
        asked |= {"num_text_tokens": 0, "num_continued": 0, "num_asked": 0}
    teaching = TeachingPlan(
        texts=texts,
        questions=questions or QUESTIONS,
        openings=openings or OPENINGS,
        seed=seed,
        prompts=prompts,
        picks=PromptPicks(column, categories, num_prompts),
        **asked,
    )
    training = TrainingPlan(num_epochs, batch_tokens=batch_tokens, learning_rate=learning_rate, seed=seed)
    make_drafter(Request(target, device, threads, teaching, batches, chosen, num_outputs, training), out)


def _with_places(questions: tuple[str, ...]) -> tuple[str, ...]:
    for question in questions:
        if "{text}" not in question:
            raise click.BadParameter(f"must have {{text}} where a passage goes, got '{question}'")
    return questions
