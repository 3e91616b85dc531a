"""What an answer has beside its text: log-probabilities, calls of tools, and how its tokens came about."""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Callable, Sequence
from typing import Any

import attrs

from dynatree_core.report import TokenLogprob
from dynatree_core.serve.loop import Update
from dynatree_core.serve.tokens import TokenTexts
from dynatree_core.text.stream import IncrementalText
from dynatree_core.text.tools import ToolCall

__all__ = ["Content", "StepTexts", "call_records", "chat_logprobs", "completion_logprobs"]

LOWEST = -9999.0  # for a token of probability 0: JSON has no infinity, and OpenAI's API has this number


@attrs.frozen
class Content:
    """Some of an answer, or all of it."""

    text: str = ""
    logprobs: tuple[TokenLogprob, ...] | None = None  # of the tokens; None: not asked for
    calls: tuple[ToolCall, ...] = ()
    steps: dict[str, Any] | None = None  # how the tokens came about; None: not asked for

    @classmethod
    def joined(cls, parts: Sequence[Content]) -> Content:
        """Parts that follow each other, as one."""
        listed = [part.logprobs for part in parts if part.logprobs is not None]
        return cls(
            "".join(part.text for part in parts),
            tuple(itertools.chain.from_iterable(listed)) if listed else None,
            tuple(call for part in parts for call in part.calls),
        )


class StepTexts:
    """What the steps of one choice say about their tokens.

    Args:
        decode: the text of token ids.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._text = IncrementalText(decode)

    def record(self, update: Update) -> dict[str, Any]:
        """Of one iteration: the text that each token settles, the first `accepted` of which were drafted."""
        texts = [self._text.push(token_id) for token_id in update.token_ids]
        if update.is_last:
            texts.append(self._text.finish())  # what was held back, behind the last token
        return {"texts": texts, "accepted": update.num_accepted, "drafted": update.num_drafted}


def call_records(calls: Sequence[ToolCall], *, is_chunk: bool) -> list[dict[str, Any]]:
    """The calls as `tool_calls` has them; in a chunk each has its place."""
    return [
        ({"index": index} if is_chunk else {})
        | {
            "id": f"call_{secrets.token_hex(12)}",
            "type": "function",
            "function": {"name": call.name, "arguments": call.arguments},
        }
        for index, call in enumerate(calls)
    ]


def chat_logprobs(listed: Sequence[TokenLogprob], tokens: TokenTexts) -> dict[str, Any]:
    """Log-probabilities as chat completions have them."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        known = tokens.bytes(token_id)
        return {
            "token": tokens.text(token_id),
            "logprob": max(logprob, LOWEST),
            "bytes": None if known is None else [*known],
        }

    content = [
        entry(one.token_id, one.logprob) | {"top_logprobs": [entry(*alternative) for alternative in one.top]}
        for one in listed
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(listed: Sequence[TokenLogprob], tokens: TokenTexts, offset: int) -> dict[str, Any]:
    """Log-probabilities as completions have them.

    Args:
        listed: of the tokens.
        tokens: what each says.
        offset: characters of the answer before them.
    """
    alternatives = [dict([(one.token_id, one.logprob), *one.top]) for one in listed]
    lengths = [tokens.num_begun(one.token_id) for one in listed[:-1]]
    return {
        "tokens": [tokens.name(one.token_id) for one in listed],
        "token_logprobs": [max(one.logprob, LOWEST) for one in listed],
        "top_logprobs": [
            {tokens.name(token_id): max(logprob, LOWEST) for token_id, logprob in top.items()} for top in alternatives
        ],
        "text_offset": list(itertools.accumulate(lengths, initial=offset))[: len(listed)],
    }
