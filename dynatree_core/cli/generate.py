"""`dynatree generate`: one prompt, or those of a file."""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dynatree_core.cli import console
from dynatree_core.cli.checks import check_names
from dynatree_core.cli.exits import DONE, INTERRUPTED
from dynatree_core.cli.imports import importing
from dynatree_core.cli.job import Job
from dynatree_core.cli.loading import is_packed
from dynatree_core.cli.option_types import FiniteRange
from dynatree_core.cli.options import (
    ACTIVATIONS,
    ANSWER_OPTIONS,
    FILE_OPTIONS,
    JSON,
    LIMIT_OPTIONS,
    MODEL_OPTIONS,
    OUTPUT_OPTIONS,
    POLICY,
    TRACE_OPTIONS,
    WEIGHTS,
    with_options,
)
from dynatree_core.cli.prompts import PromptPicks, typed_prompt
from dynatree_core.cli.recorded import Recorded
from dynatree_core.cli.setup import Setup
from dynatree_core.errors import DynaTreeError
from dynatree_core.models import embedded

if TYPE_CHECKING:
    from dynatree_core.text.prompt_files import Prompts

__all__ = ["generate"]


@click.command()
@click.argument("prompt", metavar="PROMPT|-", required=False)
@with_options(*MODEL_OPTIONS, WEIGHTS, ACTIVATIONS, POLICY, *OUTPUT_OPTIONS, *ANSWER_OPTIONS, *LIMIT_OPTIONS)
@click.option("--max-time", type=FiniteRange(min=0), metavar="SECONDS", help="Stop when so much time has passed.")
@click.option(
    "--cache",
    metavar="sinks=N,window=N",
    help="Keep the first and the last tokens only (StreamingLLM), e.g. sinks=4,window=1024: for texts without end.",
)
@click.option("--show-trees", "shows_trees", is_flag=True, help="Draw each iteration's tree on standard error.")
@click.option("--compare", is_flag=True, help="Decode without drafting too; exit with 1 if tokens differ.")
@with_options(*FILE_OPTIONS)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="With --prompts: write a line of JSON for each answer to this file, and go on where a run has left it.",
)
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    metavar="N",
    help="With --prompts: answer N at once, with --out FILE or --json.  [default: 1]",
)
@with_options(*TRACE_OPTIONS, JSON)
def generate(
    prompt: str | None,
    target: str | None,
    drafter: str,
    policy: str,
    as_json: bool,
    compare: bool,
    prompts_file: str | None,
    column: str | None,
    categories: tuple[str, ...],
    num_prompts: int | str | None,
    is_played: bool,
    pick_seed: int | None,
    is_chat: bool | None,
    trace_file: str | None,
    is_trace_private: bool,
    shows_trees: bool,
    out: Path | None,
    batch_size: int | None,
    **request: Any,
) -> int:
    """Answer PROMPT, or what stands on standard input if PROMPT is `-`, or the prompts of a file.

    The answer goes to standard output as it comes; in a terminal, what was drafted and accepted is green. The
    numbers follow on standard error. With --prompts, --json prints a line for each answer.

    \b
    Examples:
      dynatree generate "Why is the sky blue?"
      dynatree generate --compare --max-new-tokens 64 "Say ten times: I am a tree."
      dynatree generate --target ./big --drafter ./small "Once upon a time"
      dynatree generate --json - < prompt.txt > answer.json
      dynatree generate --json --prompts questions.jsonl > answers.jsonl
      dynatree generate --prompts questions.jsonl --out answers.jsonl --batch-size 8
    """
    picks = PromptPicks(column, categories, num_prompts, is_played, pick_seed)
    picks.check(prompt, prompts_file)
    is_many = out is not None or batch_size is not None
    if is_many:
        in_turn = {"--compare": compare, "--trace": trace_file is not None, "--show-trees": shows_trees}
        _check_many(prompts_file, out, as_json, [name for name, is_asked in in_turn.items() if is_asked])
    if compare and request["max_time"] is not None:
        raise click.UsageError("--compare needs outputs of one length, and --max-time ends each at another token")
    check_names(policy=policy, drafter=drafter)
    if target in (None, "default"):
        embedded.check_early(is_packed=is_packed(**request))
    # first: torch cannot be imported again, as a conclusion needs it, once an interrupt has left it half imported
    with importing():
        importlib.import_module("dynatree_core.engine.session")
    from dynatree_core.cli.questions import Question, asked, check_lengths
    from dynatree_core.text.prompt import encode_prompt

    recorded = Recorded(trace_file, is_trace_private, shows_trees)
    setup = Setup(target, drafter, policy, as_json, compare, recorded)
    job, exit_code, is_warm = Job(setup), DONE, False
    try:
        with console.warnings_in_one_line():
            text = typed_prompt(prompt) if prompt is not None else ""
            prompts = picks.read(prompts_file) if prompts_file is not None else None
            if is_many:
                assert prompts is not None, "checked above"
                return _answer_many(setup, prompts, out, batch_size or 1, is_chat, is_played, request)
            loaded, tokenizer = setup.load(**request)
            if prompts is None:
                questions = iter([Question(encode_prompt(text, tokenizer, is_chat))])
            else:
                questions = asked(prompts, tokenizer, is_chat, is_played)
                if request["cache"] is None:
                    check_lengths(prompts, tokenizer, is_chat, loaded.model, request["max_new_tokens"])
        for question in questions:
            job = Job(setup, question)
            with console.warnings_in_one_line():
                job.open()
                if compare and not is_warm:
                    job.warm_up()
                    is_warm = True
                job.answer()
                if compare:
                    job.answer_without_drafting()
            # another one takes its place first, so that an interrupt from here on concludes nothing twice
            done, job = job, Job(setup)
            exit_code = max(exit_code, done.conclude())
    except KeyboardInterrupt:
        if not is_many:
            job.conclude("interrupted")
        return INTERRUPTED
    except DynaTreeError:
        if job.session is not None:
            job.conclude("error")
        raise
    finally:
        setup.recorded.close()
    return exit_code


def _check_many(prompts_file: str | None, out: Path | None, as_json: bool, in_turn: Sequence[str]) -> None:
    """Refuse what does not go with many prompts at once.

    Args:
        in_turn: options that were given and are about one answer after the other.

    Raises:
        UsageError: naming it.
    """
    context, named = click.get_current_context(), "--out" if out is not None else "--batch-size"
    if prompts_file is None:
        raise click.UsageError(f"{named} is about a file of prompts, and needs --prompts FILE", context)
    if in_turn:
        raise click.UsageError(f"{in_turn[0]} takes one prompt after the other; leave out {named}", context)
    if out is None and not as_json:
        raise click.UsageError("--batch-size needs --out FILE, or --json for answers on standard output", context)


def _answer_many(
    setup: Setup,
    prompts: Prompts,
    out: Path | None,
    batch_size: int,
    is_chat: bool | None,
    is_played: bool,
    request: dict[str, Any],
) -> int:
    """Answer the prompts of a file, several at once; the exit status."""
    from dynatree_core.cli.answers import Answers, Fingerprints
    from dynatree_core.cli.many import ManyAnswers
    from dynatree_core.cli.questions import check_lengths

    named = {"drafter": setup.drafter_name, "policy": setup.policy, "is_chat": is_chat, **request}
    answers = Answers(out, Fingerprints.of(setup.target_name, **named))
    answers.check(prompts)
    loaded, tokenizer = setup.load(**request)
    if request["cache"] is None:
        check_lengths(prompts, tokenizer, is_chat, loaded.model, request["max_new_tokens"])
    many = ManyAnswers(setup, prompts, answers, batch_size, is_chat, is_played)
    try:
        exit_code = many.run()
    except KeyboardInterrupt:
        exit_code = INTERRUPTED
    if out is not None and setup.is_json:
        click.echo(json.dumps(many.summary()))
    elif out is not None:
        console.complain("note", many.told())
    return exit_code
