"""Tables: what a person reads on a page or a terminal, and the same as numbers."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import attrs
import rich.table
from rich.box import SIMPLE_HEAD

from dynatree_bench.report.statistics import Estimate, PooledRatio
from dynatree_core.files.writing import write_text


@attrs.frozen
class Table:
    """A table of a report."""

    name: str
    title: str
    note: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    data_header: tuple[str, ...]
    data: tuple[tuple[Any, ...], ...]

    def __attrs_post_init__(self) -> None:
        names = self.data_header
        assert len(set(names)) == len(names), f"each column of a table must have a name of its own, got {names}"


@attrs.frozen
class Spread:
    """Numbers that were measured several times."""

    median: float
    low: float  # lower quartile, of fewer than four numbers the lowest
    high: float
    digits: int = 2  # that are shown

    @classmethod
    def of(cls, values: Sequence[float], *, scale: float = 1.0, digits: int = 2) -> Spread:
        """Of numbers, at least one, each times `scale`."""
        ordered = sorted(scale * value for value in values)
        low, high = ordered[0], ordered[-1]
        if len(ordered) > 3:
            low, _, high = statistics.quantiles(ordered, n=4)
        return cls(statistics.median(ordered), low, high, digits)

    def __str__(self) -> str:
        median, low, high = (f"{value:.{self.digits}f}" for value in (self.median, self.low, self.high))
        return median if low == high else f"{median} ({low}–{high})"


def simple(
    name: str, title: str, note: str, header: Sequence[str], rows: Iterable[Sequence[Any]], *, digits: int = 2
) -> Table | None:
    """A table whose numbers are shown with so many digits and stored as they are; None where it has no row."""
    rows = tuple(map(tuple, rows))
    if not rows:
        return None
    cells = tuple(tuple(shown(value, digits) for value in row) for row in rows)
    return Table(name, title, note, tuple(header), cells, tuple(header), rows)


def shown(value: Any, digits: int = 2) -> str:
    """A cell as a person reads it."""
    if isinstance(value, PooledRatio):
        return f"{value.value:.2f}{interval(value)}"
    return "–" if value is None else f"{value:.{digits}f}" if isinstance(value, float) else str(value)


def interval(value: Estimate | PooledRatio) -> str:
    """Its 95 % interval; of one prompt there is none."""
    return f" [{value.low:.2f}, {value.high:.2f}]" if value.count > 1 else ""


def for_terminal(table: Table) -> rich.table.Table:
    """The table as rich prints it."""
    found = rich.table.Table(title=table.title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for place, heading in enumerate(table.header):
        found.add_column(heading, justify="right" if place else "left")
    for row in table.rows:
        found.add_row(*row)
    return found


def markdown(table: Table) -> list[str]:
    """Heading, table and note as lines of a page."""
    lines = [table.header, ["---", *["---:"] * (len(table.header) - 1)], *table.rows]
    cells = ["| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines]
    return [f"## {table.title}", "", *cells, "", *([table.note, ""] if table.note else [])]


def write_tables(tables: Iterable[Table], out: Path) -> list[str]:
    """Write the numbers of each as a CSV file in a folder of a report; the lines that show them on its page."""
    page = []
    for table in tables:
        (out / "tables").mkdir(parents=True, exist_ok=True)
        lines = io.StringIO()
        csv.writer(lines, lineterminator="\n").writerows([table.data_header, *table.data])
        write_text(out / "tables" / f"{table.name}.csv", lines.getvalue())
        page += markdown(table)
    return page


def write_lines(path: Path, lines: Iterable[str]) -> Path:
    """A page, in a folder that is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "\n".join(lines).rstrip() + "\n")
    return path
