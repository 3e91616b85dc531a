"""`dynatree doctor`: what it shows. What it finds out is in `examine`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import click

from dynatree_core.cli import console
from dynatree_core.cli.options import JSON

__all__ = ["doctor"]


@click.command()
@JSON
def doctor(as_json: bool) -> int:
    """Show what a bug report needs: versions, device, cache, plugins, runner, threads, and what else loads the machine.

    Nothing secret is in it. Exits with 1 if something is wrong, which stands at the end.

    \b
    Examples:
      dynatree doctor
      dynatree doctor --json > doctor.json
    """
    from dynatree_core.cli.examine import examine

    with console.spinner("looking"):
        found = examine()
    if as_json:
        click.echo(json.dumps(found, indent=2))
    else:
        for label, text in _lines(found):
            click.echo(f"{label:<14} {text}".rstrip())
    return 1 if found["problems"] else 0


def _lines(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Label and text of each line; the parts that could not be found out say why under "problems"."""
    parts = {name: part for name, part in found.items() if not (isinstance(part, Mapping) and "error" in part)}
    if versions := parts.get("versions"):
        yield "versions", ", ".join(f"{name} {version}" for name, version in versions.items() if version is not None)
        yield "not installed", ", ".join(name for name, version in versions.items() if version is None) or "nothing"
    if system := parts.get("system"):
        yield "system", system["platform"]
        yield "python", system["python"]
        usable = "" if system["usable_cores"] is None else f", {system['usable_cores']} for this process"
        yield "cores", f"{system['cores']} physical, {system['logical_cores']} logical{usable}"
        yield "memory", f"{_gigabytes(system['free_memory'])} free of {_gigabytes(system['memory'])}"
    if torch := parts.get("torch"):
        yield "device", ", ".join([torch["device"], *torch["gpus"], torch["cpu_capability"]])
        yield "threads", f"{torch['threads']} of torch"
        yield "runner", f"{torch['runner']['name']}: {torch['runner']['reason']}"
    if load := parts.get("load"):
        busiest = ", ".join(f"{one['name']} {one['percent']} %" for one in load["busiest"])
        yield "others use", f"{load['others_percent']} % of a core{f' ({busiest})' if busiest else ''}"
    if environment := parts.get("environment"):
        yield "environment", ", ".join(f"{name}={value}" for name, value in environment.items())
    if cache := parts.get("cache"):
        state = "" if cache["is_writable"] else ", cannot be written"
        yield "cache", f"{cache['folder']}, {_gigabytes(cache['free_disk'])} free on its disk{state}"
    if model := parts.get("default model"):
        states = (
            "installed" if model["installed"] else "not installed",
            "converted" if model["converted"] else "not converted",
        )
        yield "default model", f"{model['name']}, {model['package']} {model['version']}: {', '.join(states)}"
    if plugins := parts.get("plugins"):
        yield from _plugin_lines(plugins)
    yield "problems", "none" if not found["problems"] else str(len(found["problems"]))
    for problem in found["problems"]:
        yield "", console.fold(problem)


def _plugin_lines(plugins: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    """The sound plugins by package, a line for each."""
    label = "plugins"
    sound = [one for one in plugins if one["error"] is None]
    by_package = sorted(sound, key=lambda one: (one["package"], one["version"]))
    for (package, version), group in groupby(by_package, key=lambda one: (one["package"], one["version"])):
        yield label, f"{package} {version}: {', '.join(one['name'] for one in group)}"
        label = ""


def _gigabytes(number: float) -> str:
    return f"{number / 1e9:.1f} GB"
