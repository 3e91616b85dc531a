"""The references of docs/, which are made when the site is built: all commands, and the public names.

A page says where they come. `<!-- commands -->` becomes what `--help` says of each command. Behind `<!-- python:
MODULE -->` stand names in backquotes, which become that names' signatures and docstrings (mkdocstrings); on GitHub the
names themselves are to be read.

`python .ci/docs_reference.py` prints the reference of the commands.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator

import click

from dynatree_core.cli.group import _dynatree

__all__ = ["all_commands", "command_reference", "expanded", "referenced_names"]

COMMANDS = "<!-- commands -->\n"
NAMES = re.compile(r"^<!-- python: (?P<module>[\w.]+) -->\n+(?P<names>(?:`[\w.]+`[,.]?\s)+)", re.M)


def expanded(markdown: str) -> str:
    """A page with its references in place of the comments that ask for them."""
    if COMMANDS in markdown:
        markdown = markdown.replace(COMMANDS, command_reference())

    def directives(found: re.Match[str]) -> str:
        return "\n\n".join(f"::: {found['module']}.{name}" for name in _names(found)) + "\n\n"

    return NAMES.sub(directives, markdown)


def referenced_names(markdown: str, module: str) -> list[str]:
    """The names of a module whose reference a page asks for, in its order."""
    return [name for found in NAMES.finditer(markdown) if found["module"] == module for name in _names(found)]


def _names(found: re.Match[str]) -> list[str]:
    return re.findall(r"`([\w.]+)`", found["names"])


def all_commands(command: click.Command, parent: click.Context | None = None) -> Iterator[click.Context]:
    """The contexts of a command and of all commands below it, in the order in which help lists them."""
    context = click.Context(command, info_name=command.name, parent=parent, **command.context_settings)
    yield context
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            found = command.get_command(context, name)
            if found is not None and not found.hidden:
                yield from all_commands(found, context)


def command_reference() -> str:
    """All commands: a heading each, what it does, its usage, a table of its options."""
    return "\n".join(section(context) for context in all_commands(_dynatree))


def section(context: click.Context) -> str:
    depth = len(context.command_path.split())
    usage = " ".join(context.command.collect_usage_pieces(context))
    heading = f"{'#' * min(depth + 1, 4)} {context.command_path}\n"
    parts = [heading, f"```text\n{context.command_path} {usage}\n```\n", description(context.command), options(context)]
    return "\n".join(part for part in parts if part)


def description(command: click.Command) -> str:
    """The help text; its blocks that click is to leave alone (`\\b`) as blocks of code."""
    paragraphs = []
    for paragraph in inspect.cleandoc(command.help or "").split("\n\n"):
        if paragraph.startswith("\b\n"):
            title, *lines = paragraph.removeprefix("\b\n").splitlines()
            is_titled = title.endswith(":") and lines
            shown = [line.removeprefix("  ") for line in lines] if is_titled else [title, *lines]
            paragraphs.append((f"{title}\n\n" if is_titled else "") + "```text\n" + "\n".join(shown) + "\n```")
        else:
            paragraphs.append(_escaped(" ".join(paragraph.split())))
    return "\n\n".join(paragraphs) + "\n"


def options(context: click.Context) -> str:
    """The table of the options. `--help` is in none, as every command has it."""
    records = [
        record
        for parameter in context.command.get_params(context)
        if isinstance(parameter, click.Option) and "--help" not in parameter.opts
        if (record := parameter.get_help_record(context)) is not None
    ]
    if not records:
        return ""
    rows = [f"| {_code(names)} | {_escaped(' '.join(text.split()))} |" for names, text in records]
    return "\n".join(["| option | meaning |", "| --- | --- |", *rows]) + "\n"


def _code(text: str) -> str:
    """As code in a cell of a table."""
    return "`" + text.replace("|", "\\|") + "`"


def _escaped(text: str) -> str:
    """As prose in a cell: nothing in it is HTML or emphasis; what stands in backquotes stays code."""
    parts = text.split("`")
    for index in range(0, len(parts), 2):
        for character in "<>*_[]":
            parts[index] = parts[index].replace(character, f"&#{ord(character)};")
    return "`".join(parts).replace("|", "\\|")


if __name__ == "__main__":
    print(command_reference())
