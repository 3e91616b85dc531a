"""What all figures share: the page's style, and the colour and marker of each method, the same in every figure.

The phases have the palette of Okabe and Ito, which the colour-blind can tell apart, what stands beside them mostly
Tol's muted one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

GREY = "#777777"
ORANGE, SKY, GREEN, YELLOW, BLUE, VERMILION, PURPLE = (
    "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7",
)  # fmt: skip
STYLE: dict[str, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.markersize": 5,
    "savefig.dpi": 200,
}
Styles = dict[str, dict[str, str]]  # label -> matplotlib's colour and marker
KNOWN: Styles = {
    name: {"color": colour, "marker": marker}
    for name, colour, marker in (
        ("autoregressive", "#000000", "x"),
        ("linear", SKY, "v"),
        ("fixed", BLUE, "s"),
        ("phase1", ORANGE, "^"),
        ("phase2", GREEN, "D"),
        ("phase3", VERMILION, "o"),
        ("cost_aware", PURPLE, "d"),
    )
}
# shades for transformers' own methods, in turn
HF_COLOURS = ("#3D3D3D", "#5C5C5C", "#7A7A7A", "#949494", "#ABABAB", "#C2C2C2", "#D6D6D6")
# of other packages, and of methods beside the phases: wine, olive, indigo, yellow, teal, brown, lime
OTHER_COLOURS = ("#882255", "#999933", "#332288", YELLOW, "#44AA99", "#8C510A", "#A6D854")
OTHER_MARKERS = ("P", "*", "<", ">", "h")
# of what a study compares, where that is no method
LINE_COLOURS = (VERMILION, BLUE, ORANGE, SKY, GREEN, PURPLE, GREY)
LINE_MARKERS = ("s", "o", "^", "v", "D", "P", "x")


def method_styles(names: Iterable[str], is_of_hf: Callable[[str], bool]) -> Styles:
    """The styles of methods: those of the phases, and for others the next of their kind."""
    hf, others = (_in_turn(colours, OTHER_MARKERS) for colours in (HF_COLOURS, OTHER_COLOURS))
    return {name: KNOWN.get(name) or next(hf if is_of_hf(name) else others) for name in names}


def line_styles(labels: Iterable[str]) -> Styles:
    """The styles of a study's lines: a method's own, and for others the next whose colour no method of these has."""
    labels = list(dict.fromkeys(labels))
    taken = {KNOWN[label]["color"] for label in labels if label in KNOWN}
    pairs = [pair for pair in zip(LINE_COLOURS, LINE_MARKERS, strict=True) if pair[0] not in taken]
    others = _in_turn(*zip(*pairs, strict=True))
    return {label: KNOWN.get(label) or next(others) for label in labels}


def _in_turn(colours: Sequence[str], markers: Sequence[str]) -> Iterator[dict[str, str]]:
    """Colours and markers without an end; where both are as many, the markers move on by one after each round."""
    for place in itertools.count():
        turn = place // len(colours) if len(colours) == len(markers) else 0
        yield {"color": colours[place % len(colours)], "marker": markers[(place + turn) % len(markers)]}
