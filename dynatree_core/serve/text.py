"""The text of an answer as it comes, up to where a stop text begins."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

from dynatree_core.text.stream import IncrementalText
from dynatree_core.text.tools import ToolCall, ToolText

__all__ = ["AnswerText", "StopTextCriterion"]

Decode = Callable[[list[int]], str]


class AnswerText:
    """Turns tokens into the text that a client gets: each character once, none of a stop text.

    What may yet become a stop text is held back until it is settled.

    Args:
        decode: the text of token ids.
        stops: texts before the first of which the answer ends.
        tools: takes calls out of the text; None: there are none.
    """

    def __init__(self, decode: Decode, stops: Sequence[str] = (), tools: ToolText | None = None) -> None:
        self._stops = stops
        self._tools = tools
        self.calls: tuple[ToolCall, ...] = ()  # at the end
        self._text = IncrementalText(decode)
        self._held = ""  # settled characters that may begin a stop text
        self.is_stopped = False  # whether a stop text has come

    def push(self, token_ids: Sequence[int]) -> str:
        """The characters that these tokens let the client have."""
        text = "".join(self._shown(self._text.push(token_id)) for token_id in token_ids)
        return text if self._tools is None else self._tools.push(text)

    def finish(self) -> str:
        """What was held back, when no token will come any more."""
        piece = self._shown(self._text.finish()) + self._held  # a stop text that comes here leaves nothing held
        self._held = ""
        return self._without_calls(piece)

    def _without_calls(self, last: str) -> str:
        if self._tools is None:
            return last
        text = self._tools.push(last)
        rest, calls = self._tools.finish()
        self.calls = tuple(calls)
        return text + rest

    def _shown(self, piece: str) -> str:
        if self.is_stopped or not piece:
            return ""
        text = self._held + piece
        starts = [start for stop in self._stops if (start := text.find(stop)) >= 0]
        if starts:
            self.is_stopped, self._held = True, ""
            return text[: min(starts)]
        num_held = max((num_begun(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]


def num_begun(text: str, stop: str) -> int:
    """Characters at the end of the text that are the beginning of a stop text, and not all of it."""
    lengths = range(min(len(text), len(stop) - 1), 0, -1)
    return next((length for length in lengths if text.endswith(stop[:length])), 0)


class StopTextCriterion(StoppingCriteria):
    """Ends a generation with the token in whose text a stop text is complete.

    It looks at the new tokens only, as servers do, where transformers' own also finds a text that begins in the
    prompt; and it needs no table over the whole vocabulary, which for each new stop text takes that one seconds.

    Args:
        decode: the text of token ids.
        stops: the stop texts.
        num_prompt: tokens of the prompt.
    """

    def __init__(self, decode: Decode, stops: Sequence[str], num_prompt: int) -> None:
        self._num_seen = num_prompt  # tokens of the text that were looked at
        self._text = AnswerText(decode, stops)

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """Whether the text [1, tokens] has a stop text behind its prompt; [1] of bool."""
        self._text.push(input_ids[0, self._num_seen :].tolist())
        self._num_seen = input_ids.shape[1]
        return torch.tensor([self._text.is_stopped], device=input_ids.device)
