"""What every command shows on standard error: notices of one line, spinners, the progress of a long prompt."""

from __future__ import annotations

import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

__all__ = [
    "PrefillBar",
    "answers_bar",
    "clean_terminal",
    "complain",
    "fold",
    "interrupts_wait",
    "show_title",
    "spinner",
    "warnings_in_one_line",
    "words_of",
]

LONG_PREFILL = 1.0  # seconds after which its progress is shown


@contextmanager
def spinner(message: str, *, is_animated: bool = True) -> Iterator[Callable[[str], None]]:
    """Say on stderr what is being waited for while the block runs; nothing where stderr is no terminal.

    Args:
        is_animated: False for plain lines, between which progress bars of others can stand.

    Yields:
        A function that takes the next message.
    """
    console = Console(stderr=True, highlight=False)
    if not sys.stderr.isatty():
        yield lambda message: None
    elif not is_animated or console.is_dumb_terminal:
        yield lambda message: console.print(Text(message, style="dim"))
    else:
        with console.status(Text(message), spinner_style="cyan") as status:
            yield lambda message: status.update(Text(message))


@contextmanager
def answers_bar(num_questions: int, num_done: int) -> Iterator[Callable[[int, float], None]]:
    """A bar on stderr while many prompts are answered; nothing where stderr is no terminal.

    Args:
        num_questions: how many answers there will be.
        num_done: how many there are already.

    Yields:
        A function that takes how many have come since, and the tokens per second.
    """
    columns = (
        TextColumn("answers"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[speed]:.1f} tokens/s"),
        TextColumn("left:"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("", total=num_questions, completed=num_done, speed=0.0)
        yield lambda num_more, speed: progress.update(task, completed=num_done + num_more, speed=speed)


class PrefillBar:
    """A bar on stderr while a long prompt goes through a model; nothing where stderr is no terminal.

    It is called as `on_prefill`, within a `with` block around the generation, and appears when the prefill has taken
    so long that one wonders.
    """

    def __init__(self) -> None:
        self._progress: Progress | None = None

    def __enter__(self) -> PrefillBar:
        self._begin = time.monotonic()
        return self

    def __call__(self, num_done: int, num_tokens: int) -> None:
        """Show that so many of the tokens are done."""
        if num_done >= num_tokens:
            self.close()
        elif self._progress is not None:
            self._progress.update(self._progress.task_ids[0], completed=num_done, total=num_tokens)
        elif sys.stderr.isatty() and time.monotonic() - self._begin > LONG_PREFILL:
            columns = TextColumn("reading the prompt"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
            self._progress = Progress(*columns, console=Console(stderr=True), transient=True)
            self._progress.add_task("", completed=num_done, total=num_tokens)
            self._progress.start()

    def close(self) -> None:
        """Take the bar away."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def show_title(text: str) -> None:
    """Show a text in the title of the terminal's window, where it disturbs no other output."""
    if sys.stderr.isatty():
        Console(stderr=True).set_window_title(text)


@contextmanager
def warnings_in_one_line() -> Iterator[None]:
    """Print the warnings of the block when it has ended, so that none stands in the middle of an answer."""
    try:
        with warnings.catch_warnings(record=True) as caught:
            yield
    finally:
        for warning in caught:
            complain("warning", str(warning.message))


def complain(kind: str, message: str) -> None:
    """Print a notice of one line to stderr."""
    with suppress(OSError):  # nobody reads it, or its disk is full: the exit status is left
        click.echo(f"dynatree: {kind}: {fold(message)}", err=True)


def words_of(error: BaseException) -> str:
    """An error's message, and its notes: what has failed besides."""
    return "; ".join([str(error), *getattr(error, "__notes__", ())])


def fold(message: str) -> str:
    """A text of any number of lines in one."""
    return " ".join(message.split())


def clean_terminal() -> None:
    """Show the cursor again, should an interrupt have come just when a spinner had hidden it."""
    if sys.stderr.isatty():
        Console(stderr=True).show_cursor(True)


@contextmanager
def interrupts_wait() -> Iterator[None]:
    """Let a Ctrl-C within the block count after it; a second one does not wait."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    num_received = 0

    def note(signum: int, frame: FrameType | None) -> None:
        nonlocal num_received
        num_received += 1
        if num_received > 1:
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if num_received:
        raise KeyboardInterrupt
