"""The answers to one HTTP request while they are computed, as the event loop sees them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

import attrs

from dynatree_core.engine.handle import Handle
from dynatree_core.serve.asked import Asked
from dynatree_core.serve.errors import ApiError, as_api_error
from dynatree_core.serve.logs import log_fault
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
    num_tokens: int = 0  # that `pieces` has given
    finish_reason: str | None = None  # "stop", "length" or "tool_calls", at the end


@attrs.frozen(eq=False)
class Piece:
    """What has come of one choice."""

    choice: Choice
    text: str
    update: Update


class Answers:
    """All choices of one request. They are computed from `submit` on; whoever submits must `close` at the end.

    Args:
        loop: the engines.
        asked: what was asked.
        decode: the text of token ids, for the event loop's thread.
        max_seconds: from `submit` on, after which what there is becomes the answer; None: any time.
    """

    def __init__(
        self,
        loop: EngineLoop,
        asked: Asked,
        decode: Callable[[list[int]], str],
        *,
        max_seconds: float | None = None,
    ) -> None:
        self.asked = asked
        self.decode = decode
        self.choices = [
            Choice(index, AnswerText(decode, asked.stops, asked.new_tool_text()))
            for index in range(len(asked.requests))
        ]
        self._loop = loop
        self._max_seconds = max_seconds
        self._deadline: float | None = None  # on the event loop's clock
        self._is_late = False
        self._updates: asyncio.Queue[tuple[Choice, Update]] = asyncio.Queue()
        self._at_close = contextlib.ExitStack()

    @property
    def handles(self) -> list[Handle]:
        """Of the choices that were submitted."""
        return [choice.handle for choice in self.choices if choice.handle is not None]

    def submit(self) -> None:
        """Have all choices computed, or none.

        Raises:
            ApiError: the waiting line has no room for all of them.
        """
        self.submit_from(asyncio.get_running_loop())

    def submit_from(self, event_loop: asyncio.AbstractEventLoop) -> None:
        """The same from another thread than the event loop's, since an engine's first request takes a pass."""
        if self._max_seconds is not None:
            self._deadline = event_loop.time() + self._max_seconds
        listeners = {
            request: _listener(event_loop, self._updates, choice)
            for choice, request in zip(self.choices, self.asked.requests, strict=True)
        }
        try:
            handles = self._loop.submit(self.asked.drafter, listeners)
        except Exception as error:
            raise as_api_error(error, retry_after=self._loop.seconds_to_room) from error
        for choice, handle in zip(self.choices, handles, strict=True):
            choice.handle = handle

    def at_close(self, callback: Callable[[], object]) -> None:
        """Have something called by `close`."""
        self._at_close.callback(callback)

    def close(self) -> None:
        """Have no more computed; what is done stays. Again: nothing."""
        for handle in self.handles:
            self._loop.cancel(handle)
        self._at_close.close()

    def line(self) -> dict[str, object]:
        """What the log says of them when they are closed."""
        reasons = [choice.finish_reason or "cut" for choice in self.choices]
        return {"completion_tokens": sum(handle.num_tokens for handle in self.handles), "finish": reasons}

    async def pieces(self) -> AsyncIterator[Piece]:
        """What comes, until all choices are done.

        Raises:
            ApiError: one of them has failed, or was cut off before it had any token.
        """
        num_open = len(self.choices)
        while num_open:
            choice, update = await self._next()
            if update.error is not None:
                log_fault("failed", update.error)
                raise as_api_error(update.error) from update.error
            choice.num_tokens += len(update.token_ids)
            text = choice.text.push(update.token_ids)
            if update.is_last:
                num_open -= 1
                text += choice.text.finish()
                choice.finish_reason = self._finish_reason(choice, update)
                if choice.text.calls:
                    choice.finish_reason = "tool_calls"
            yield Piece(choice, text, update)

    async def _next(self) -> tuple[Choice, Update]:
        """The next update. At the deadline all that still run are ended, each of which has an update of its own."""
        if not self._is_late:
            try:
                async with asyncio.timeout_at(self._deadline):
                    return await self._updates.get()
            except TimeoutError:
                self._is_late = True
                for handle in self.handles:
                    self._loop.cancel(handle)
        return await self._updates.get()

    def _finish_reason(self, choice: Choice, update: Update) -> str:
        assert update.result is not None, "a sequence that ends without an error has a result"
        if update.result.stop_reason != "cancelled":
            is_stopped = choice.text.is_stopped or update.result.stop_reason in STOPPED
            return "stop" if is_stopped else "length"
        if not self._is_late:
            raise ApiError(503, "the answer was cut off, since the server is about to end", code="stopping")
        if not update.result.token_ids:
            message = f"an answer has {self._max_seconds} s here, in which not one token has come; ask again later"
            raise ApiError(503, message, code="timeout", retry_after=1)
        return "length"


def _listener(
    event_loop: asyncio.AbstractEventLoop, updates: asyncio.Queue[tuple[Choice, Update]], choice: Choice
) -> Callable[[Update], None]:
    def tell(update: Update) -> None:
        try:
            event_loop.call_soon_threadsafe(updates.put_nowait, (choice, update))
        except RuntimeError:
            if not event_loop.is_closed():  # else the server has ended, and nobody waits
                raise

    return tell
