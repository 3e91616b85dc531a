"""`dynatree profile`. What takes seconds to import is imported when it runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import click
from rich.console import Console, RenderableType

from dynatree_core.cli import console
from dynatree_core.cli.checks import check_names, check_settings, checkable
from dynatree_core.cli.loading import load_drafter, load_target
from dynatree_core.cli.options import (
    ACTIVATIONS,
    JSON,
    MAX_DEPTH,
    MAX_NODES,
    MODEL_OPTIONS,
    POLICY,
    WEIGHTS,
    with_options,
)
from dynatree_core.text.prompt import encode_prompt, tokenizer_of


@click.command()
@click.argument("prompt", default="Why is the sky blue?")
@with_options(*MODEL_OPTIONS, WEIGHTS, ACTIVATIONS, POLICY, MAX_NODES, MAX_DEPTH, JSON)
@click.option("--iterations", type=click.IntRange(min=1), default=20, show_default=True, help="That are measured.")
@click.option(
    "--trace",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write a trace for chrome://tracing or ui.perfetto.dev; .json or .json.gz.",
)
@click.option("--start", is_flag=True, help="Show instead what the start of a generation takes, up to its prefill.")
def profile(
    prompt: str,
    target: str | None,
    drafter: str,
    device: str | None,
    dtype: str,
    weights: str,
    activations: str,
    as_json: bool,
    iterations: int,
    trace: Path | None,
    start: bool,
    **options: Any,
) -> None:
    """Show where an iteration's time goes: by stage, by operator, and as a trace.

    \b
    Examples:
      dynatree profile
      dynatree profile --policy "fixed(depth=4)" --runner eager --trace trace.json.gz
      dynatree profile --start
    """
    if start and trace is not None:
        raise click.UsageError("--trace shows iterations, got it beside --start, which decodes none; leave one out")
    check_names(policy=options["policy"], drafter=drafter)
    from dynatree_bench.run.profile import profile as measure
    from dynatree_bench.run.profile import shown, start_of_a_generation, start_shown

    limits = checkable(options)
    source: Any = check_settings(target=target, drafter=drafter, policy=options["policy"], device=device, **limits)
    loaded = load_target(target, device, dtype, weights=weights, activations=activations, **options)
    tokenizer = tokenizer_of(loaded)
    if source is None:
        source = load_drafter(drafter, loaded).model
    ids = encode_prompt(prompt, tokenizer)
    given = {name: value for name, value in options.items() if value is not None}
    if start:
        with console.spinner("beginning generations"):
            begun = start_of_a_generation(loaded.model, source, ids, tokenizer=tokenizer, **given)
        _show(begun, as_json, start_shown)
        return
    with console.spinner(f"decoding {iterations} iterations twice"):
        found = measure(loaded.model, source, ids, num_iterations=iterations, trace=trace, tokenizer=tokenizer, **given)
    _show(found, as_json, shown)
    if trace is not None and not as_json:
        click.echo(f"the trace is in {trace}; open it in chrome://tracing or ui.perfetto.dev")


def _show(found: Any, as_json: bool, table: Callable[[Any], RenderableType]) -> None:
    """What was measured: as JSON, or as the table that is made of it."""
    if as_json:
        click.echo(json.dumps(attrs.asdict(found)))
    else:
        Console(highlight=False).print(table(found))
