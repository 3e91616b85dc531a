"""An answer over HTTP: whole, or as server-sent events. A client that goes away ends its generation."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from dynatree_core.serve.answers import Answers
from dynatree_core.serve.errors import ApiError, error_record
from dynatree_core.serve.figures import usage
from dynatree_core.serve.records import Head

__all__ = ["event_stream", "whole_answer"]

CLIENT_HAS_LEFT = 499  # nginx's number; nobody reads it but the log


async def whole_answer(request: Request, head: Head, answers: Answers, num_prompts: int) -> Response:
    """The answer when all of it is there.

    Args:
        request: whose body was read.
        head: of its record.
        answers: that were submitted.
        num_prompts: that they answer.
    """
    collecting = asyncio.ensure_future(_texts(answers))
    leaving = asyncio.ensure_future(_departure(request))
    try:
        await asyncio.wait({collecting, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not collecting.done():
            return Response(status_code=CLIENT_HAS_LEFT)
        reasons = [choice.finish_reason for choice in answers.choices]
        return JSONResponse(head.whole(collecting.result(), reasons, usage(answers.handles, num_prompts=num_prompts)))
    finally:
        for task in (collecting, leaving):
            task.cancel()
        answers.close()


async def _texts(answers: Answers) -> list[str]:
    texts = [""] * len(answers.choices)
    async for piece in answers.pieces():
        texts[piece.choice.index] += piece.text
    return texts


async def _departure(request: Request) -> None:
    """Wait until the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def event_stream(head: Head, answers: Answers, num_prompts: int, *, has_usage: bool) -> Response:
    """The answer in chunks as it comes, then `[DONE]`; an error ends it as an event of its own.

    Args:
        head: of its chunks.
        answers: that were submitted.
        num_prompts: that they answer.
        has_usage: whether a chunk with the usage comes last.
    """
    records = _chunks(head, answers, num_prompts, has_usage)
    return EventStream(_events(records), on_end=answers.close)


class EventStream(StreamingResponse):
    """Server-sent events, and what is done when they end, however that is: also if the client goes away."""

    def __init__(self, events: AsyncIterator[str], on_end: Callable[[], None]) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # proxies hand each event on at once
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._on_end()


async def _events(records: AsyncIterator[Mapping[str, Any]]) -> AsyncIterator[str]:
    try:
        async with contextlib.aclosing(records) as open_records:  # type: ignore[type-var]
            async for record in open_records:
                yield _event(json.dumps(record, ensure_ascii=False))
    except ApiError as error:
        yield _event(json.dumps(error_record(error)))
        return
    yield _event("[DONE]")


def _event(data: str) -> str:
    return f"data: {data}\n\n"


async def _chunks(head: Head, answers: Answers, num_prompts: int, has_usage: bool) -> AsyncIterator[Mapping[str, Any]]:
    for choice in answers.choices:
        opening = head.opening(choice.index)
        if opening is not None:
            yield opening
    async for piece in answers.pieces():
        if piece.text or piece.choice.finish_reason is not None:
            yield head.chunk(piece.choice.index, piece.text, piece.choice.finish_reason)
    if has_usage:
        yield head.last(usage(answers.handles, num_prompts=num_prompts))
