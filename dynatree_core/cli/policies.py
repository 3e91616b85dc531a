"""`dynatree policies` and `dynatree drafters`: what is installed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import attrs
import click
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dynatree_core.cli.catalogue import PluginRow, plugin_rows
from dynatree_core.cli.options import JSON_LIST
from dynatree_core.plugins.registry import DRAFTERS, POLICIES, PRESETS

__all__ = ["drafters", "policies"]


@click.command()
@JSON_LIST
def policies(as_json: bool) -> None:
    """List the installed policies and presets."""
    _show(plugin_rows(PRESETS, POLICIES), as_json)


@click.command()
@JSON_LIST
def drafters(as_json: bool) -> None:
    """List the installed drafters."""
    _show(plugin_rows(DRAFTERS), as_json)


def _show(rows: Sequence[PluginRow], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps([attrs.asdict(row) for row in rows], indent=2, default=repr))
    else:
        Console(highlight=False).print(_listing(rows))


def _listing(rows: Sequence[PluginRow]) -> Table:
    """A table of plugins, in which a broken one does not hide the others."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("name", no_wrap=True)
    table.add_column("what it does", overflow="fold")
    for row in rows:
        name = Text.assemble((row.name, "bold"), "\n", (f"{row.package} {row.version}", "dim"))
        table.add_row(name, Text("\n").join(_plugin_lines(row)), end_section=True)
    return table


def _plugin_lines(row: PluginRow) -> Iterator[Text]:
    if row.description:
        yield Text(row.description)
    if row.parameters:
        defaults = {name: value for name, value in row.parameters.items() if name not in row.required}
        yield _labelled("parameters", [*(f"{name} (required)" for name in row.required), *_settings(defaults)])
    for variant, values in row.variants.items():
        yield _labelled(f"variant :{variant}", _settings(values))
    if row.hooks:
        yield _labelled("hooks", row.hooks)
    if row.error is not None:
        yield Text(f"cannot be used: {row.error}", style="red")


def _settings(values: Mapping[str, Any]) -> list[str]:
    return [f"{name}={value!r}" for name, value in values.items()]


def _labelled(label: str, items: Iterable[str]) -> Text:
    return Text.assemble((f"{label} ", "dim"), ", ".join(items))
