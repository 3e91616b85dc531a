"""The records of an answer, whole or in chunks, as the two routes of OpenAI's API have them."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any

import attrs

from dynatree_core.report import TokenLogprob
from dynatree_core.serve.content import Content, call_records, chat_logprobs, completion_logprobs
from dynatree_core.serve.tokens import TokenTexts

__all__ = ["CHAT", "COMPLETION", "Form", "Head"]


@attrs.frozen
class Form:
    """How one route writes its answers."""

    id_prefix: str
    whole: str  # the `object` of a whole answer
    chunk: str  # and that of a chunk
    choice: Callable[[Content], dict[str, Any]]  # what a choice of a whole answer has
    piece: Callable[[Content], dict[str, Any]]  # what a choice of a chunk has
    # what a choice says of log-probabilities: from them, the texts of tokens, and characters before them
    logprobs: Callable[[Sequence[TokenLogprob], TokenTexts, int], dict[str, Any]]
    opening: dict[str, Any] | None = None  # of the first chunk of each choice; None: there is none


@attrs.frozen
class Head:
    """What all records of one answer begin with."""

    form: Form
    model: str
    tokens: TokenTexts  # for log-probabilities
    id: str = attrs.field(
        default=attrs.Factory(lambda self: f"{self.form.id_prefix}-{secrets.token_hex(12)}", takes_self=True)
    )
    created: int = attrs.field(factory=lambda: int(time.time()))

    def whole(self, contents: list[Content], reasons: list[str | None], figures: dict[str, Any]) -> dict[str, Any]:
        """A whole answer, with the figures that say how it was made."""
        choices = [
            _choice(index, self.form.choice(content), reason, self._logprobs(content, 0))
            for index, (content, reason) in enumerate(zip(contents, reasons, strict=True))
        ]
        return self._record(self.form.whole, choices) | figures

    def opening(self, index: int) -> dict[str, Any] | None:
        """The first chunk of a choice, where the form has one."""
        form = self.form
        return None if form.opening is None else self._record(form.chunk, [_choice(index, form.opening, None)])

    def chunk(self, index: int, content: Content, reason: str | None, offset: int) -> dict[str, Any]:
        """A chunk with more of one choice, before whose tokens so many characters begin."""
        choice = _choice(index, self.form.piece(content), reason, self._logprobs(content, offset))
        record = self._record(self.form.chunk, [choice])
        return record if content.steps is None else record | {"dynatree": content.steps}

    def last(self, figures: dict[str, Any]) -> dict[str, Any]:
        """The chunk with the figures."""
        return self._record(self.form.chunk, []) | figures

    def _logprobs(self, content: Content, offset: int) -> dict[str, Any] | None:
        return None if content.logprobs is None else self.form.logprobs(content.logprobs, self.tokens, offset)

    def _record(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}


def _choice(
    index: int, content: dict[str, Any], reason: str | None, logprobs: dict[str, Any] | None = None
) -> dict[str, Any]:
    return {"index": index, **content, "logprobs": logprobs, "finish_reason": reason}


def _message(content: Content) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": content.text, "refusal": None}
    if content.calls:
        message |= {"content": content.text or None, "tool_calls": call_records(content.calls, is_chunk=False)}
    return {"message": message}


def _delta(content: Content) -> dict[str, Any]:
    delta: dict[str, Any] = {"content": content.text} if content.text else {}
    if content.calls:
        delta["tool_calls"] = call_records(content.calls, is_chunk=True)
    return {"delta": delta}


COMPLETION = Form(
    "cmpl",
    "text_completion",
    "text_completion",
    lambda content: {"text": content.text},
    lambda content: {"text": content.text},
    completion_logprobs,
)
CHAT = Form(
    "chatcmpl",
    "chat.completion",
    "chat.completion.chunk",
    _message,
    _delta,
    lambda listed, tokens, _: chat_logprobs(listed, tokens),
    opening={"delta": {"role": "assistant", "content": ""}},
)
