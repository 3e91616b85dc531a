"""`dynatree calibrate`: measure costs, and show them."""

from __future__ import annotations

import json
import math
import warnings
from typing import TYPE_CHECKING

import attrs
import click
from rich import box
from rich.console import Console
from rich.table import Table

from dynatree_core.cli import console
from dynatree_core.cli.checks import check_names, check_settings
from dynatree_core.cli.loading import load_drafter, load_target
from dynatree_core.cli.options import ACTIVATIONS, JSON, MODEL_OPTIONS, WEIGHTS, with_options

if TYPE_CHECKING:
    from dynatree_core.cost_model import CostModel

__all__ = ["calibrate"]


@click.command()
@with_options(*MODEL_OPTIONS, WEIGHTS, ACTIVATIONS, JSON)
@click.option("--rounds", type=click.IntRange(min=1), default=7, show_default=True, help="Measurements of each point.")
def calibrate(
    target: str | None,
    drafter: str,
    device: str | None,
    dtype: str,
    runner: str,
    weights: str,
    activations: str,
    as_json: bool,
    rounds: int,
) -> None:
    """Measure how long passes take on this machine, for the policies that weigh costs, and keep the result.

    Such a policy measures by itself at its first use, in a few seconds and with fewer rounds. Use an idle machine.

    \b
    Examples:
      dynatree calibrate
      dynatree calibrate --target ./big --drafter ./small --rounds 15
    """
    check_names(drafter=drafter)
    from dynatree_core.cli.generate_report import made_with
    from dynatree_core.drafters.model import ModelDrafter
    from dynatree_core.engine.costs import NotKeptWarning, folder, measured_costs

    source = check_settings(target=target, drafter=drafter, device=device, runner=runner)
    loaded = load_target(target, device, dtype, weights=weights, activations=activations, runner=runner)
    if source is None:
        source = ModelDrafter(load_drafter(drafter, loaded).model)
    with warnings.catch_warnings(record=True) as caught, console.spinner(f"measuring {rounds} rounds"):
        costs = measured_costs(
            loaded.model,
            source,
            runner=runner,
            rounds=rounds,
            patience=math.inf,
            is_anew=True,
            tokenizer=loaded.tokenizer,
        )
    for warning in caught:
        console.complain("warning", str(warning.message))
    if as_json:
        shown = {"verify": costs.target_pass_seconds, "draft": costs.drafter_level_seconds}
        measured = {
            **{name: attrs.asdict(seconds) for name, seconds in shown.items()},
            "rest_seconds": costs.rest_seconds,
            "follow": costs.drafter_follow_seconds and attrs.asdict(costs.drafter_follow_seconds),
        }
        document = {"target": target or "default", "drafter": drafter, **made_with(loaded), "costs": measured}
        click.echo(json.dumps(document))
    else:
        Console(highlight=False).print(_cost_table(costs))
        if not any(warning.category is NotKeptWarning for warning in caught):
            click.echo(f"kept in {folder()}")


def _cost_table(costs: CostModel) -> Table:
    """What an iteration takes, in milliseconds, with each count beside the time of one row."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("what", no_wrap=True)
    for heading in ("count", "ms", "of a pass"):
        table.add_column(heading, justify="right", no_wrap=True)
    for what, seconds in (
        ("target's pass, by rows", costs.target_pass_seconds),
        ("drafter's level, by nodes", costs.drafter_level_seconds),
        ("drafter's catching up, by tokens", costs.drafter_follow_seconds),
    ):
        if seconds is None:
            continue
        for count, at_count in zip(seconds.at, seconds.seconds, strict=True):
            cells = (str(count), f"{1000 * at_count:.2f}", f"{at_count / costs.target_pass_seconds(1):.2f}")
            table.add_row(what, *cells, end_section=count == seconds.at[-1])
            what = ""
    rest = costs.rest_seconds
    table.add_row("rest of an iteration", "", f"{1000 * rest:.2f}", f"{rest / costs.target_pass_seconds(1):.2f}")
    return table
