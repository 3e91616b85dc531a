"""What does a pass over a tree cost with each runner?

Question: time of a verification pass of the target by its rows, the drafted nodes and the root, for each runner and
each dtype; for `native` with the weights in the bits that they were published in, too.

Method: a prompt of 256 tokens; passes over a root and its children. All runners, dtypes and numbers of rows take turns,
several times over in one process after a warm-up round; medians are shown, with quartiles. What counts is a runner's
pass relative to the plain pass over one row in the same round: what slows the machine down hits both alike.

Output: times, and times relative to the plain pass over one row.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from dynatree_bench.report.series import Panel
from dynatree_bench.report.tables import Spread, Table, simple
from dynatree_bench.run.passes import CONTEXT, ROWS, filled, pass_seconds
from dynatree_bench.run.progress import in_rounds
from dynatree_bench.studies.study import Asked, Study
from dynatree_core import load_model
from dynatree_core.models.stored import StoredModel
from dynatree_core.runners.native import NativeRunner
from dynatree_core.runners.packed import can_pack

PLAIN = "float32 eager"
DTYPES = ("float32", "bfloat16")


def measure(asked: Asked) -> dict[str, Any]:
    """{"seconds": way -> rows -> seconds of each round}"""
    ways = {}
    for dtype in DTYPES:
        loaded = load_model(asked.models.target, device="cpu", dtype=dtype)
        is_here = {
            "eager": True,
            "packed": can_pack(loaded.model),
            "native": NativeRunner.reason_against(loaded.model) is None,
        }
        for name in (name for name, can_run in is_here.items() if can_run):
            ways[f"{dtype} {name}"] = filled(loaded.model, name)
    stored = load_model(asked.models.target, device="cpu", dtype="float32", weights="stored").model
    if isinstance(stored, StoredModel):  # else nothing can compute it as it was published
        ways["stored native"] = filled(stored, "native")
    rounds = asked.rounds(full=15, quick=1)
    seconds: dict[str, dict[str, list[float]]] = {way: defaultdict(list) for way in ways}

    def job(way: str, rows: int, turn: int) -> None:
        spent, numbers = pass_seconds(*ways[way], rows), seconds[way][str(rows)]
        if turn:
            numbers.append(spent)

    rows = ROWS[:3] if asked.is_quick else ROWS
    in_rounds([functools.partial(job, way, count) for count in rows for way in ways], rounds)
    return {"provenance": {"model": loaded.name, "context": CONTEXT, "rounds": rounds}, "seconds": seconds}


def relative(found: Mapping[str, Any], way: str, rows: str) -> Spread:
    """A pass relative to the plain pass over one row in the same round."""
    pairs = zip(found["seconds"][way][rows], found["seconds"][PLAIN]["1"], strict=True)
    return Spread.of([seconds / plain for seconds, plain in pairs])


def tables(found: Mapping[str, Any]) -> Sequence[Table | None]:
    seconds = found["seconds"]
    times = [
        [rows, *(Spread.of(seconds[way][rows], scale=1000, digits=0) for way in seconds)] for rows in seconds[PLAIN]
    ]
    ratios = [[rows, *(relative(found, way, rows) for way in seconds)] for rows in seconds[PLAIN]]
    note = "Median and quartiles of the rounds."
    return [
        simple("times", "ms per pass", note, ("rows", *seconds), times),
        simple("relative", f"Relative to one row of {PLAIN}", note, ("rows", *seconds), ratios),
    ]


def panels(found: Mapping[str, Any]) -> Sequence[Panel]:
    lines = {
        way: {int(rows): relative(found, way, rows) for rows in by_rows} for way, by_rows in found["seconds"].items()
    }
    return [
        Panel(
            f"{found['provenance']['context']} tokens of context", "rows of a pass (drafted nodes and the root)",
            f"time, 1 = one row of {PLAIN}", lines, is_doubling=True, is_log=True,
        )
    ]  # fmt: skip


STUDY = Study(("target", "repeats"), measure, tables, panels)
