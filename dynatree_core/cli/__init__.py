"""The command line: a file for each command."""

from collections.abc import Sequence
from typing import NoReturn


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and end the process with its exit status."""
    from dynatree_core.cli.group import main as run  # a module of this folder must not import the group

    run(args)
