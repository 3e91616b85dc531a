"""A run beside the published numbers of DynaTree: only shapes can be compared.

They belong to other models and another machine, so a number of theirs never stands beside one of ours: each side is
taken relative to a value of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import attrs

from dynatree_bench.data.published import published
from dynatree_bench.report.statistics import differ_only_in, summaries
from dynatree_bench.run.records import Results

Series = dict[str, dict[str, float]]  # method -> tick -> tokens per second, relative to the reference


@attrs.frozen
class ShapePair:
    """A run and the published numbers of the same experiment, each relative to its own reference."""

    label: str  # of the axis
    reference: str  # what is 1
    ticks: tuple[str, ...]
    ours: Series
    theirs: Series


@attrs.frozen
class _Axis:
    """Where the numbers of an experiment stand, and what they are relative to."""

    label: str
    method: str
    tick: str | None  # None: the last one that both have
    varied: tuple[str, ...] = ()  # axes of the experiment


_AXES = {
    "main": _Axis("method", "fixed", "fixed"),
    "ablation": _Axis("base depth (levels)", "fixed", "5", ("base_depth",)),
    "sensitivity": _Axis("thresholds, branches", "phase3", "0.9/0.4", ("high", "low", "min_branch", "max_branch")),
    "scalability": _Axis("length of the output (new tokens)", "fixed", None, ("max_new_tokens",)),
}


def compared(results: Results) -> ShapePair | None:
    """A run beside the published numbers, where both have the methods, the points and the reference.

    None where they have not, and where the run has several numbers for a point since it varies another axis too.
    """
    name, found = results.info.experiment, summaries(results.records)
    if name not in _AXES or not differ_only_in(_AXES[name].varied, found):
        return None
    own_rows = [
        {**one.axes, "method": one.method, "tokens_per_second": one.tokens_per_second.mean}
        for one in found
        if one.tokens_per_second is not None
    ]
    ours, theirs = _table(name, own_rows), _table(name, published()[name])
    ticks = [tick for tick in dict.fromkeys(tick for row in theirs.values() for tick in row) if _has(ours, tick)]
    methods = [method for method in theirs if method in ours]
    axis = _AXES[name]
    tick = axis.tick or (ticks[-1] if ticks else "")
    if len(ticks) < 2 or tick not in ours.get(axis.method, {}) or tick not in theirs.get(axis.method, {}):
        return None
    reference = axis.method if name == "main" else f"{axis.method} at {tick}"
    sides = []
    for side in (ours, theirs):
        unit = side[axis.method][tick]
        sides.append({m: {t: side[m][t] / unit for t in ticks if t in side[m]} for m in methods})
    return ShapePair(axis.label, reference, tuple(ticks), *sides)


def _has(table: Series, tick: str) -> bool:
    return any(tick in row for row in table.values())


def _table(name: str, rows: Iterable[Mapping[str, Any]]) -> Series:
    values: Series = {}
    for row in rows:
        for tick in _ticks(name, row):
            values.setdefault(row["method"], {})[tick] = row["tokens_per_second"]
    return values


def _ticks(name: str, row: Mapping[str, Any]) -> list[str]:
    """Where on the axis a row stands; in the sensitivity the default stands among thresholds and among branches.

    There the published numbers have two values for it, and say to which part each belongs.
    """
    match name:
        case "main":
            return [row["method"]]
        case "sensitivity" if "high" in row:
            threshold, branches = f"{row['high']}/{row['low']}", f"[{row['min_branch']}, {row['max_branch']}]"
            part = row.get("part")
            ticks = [threshold] if part != "branches" and branches == "[1, 3]" else []
            return ticks + ([branches] if part != "thresholds" and threshold == "0.9/0.4" else [])
        case "ablation" if "base_depth" in row:
            return [str(row["base_depth"])]
        case "scalability" if "max_new_tokens" in row:
            return [str(row["max_new_tokens"])]
    return []
