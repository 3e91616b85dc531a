"""The answers to one HTTP request while they are computed, as the event loop sees them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import attrs

from dynatree_core.engine.handle import Handle
from dynatree_core.serve.asked import Asked
from dynatree_core.serve.errors import ApiError, as_api_error
from dynatree_core.serve.loop import EngineLoop, Update
from dynatree_core.serve.text import AnswerText

__all__ = ["Answers", "Choice", "Piece"]

STOPPED = ("eos", "stop_string", "criterion")  # stop reasons that OpenAI's API calls "stop"; others are "length"


@attrs.define(eq=False)
class Choice:
    """One answer, and how far it has come."""

    index: int
    text: AnswerText
    handle: Handle | None = None  # None: not submitted yet
    finish_reason: str | None = None  # "stop" or "length", at the end


@attrs.frozen(eq=False)
class Piece:
    """What has come of one choice."""

    choice: Choice
    text: str
    update: Update


class Answers:
    """All choices of one request. They are computed from `submit` on; whoever submits must `cancel` at the end.

    Args:
        loop: the engines.
        asked: what was asked.
        decode: the text of token ids, for the event loop's thread.
    """

    def __init__(self, loop: EngineLoop, asked: Asked, decode: Callable[[list[int]], str]) -> None:
        self.asked = asked
        self.choices = [Choice(index, AnswerText(decode, asked.stops)) for index in range(len(asked.requests))]
        self._loop = loop
        self._updates: asyncio.Queue[tuple[Choice, Update]] = asyncio.Queue()

    @property
    def handles(self) -> list[Handle]:
        """Of the choices that were submitted."""
        return [choice.handle for choice in self.choices if choice.handle is not None]

    def submit(self) -> None:
        """Have all choices computed, or none.

        Raises:
            ApiError: the waiting line has no room for all of them.
        """
        event_loop = asyncio.get_running_loop()
        try:
            for choice, request in zip(self.choices, self.asked.requests, strict=True):
                listener = _listener(event_loop, self._updates, choice)
                choice.handle = self._loop.submit(self.asked.drafter, request, listener)
        except Exception as error:
            self.cancel()
            raise as_api_error(error) from error

    def cancel(self) -> None:
        """Have no more computed; what is done stays."""
        for handle in self.handles:
            self._loop.cancel(handle)

    async def pieces(self) -> AsyncIterator[Piece]:
        """What comes, until all choices are done.

        Raises:
            ApiError: one of them has failed.
        """
        num_open = len(self.choices)
        while num_open:
            choice, update = await self._updates.get()
            if update.error is not None:
                raise as_api_error(update.error) from update.error
            text = choice.text.push(update.token_ids)
            if update.is_last:
                num_open -= 1
                text += choice.text.finish()
                choice.finish_reason = _finish_reason(choice, update)
            yield Piece(choice, text, update)


def _listener(
    event_loop: asyncio.AbstractEventLoop, updates: asyncio.Queue[tuple[Choice, Update]], choice: Choice
) -> Callable[[Update], None]:
    def tell(update: Update) -> None:
        if not event_loop.is_closed():  # else the server has ended, and nobody waits
            event_loop.call_soon_threadsafe(updates.put_nowait, (choice, update))

    return tell


def _finish_reason(choice: Choice, update: Update) -> str:
    assert update.result is not None, "a sequence that ends without an error has a result"
    if update.result.stop_reason == "cancelled":
        raise ApiError(503, "the answer was cut off, since the server is about to end", code="stopping")
    return "stop" if choice.text.is_stopped or update.result.stop_reason in STOPPED else "length"
