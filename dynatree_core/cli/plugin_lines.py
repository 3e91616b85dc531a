"""What the list of commands says of each, remembered so that a list need not import the packages that add them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from importlib.metadata import EntryPoint
from typing import Any

import attrs
import click

from dynatree_core.plugins.remembered import Memory

__all__ = ["command_lines"]

_is_text = attrs.validators.optional(attrs.validators.instance_of(str))
_is_flag = attrs.validators.instance_of(bool | str)  # deprecated may say what to take instead


@attrs.frozen
class _Line:
    """What click shows of a command in a list."""

    help: str | None = attrs.field(validator=_is_text)
    short_help: str | None = attrs.field(validator=_is_text)
    hidden: bool = attrs.field(validator=attrs.validators.instance_of(bool))
    deprecated: bool | str = attrs.field(validator=_is_flag)


def command_lines(
    entries: Iterable[EntryPoint],
    load: Callable[[str], click.Command | None],
    is_broken: Callable[[click.Command], bool],
) -> dict[str, click.Command]:
    """A command for each entry point that has its help and does nothing.

    Args:
        entries: those of commands; more than one of a name is a conflict, and nothing to remember.
        load: the command itself, by name.
        is_broken: whether a command stands for one that cannot be loaded; such are not remembered.
    """
    memory = Memory()
    found: dict[str, click.Command] = {}
    entries = list(entries)
    num_of = Counter(entry.name for entry in entries)
    for entry in entries:
        line = _recalled(memory.recall(entry)) if num_of[entry.name] == 1 else None
        if line is None:
            command = load(entry.name)
            if command is None:
                continue
            line = _Line(command.help, command.short_help, command.hidden, command.deprecated)
            if not is_broken(command):
                memory.keep(entry, attrs.asdict(line))
        found[entry.name] = click.Command(entry.name, **attrs.asdict(line))
    memory.save()
    return found


def _recalled(facts: dict[str, Any] | None) -> _Line | None:
    try:
        return None if facts is None else _Line(**facts)
    except TypeError:  # something else has written it
        return None
