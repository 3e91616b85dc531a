"""An answer over HTTP: whole, or as server-sent events. A client that goes away ends its generation."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import anyio.to_thread
import attrs
from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Scope, Send

from dynatree_core.serve.answers import Answers, Piece
from dynatree_core.serve.connections import SEND_SECONDS
from dynatree_core.serve.content import Content, StepTexts
from dynatree_core.serve.errors import ApiError, error_record
from dynatree_core.serve.figures import figures, usage_so_far
from dynatree_core.serve.logs import log
from dynatree_core.serve.records import Head
from dynatree_core.serve.schema import StreamOptions

__all__ = ["event_stream", "whole_answer"]

LINE_BREAKS = {number: f"\\u{number:04x}" for number in (0x85, 0x2028, 0x2029)}  # of str.splitlines, as httpx has it
CLIENT_HAS_LEFT = 499  # nginx's number; nobody reads it but the log


async def whole_answer(request: Request, head: Head, answers: Answers, num_prompts: int) -> Response:
    """The answer when all of it is there.

    Args:
        request: whose body was read.
        head: of its record.
        answers: that were submitted.
        num_prompts: that they answer.
    """
    collecting = asyncio.ensure_future(_contents(answers))
    leaving = asyncio.ensure_future(_departure(request))
    try:
        await asyncio.wait({collecting, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not collecting.done():
            return Response(status_code=CLIENT_HAS_LEFT)
        contents, reasons = collecting.result(), [choice.finish_reason for choice in answers.choices]
        told = figures(answers.handles, num_prompts=num_prompts)
        # log-probabilities may be many, and other clients are not to wait while they are written down
        return await anyio.to_thread.run_sync(lambda: JSONResponse(head.whole(contents, reasons, told)))
    finally:
        for task in (collecting, leaving):
            task.cancel()
        answers.close()


async def _contents(answers: Answers) -> list[Content]:
    parts: list[list[Content]] = [[] for _ in answers.choices]
    async for piece in answers.pieces():
        parts[piece.choice.index].append(_content(answers, piece))
    return list(map(Content.joined, parts))


def _content(answers: Answers, piece: Piece) -> Content:
    has_logprobs = answers.asked.requests[piece.choice.index].num_logprobs is not None
    calls = piece.choice.text.calls if piece.update.is_last else ()
    return Content(piece.text, piece.update.logprobs if has_logprobs else None, calls)


async def _departure(request: Request) -> None:
    """Wait until the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def event_stream(head: Head, answers: Answers, num_prompts: int, options: StreamOptions) -> Response:
    """The answer in chunks as it comes, then `[DONE]`; an error ends it as an event of its own.

    Args:
        head: of its chunks.
        answers: that were submitted.
        num_prompts: that they answer.
        options: which chunks have the usage.
    """
    records = _with_usage(_chunks(head, answers), head, answers, num_prompts, options)
    return EventStream(_events(records), on_end=answers.close)


class EventStream(StreamingResponse):
    """Server-sent events, and what is done when they end, however that is: also if the client goes away."""

    def __init__(self, events: AsyncIterator[str], on_end: Callable[[], None]) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # proxies hand each event on at once
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_in_time(message: Message) -> None:
            try:
                async with asyncio.timeout(SEND_SECONDS):
                    await send(message)
            except TimeoutError:
                log("unread", level=logging.WARNING, seconds=SEND_SECONDS)
                raise

        try:
            # the connection is closed then; ClientDisconnect: Starlette's word for it where a server speaks newer ASGI
            with contextlib.suppress(TimeoutError, ClientDisconnect):
                await super().__call__(scope, receive, send_in_time)
        finally:
            self._on_end()


async def _events(records: AsyncIterator[Mapping[str, Any]]) -> AsyncIterator[str]:
    try:
        async with contextlib.aclosing(records) as open_records:  # type: ignore[type-var]
            async for record in open_records:
                yield _event(_in_one_line(json.dumps(record, ensure_ascii=False)))
    except ApiError as error:
        yield _event(json.dumps(error_record(error)))
        return
    yield _event("[DONE]")


def _in_one_line(text: str) -> str:
    """JSON without the characters at which some clients break lines beside those that JSON itself escapes."""
    return text.translate(LINE_BREAKS)


def _event(data: str) -> str:
    return f"data: {data}\n\n"


async def _with_usage(
    chunks: AsyncIterator[dict[str, Any]], head: Head, answers: Answers, num_prompts: int, options: StreamOptions
) -> AsyncIterator[Mapping[str, Any]]:
    """The chunks, where it was asked for with the `usage` of what has come by then, and a last one with all of it."""
    num_choices = len(answers.choices) // num_prompts
    num_prompt = sum(len(request.prompt_ids) for request in answers.asked.requests[::num_choices])
    async for chunk in chunks:
        if options.continuous_usage_stats:
            chunk["usage"] = usage_so_far(num_prompt, sum(choice.num_tokens for choice in answers.choices))
        elif options.include_usage:
            chunk["usage"] = None
        yield chunk
    if options.include_usage:
        yield head.last(figures(answers.handles, num_prompts=num_prompts))


async def _chunks(head: Head, answers: Answers) -> AsyncIterator[dict[str, Any]]:
    for choice in answers.choices:
        opening = head.opening(choice.index)
        if opening is not None:
            yield opening
    num_begun = [0 for _ in answers.choices]  # characters, as the whole answer counts them
    steps = [StepTexts(answers.decode) for _ in answers.choices] if answers.asked.has_steps else None
    async for piece in answers.pieces():
        index, reason, content = piece.choice.index, piece.choice.finish_reason, _content(answers, piece)
        said: dict[str, Any] = {} if steps is None else steps[index].record(piece.update)
        if answers.asked.trees:
            said |= answers.asked.trees[index].record(head.tokens.text)
        if said:
            content = attrs.evolve(content, steps=said)
        if content.text or content.logprobs or content.steps or reason is not None:
            yield head.chunk(index, content, reason, num_begun[index])
        num_begun[index] += sum(head.tokens.num_begun(one.token_id) for one in content.logprobs or ())
