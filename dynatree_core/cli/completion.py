"""`dynatree completion`: the script by which a shell completes commands, options and the names of plugins.

The shell asks the command itself each time, so what is installed later is known at once. Nothing here needs torch.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path

import click
from click.shell_completion import CompletionItem, get_completion_class

from dynatree_core.plugins.registry import DRAFTERS, POLICIES, PRESETS, plugin_table

__all__ = [
    "complete_command",
    "complete_drafter",
    "complete_model",
    "complete_policy",
    "completing",
    "completion",
    "is_completing",
]

SHELLS = ("bash", "zsh", "fish")
PROGRAM = "dynatree"
VARIABLE = "_DYNATREE_COMPLETE"  # of the environment, by which a shell asks; click derives it from the program's name


@click.command()
@click.argument("shell", type=click.Choice(SHELLS), required=False)
@click.pass_context
def completion(context: click.Context, shell: str | None) -> None:
    """Print the script that completes commands, options, policies and drafters in a shell.

    SHELL is that of $SHELL where it is left out.

    \b
    To have it in every new shell:
      echo 'eval "$(dynatree completion bash)"' >> ~/.bashrc
      echo 'eval "$(dynatree completion zsh)"' >> ~/.zshrc
      dynatree completion fish > ~/.config/fish/completions/dynatree.fish
    """
    if shell is None:
        shell = Path(os.environ.get("SHELL", "")).name
        if shell not in SHELLS:
            raise click.UsageError(f"SHELL must be one of {', '.join(SHELLS)}, got '{shell}' from $SHELL", context)
    made = get_completion_class(shell)
    assert made is not None, "click knows the three shells"
    click.echo(made(context.find_root().command, {}, PROGRAM, VARIABLE).source())


def completing(command: Callable[[], int | None]) -> Callable[[], int | None]:
    """The command as a shell is to have it that completes a line: without a word on standard error."""

    def quiet() -> int | None:
        warnings.simplefilter("ignore")
        return command()

    return quiet


def is_completing() -> bool:
    """Whether a shell asks what could stand there."""
    return VARIABLE in os.environ


def complete_command(
    group: click.Group, lines: click.Group, context: click.Context, incomplete: str
) -> list[CompletionItem]:
    """The group's commands that begin so, with the help of `lines`, and its options."""
    found = [
        CompletionItem(name, help=command.get_short_help_str())
        for name, command in sorted(lines.commands.items())
        if name.startswith(incomplete) and not command.hidden
    ]
    return [*found, *click.Command.shell_complete(group, context, incomplete)]


def complete_policy(context: click.Context, option: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Policies and presets, also behind the `+` of a stack that has begun."""
    return _joined(incomplete, [*plugin_table(PRESETS), *plugin_table(POLICIES)])


def complete_drafter(context: click.Context, option: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Drafters, also behind a `+`, and folders."""
    return [*_folders(incomplete), *_joined(incomplete, list(plugin_table(DRAFTERS)))]


def complete_model(context: click.Context, option: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Folders, and `default` for the embedded model."""
    return [*_folders(incomplete), *_joined(incomplete, ["default"])]


def _joined(incomplete: str, names: list[str]) -> list[CompletionItem]:
    """The names that the part behind the last `+` begins, with all before it; a name stands in a stack once."""
    begun, plus, part = incomplete.rpartition("+")
    if part.count("(") > part.count(")") or begun.count("(") > begun.count(")"):
        return []  # within parameters
    used = {one.partition("(")[0].partition(":")[0].strip() for one in begun.split("+")}
    return [CompletionItem(begun + plus + name) for name in names if name.startswith(part) and name not in used]


def _folders(incomplete: str) -> list[CompletionItem]:
    """Has the shell complete folders itself. It stands first: bash forgets the items before it."""
    return [CompletionItem(incomplete, type="dir")] if "+" not in incomplete else []
