"""`dynatree new-policy` and `dynatree new-drafter`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from dynatree_core.cli.scaffold import Kind

__all__ = ["new_drafter", "new_policy"]


def _with_arguments(function: Callable[..., Any]) -> Callable[..., Any]:
    folder = click.option(
        "--dir",
        "parent",
        metavar="DIR",
        type=click.Path(exists=True, file_okay=False, path_type=Path),
        default=".",
        help="Where the package's folder is made.  [default: here]",
    )
    return click.argument("name")(folder(function))


@click.command("new-policy")
@_with_arguments
def new_policy(name: str, parent: Path) -> None:
    """Write an installable package dynatree-NAME with a policy NAME, its tests and a README.

    \b
    Examples:
      dynatree new-policy wide_root
      dynatree new-policy --dir ~/policies wide_root
    """
    from dynatree_core.cli import scaffold

    _write(scaffold.POLICY, name, parent)


@click.command("new-drafter")
@_with_arguments
def new_drafter(name: str, parent: Path) -> None:
    """Write an installable package dynatree-NAME with a drafter NAME, its tests and a README.

    \b
    Examples:
      dynatree new-drafter last_words
      dynatree new-drafter --dir ~/drafters last_words
    """
    from dynatree_core.cli import scaffold

    _write(scaffold.DRAFTER, name, parent)


def _write(kind: Kind, name: str, parent: Path) -> None:
    from dynatree_core.cli import scaffold

    click.echo(scaffold.next_steps(kind, scaffold.write_package(kind, name, parent)))
