"""The figures of a report, each made from the records of one run alone.

A method keeps its colour and its marker in all figures (`style.py`). A long name is shortened in its middle; a dagger
behind it says that some outputs differ from greedy decoding. Every figure has its provenance at its foot.
"""

from __future__ import annotations

import functools
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from dynatree_bench.report.formulas import best_tree, tree_tokens
from dynatree_bench.report.oracle import oracle_tokens_per_iteration
from dynatree_bench.report.shapes import compared
from dynatree_bench.report.statistics import (
    BASELINE,
    MIN_BIN,
    Estimate,
    Summary,
    accepted_depths,
    by_method,
    calibration,
    differ_only_in,
    groups,
    is_drafting,
    over_length,
    rank_shares,
    ratios,
    replayed_texts,
    summaries,
)
from dynatree_bench.report.style import BLUE, GREY, ORANGE, SKY, STYLE, VERMILION, Styles, method_styles
from dynatree_bench.run.records import OutputRecord, Results, is_busy
from dynatree_core.files.writing import whole_file

DAGGER = " †"
STAGES = {"draft": SKY, "verify": BLUE, "rest": ORANGE}
WIDTH = 7.0  # inches, the width of a printed page's text
MAX_CURVE_NODES = 128
MAX_LABEL = 34  # characters of a method's name
MAX_ERROR = 80  # of an error, beside a label as long as that


@attrs.frozen
class Plot:
    """A figure and the sentence below it in the report."""

    name: str  # of the file
    caption: str
    draw: Callable[[Results], Figure | None]  # None: the run has nothing to show in it


FIGURES: list[Plot] = []  # in the order in which they are defined


def _shown_as(name: str, caption: str) -> Callable[[Callable[[Results], Figure | None]], Callable[..., Figure | None]]:
    """Make a function a figure of every report whose run has what it shows."""

    def add(function: Callable[[Results], Figure | None]) -> Callable[..., Figure | None]:
        FIGURES.append(Plot(name, caption, function))
        return function

    return add


def draw(plot: Plot, results: Results, path: Path) -> bool:
    """Write a figure as PNG with its provenance; False where the run has nothing to show in it."""
    with mpl.rc_context(STYLE):  # type: ignore[arg-type]  # its names are literals there
        figure = plot.draw(results)
        if figure is None:
            return False
        _add_foot(figure, results)
        with whole_file(path) as draft:
            figure.savefig(draft, metadata={"Software": None})  # the same bytes for the same records
    return True


def _add_foot(figure: Figure, results: Results) -> None:
    """The provenance in small print, and above it what somebody must not overlook."""
    notes = ["This run is synthetic: random weights, and a text whose acceptance was set."]
    notes = notes if results.info.is_synthetic else []
    if is_busy(results):
        notes.append("The machine was busy: times are not to be believed.")
    if any(record.is_identical is False for record in results.records):
        notes.append(f"{DAGGER.strip()} some outputs differ from greedy decoding.")
    warning = textwrap.wrap(" ".join(notes), int(figure.get_figwidth() * 18))
    lines = textwrap.wrap(provenance(results), int(figure.get_figwidth() * 21))
    line = 0.125 / figure.get_figheight()
    height = line * (len(lines) + len(warning) + 0.6)
    figure.set_layout_engine("constrained", rect=(0, height, 1, 1 - height))
    figure.text(0.01, 0.01, "\n".join(lines), fontsize=6, color=GREY, va="bottom")
    place = 0.01 + line * (len(lines) + 0.2)
    figure.text(0.01, place, "\n".join(warning), fontsize=7, color=VERMILION, va="bottom")


def provenance(results: Results) -> str:
    """Where a run's numbers come from, in one line."""
    info = results.info
    commit = f" ({info.commit[:10]}{'-dirty' if info.commit.endswith('-dirty') else ''})" if info.commit else ""
    drafters = list(dict.fromkeys(method.drafter for method in info.methods if method.drafter))
    libraries = ", ".join(f"{name} {version}" for name, version in info.libraries.items())
    parts = [
        f"target {info.target.name}, {info.target.num_parameters / 1e6:,.0f} M parameters, {info.target.dtype}",
        f"drafter {', '.join(drafters)}" if drafters else "",
        f"{info.device_name} ({info.device}), {info.threads} thread{'s' if info.threads > 1 else ''}",
        f"memory read at {info.memory.bytes_per_second / 1e9:.1f} GB/s" if info.memory is not None else "",
        f"dynatree {info.version}{commit}, {libraries}",
        f"seed {info.seed}",
        "end tokens ignored" if info.ignore_eos else "",
        info.started[:10] + (f", continued {info.continued[-1][:10]}" if info.continued else ""),
        info.command,
    ]
    return " · ".join(part for part in parts if part)


# what figures share


def _figure(width: float, height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def _styles(results: Results) -> Styles:
    """Method -> colour and marker."""
    hf = {method.name for method in results.info.methods if method.kind == "hf"}
    return method_styles(by_method(results.records), hf.__contains__)


def _labels(records: Iterable[OutputRecord]) -> dict[str, str]:
    """Method -> its label, which no other one has and for which there is room, with a dagger where outputs differ."""
    records = list(records)
    different = {record.method for record in records if record.is_identical is False}
    names = list(by_method(records))
    short = {name: _shortened(name) for name in names}
    twins = {name: [other for other in names if short[other] == short[name]] for name in names}
    numbers = {name: f" ({twins[name].index(name) + 1})" if len(twins[name]) > 1 else "" for name in names}
    return {name: short[name] + numbers[name] + (DAGGER if name in different else "") for name in names}


def _shortened(name: str) -> str:
    """Without its middle where it is long; more of the end is kept, since stacks often begin alike."""
    begin = MAX_LABEL // 3
    return name if len(name) <= MAX_LABEL else f"{name[:begin]}…{name[begin + 1 - MAX_LABEL :]}"


def _legend_above(figure: Figure, axes: Axes) -> None:
    """The legend over the panels, in as many columns as the width has room for; the figure grows by its rows."""
    handles, labels = axes.get_legend_handles_labels()
    # a character takes about 4.6 points at a size of 8; line, gaps and space between columns 44
    room = int(72 * figure.get_figwidth() / (4.6 * max(map(len, labels)) + 44))
    num_columns = min(max(room, 1), len(labels))
    figure.set_figheight(figure.get_figheight() + 0.17 * (-(-len(labels) // num_columns) - 1))
    figure.legend(handles, labels, loc="outside upper center", ncols=num_columns)


def _error_bars(estimates: Sequence[Estimate]) -> np.ndarray[Any, Any]:
    """[2, points]: how far each interval reaches below and above the median; NaN, which is not drawn, of one prompt."""
    limits = [(e.median - e.low, e.high - e.median) if e.count > 1 else (np.nan, np.nan) for e in estimates]
    return np.array(limits).T


def _lines_over(
    results: Results, axis: str, panels: Sequence[tuple[str, Callable[[Summary], Estimate | float | None]]], label: str
) -> Figure | None:
    """A panel for each quantity, over a numeric axis, a line for each method."""
    points = [one for one in summaries(results.records) if isinstance(one.axes.get(axis), int | float)]
    if len({one.axes[axis] for one in points}) < 2 or not differ_only_in([axis], points):
        return None
    styles, labels = _styles(results), _labels(results.records)
    ticks = sorted({one.axes[axis] for one in points})
    # side by side, so that intervals do not hide each other
    offsets = np.linspace(-1, 1, len(styles)) * 0.012 * (ticks[-1] - ticks[0]) if len(styles) > 1 else [0.0]
    dodges = dict(zip(styles, offsets, strict=True))
    figure, grid = _figure(WIDTH, 3.0, columns=len(panels))
    for axes, (title, quantity) in zip(grid[0], panels, strict=True):
        for name in styles:
            own = sorted((one for one in points if one.method == name), key=lambda one: one.axes[axis])
            found = [(one.axes[axis], value) for one in own if (value := quantity(one)) is not None]
            if not found:
                continue
            xs = [x + dodges[name] for x, _ in found]
            style = {**styles[name], "label": labels[name], "linewidth": 1.4}
            if isinstance(found[0][1], Estimate):
                estimates = [value for _, value in found if isinstance(value, Estimate)]
                axes.errorbar(xs, [e.median for e in estimates], _error_bars(estimates), capsize=2.5, **style)
            else:
                axes.plot(xs, [value for _, value in found], **style)
        axes.set(title=title, xlabel=label)
        axes.set_xticks(ticks)
        axes.margins(x=0.07)
        axes.set_ylim(0, 1.06 * axes.get_ylim()[1])
        if "Speedup" in title:
            axes.axhline(1, color="black", linewidth=0.8, linestyle="--")
    _legend_above(figure, grid[0][0])
    return figure


def _bars(axes: Axes, summary_by_label: Mapping[str, Summary], styles: Mapping[str, Mapping[str, str]]) -> None:
    """Speedups as horizontal bars with intervals."""
    for place, one in enumerate(summary_by_label.values()):
        if one.speedup is None:
            text = textwrap.shorten(one.error or "not measured", MAX_ERROR, placeholder=" …")
            axes.text(0.02, place, text, va="center", fontsize=6.5, color=GREY)
            continue
        axes.barh(
            place, one.speedup.median, height=0.62, color=styles[one.method]["color"], alpha=0.85,
            hatch="///" if one.is_different else None, edgecolor="white",
        )  # fmt: skip
        axes.errorbar(
            one.speedup.median, place, xerr=_error_bars([one.speedup]), color="black", capsize=2.5, linewidth=1
        )
        axes.annotate(
            f"{one.speedup.median:.2f}×", (max(one.speedup.high, one.speedup.median), place), xytext=(5, 0),
            textcoords="offset points", va="center", fontsize=8,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
        )  # fmt: skip
    axes.axvline(1, color="black", linewidth=0.8, linestyle="--")
    axes.set_yticks(range(len(summary_by_label)), list(summary_by_label))
    axes.set_ylim(len(summary_by_label) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.margins(x=0.14)


# experiments


@_shown_as(
    "phases",
    "Speedup over autoregressive decoding on the same runtime: median over prompts with its bootstrap 95 % "
    "interval; a tick below a bar is one prompt. Hatched: some outputs differ from greedy decoding.",
)
def phases(results: Results) -> Figure | None:
    """The main comparison: a bar for each method, a point for each prompt."""
    found = summaries(results.records)
    if len(found) < 2 or any(one.axes != found[0].axes for one in found):
        return None
    styles, labels = _styles(results), _labels(results.records)
    figure, grid = _figure(WIDTH, 1.3 + 0.32 * len(found))
    axes = grid[0][0]
    _bars(axes, {labels[one.method]: one for one in found}, styles)
    baseline = by_method(results.records).get(BASELINE, [])
    for place, group in enumerate(groups(results.records)):
        values = list(ratios(group, baseline).values())
        axes.plot(values, [place + 0.4] * len(values), "|", color="black", markersize=4, alpha=0.6)
    axes.set(title="Speedup of each method", xlabel="tokens per second relative to autoregressive decoding (×)")
    return figure


SPEEDUP = ("Speedup (×)", lambda one: one.speedup)
TOKENS = ("Tokens per iteration", lambda one: one.tokens_per_iteration)
THROUGHPUT = ("Throughput (tokens/s)", lambda one: one.tokens_per_second)
# figure -> the axis, its label, the panels, and the caption
OVER: dict[str, tuple[str, str, tuple[Any, Any], str]] = {
    "ablation": (
        "base_depth", "base depth (levels)", (SPEEDUP, TOKENS),
        "Each phase by base depth: speedup (median, 95 % interval) and tokens per iteration.",
    ),
    "scalability": (
        "max_new_tokens", "length of the output (new tokens)", (THROUGHPUT, SPEEDUP),
        "Throughput and speedup by the length of the output (medians, 95 % intervals).",
    ),
    "prompt-length": (
        "prompt_tokens", "length of the prompt (tokens)", (SPEEDUP, TOKENS),
        "Speedup (median, 95 % interval) and tokens per iteration by the length of the prompt.",
    ),
}  # fmt: skip
for _name, (_axis, _label, _panels, _caption) in OVER.items():
    FIGURES.append(Plot(_name, _caption, functools.partial(_lines_over, axis=_axis, panels=_panels, label=_label)))


@_shown_as(
    "sensitivity",
    "Confidence thresholds at branches [1, 3], and branches at thresholds 0.9/0.4: speedup (median, 95 % "
    "interval) and tokens per iteration.",
)
def sensitivity(results: Results) -> Figure | None:
    """Thresholds and the range of branches, each beside the other at its default."""
    varied = ("high", "low", "min_branch", "max_branch")
    found = [one for one in summaries(results.records) if set(varied) <= set(one.axes)]
    panels = {title: _part(found, title) for title in ("thresholds", "branches")}
    if not all(panels.values()) or not differ_only_in(varied, found):
        return None
    styles, labels = _styles(results), _labels(results.records)
    figure, grid = _figure(WIDTH, 4.2, 2, 2, sharex="col", sharey="row")
    for column, (part, series) in enumerate(panels.items()):
        ticks = list(dict.fromkeys(tick for points in series.values() for tick, _ in points))
        for name, points in series.items():
            style = {**styles[name], "label": labels[name], "linestyle": ":"}
            estimates = [one.speedup for _, one in points if one.speedup is not None]
            if len(estimates) == len(points):
                medians = [one.median for one in estimates]
                grid[0][column].errorbar(
                    [tick for tick, _ in points], medians, _error_bars(estimates), capsize=2.5, **style
                )
            tokens = [one.tokens_per_iteration or np.nan for _, one in points]
            grid[1][column].plot([tick for tick, _ in points], tokens, **style)
        grid[1][column].set_xlabel(
            "confidence thresholds (high/low)" if part == "thresholds" else "branches [min, max]"
        )
        grid[0][column].set_title("Thresholds" if part == "thresholds" else "Range of branches")
        grid[1][column].set_xlim(-0.5, len(ticks) - 0.5)
    grid[0][0].set_ylabel("speedup (×)")
    grid[1][0].set_ylabel("tokens per iteration")
    if len(panels["branches"]) > 1:
        _legend_above(figure, grid[1][0])
    return figure


def _part(found: Iterable[Summary], part: str) -> dict[str, list[tuple[str, Summary]]]:
    """Method -> (tick, summary): those at the default range of branches, or at the default thresholds."""
    series: dict[str, list[tuple[str, Summary]]] = {}
    for one in found:
        point = one.axes
        if part == "thresholds" and (point["min_branch"], point["max_branch"]) == (1, 3):
            series.setdefault(one.method, []).append((f"{point['high']}/{point['low']}", one))
        if part == "branches" and (point["high"], point["low"]) == (0.9, 0.4):
            series.setdefault(one.method, []).append((f"[{point['min_branch']}, {point['max_branch']}]", one))
    return {name: sorted(points, key=lambda item: item[0]) for name, points in series.items()}


@_shown_as(
    "tree-search", "Median speedup of fixed trees by depth, branch factor and threshold; the best one is framed."
)
def tree_search(results: Results) -> Figure | None:
    """A heat map of depth and branch factor for each threshold."""
    varied = ("depth", "branch", "tau")
    found = [one for one in summaries(results.records) if set(varied) <= set(one.axes) and one.speedup]
    if len(found) < 2 or len({one.method for one in found}) > 1 or not differ_only_in(varied, found):
        return None
    taus, depths, branches = (sorted({one.axes[axis] for one in found}) for axis in ("tau", "depth", "branch"))
    values = np.full((len(taus), len(depths), len(branches)), np.nan)
    for one in found:
        assert one.speedup is not None
        place = tuple(
            axis.index(one.axes[name]) for axis, name in ((taus, "tau"), (depths, "depth"), (branches, "branch"))
        )
        values[place] = one.speedup.median
    best = tuple(map(int, np.unravel_index(np.nanargmax(values), values.shape)))
    # a second column would leave little room for the numbers
    columns = min(len(taus), 2)
    rows = -(-len(taus) // columns)
    figure, grid = _figure(WIDTH, 0.9 + rows * (0.9 + 0.32 * len(depths)), rows, columns)
    image = None
    for axes in grid.flat[len(taus) :]:
        axes.set_visible(False)
    for panel, axes in enumerate(grid.flat[: len(taus)]):
        axes.grid(visible=False)
        image = axes.imshow(
            values[panel], cmap="cividis", vmin=np.nanmin(values), vmax=np.nanmax(values), aspect="auto", origin="lower"
        )
        middle = (np.nanmin(values) + np.nanmax(values)) / 2
        for i, j in np.ndindex(len(depths), len(branches)):
            if np.isfinite(value := values[panel, i, j]):
                is_best = (panel, i, j) == best
                axes.text(
                    j, i, f"{value:.2f}", ha="center", va="center", fontsize=8,
                    color="white" if value < middle else "black", weight="bold" if is_best else "normal",
                    bbox={"fill": False, "edgecolor": VERMILION, "linewidth": 1.6} if is_best else None,
                )  # fmt: skip
        axes.set_xticks(range(len(branches)), branches)
        axes.set_yticks(range(len(depths)), depths)
        axes.set(title=f"τ = {taus[panel]}", xlabel="branch factor", ylabel="depth (levels)")
    assert image is not None
    figure.colorbar(image, ax=grid, label="speedup (×)", shrink=0.8)
    return figure


@_shown_as("datasets", "Speedup on each data set (median, 95 % interval).")
def datasets(results: Results) -> Figure | None:
    """A panel for each data set, the methods' speedups side by side."""
    found = [one for one in summaries(results.records) if "dataset" in one.axes and one.speedup]
    names = list(dict.fromkeys(one.axes["dataset"] for one in found))
    if len(names) < 2 or not differ_only_in(["dataset"], found):
        return None
    styles, labels = _styles(results), _labels(results.records)
    figure, grid = _figure(WIDTH, 1.3 + 0.34 * len(styles), 1, len(names), sharex=True, sharey=True)
    for axes, name in zip(grid[0], names, strict=True):
        of_dataset = {one.method: one for one in found if one.axes["dataset"] == name}
        _bars(axes, {labels[method]: of_dataset[method] for method in styles if method in of_dataset}, styles)
        axes.set(title=_shortened(str(name)), xlabel="speedup (×)")
    return figure


@_shown_as(
    "shapes",
    "The shape of this run beside that of the published numbers, which come from other models on another machine: "
    "each side is relative to a value of its own, and no number of one belongs beside one of the other.",
)
def shapes(results: Results) -> Figure | None:
    """Ours and the published numbers in panels of their own."""
    pair = compared(results)
    if pair is None:
        return None
    figure, grid = _figure(WIDTH, 3.1, 1, 2, sharey=True)
    styles = _styles(results)
    is_line = results.info.experiment in ("ablation", "scalability")
    for axes, title, series in ((grid[0][0], "This run", pair.ours), (grid[0][1], "Published, A100", pair.theirs)):
        for name, points in series.items():
            places = [pair.ticks.index(tick) for tick in points]
            style = {**styles[name], "linestyle": "-" if is_line else "none", "label": name}
            axes.plot(places, list(points.values()), **style)
        axes.axhline(1, color="black", linewidth=0.8, linestyle="--")
        turned = {} if is_line else {"rotation": 35, "ha": "right", "rotation_mode": "anchor"}
        axes.set_xticks(range(len(pair.ticks)), pair.ticks, **turned)
        axes.set(title=f"{title} (1: {pair.reference})", xlabel=pair.label if pair.label != "method" else None)
        axes.margins(x=0.12, y=0.12)
    grid[0][0].set_ylim(bottom=0)
    grid[0][0].set_ylabel("tokens/s, relative")
    if is_line:
        _legend_above(figure, grid[0][0])
    return figure


# what any run shows; the points of a method are taken together


@_shown_as(
    "acceptance-over-length",
    "Tokens per iteration along the output, beside the share of 4-grams that occurred earlier in it: a text that "
    "repeats itself is easy to draft.",
)
def acceptance_over_length(results: Results) -> Figure | None:
    styles, labels = _styles(results), _labels(results.records)
    figure, grid = _figure(WIDTH, 3.0, 1, 2)
    num_lines = 0
    for name, own in by_method(results.records).items():
        bins = over_length(own, min_width=MIN_BIN)
        if not is_drafting(own) or len(bins) < 2:
            continue
        num_lines += 1
        middles = [(one.start + one.end) / 2 for one in bins]
        style = {**styles[name], "linewidth": 1.4}
        grid[0][0].plot(middles, [one.tokens_per_iteration for one in bins], label=labels[name], **style)
        shares = [one.repetition if one.repetition is not None else np.nan for one in bins]
        grid[0][1].plot(middles, [100 * share for share in shares], **style)
    if not num_lines:
        return None
    grid[0][0].set(title="Tokens per iteration", xlabel="place in the output (new tokens)")
    grid[0][0].set_ylim(0, 1.06 * grid[0][0].get_ylim()[1])
    grid[0][1].set(title="Repetition (% of 4-grams)", xlabel="place in the output (new tokens)", ylim=(-3, 103))
    _legend_above(figure, grid[0][0])
    return figure


@_shown_as("iteration-time", "Where the time of an iteration goes: drafter, target's forward pass, and all else.")
def iteration_time(results: Results) -> Figure | None:
    """Draft, verify and rest of an iteration, one bar a method."""
    labels = _labels(results.records)
    pooled = [attrs.evolve(record, axes={}) for record in results.records]
    found = [one for one in summaries(pooled) if one.iteration_ms]
    if not found:
        return None
    figure, grid = _figure(WIDTH, 1.3 + 0.34 * len(found))
    axes = grid[0][0]
    left = np.zeros(len(found))
    for stage, colour in STAGES.items():
        parts = np.array([getattr(one, f"{stage}_ms") or 0.0 for one in found])
        axes.barh(range(len(found)), parts, left=left, height=0.62, color=colour, label=stage)
        left += parts
    for place, one in enumerate(found):
        per_token = f"{left[place] / one.tokens_per_iteration:.2f}" if one.tokens_per_iteration else "–"
        axes.annotate(
            f"{per_token} ms a token", (left[place], place), xytext=(5, 0), textcoords="offset points", va="center",
            fontsize=8,
        )  # fmt: skip
    axes.set_yticks(range(len(found)), [labels[one.method] for one in found])
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.margins(x=0.2)
    axes.set(title="Time of an iteration", xlabel="mean time (ms)")
    axes.set_xlim(left=0)
    _legend_above(figure, axes)
    return figure


@_shown_as(
    "calibration",
    "Share of drafted nodes under accepted parents that were accepted, by the drafter's probability, with "
    "Wilson's 95 % intervals, and how many nodes there were.",
)
def confidence_calibration(results: Results) -> Figure | None:
    """How often drafted nodes were accepted, by the drafter's probability, and how many nodes that is."""
    styles, labels = _styles(results), _labels(results.records)
    figure, grid = _figure(WIDTH * 0.72, 4.6, 2, 1, sharex=True, height_ratios=[3, 1])
    upper, lower = grid[0][0], grid[1][0]
    upper.plot([0, 1], [0, 1], color="black", linewidth=0.8, linestyle="--", label="calibrated")
    num_lines = 0
    for name, own in by_method(results.records).items():
        bins = calibration(own)
        if not bins:
            continue
        num_lines += 1
        xs, ys = [one.probability for one in bins], [one.share.value or 0.0 for one in bins]
        limits = [one.share.interval or (0.0, 1.0) for one in bins]
        bars = [[y - low for y, (low, _) in zip(ys, limits, strict=True)]]
        bars.append([high - y for y, (_, high) in zip(ys, limits, strict=True)])
        style = {**styles[name], "linewidth": 1.2}
        upper.errorbar(xs, ys, np.maximum(bars, 0), capsize=2, label=labels[name], **style)
        lower.plot(xs, [one.share.trials for one in bins], **style)
    if not num_lines:
        return None
    upper.set(title="Calibration of the drafter", ylabel="share accepted", xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
    lower.set(xlabel="probability that the drafter gives to a node", ylabel="nodes", yscale="log")
    lower.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    lower.yaxis.set_major_formatter("{x:,.0f}")
    lower.yaxis.set_minor_formatter(NullFormatter())
    _legend_above(figure, upper)
    return figure


@_shown_as(
    "nodes",
    "Tokens per iteration against drafted nodes: each method; the best static tree of so many nodes by the "
    "formula, from the drafter's acceptance by rank on this text; and the oracle tree, which knows the text.",
)
def nodes_and_tokens(results: Results) -> Figure | None:
    """Tokens an iteration against drafted nodes, with what the best static tree and the oracle tree would reach."""
    found = [one for one in summaries(results.records) if one.nodes_per_iteration]
    if not found:
        return None
    styles, labels = _styles(results), _labels(results.records)
    figure, grid = _figure(WIDTH, 3.8)
    axes = grid[0][0]
    for name in styles:
        own = [one for one in found if one.method == name]
        if own:
            xs, ys = [one.nodes_per_iteration for one in own], [one.tokens_per_iteration for one in own]
            axes.plot(xs, ys, linestyle="none", label=labels[name], **styles[name])
    largest = max(one.nodes_per_iteration or 0 for one in found)
    sizes = sorted({int(n) for n in np.geomspace(1, min(max(2 * largest, 8), MAX_CURVE_NODES), 24)})
    replayed = replayed_texts(results.records)
    if replayed:
        acceptance = sorted((share.value or 0.0 for share in rank_shares(replayed)), reverse=True)
        static = [tree_tokens(best_tree(acceptance, n), acceptance) for n in sizes]
        axes.plot(sizes, static, color="black", linestyle="--", linewidth=1.2, label="best static tree (formula)")
        oracle = [oracle_tokens_per_iteration(replayed, n) or np.nan for n in sizes]
        axes.plot(sizes, oracle, color="black", linewidth=1.2, label="oracle tree")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    for own_axis in (axes.xaxis, axes.yaxis):
        own_axis.set_major_formatter("{x:g}")
    axes.yaxis.set_major_locator(LogLocator(base=2, subs=(1, 1.5)))  # most runs stay between 1 and 4
    axes.set(title="What nodes buy", xlabel="drafted nodes per iteration", ylabel="tokens per iteration")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center")  # the curves begin at the left edge
    return figure


@_shown_as("accepted", "How many drafted tokens an iteration had accepted.")
def accepted_histogram(results: Results) -> Figure | None:
    """How many drafted tokens an iteration had accepted."""
    styles, labels = _styles(results), _labels(results.records)
    counts = {name: found for name, own in by_method(results.records).items() if (found := accepted_depths(own))}
    if not counts:
        return None
    figure, grid = _figure(WIDTH * 0.8, 3.2)
    axes = grid[0][0]
    for name, found in counts.items():
        shares = [100 * count / sum(found) for count in found]
        axes.plot(range(len(shares)), shares, label=labels[name], linewidth=1.2, clip_on=False, **styles[name])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(title="How far the target followed", xlabel="accepted drafted tokens", ylabel="share of iterations (%)")
    axes.set_ylim(bottom=0)
    _legend_above(figure, axes)
    return figure
