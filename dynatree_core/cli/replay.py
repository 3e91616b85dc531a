"""`dynatree replay`: what other policies would have done on a recorded generation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import attrs
import click
from rich import box
from rich.console import Console
from rich.table import Table

from dynatree_core.cli.checks import check_names
from dynatree_core.cli.completion import complete_policy
from dynatree_core.cli.options import JSON, LIMIT_OPTIONS, with_options
from dynatree_core.errors import InputError

if TYPE_CHECKING:
    from dynatree_core.trace import Replay, SequenceTrace

__all__ = ["replay"]

BIAS = (
    "A replay knows only what was proposed in the recorded run: trees that go elsewhere come out smaller, and the text "
    "is taken as it is. 'unknown' is the share of nodes whose children a stack wanted and the trace does not know."
)


@click.command()
@click.argument("file", type=click.Path(dir_okay=False))
@click.option(
    "--policy",
    "policies",
    metavar="STACK",
    multiple=True,
    required=True,
    shell_complete=complete_policy,
    help="What to replay; may be repeated.",
)
@click.option("--sequence", "number", type=click.IntRange(min=0), help="Only this one of the file's generations.")
@with_options(*LIMIT_OPTIONS, JSON)
def replay(file: str, policies: Sequence[str], number: int | None, as_json: bool, **limits: Any) -> None:
    """Say what stacks of policies would have done on a recorded generation.

    FILE is what `--trace FILE` has written. No model runs: the text and the drafter's proposals are those of the file,
    so the answer comes in seconds, and is biased (docs/trace.md).

    \b
    Examples:
      dynatree generate --trace run.jsonl "Why is the sky blue?"
      dynatree replay run.jsonl --policy "fixed(depth=4)" --policy cost_aware
    """
    for policy in policies:
        check_names(policy=policy)
    context = click.get_current_context()
    given = {
        name: value
        for name, value in limits.items()
        if context.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT
    }
    from dynatree_core.trace import read

    sequences = read(file).sequences
    if number is not None:
        sequences = [one for one in sequences if one.number == number]
    sequences = [one for one in sequences if one.iterations]
    if not sequences:
        raise InputError(f"{file} must have a generation with an iteration, got none; record one with --trace {file}")
    rows = _rows(sequences, policies, given)
    if as_json:
        click.echo(json.dumps([attrs.asdict(row) for row in rows]))
        return
    _show(rows)


@attrs.frozen
class _Row:
    """A stack over all generations of a file."""

    policy: str
    is_recorded: bool
    num_tokens: int
    num_iterations: int
    tokens_per_iteration: float
    nodes_per_iteration: float
    expected_seconds: float
    expected_tokens_per_second: float
    unknown_share: float


def _rows(sequences: Sequence[SequenceTrace], policies: Sequence[str], limits: dict[str, Any]) -> list[_Row]:
    from dynatree_core.trace import recorded, replay

    names = " / ".join(dict.fromkeys(one.begin["policy"] for one in sequences))
    rows = [_row(names, [recorded(one) for one in sequences], is_recorded=True)]
    return rows + [
        _row(policy, [replay(one, policy, **limits) for one in sequences], is_recorded=False) for policy in policies
    ]


def _row(policy: str, replays: Sequence[Replay], *, is_recorded: bool) -> _Row:
    steps = [step for one in replays for step in one.steps]
    num_tokens, seconds = sum(step.num_committed for step in steps), sum(step.expected_seconds for step in steps)
    num_asked = sum(step.num_asked for step in steps)
    return _Row(
        policy=policy,
        is_recorded=is_recorded,
        num_tokens=num_tokens,
        num_iterations=len(steps),
        tokens_per_iteration=num_tokens / len(steps),
        nodes_per_iteration=sum(step.num_verified for step in steps) / len(steps),
        expected_seconds=seconds,
        expected_tokens_per_second=num_tokens / seconds,
        unknown_share=sum(step.num_unknown for step in steps) / num_asked if num_asked else 0.0,
    )


def _show(rows: Sequence[_Row]) -> None:
    table = Table(box=box.SIMPLE_HEAD)
    for header in ("", "tokens / iteration", "nodes / iteration", "expected tokens / s", "unknown"):
        table.add_column(header, justify="right" if header else "left")
    for row in rows:
        table.add_row(
            f"{row.policy} (recorded)" if row.is_recorded else row.policy,
            f"{row.tokens_per_iteration:.2f}",
            f"{row.nodes_per_iteration:.1f}",
            f"{row.expected_tokens_per_second:.2f}",
            "–" if row.is_recorded else f"{row.unknown_share:.0%}",
        )
    Console(highlight=False).print(table)
    Console(stderr=True, highlight=False).print(BIAS, style="dim")
