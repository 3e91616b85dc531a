"""What does a pass over a tree cost with each runner?

Question: time of a verification pass of the target by its rows, the drafted nodes and the root, for each runner and
each dtype.

Method: a prompt of 256 tokens; passes over a root and its children. All runners, dtypes and numbers of rows take turns,
several times over in one process after a warm-up round; medians are shown, with quartiles. What counts is a runner's
pass relative to the plain pass over one row in the same round: what slows the machine down hits both alike. Meanwhile
the machine is watched.

Output: a table, FOLDER/runners.json with all that was measured, FOLDER/runners.svg drawn from it.

Command: python -m dynatree_bench.studies.runners [--quick] [--rounds N] [--target ID|PATH] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import attrs
import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Table

from dynatree_bench.report.figures import BLUE, GREY, ORANGE, SKY, VERMILION
from dynatree_bench.run.machine import BUSY_PERCENT, LoadMeter, check_writable, idle_or_busy, now, provenance
from dynatree_core import load_model
from dynatree_core.cache.tree_cache import TreeCache
from dynatree_core.cli.exits import end_process
from dynatree_core.clock import StageClock
from dynatree_core.files.writing import whole_file, write_text
from dynatree_core.runners.packed import can_pack
from dynatree_core.runners.runner import ModelRunner
from dynatree_core.tree.flatten import flatten
from dynatree_core.tree.token_tree import TokenTree

PROGRAM = "python -m dynatree_bench.studies.runners"
ROWS = (1, 2, 4, 8, 16, 32, 64)
CONTEXT = 256
PLAIN = "float32 eager"
DTYPES = ("float32", "bfloat16")
STYLES = {
    PLAIN: (VERMILION, "s", "--"),
    "float32 packed": (BLUE, "o", "-"),
    "bfloat16 eager": (ORANGE, "^", "--"),
    "bfloat16 packed": (SKY, "v", "-"),
}


@attrs.define(eq=False)
class Results:
    """What was measured."""

    provenance: dict[str, Any]
    seconds: dict[str, dict[str, list[float]]]  # way -> rows -> seconds of each round


def main() -> None:
    arguments = _parse_arguments()
    for name in ("runners.svg", *(["runners.json"] if arguments.source is None else [])):
        check_writable(arguments.out / name, PROGRAM)
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    if arguments.source is not None:
        results = Results(**json.loads(arguments.source.read_text(encoding="utf-8")))
    else:
        results = _measured(arguments)
        text = json.dumps(attrs.asdict(results), indent=1) + "\n"
        write_text(arguments.out / "runners.json", text)
    console.print(table(results))
    console.print(idle_or_busy(results.provenance["busy_percent"]))
    draw(results, arguments.out / "runners.svg")


def _measured(arguments: argparse.Namespace) -> Results:
    ways: dict[str, tuple[ModelRunner, TreeCache]] = {}
    for dtype in DTYPES:
        loaded = load_model(arguments.target, device="cpu", dtype=dtype)
        for name in ("eager", "packed"):
            if name == "eager" or can_pack(loaded.model):
                ways[f"{dtype} {name}"] = filled(loaded.model, name)
    rows = ROWS[:3] if arguments.quick else ROWS
    rounds = 1 if arguments.quick else arguments.rounds
    found: dict[str, dict[str, list[float]]] = {way: defaultdict(list) for way in ways}
    meter = LoadMeter()
    for turn in track(range(rounds + 1), console=Console(stderr=True), transient=True, description="measuring"):
        for count in rows:
            for way, (runner, cache) in ways.items():
                seconds = pass_seconds(runner, cache, count)
                if turn:  # the first round allocates and chooses kernels
                    found[way][str(count)].append(seconds)
    return Results(
        {
            **provenance("dynatree_bench.studies.runners", torch.device("cpu")),
            "model": arguments.target or "SmolLM2-135M-Instruct",
            "context": CONTEXT,
            "rounds": rounds,
            "busy_percent": meter.meanwhile(),
        },
        found,
    )


@torch.inference_mode()
def filled(model: torch.nn.Module, name: str) -> tuple[ModelRunner, TreeCache]:
    """A runner with a cache that has the prompt's rows."""
    device: Any = model.device
    runner, cache = ModelRunner(model, StageClock(device), name=name), TreeCache(CONTEXT + max(ROWS))
    runner.prefill(torch.arange(CONTEXT, device=device), cache)
    return runner, cache


@torch.inference_mode()
def pass_seconds(runner: ModelRunner, cache: TreeCache, rows: int) -> float:
    """Seconds of a pass over a root and its children; nothing is committed."""
    device = cache.keys[0].device
    tree = TokenTree.root(torch.zeros(1, dtype=torch.int64, device=device))
    if rows > 1:
        parents = torch.zeros(rows - 1, dtype=torch.int64, device=device)
        tree = tree.grow(parents, torch.arange(rows - 1, device=device), torch.full((rows - 1,), -1.0, device=device))
    flat = flatten([tree], [cache.length])
    start = now(device)
    runner.forward(flat, cache, stage="measured")
    seconds = now(device) - start
    cache.rollback()
    return seconds


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Median, and lower and upper quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, median, high = statistics.quantiles(values, n=4)
    return median, low, high


def relative(results: Results, way: str, rows: str) -> tuple[float, float, float]:
    """Median and quartiles of a pass relative to the plain pass over one row in the same round."""
    plain = results.seconds[PLAIN]["1"]
    ratios = [seconds / one for seconds, one in zip(results.seconds[way][rows], plain, strict=True)]
    return quartiles(ratios)


def table(results: Results) -> Table:
    """A row for each number of rows, a column for each way."""
    said = results.provenance
    of_what = f"{said['model']}, {said['threads']} threads"
    title = f"ms per pass, and relative to one row of {PLAIN} (median, quartiles) · {of_what}"
    shown = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    shown.add_column("rows", justify="right")
    for way in results.seconds:
        shown.add_column(way, justify="right")
    for rows in results.seconds[PLAIN]:
        cells = []
        for way, by_rows in results.seconds.items():
            median, low, high = relative(results, way, rows)
            cells.append(f"{1000 * statistics.median(by_rows[rows]):.0f}  {median:.2f} ({low:.2f}–{high:.2f})")
        shown.add_row(rows, *cells)
    return shown


def draw(results: Results, path: Path) -> None:
    """Passes over their rows, relative to one plain row."""
    import matplotlib as mpl

    mpl.rcParams["svg.hashsalt"] = "runners"  # the same file for the same numbers
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    for way, by_rows in results.seconds.items():
        plot_over_rows(axes, way, {rows: relative(results, way, rows) for rows in by_rows}, STYLES[way])
    axes.set(ylabel=f"time, 1 = one row of {PLAIN}", ylim=(0, None))
    said = results.provenance
    what = f"{said['model']}, {said['context']} tokens of context, {said['threads']} threads"
    finish(figure, axes, what, said, path, PROGRAM)


def plot_over_rows(
    axes: Any, label: str, by_rows: dict[str, tuple[float, float, float]], style: tuple[str, str, str]
) -> None:
    """A line over the rows of a pass, through medians and with bars from quartile to quartile."""
    colour, mark, line = style
    found = list(by_rows.values())
    bars = [[m - low for m, low, _ in found], [high - m for m, _, high in found]]
    axes.errorbar(
        [int(rows) for rows in by_rows], [median for median, _, _ in found], yerr=bars, label=label, color=colour,
        marker=mark, linestyle=line, capsize=2,
    )  # fmt: skip


def finish(figure: Any, axes: Any, what: str, said: dict[str, Any], path: Path, program: str) -> None:
    """The axis of rows, and the provenance at the foot; written to a file that names the program."""
    from matplotlib.ticker import FormatStrFormatter

    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FormatStrFormatter("%d"))
    axes.set_xlabel("rows of a pass (drafted nodes and the root)")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    busy = " (on a busy machine: provisional)" if max(said["busy_percent"].values()) > BUSY_PERCENT else ""
    versions = ", ".join(f"{name} {said['versions'][name]}" for name in ("torch", "transformers"))
    figure.supxlabel(f"{what}, {versions}\n{said['device']}, {said['date']}{busy}", fontsize=7, color=GREY)
    with whole_file(path) as draft:
        figure.savefig(draft, metadata={"Date": None, "Description": program} if path.suffix == ".svg" else None)


def _parse_arguments() -> argparse.Namespace:
    description = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m dynatree_bench.studies.runners", description=description)
    parser.add_argument("--quick", action="store_true", help="few rows, once: to see that it runs")
    parser.add_argument("--rounds", type=int, default=15, help="times that everything is measured (default: 15)")
    parser.add_argument("--target", help="hub id or folder (default: the embedded model)")
    parser.add_argument(
        "--out", type=Path, default=Path(), metavar="FOLDER", help="where the results go (default: here)"
    )
    parser.add_argument(
        "--from", dest="source", type=Path, metavar="FILE.json", help="show and draw these results, measure nothing"
    )
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error("--rounds must be at least 1")
    return arguments


if __name__ == "__main__":
    end_process(main)
