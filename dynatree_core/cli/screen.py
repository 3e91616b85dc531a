"""An answer on standard output, written as its tokens are committed."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import click
from rich.console import Console

from dynatree_core.cli.console import interrupts_wait
from dynatree_core.text.stream import REPLACEMENT, IncrementalText, decode_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Answer"]

# an answer must not steer the terminal: control characters but newline and tab are shown by their pictures
_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
_PICTURES |= dict.fromkeys(range(0x80, 0xA0), ord(REPLACEMENT)) | {0x7F: 0x2421}


class Answer:
    """An answer on stdout, written as its tokens are committed."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._text = IncrementalText(lambda token_ids: decode_text(tokenizer, token_ids))
        self._is_terminal = sys.stdout.isatty()
        self.is_coloured = self._is_terminal and _has_colours()
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


def _has_colours() -> bool:
    console = Console()
    return console.color_system is not None and not console.no_color
