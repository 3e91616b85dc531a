"""A connection of a client: how many there are, and how long one may take to say what it wants and to read the answer.

uvicorn's own protocol waits for ever for the first request, for the rest of one whose headers have begun, and for a
client to read.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import final

from uvicorn.protocols.http.h11_impl import H11Protocol

from dynatree_core.serve.logs import log

__all__ = ["MOST_HEADER_BYTES", "SEND_SECONDS", "BoundedConnection"]

HEADER_SECONDS = 20.0  # in which a request's headers have to arrive, from the connection or their first byte on
MOST_HEADER_BYTES = 64 * 1024
SEND_SECONDS = 60.0  # in which a client has to take what it is sent
LEAST_BYTES = 64 * 1024  # of it, where there is more: 1 KB a second
LOG_SECONDS = 1.0  # between two lines of a kind, of which a client could cause any number


class SeldomLog:
    """Writes at most one line a second of each event, with how many there were since the one before as `count`."""

    def __init__(self) -> None:
        self._last: dict[str, float] = {}  # when a line was written
        self._count: dict[str, int] = {}  # since then

    def __call__(self, event: str, *, level: int = logging.INFO, **fields: object) -> None:
        now = time.monotonic()
        self._count[event] = self._count.get(event, 0) + 1
        if now - self._last.get(event, -LOG_SECONDS) >= LOG_SECONDS:
            self._last[event] = now
            log(event, level=level, count=self._count.pop(event), **fields)


_log = SeldomLog()


@final
class BoundedConnection(H11Protocol):
    """Closes itself where there are too many, no whole request has come in time, or nobody reads what is sent.

    How many there may be is uvicorn's `limit_concurrency`, less one: with that many uvicorn answers 503, in no form
    that clients know, so connections beyond are closed before they ask.
    """

    _waiting: asyncio.TimerHandle | None = None  # for a request; None: one is being answered
    _sending: asyncio.TimerHandle | None = None  # while the client has something to take

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if self.limit_concurrency is not None and len(self.connections) >= self.limit_concurrency:
            _log("too_many_connections", open=len(self.connections))
            transport.abort()
        else:
            # what is left to send has `pause_writing` called, however little; with 0 asyncio's TLS would always pause
            transport.set_write_buffer_limits(high=1)
            self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        self._stop_sending()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_sending()

    def resume_writing(self) -> None:
        self._stop_sending()
        super().resume_writing()

    def _watch(self) -> None:
        """Have the time run while a request is awaited, or what comes is of one that was answered before its end."""
        is_answering = self.cycle is not None and not self.cycle.response_complete
        if is_answering:
            self._stop_waiting()
        elif self._waiting is None:
            self._waiting = self.loop.call_later(HEADER_SECONDS, self._give_up)

    def _stop_waiting(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None

    def _give_up(self) -> None:
        self._waiting = None
        if not self.transport.is_closing():
            _log("no_request", seconds=HEADER_SECONDS)
            self.transport.abort()

    def _watch_sending(self) -> None:
        """Look in a while whether the client has read anything. uvicorn writes no more before all of it is taken."""
        num_left = self.transport.get_write_buffer_size()
        self._sending = self.loop.call_later(SEND_SECONDS, self._check_sending, num_left)

    def _stop_sending(self) -> None:
        if self._sending is not None:
            self._sending.cancel()
            self._sending = None

    def _check_sending(self, num_before: int) -> None:
        if self.transport.get_write_buffer_size() <= num_before - LEAST_BYTES:
            self._watch_sending()
        else:  # also where it is closing, which waits for the client
            self._sending = None
            _log("unread", level=logging.WARNING, seconds=SEND_SECONDS)
            self.transport.abort()
