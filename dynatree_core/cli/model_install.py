"""`dynatree models install`: the default model is fetched and converted, each step with its time."""

from __future__ import annotations

import time

import click

from dynatree_core.cli import console
from dynatree_core.models import embedded

__all__ = ["install_default_model"]


def install_default_model() -> None:
    """Have the default model ready: fetched, converted and intact. Prints what was done and how long it took."""
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
