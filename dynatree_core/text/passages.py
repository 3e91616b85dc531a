"""Running text to passages, cut where a line, a sentence or a word ends."""

from __future__ import annotations

import re

__all__ = ["cut"]

# how much longer than asked for a passage may be, to end where a line or a sentence does
LINE_SLACK, SENTENCE_SLACK = 1.0, 0.25
_SENTENCE_END = re.compile(r"[.!?…]['\"”’»)\]]*(?=\s)|[。！？]")
_BLANK = re.compile(r"\s")
_TEXT = re.compile(r"\S")


def cut(text: str, num_chars: int) -> list[str]:
    """Passages of `num_chars` characters or a little more, with all of the text in them.

    Each ends where the next line does, where that makes it at most twice as long; else where the next sentence does,
    within a quarter; else with a word. Only a word that is longer than that is cut. An end of less than half a passage
    belongs to the passage before it.
    """
    passages: list[str] = []
    start = _next_text(text, 0)
    while start < len(text):
        end = _end(text, start + num_chars, num_chars)
        if len(text) - _next_text(text, end) < num_chars // 2:
            end = len(text)
        passages.append(text[start:end].rstrip())
        start = _next_text(text, end)
    return passages


def _next_text(text: str, start: int) -> int:
    found = _TEXT.search(text, start)
    return found.start() if found is not None else len(text)


def _end(text: str, low: int, num_chars: int) -> int:
    """Where a passage ends that has to have all before `low`."""
    line_end = text.find("\n", low, low + int(LINE_SLACK * num_chars))
    if line_end >= 0:
        return line_end
    for pattern in (_SENTENCE_END, _BLANK):
        found = pattern.search(text, low - 1, low + int(SENTENCE_SLACK * num_chars))
        if found is not None:
            return found.end()
    return min(low, len(text))
