"""The `dynatree` command: the group of all commands.

Answers and documents go to stdout, everything else to stderr: a terminal shows both, and what is piped on is the
answer alone. Exit statuses are in `exits`. A command's file is imported when the command is used, and torch and
transformers, which take seconds to import, when it computes.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn, cast

import click

from dynatree_core.cli.completion import complete_command, completing, is_completing
from dynatree_core.cli.exits import end_process, without_exits
from dynatree_core.cli.plugin_lines import command_lines
from dynatree_core.cli.quiet import quiet_imports
from dynatree_core.errors import PluginLoadError
from dynatree_core.plugins.distributions import entry_points
from dynatree_core.plugins.foreign import others_code, raised

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

__all__ = ["main"]

FILES = {  # command -> the file of this folder that has it
    "audit": "audit",
    "calibrate": "calibrate",
    "chat": "chat",
    "completion": "completion",
    "doctor": "doctor",
    "drafters": "policies",
    "generate": "generate",
    "hf-folder": "hf_folder",
    "models": "models",
    "new-drafter": "scaffold",
    "new-policy": "scaffold",
    "policies": "policies",
    "replay": "replay",
    "serve": "serve",
    "view": "view",
}
COMMANDS = "dynatree.commands"  # entry-point group: name -> click command, in a module that imports quickly


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and end the process with its exit status. What goes wrong is told in one line."""

    def command() -> int | None:
        return cast("int | None", _dynatree.main(args, prog_name="dynatree", standalone_mode=False))

    quiet_imports()

    end_process(completing(command) if is_completing() else without_exits(command))


class _Commands(click.Group):
    """The runtime's own commands (`FILES`), and those that installed packages add (entry-point group `COMMANDS`)."""

    def list_commands(self, context: click.Context) -> list[str]:
        return sorted({*FILES, *(entry.name for entry in entry_points(group=COMMANDS))})

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name in FILES:
            file = importlib.import_module(f"dynatree_core.cli.{FILES[name]}")
            return cast(click.Command, getattr(file, name.replace("-", "_")))
        found = [entry for entry in entry_points(group=COMMANDS) if entry.name == name]
        if not found:
            return None
        [entry_point, *others] = found
        if others:
            values = " and ".join(entry.value for entry in found)
            return _broken(name, f"it must come from one package, but comes from {values}; uninstall one")
        try:
            with others_code(
                lambda error: PluginLoadError(f"{raised(error)}; repair or uninstall its package, {entry_point.value}")
            ):
                command = entry_point.load()
        except PluginLoadError as error:
            return _broken(name, str(error))
        if not isinstance(command, click.Command):
            return _broken(
                name, f"it must be a click command, got {command!r}; repair or uninstall {entry_point.value}"
            )
        return command

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        self._lines(context).format_commands(context, formatter)

    def shell_complete(self, context: click.Context, incomplete: str) -> list[CompletionItem]:
        return complete_command(self, self._lines(context), context, incomplete)

    def _lines(self, context: click.Context) -> click.Group:
        """The same commands, but of those that packages add only the help, which is remembered."""
        own = {name: self.get_command(context, name) for name in FILES}
        added = command_lines(
            [entry for entry in entry_points(group=COMMANDS) if entry.name not in FILES],
            lambda name: self.get_command(context, name),
            lambda command: isinstance(command, _Broken),
        )
        return click.Group(self.name, commands={name: command for name, command in own.items() if command} | added)


class _Broken(click.Command):
    """Stands in the list for a command that cannot be loaded, and says why when it is called."""


def _broken(name: str, reason: str) -> click.Command:
    def complain() -> NoReturn:
        raise PluginLoadError(f"the command '{name}' cannot be used: {reason}")

    return _Broken(name, callback=complain, help=f"(broken: {reason})")


@click.group(
    "dynatree",
    cls=_Commands,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(package_name="dynatree", message="%(prog)s %(version)s")
@click.pass_context
def _dynatree(context: click.Context) -> None:
    """Lossless tree speculative decoding: a model's own output in fewer passes.

    \b
    Examples:
      dynatree models install
      dynatree generate "Why is the sky blue?"
      dynatree generate --compare --policy "fixed(depth=4)" "Count to twenty."
      dynatree policies
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())
