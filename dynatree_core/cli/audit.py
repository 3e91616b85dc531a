"""`dynatree audit`: of an answer that it generates, or of outputs in a file."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dynatree_core.cli import console
from dynatree_core.cli.checks import check_names, check_settings, checkable
from dynatree_core.cli.exits import DONE, FAILED, INTERRUPTED
from dynatree_core.cli.loading import load, load_drafter
from dynatree_core.cli.options import (
    FILE_OPTIONS,
    JSON,
    MAX_NODES,
    MODEL_OPTIONS,
    OUTPUT_OPTIONS,
    POLICY,
    with_options,
)
from dynatree_core.cli.prompts import PromptPicks, typed_prompt

if TYPE_CHECKING:
    from dynatree_core.text.prompt_files import Prompts

__all__ = ["audit"]


@click.command()
@click.argument("prompt", metavar="[PROMPT|-]", required=False)
@with_options(*MODEL_OPTIONS, POLICY, *OUTPUT_OPTIONS, MAX_NODES, *FILE_OPTIONS)
@click.option(
    "--output",
    "output_file",
    type=click.Path(path_type=Path),
    help="Audit what `dynatree generate --json` has printed into this file, instead of generating.",
)
@click.option(
    "--reference-dtype",
    type=click.Choice(["float64", "float32"]),
    help="Show the logits in this precision too; loads the target twice.",
)
@with_options(JSON)
def audit(
    prompt: str | None,
    prompts_file: str | None,
    output_file: Path | None,
    column: str | None,
    categories: tuple[str, ...],
    num_prompts: int | str | None,
    is_played: bool,
    pick_seed: int | None,
    **request: Any,
) -> int:
    """Tell whether an output is what autoregressive decoding gives, and if not, whether rounding explains it.

    Generates an answer to PROMPT, or to standard input if it is `-`, and computes every token again. A difference is
    a tie if rounding, as measured on this very model, can turn it, and else a bug. Exits with 1 if there is a bug.

    \b
    Examples:
      dynatree audit --dtype bfloat16 "Why is the sky blue?"
      dynatree audit --dtype bfloat16 --exact fixed_width "Why is the sky blue?"
      dynatree audit --dtype float16 --prompts prompts.jsonl --num-prompts 100
      dynatree generate --json "Why is the sky blue?" > answer.json
      dynatree audit --output answer.json
    """
    # an output without its prompt's tokens may come with PROMPT; else there is one source
    sources = [prompt or output_file, prompts_file]
    if sources.count(None) != 1:
        raise click.UsageError("give either PROMPT, --prompts or --output", click.get_current_context())
    picks = PromptPicks(column, categories, num_prompts, is_played, pick_seed)
    if prompts_file is None:
        picks.check(prompt or "-", None)
    with console.warnings_in_one_line():
        prompts = picks.read(prompts_file) if prompts_file is not None else None
        return _audit(prompt, prompts, output_file, is_played, **request)


def _audit(
    prompt: str | None,
    prompts: Prompts | None,
    output_file: Path | None,
    is_played: bool,
    *,
    target: str | None,
    drafter: str,
    device: str | None,
    dtype: str,
    as_json: bool,
    is_chat: bool | None,
    ignore_eos: bool,
    reference_dtype: str | None,
    **options: Any,
) -> int:
    given_drafter = drafter if output_file is None else None  # of an output nobody drafts
    check_names(policy=options["policy"], drafter=given_drafter)
    from dynatree_core.cli.audit_input import read_outputs, target_of
    from dynatree_core.cli.audit_report import Case, audit_cases, document, show
    from dynatree_core.cli.generate_report import made_with
    from dynatree_core.cli.questions import Question, asked, num_asked
    from dynatree_core.models.architectures import vocab_size
    from dynatree_core.text.prompt import encode_prompt, tokenizer_of

    outputs = read_outputs(output_file) if output_file is not None else []
    if outputs:
        given = outputs[0].document  # what all of them have
        target = target_of(outputs[0], target)
        ignore_eos = ignore_eos or bool(given.get("ignore_eos"))
        for name in ("exact", "max_nodes"):
            options[name] = given.get(name) if options[name] is None else options[name]
        if dtype == "auto":
            dtype = given.get("dtype") or dtype  # another one would round in another way
    text = typed_prompt(prompt) if prompt is not None else None
    limits, policy = checkable(options), options["policy"]
    source: Any = check_settings(target=target, drafter=given_drafter, policy=policy, device=device, **limits)
    loaded = load(target, device, dtype)
    tokenizer = tokenizer_of(loaded)
    cases: Iterable[Case]
    if outputs:
        vocab = vocab_size(loaded.model)
        cases = [
            Case(Question(output.prompt_ids(text, tokenizer, is_chat, vocab)), output.token_ids(tokenizer, vocab))
            for output in outputs
        ]
        if any(output.needs_cutting for output in outputs):
            console.complain(
                "warning", "the output has no token_ids: its text is cut into tokens again, perhaps otherwise"
            )
        num_cases = len(cases)
    elif prompts is not None:
        cases = map(Case, asked(prompts, tokenizer, is_chat, is_played))  # a later turn's prompt holds earlier answers
        cases = cases if is_played else list(cases)  # a prompt that cannot be written is refused before the first audit
        num_cases = num_asked(prompts, is_played)
    else:
        assert text is not None, "there is one source"
        cases, num_cases = [Case(Question(encode_prompt(text, tokenizer, is_chat)))], 1
    if not outputs and source is None:
        source = load_drafter(drafter, loaded).model
    precise = load(target, device, reference_dtype).model if reference_dtype is not None else None
    options |= {"eos_token_id": [] if ignore_eos else None, "tokenizer": tokenizer}
    audits = audit_cases(loaded.model, source, cases, options, precise, num_cases=num_cases)
    found = {**document(audits), "target": target or "default", **made_with(loaded)}
    if as_json:
        click.echo(json.dumps(found))
    else:
        show(audits, tokenizer)
    if len(audits) < num_cases:
        return INTERRUPTED
    return FAILED if found["verdict"] == "bug" else DONE
