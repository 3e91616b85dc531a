"""Figures of studies: lines over a number, through medians and with bars from quartile to quartile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter

from dynatree_bench.report.style import GREY, STYLE, Styles, line_styles
from dynatree_bench.report.tables import Spread
from dynatree_core.files.writing import whole_file


@attrs.frozen
class Panel:
    """Lines over one number."""

    title: str
    xlabel: str
    ylabel: str
    lines: Mapping[str, Mapping[int, Spread]]  # label -> place -> what was measured there
    is_doubling: bool = False  # places are powers of two
    is_log: bool = False  # so are the values, about


def lines_of(found: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, dict[int, Spread]]:
    """A panel's lines of what a study's file has: label -> place -> numbers of its rounds."""
    return {label: {int(at): Spread.of(numbers) for at, numbers in line.items()} for label, line in found.items()}


def draw_panels(panels: Sequence[Panel], name: str, foot: str, path: Any) -> None:
    """Write panels side by side as SVG, with small print below.

    Args:
        panels: what is drawn.
        name: of the figure; the same file comes of the same numbers.
        foot: the provenance.
        path: the file.
    """
    with mpl.rc_context({**STYLE, "svg.hashsalt": name}):  # type: ignore[dict-item]
        figure = Figure(figsize=(6.4 if len(panels) == 1 else 4.3 * len(panels), 4.8), layout="constrained")
        styles = line_styles(label for panel in panels for label in panel.lines)  # the same in every panel
        for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            _draw(axes, panel, styles)
        figure.supxlabel(foot, fontsize=7, color=GREY)
        with whole_file(path) as draft:
            figure.savefig(draft, format="svg", metadata={"Date": None})


def _draw(axes: Any, panel: Panel, styles: Styles) -> None:
    for label, line in panel.lines.items():
        places = sorted(line)  # whatever the order they were measured in
        found = [line[place] for place in places]
        bars = [[one.median - one.low for one in found], [one.high - one.median for one in found]]
        axes.errorbar(places, [one.median for one in found], yerr=bars, label=label, capsize=2, **styles[label])
    axes.set(title=panel.title, xlabel=panel.xlabel, ylabel=panel.ylabel)
    if panel.is_doubling:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(FormatStrFormatter("%d"))
    if panel.is_log:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    else:
        axes.set_ylim(bottom=0)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14))
