"""The records of an answer, whole or in chunks, as the two routes of OpenAI's API have them."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from typing import Any

import attrs

__all__ = ["CHAT", "COMPLETION", "Form", "Head"]


@attrs.frozen
class Form:
    """How one route writes its answers."""

    id_prefix: str
    whole: str  # the `object` of a whole answer
    chunk: str  # and that of a chunk
    choice: Callable[[str], dict[str, Any]]  # what a choice of a whole answer has, from its text
    piece: Callable[[str], dict[str, Any]]  # what a choice of a chunk has
    opening: dict[str, Any] | None = None  # of the first chunk of each choice; None: there is none


@attrs.frozen
class Head:
    """What all records of one answer begin with."""

    form: Form
    model: str
    id: str = attrs.field(
        default=attrs.Factory(lambda self: f"{self.form.id_prefix}-{secrets.token_hex(12)}", takes_self=True)
    )
    created: int = attrs.field(factory=lambda: int(time.time()))

    def whole(self, texts: list[str], reasons: list[str | None], usage: dict[str, Any]) -> dict[str, Any]:
        """A whole answer."""
        choices = [
            _choice(index, self.form.choice(text), reason)
            for index, (text, reason) in enumerate(zip(texts, reasons, strict=True))
        ]
        return self._record(self.form.whole, choices) | {"usage": usage}

    def opening(self, index: int) -> dict[str, Any] | None:
        """The first chunk of a choice, where the form has one."""
        form = self.form
        return None if form.opening is None else self._record(form.chunk, [_choice(index, form.opening, None)])

    def chunk(self, index: int, text: str, reason: str | None) -> dict[str, Any]:
        """A chunk with more of one choice."""
        return self._record(self.form.chunk, [_choice(index, self.form.piece(text), reason)])

    def last(self, usage: dict[str, Any]) -> dict[str, Any]:
        """The chunk with the usage."""
        return self._record(self.form.chunk, []) | {"usage": usage}

    def _record(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}


def _choice(index: int, content: dict[str, Any], reason: str | None) -> dict[str, Any]:
    return {"index": index, **content, "logprobs": None, "finish_reason": reason}


COMPLETION = Form(
    "cmpl", "text_completion", "text_completion", lambda text: {"text": text}, lambda text: {"text": text}
)
CHAT = Form(
    "chatcmpl",
    "chat.completion",
    "chat.completion.chunk",
    lambda text: {"message": {"role": "assistant", "content": text, "refusal": None}},
    lambda text: {"delta": {"content": text} if text else {}},
    opening={"delta": {"role": "assistant", "content": ""}},
)
