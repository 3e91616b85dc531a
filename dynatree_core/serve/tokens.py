"""The text and the bytes of single tokens, as log-probabilities name them."""

from __future__ import annotations

import functools
import re
import threading
from typing import TYPE_CHECKING

from tokenizers import pre_tokenizers

from dynatree_core.text.stream import REPLACEMENT, decode_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["TokenTexts"]

BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")  # how vocabularies with a fallback write one byte


class TokenTexts:
    """What single tokens say. Any thread may ask.

    Args:
        tokenizer: the target's, which nobody else uses.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        # decoders drop the blank of a text's first token, so a token is read behind this one
        self._some_token = next(iter(tokenizer("a", add_special_tokens=False).input_ids), 0)
        self._texts: dict[int, str] = {}
        self._begun: dict[int, int] = {}
        self._lock = threading.Lock()  # guards all of it

    def text(self, token_id: int) -> str:
        """The text of one token behind others, special ones too. A part of a character shows as U+FFFD."""
        with self._lock:
            if token_id not in self._texts:
                before = self._decode([self._some_token])
                self._texts[token_id] = self._decode([self._some_token, token_id])[len(before) :]
            return self._texts[token_id]

    def bytes(self, token_id: int) -> bytes | None:
        """Its bytes in UTF-8, which may be a part of a character's; None: the vocabulary does not say which part."""
        text = self.text(token_id)
        if REPLACEMENT not in text:
            return text.encode()
        with self._lock:
            name = str(self._tokenizer.convert_ids_to_tokens(token_id))
        found = _bytes_of(name)
        return found if found is not None and found.decode(errors="replace") == text else None

    def name(self, token_id: int) -> str:
        """Its text, or, where that is a part of a character, its bytes, as completions of OpenAI's API have them."""
        text, known = self.text(token_id), self.bytes(token_id)
        if REPLACEMENT not in text or known is None:
            return text
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in known)

    def num_begun(self, token_id: int) -> int:
        """Characters of an answer that begin in it: none in a special token, which answers leave out."""
        if token_id not in self._begun:
            known = b"" if self._is_left_out(token_id) else self.bytes(token_id)
            number = len(self.text(token_id)) if known is None else sum(byte & 0xC0 != 0x80 for byte in known)
            self._begun[token_id] = number  # the same, whoever counts
        return self._begun[token_id]

    def _is_left_out(self, token_id: int) -> bool:
        with self._lock:
            return decode_text(self._tokenizer, [self._some_token, token_id]) == decode_text(
                self._tokenizer, [self._some_token]
            )

    def _decode(self, token_ids: list[int]) -> str:
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _bytes_of(name: str) -> bytes | None:
    """The bytes of a token by its name in the vocabulary; None: it has another form."""
    if one := BYTE_TOKEN.fullmatch(name):
        return bytes.fromhex(one[1])
    if name and all(character in _alphabet() for character in name):
        return bytes(_alphabet()[character] for character in name)
    return None


@functools.cache
def _alphabet() -> dict[str, int]:
    """The characters by which byte-level vocabularies write bytes: those that can be printed stand for themselves."""
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    printable = {character: ord(character) for character in characters if ord(character) < 256}
    others = (byte for byte in range(256) if byte not in printable.values())
    return printable | dict(zip(characters[len(printable) :], others, strict=True))
