"""A connection of a client: how many there are, and how long one may take to say what it wants.

uvicorn's own protocol waits for ever for the first request, and for the rest of one whose headers have begun.
"""

from __future__ import annotations

import asyncio
from typing import final

from uvicorn.protocols.http.h11_impl import H11Protocol

from dynatree_core.serve.logs import log

__all__ = ["MOST_HEADER_BYTES", "BoundedConnection"]

HEADER_SECONDS = 20.0  # in which a request's headers have to arrive, from the connection or their first byte on
MOST_HEADER_BYTES = 64 * 1024


@final
class BoundedConnection(H11Protocol):
    """Closes itself where there are too many, or where no whole request has come in time.

    How many there may be is uvicorn's `limit_concurrency`, less one: with that many uvicorn answers 503, in no form
    that clients know, so connections beyond are closed before they ask.
    """

    _waiting: asyncio.TimerHandle | None = None  # for a request; None: one is being answered

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if self.limit_concurrency is not None and len(self.connections) >= self.limit_concurrency:
            log("too_many_connections", open=len(self.connections))
            transport.abort()
        else:
            self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

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
            log("no_request", seconds=HEADER_SECONDS)
            self.transport.abort()
