"""Bars on the terminal, and measuring in rounds."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Job = Callable[[int], None]  # told the round; what it measures in round 0 does not count


@contextmanager
def bar(title: str, total: int | None = None) -> Iterator[Callable[..., None]]:
    """A bar with the time that is left, on a terminal only.

    Yields:
        What moves it on: by a step, or as `Progress.update` takes it (completed, total, note).
    """
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left:"),
        TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
    )  # fmt: skip
    shown = Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())
    with shown as progress:
        task = progress.add_task(title, total=total, note="")
        yield lambda **changes: progress.update(task, **(changes or {"advance": 1}))


def in_rounds(jobs: Sequence[Job], num_rounds: int) -> None:
    """Every job once a round, in rotating order, so that a drift of the machine favours none; first a round 0.

    First passes allocate, and choose or record kernels.
    """
    with bar("measuring", len(jobs) * (num_rounds + 1)) as advance:
        for turn in range(num_rounds + 1):
            start = turn * len(jobs) // (num_rounds + 1)
            for job in (*jobs[start:], *jobs[:start]):
                job(turn)
                advance()
