"""What the `dynatree` command shows: an answer as it comes, tables, a spinner, notices in one line."""

from __future__ import annotations

import itertools
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

import attrs
import click
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dynatree_core.cli.catalogue import PluginRow
    from dynatree_core.cost_model import CostModel
    from dynatree_core.models.embedded import EmbeddedModel
    from dynatree_core.report import GenerationReport, GenerationResult

__all__ = [
    "Answer",
    "Comparison",
    "IncrementalText",
    "PrefillBar",
    "clean_terminal",
    "complain",
    "cost_table",
    "decode_text",
    "interrupts_wait",
    "model_sheet",
    "plugin_listing",
    "report_table",
    "show_report",
    "show_title",
    "spinner",
    "warnings_in_one_line",
]

_CUT_SHORT = {"interrupted", "error"}  # stop reasons

REPLACEMENT = "\ufffd"  # what a decoder writes for bytes that are no character, or not yet
LONG_PREFILL = 1.0  # seconds after which its progress is shown
CONTEXT_TOKENS = 16  # how many earlier tokens are decoded along with new ones, at least

# an answer must not steer the terminal: control characters but newline and tab are shown by their pictures
_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
_PICTURES |= dict.fromkeys(range(0x80, 0xA0), ord(REPLACEMENT)) | {0x7F: 0x2421}


class IncrementalText:
    """Turns tokens into text as they come: every character once, in order, as soon as it is settled.

    A token may end within a character, which shows as U+FFFD at the end of the text. Those are held back until a
    later token settles them, or `finish` says that none will come.

    Args:
        decode: the text of a sequence of token ids.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._window: list[int] = []  # the latest tokens; the text of those before it has been given out
        self._num_given = 0  # characters of the window's text that have been given out

    def push(self, token_id: int) -> str:
        """The characters that this token settles, often its own."""
        self._window.append(token_id)
        text = self._decode(self._window)
        piece = text[self._num_given : len(text.rstrip(REPLACEMENT))]
        self._num_given += len(piece)
        if len(self._window) >= 2 * CONTEXT_TOKENS and self._num_given == len(text):
            self._forget_start(text)
        return piece

    def finish(self) -> str:
        """What was held back."""
        piece = self._decode(self._window)[self._num_given :]
        self._num_given += len(piece)
        return piece

    def _forget_start(self, text: str) -> None:
        """Shorten the window, unless what remains reads differently on its own."""
        tail = self._decode(self._window[-CONTEXT_TOKENS:])
        if tail and text.endswith(tail):
            self._window = self._window[-CONTEXT_TOKENS:]
            self._num_given = len(tail)


class Answer:
    """An answer on stdout, written as its tokens are committed."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._text = IncrementalText(lambda token_ids: decode_text(tokenizer, token_ids))
        self._is_terminal = sys.stdout.isatty()
        self.is_coloured = self._is_terminal and _has_colours(Console())
        self._num_shown = 0  # tokens
        self._is_line_open = False

    def show(self, token_ids: Sequence[int], *, num_accepted: int) -> None:
        """Write tokens, of which the first `num_accepted` had been drafted."""
        with interrupts_wait():
            pieces = [(self._text.push(token), i < num_accepted) for i, token in enumerate(token_ids)]
            self._num_shown += len(token_ids)
            self._write(pieces)

    def finish(self, token_ids: Sequence[int]) -> None:
        """Write what was held back, and what has not been shown of all the answer's tokens, and end the line."""
        with interrupts_wait():
            self.show(token_ids[self._num_shown :], num_accepted=0)
            self._write([(self._text.finish(), False)])
            if self._is_line_open:
                self._write([("\n", False)])

    def _write(self, pieces: Iterable[tuple[str, bool]]) -> None:
        """Write texts, each with whether it had been drafted."""
        output = ""
        for was_drafted, group in itertools.groupby(pieces, key=lambda piece: piece[1]):
            text = "".join(piece for piece, _ in group)
            if text:
                self._is_line_open = not text.endswith("\n")
                text = text.translate(_PICTURES) if self._is_terminal else text
                output += click.style(text, fg="green") if was_drafted and self.is_coloured else text
        if output:
            click.echo(output, nl=False, color=True)  # True: leave the text as it is


def decode_text(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> str:
    """The text of tokens, special ones left out and nothing tidied up."""
    return str(tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


@attrs.frozen
class Comparison:
    """A generation, and the autoregressive one of the same prompt if there was one."""

    result: GenerationResult
    baseline: GenerationResult | None = None

    @property
    def is_empty(self) -> bool:
        """Whether it was cut short before the first token."""
        return not self.result.token_ids and self.result.stop_reason in _CUT_SHORT

    @property
    def is_identical(self) -> bool | None:
        """Whether both chose the same tokens; None unless both came to their end."""
        if self.baseline is None or {self.result.stop_reason, self.baseline.stop_reason} & _CUT_SHORT:
            return None
        return self.result.token_ids == self.baseline.token_ids

    @property
    def speedup(self) -> float | None:
        """Tokens per second ÷ the baseline's; None unless both came to their end and decoded anything."""
        if self.is_identical is None or self.baseline is None:
            return None
        ours, theirs = self.result.report.tokens_per_second, self.baseline.report.tokens_per_second
        return ours / theirs if ours and theirs else None


def show_report(compared: Comparison, *, has_legend: bool) -> None:
    """Print the numbers of a generation to stderr, with what the colours of its answer mean."""
    console = Console(stderr=True, highlight=False)
    if has_legend and console.is_terminal:
        legend = Text.assemble("\n", ("green", "green"), ": drafted and accepted; the rest: the target's own tokens")
        console.print(legend)
    console.print(report_table(compared))


def report_table(compared: Comparison) -> Table:
    """The metrics of a generation, beside those of the autoregressive one if there was one."""
    results = [result for result in (compared.result, compared.baseline) if result is not None]
    table = Table(box=box.SIMPLE_HEAD, show_header=len(results) > 1)
    for header in ("", "with drafting", "autoregressive")[: len(results) + 1]:
        table.add_column(header, justify="right" if header else "left")
    for cells in zip(*map(_report_cells, results), strict=True):
        table.add_row(cells[0][0], *(value for _, value in cells))
    if compared.is_identical is not None:
        table.add_section()
        table.add_row("identical", _identical(*(result.token_ids for result in results)))
    if compared.speedup is not None:
        table.add_row("speedup", f"{compared.speedup:.2f}×")
        table.caption = "one run each: the speedup is only an indication"
    return table


def _report_cells(result: GenerationResult) -> list[tuple[str, str]]:
    """Rows of label and value."""
    report = result.report
    return [
        ("tokens / iteration", _number(report.tokens_per_iteration)),
        ("path acceptance", _percent(report.path_acceptance)),
        ("node acceptance", _percent(report.node_acceptance)),
        ("drafted nodes", str(report.num_drafted_nodes)),
        ("tokens / s", _number(report.tokens_per_second)),
        ("drafting", _share(report, report.draft_seconds)),
        ("verification", _share(report, report.verify_seconds)),
        ("the rest", _share(report, report.rest_seconds)),
        ("decoding in all", f"{report.decode_seconds:.2f} s"),
        ("prefill", f"{report.prefill_seconds:.2f} s"),
        ("runner", report.runner),
        ("new tokens", str(report.num_new_tokens)),
        ("stop reason", result.stop_reason),
    ]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}"


def _share(report: GenerationReport, seconds: float) -> str:
    share = seconds / report.decode_seconds if report.decode_seconds else None
    return f"({_percent(share)}) {seconds:.2f} s"


def _identical(token_ids: Sequence[int], baseline_ids: Sequence[int]) -> str:
    if token_ids == baseline_ids:
        return "yes"
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(token_ids, baseline_ids, strict=False))
    return f"no, from token {len(list(same))} on"


def plugin_listing(rows: Sequence[PluginRow]) -> Table:
    """A table of plugins, in which a broken one does not hide the others."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("name", no_wrap=True)
    table.add_column("what it does", overflow="fold")
    for row in rows:
        name = Text.assemble((row.name, "bold"), "\n", (f"{row.package} {row.version}", "dim"))
        table.add_row(name, Text("\n").join(_plugin_lines(row)), end_section=True)
    return table


def cost_table(costs: CostModel) -> Table:
    """What an iteration takes, in milliseconds, with each count beside the time of one row."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("what", no_wrap=True)
    for heading in ("count", "ms", "of a pass"):
        table.add_column(heading, justify="right", no_wrap=True)
    for what, seconds in (
        ("target's pass, by rows", costs.target_pass_seconds),
        ("drafter's level, by nodes", costs.drafter_level_seconds),
    ):
        for count, at_count in zip(seconds.at, seconds.seconds, strict=True):
            cells = (str(count), f"{1000 * at_count:.2f}", f"{at_count / costs.target_pass_seconds(1):.2f}")
            table.add_row(what, *cells, end_section=count == seconds.at[-1])
            what = ""
    rest = costs.rest_seconds
    table.add_row("rest of an iteration", "", f"{1000 * rest:.2f}", f"{rest / costs.target_pass_seconds(1):.2f}")
    return table


def _plugin_lines(row: PluginRow) -> Iterator[Text]:
    if row.description:
        yield Text(row.description)
    if row.parameters:
        defaults = {name: value for name, value in row.parameters.items() if name not in row.required}
        yield _labelled("parameters", [*(f"{name} (required)" for name in row.required), *_settings(defaults)])
    for variant, values in row.variants.items():
        yield _labelled(f"variant :{variant}", _settings(values))
    if row.hooks:
        yield _labelled("hooks", row.hooks)
    if row.error is not None:
        yield Text(f"cannot be used: {row.error}", style="red")


def _settings(values: Mapping[str, Any]) -> list[str]:
    return [f"{name}={value!r}" for name, value in values.items()]


def _labelled(label: str, items: Iterable[str]) -> Text:
    return Text.assemble((f"{label} ", "dim"), ", ".join(items))


def model_sheet(model: EmbeddedModel) -> str:
    """What is known of the embedded default model, and the command for what is missing."""
    rows = {
        "default model": model.name,
        "package": f"{model.package} {model.version}, {'installed' if model.installed else 'not installed'}",
        "licence": model.licence,
        "converted": "yes" if model.converted else "no" if model.damage is None else f"no: {model.damage}",
        "folder": model.folder,
        "size": f"{model.size / 1e6:.0f} MB",
    }
    lines = [f"{label:<14} {value}" for label, value in rows.items()]
    if not model.converted:
        when = "at its first use, or now by" if model.installed else "once it is installed by"
        lines.append(f"\nIt is converted {when}:\n  dynatree models install")
    return "\n".join(lines)


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


def fold(message: str) -> str:
    """A text of any number of lines in one."""
    return " ".join(message.split())


def clean_terminal() -> None:
    """Show the cursor again, should an interrupt have come just when a spinner had hidden it."""
    if sys.stderr.isatty():
        Console(stderr=True).show_cursor(True)


def _has_colours(console: Console) -> bool:
    return console.color_system is not None and not console.no_color


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
