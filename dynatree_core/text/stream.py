"""Text from tokens as they come."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["REPLACEMENT", "IncrementalText", "decode_text"]

REPLACEMENT = "\ufffd"  # what a decoder writes for bytes that are no character, or not yet
CONTEXT_TOKENS = 16  # earlier tokens that are decoded along with new ones, at least


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

    def push(self, *token_ids: int) -> str:
        """The characters that these tokens settle, often their own."""
        self._window += token_ids
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


def decode_text(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> str:
    """The text of tokens, special ones left out and nothing tidied up."""
    return str(tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))
