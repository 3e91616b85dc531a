"""`dynatree models` shows the embedded default model; `dynatree models install` fetches and converts it."""

from __future__ import annotations

import time

import click

from dynatree_core.cli import console
from dynatree_core.models import embedded

__all__ = ["models"]


@click.group(invoke_without_command=True)
@click.pass_context
def models(context: click.Context) -> None:
    """Show the embedded default model: what it is, where, and whether it is ready."""
    if context.invoked_subcommand is None:
        click.echo(_sheet(embedded.describe()))


@models.command()
def install() -> None:
    """Fetch the package that carries the default model, and convert the model."""
    model = embedded.describe()
    steps: list[tuple[str, float]] = []  # what was begun, and when

    with console.spinner(f"checking {model.name}") as show:

        def begin(step: str) -> None:
            steps.append((step, time.monotonic()))
            show(step)

        folder = embedded.make_ready(progress=begin)
    ends = [start for _, start in steps[1:]]
    ends += [time.monotonic()] if steps else []  # nothing was to be done, often
    for (step, start), end in zip(steps, ends, strict=True):
        click.echo(f"{step}: {end - start:.1f} s")
    click.echo(f"{model.name} is ready in {folder}")


def _sheet(model: embedded.EmbeddedModel) -> str:
    """What is known of the embedded default model, and the command for what is missing."""
    rows = {
        "default model": model.name,
        "package": f"{model.package} {model.version}, {'installed' if model.installed else 'not installed'}",
        "licence": model.licence,
        "converted": "yes" if model.converted else "no" if model.damage is None else f"no: {model.damage}",
        "folder": model.folder,
        "size": f"{model.size / 1e6:.0f} MB",
    }
    lines = [f"{label:<14} {value}" for label, value in rows.items()]
    if not model.converted:
        when = "at its first use, or now by" if model.installed else "once it is installed by"
        lines.append(f"\nIt is converted {when}:\n  dynatree models install")
    return "\n".join(lines)
