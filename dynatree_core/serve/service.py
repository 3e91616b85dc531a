"""The service behind the routes: engines, the thread that drives them, and who reads bodies for them."""

from __future__ import annotations

import asyncio
import copy
import functools
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeVar

import anyio
import anyio.to_thread

from dynatree_core.engine.engine import Engine
from dynatree_core.engine.observer import Observer
from dynatree_core.errors import ParameterError
from dynatree_core.models.architectures import max_positions
from dynatree_core.models.placement import num_processes
from dynatree_core.serve.answers import Answers
from dynatree_core.serve.asked import Asked, Reader
from dynatree_core.serve.clients import Clients
from dynatree_core.serve.errors import ApiError
from dynatree_core.serve.keys import Keys
from dynatree_core.serve.logs import log
from dynatree_core.serve.loop import EngineLoop
from dynatree_core.serve.metrics import Metrics
from dynatree_core.serve.records import Form, Head
from dynatree_core.serve.settings import Settings
from dynatree_core.serve.tokens import TokenTexts
from dynatree_core.text.stream import decode_text
from dynatree_core.text.tools import text_with_marker

if TYPE_CHECKING:
    from dynatree_core.serve.spans import Spans  # which needs an extra

__all__ = ["Service"]

Result = TypeVar("Result")
FULL_SECONDS = 0.5  # between two looks for room in the waiting line


class Service:
    """What a server's routes work with.

    Args:
        engines: with one target and a tokenizer, by the name of their drafter, in the order of `settings.drafters`.
        settings: what is allowed.
        keys: of those who may ask; without any, everybody may.
        observers: that hear of all generations of an engine, by the same names.
        spans: of requests; None: there are none.
    """

    def __init__(
        self,
        engines: Mapping[str, Engine],
        settings: Settings,
        keys: Keys | None = None,
        observers: Mapping[str, Observer] | None = None,
        spans: Spans | None = None,
    ) -> None:
        first = next(iter(engines.values()))
        if num_processes(first.target) > 1:
            raise ParameterError("a server has its model in one process, but several share this one's weights")
        assert first.tokenizer is not None, "a server reads texts"
        self.settings = settings
        self.spans = spans
        self.keys = Keys.of([]) if keys is None else keys
        self.loop = EngineLoop(engines)
        self.metrics = Metrics(settings.model_names[0], lambda: self.loop.loads, lambda: self.loop.is_alive)
        self.loop.on_events = self.metrics.hear
        self.clients = Clients(settings.max_requests)
        self.context_limit = max_positions(first.target)
        self.created = int(time.time())
        # a tokenizer cannot be read in one thread while another has it changed, so each thread has its own
        self.reader = Reader(self.loop.engines, copy.deepcopy(first.tokenizer), settings, observers or {})
        self._tokenizer = copy.deepcopy(first.tokenizer)
        self._token_texts = TokenTexts(copy.deepcopy(first.tokenizer))
        self._reading = anyio.CapacityLimiter(1)
        self._event_loop: asyncio.AbstractEventLoop | None = None
        self._is_stopping = False
        self._is_warm = not settings.warms_up
        self._warming: asyncio.Task[None] | None = None

    @property
    def is_ready(self) -> bool:
        """Whether requests are answered without delay."""
        return self.loop.is_alive and self._is_warm and not self._is_stopping

    async def start(self) -> None:
        """Begin to compute."""
        self._event_loop = asyncio.get_running_loop()
        self.loop.start()
        if not self._is_warm:
            self._warming = asyncio.create_task(self._warm_up())

    async def _warm_up(self) -> None:
        """Have each drafter and policy decode a few tokens: what they measure, load or lay out then is there.

        Where one of them fails the server ends, since no request would do better.
        """
        begin = time.monotonic()
        try:
            for asked in await self.read(self.reader.warm_ups):
                answers = await self._submitted_when_there_is_room(asked)
                async for _ in answers.pieces():
                    pass
        except Exception as error:  # noqa: BLE001  # whatever it is ends the server, unless it is about to end
            if not self._is_stopping:
                self.loop.fail(error.__cause__ or error)  # what a client would be told says less
        else:
            self._is_warm = True
            log("ready", seconds=round(time.monotonic() - begin, 3))

    async def _submitted_when_there_is_room(self, asked: Asked) -> Answers:
        """Answers that are being computed. Clients may ask before the server is warm, and so fill the waiting line."""
        while True:
            answers = Answers(self.loop, asked, self.decode)
            try:
                await anyio.to_thread.run_sync(answers.submit_from, asyncio.get_running_loop())
            except ApiError as error:
                if error.code != "queue_full":
                    raise
                await asyncio.sleep(FULL_SECONDS)
            else:
                return answers

    def begin_to_stop(self) -> None:
        """Take no more requests, and cut off those that are not done in time. For a signal's handler."""
        self._is_stopping = True
        if self._event_loop is not None:
            self._event_loop.call_soon_threadsafe(self._plan_to_cut)

    def _plan_to_cut(self) -> None:
        log("stopping", open=self.loop.num_open, seconds=self.settings.stop_seconds)
        asyncio.get_running_loop().call_later(self.settings.stop_seconds, self.loop.cancel_all)

    async def read(self, how: Callable[..., Result], *what: object) -> Result:
        """Call a method of the reader in a thread, so that a long prompt holds nobody up."""
        return await anyio.to_thread.run_sync(how, *what, limiter=self._reading)

    def submitted(self, asked: Asked) -> Answers:
        """The answers to what was read, which are being computed.

        Raises:
            ApiError: there is no room for them, or the server is about to end.
        """
        if self._is_stopping:
            raise ApiError(503, "the server is about to end; ask again later", code="stopping", retry_after=5)
        answers = Answers(self.loop, asked, self.decode_of(asked), max_seconds=self.settings.max_seconds)
        answers.submit()
        return answers

    def told(self, answers: Answers) -> dict[str, list[str]]:
        """Prompts and answers for the log, with special tokens; nothing unless the server was told so."""
        if not self.settings.logs_prompts:
            return {}
        prompts = [str(self._tokenizer.decode(list(request.prompt_ids))) for request in answers.asked.requests]
        return {"prompts": prompts, "answers": [str(self._tokenizer.decode(one.token_ids)) for one in answers.handles]}

    def choices(self) -> dict[str, object]:
        """What a request may choose, for clients that offer it."""
        settings = self.settings
        return {
            "policies": settings.policies,
            "drafters": settings.drafters,
            "max_tokens": settings.max_tokens,
            "has_chat_template": self._tokenizer.chat_template is not None,
            "shows_trees": settings.shows_trees,
        }

    def new_head(self, form: Form) -> Head:
        """What the records of one answer begin with."""
        return Head(form, self.settings.model_names[0], self._token_texts)

    def decode_of(self, asked: Asked) -> Callable[[list[int]], str]:
        """What makes text of an answer's tokens: calls of tools may begin with a special one."""
        if asked.tool_form is None:
            return self.decode
        return functools.partial(text_with_marker, asked.tool_form, self._tokenizer)

    def decode(self, token_ids: list[int]) -> str:
        """The text of tokens, for the event loop's thread."""
        return decode_text(self._tokenizer, token_ids)
