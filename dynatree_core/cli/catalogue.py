"""What is known of the installed plugins without using them, for `dynatree policies`, `drafters` and `doctor`.

What needs torch is imported where a plugin is read whose facts are not remembered.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import EntryPoint
from typing import Any

import attrs

from dynatree_core.errors import DynaTreeError, PluginLoadError
from dynatree_core.plugins.distributions import package_of
from dynatree_core.plugins.foreign import others_code, raised
from dynatree_core.plugins.presets import expand_preset
from dynatree_core.plugins.registry import (
    DRAFTERS,
    POLICIES,
    PRESETS,
    RUNNERS,
    load_plugin,
    plugin_parameters,
    plugin_table,
    plugin_variants,
    required_parameters,
)
from dynatree_core.plugins.remembered import Memory
from dynatree_core.plugins.spec import PluginSpec, format_stack

__all__ = ["PluginRow", "plugin_rows"]

_KIND = {POLICIES: "policy", PRESETS: "preset", DRAFTERS: "drafter", RUNNERS: "runner"}

_is_text = attrs.validators.instance_of(str)
_is_list = attrs.validators.deep_iterable(_is_text, attrs.validators.instance_of(list))
_is_mapping = attrs.validators.instance_of(dict)
_is_table = attrs.validators.deep_mapping(_is_text, _is_mapping, _is_mapping)


@attrs.frozen
class PluginRow:
    """What is known of one plugin without using it."""

    name: str
    kind: str  # "policy", "preset", "drafter" or "runner"
    package: str
    version: str
    description: str = attrs.field(default="", validator=_is_text)
    hooks: Sequence[str] = attrs.field(factory=list, validator=_is_list)
    parameters: Mapping[str, Any] = attrs.field(factory=dict, validator=_is_mapping)  # name -> default
    required: Sequence[str] = attrs.field(factory=list, validator=_is_list)  # the parameters that have no default
    variants: Mapping[str, Mapping[str, Any]] = attrs.field(factory=dict, validator=_is_table)
    expands_to: str | None = attrs.field(default=None, validator=attrs.validators.optional(_is_text))  # of a preset
    error: str | None = None  # why it cannot be used


def plugin_rows(*groups: str) -> list[PluginRow]:
    """A row for each name under the entry-point groups, also for those that are broken.

    What is broken is read anew each time: what is missing may have come.
    """
    memory = Memory()
    rows = [_row(group, name, entries, memory) for group in groups for name, entries in plugin_table(group).items()]
    memory.save()
    return rows


def _row(group: str, name: str, entries: Sequence[EntryPoint], memory: Memory) -> PluginRow:
    packages, versions = (" and ".join(words) for words in zip(*map(package_of, entries), strict=True))
    identity = (name, _KIND[group], packages, versions)
    beside = _presets() if group == PRESETS else ""
    known = memory.recall(entries[0], beside=beside) if len(entries) == 1 else None
    if known is not None:
        with contextlib.suppress(TypeError):  # something else has written it: read anew
            return PluginRow(*identity, **known)
    found: dict[str, Any] = {}
    try:
        with others_code(_broken):
            for field, value in _look_into(group, name):
                json.dumps(value, default=repr)  # what cannot be shown is a fault of the plugin too
                found[field] = value
    except DynaTreeError as error:
        found["error"] = " ".join(str(error).split())
    else:
        memory.keep(entries[0], found, files=_files(group, name), beside=beside)
    return PluginRow(*identity, **found)


def _broken(error: BaseException) -> DynaTreeError:
    return error if isinstance(error, DynaTreeError) else PluginLoadError(raised(error))


def _presets() -> str:
    """What a preset's meaning depends on: the other presets, and which names are policies."""
    tables = [plugin_table(group) for group in (POLICIES, PRESETS)]
    return json.dumps([[name, *(one.value for one in entries)] for table in tables for name, entries in table.items()])


def _files(group: str, name: str) -> set[str]:
    """Files that a plugin's facts come from besides its own package: those of its base classes, or other presets."""
    if group == PRESETS:
        modules = {entry.module for entries in plugin_table(PRESETS).values() for entry in entries}
    else:
        plugin = load_plugin(group, name)
        modules = {part.__module__ for part in plugin.__mro__} if isinstance(plugin, type) else set()
    found = (getattr(sys.modules.get(module), "__file__", None) for module in modules)
    return {file for file in found if isinstance(file, str)}


def _look_into(group: str, name: str) -> Iterator[tuple[str, Any]]:
    """Fields of a plugin's row, as far as they can be found out."""
    plugin = load_plugin(group, name)
    if group == PRESETS:
        expanded = format_stack(expand_preset(PluginSpec(name)))
        yield "description", f"= {expanded}"
        yield "expands_to", expanded
        return
    yield "description", next(iter(str(plugin.__doc__ or "").strip().splitlines()), "")
    if group == RUNNERS:
        from dynatree_core.runners.choice import load_runner

        load_runner(name)  # that it is one
        return
    yield "required", required_parameters(plugin)
    yield "parameters", plugin_parameters(plugin)
    yield "variants", {variant: dict(values) for variant, values in plugin_variants(plugin).items()}
    if group == POLICIES:
        from dynatree_core.policy.registration import implemented_hooks

        yield "hooks", implemented_hooks(plugin())
