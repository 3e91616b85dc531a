"""A study: a question with a measurement of its own. Each is a file in this folder; what they share is here.

The file's docstring begins with the question, and its STUDY says how it is measured and shown. A study is found by its
file, `dynatree bench NAME` runs it, and its folder holds `study.json`, from which tables and figures are made.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch

from dynatree_bench.data.workloads import Picks, encode, load_workload
from dynatree_bench.report.page import is_report
from dynatree_bench.report.series import Panel, draw_panels
from dynatree_bench.report.tables import Table, write_lines, write_tables
from dynatree_bench.run.machine import LoadMeter, idle_or_busy, provenance
from dynatree_bench.run.pairs import Models, Pair
from dynatree_bench.studies.names import studies
from dynatree_core import build_stack
from dynatree_core.errors import InputError, nearest_match
from dynatree_core.files.outputs import check_out
from dynatree_core.files.writing import write_text

RESULTS = "study.json"


@attrs.frozen
class Asked:
    """What a study is asked for, by the options that all of `dynatree bench` has; what is None or empty is its own."""

    models: Models
    out: Path
    is_quick: bool = False
    policies: tuple[str, ...] = ()
    workloads: tuple[str, ...] = ()
    num_prompts: int | str | None = None
    picks: Picks = attrs.field(factory=Picks)
    max_new_tokens: tuple[int, ...] = ()
    prompt_tokens: tuple[int, ...] = ()
    batch_sizes: tuple[int, ...] = ()
    repeats: int | None = None
    seed: int = 0
    is_chat: bool | None = None
    steps: tuple[str, ...] = ()  # of a study that has some
    is_plan: bool = False  # only say what would run

    def load(self) -> Pair:
        """The models."""
        return self.models.load(seed=self.seed)

    def new_tokens(self, *, full: int, quick: int) -> int:
        """Tokens of an output at most."""
        return max(self.max_new_tokens, default=quick if self.is_quick else full)

    def rounds(self, *, full: int, quick: int) -> int:
        """How often everything is measured."""
        return self.repeats or (quick if self.is_quick else full)

    def prompts(
        self, pair: Pair, *, full: int | None, quick: int = 3, max_text_tokens: int | None = None
    ) -> dict[str, list[tuple[int, ...]]]:
        """Prompts in the target's tokens, by category; so many of each workload unless another number is asked for.

        Those of running text are cut to `max_text_tokens`.
        """
        number = self.num_prompts or (quick if self.is_quick else full)
        found: dict[str, list[tuple[int, ...]]] = {}
        for name in self.workloads or ("built-in",):
            workload = load_workload(name, None if number in (None, "all") else int(str(number)), self.picks)
            longest = None if workload.is_chat else max_text_tokens
            for prompt in encode(workload, pair.target, is_chat=self.is_chat):
                found.setdefault(prompt.category, []).append(prompt.token_ids[:longest])
        return found


@attrs.frozen
class Study:
    """How a question is answered.

    What is measured goes to a file and comes from it, so it is of JSON's types: numbers by names.
    """

    options: tuple[str, ...]  # those of `dynatree bench` that it understands, as fields of Asked and Models
    measure: Callable[[Asked], dict[str, Any]]  # what it finds; "provenance" has what it adds to the usual one
    tables: Callable[[Mapping[str, Any]], Sequence[Table | None]]  # of what was found
    panels: Callable[[Mapping[str, Any]], Sequence[Panel]] | None = None  # of a figure
    sentences: Callable[[Mapping[str, Any]], Sequence[str]] = lambda found: ()  # what is to be read first
    plan: Callable[[Asked], Sequence[str]] | None = None  # lines that say what would run, for --plan
    is_bad: Callable[[Mapping[str, Any]], bool] = lambda found: False  # whether the command is to fail


@attrs.frozen
class Found:
    """What a study has found, as its file has it."""

    name: str
    found: Mapping[str, Any]

    @property
    def said(self) -> Mapping[str, Any]:
        """The provenance."""
        said: Mapping[str, Any] = self.found["provenance"]
        return said

    @property
    def sentences(self) -> list[str]:
        """What to read first, whether the machine was idle among it."""
        busy = self.said.get("busy_percent")
        return [*find_study(self.name).sentences(self.found), *([idle_or_busy(busy)] if busy else [])]

    @property
    def tables(self) -> list[Table]:
        """Those that have a row."""
        return [table for table in find_study(self.name).tables(self.found) if table is not None]


def find_study(name: str) -> Study:
    """A study by its name.

    Raises:
        InputError: there is none.
    """
    if name not in studies():
        raise InputError(f"'{name}' is not a study{nearest_match(name, studies())}; they are: {', '.join(studies())}")
    found: Study = importlib.import_module(f"dynatree_bench.studies.{name.replace('-', '_')}").STUDY
    return found


def run_study(name: str, asked: Asked, *, command: str) -> Found:
    """Measure, and write the results' folder.

    Args:
        name: the study.
        asked: what of it differs from its own choice, and where the results go.
        command: how this was started.

    Raises:
        InputError: what is asked cannot be used, or the folder holds something else.
    """
    check_out(asked.out, "`dynatree bench`", lambda folder: _is_own(folder, name))
    for policy in asked.policies:
        if "{" not in policy:  # else it is a template
            build_stack(policy)
    meter = LoadMeter()
    torch.manual_seed(asked.seed)
    found = find_study(name).measure(asked)
    said = {**provenance(command), **asked.models.settings(), "seed": asked.seed, **found.pop("provenance")}
    busy = None if meter.share() is None else meter.meanwhile()  # too short to tell: all steps were done before
    document = {"study": name, "provenance": {**said, "busy_percent": busy}, **found}
    asked.out.mkdir(parents=True, exist_ok=True)
    write_text(asked.out / RESULTS, json.dumps(document, indent=1) + "\n")
    return read_found(asked.out)


def _is_own(folder: Path, name: str) -> bool:
    """Whether a folder has the results of a study, or what an interrupted run of it has left."""
    try:
        return read_found(folder).name == name
    except InputError:
        return {entry.name for entry in folder.iterdir()} in ({"answers"}, {"steps"})


def read_found(place: Path) -> Found:
    """What a study has left in a folder, or in a file that was taken out of one.

    Raises:
        InputError: there is nothing of the kind.
    """
    file = place / RESULTS if place.is_dir() else place
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        read = Found(found["study"], found)
        read.said.items()  # the provenance is there
        return read
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{place} must hold the results of a study, got {type(error).__name__}: {error}") from error


def write_report(found: Found, out: Path) -> Path:
    """Tables and figure of a study as a page, which is returned.

    Raises:
        InputError: the folder holds something else than a report.
    """
    check_out(out, "`dynatree bench report`", is_report)
    said = found.said  # of which earlier versions have less
    threads = f"{said['threads']} threads" if "threads" in said else None
    parts = [said.get("model", said.get("target")), said.get("device"), threads, said["date"]]
    foot = ", ".join(part for part in parts if part)
    versions = ", ".join(f"{name} {number}" for name, number in said["versions"].items())
    lines = [f"# Benchmark results: {found.name}", "", studies()[found.name], ""]
    lines += [*(f"- {sentence}" for sentence in found.sentences), "", f"{foot} · {versions} · `{said['command']}`", ""]
    lines += write_tables(found.tables, out)
    make_panels = find_study(found.name).panels
    panels = make_panels(found.found) if make_panels is not None else ()
    if panels:
        (out / "figures").mkdir(parents=True, exist_ok=True)
        busy = "" if "not to be believed" not in " ".join(found.sentences) else " (on a busy machine: provisional)"
        draw_panels(panels, found.name, foot + busy, out / "figures" / f"{found.name}.svg")
        lines += ["## Figure", "", f"![{found.name}](figures/{found.name}.svg)"]
    return write_lines(out / "report.md", lines)
