"""The service behind the routes: engines, the thread that drives them, and who reads bodies for them."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

import anyio
import anyio.to_thread

from dynatree_core.engine.engine import Engine
from dynatree_core.models.architectures import max_positions
from dynatree_core.serve.answers import Answers
from dynatree_core.serve.asked import Asked, Reader
from dynatree_core.serve.loop import EngineLoop
from dynatree_core.serve.settings import Settings
from dynatree_core.text.stream import decode_text

__all__ = ["Service"]

Result = TypeVar("Result")


class Service:
    """What a server's routes work with.

    Args:
        engines: with one target and a tokenizer, by the name of their drafter, in the order of `settings.drafters`.
        settings: what is allowed.
    """

    def __init__(self, engines: Mapping[str, Engine], settings: Settings) -> None:
        first = next(iter(engines.values()))
        assert first.tokenizer is not None, "a server reads texts"
        self.settings = settings
        self.loop = EngineLoop(engines)
        self.context_limit = max_positions(first.target)
        self.created = int(time.time())
        # a tokenizer cannot be read in one thread while another has it changed, so each thread has its own
        self.reader = Reader(self.loop.engines, copy.deepcopy(first.tokenizer), settings)
        self._tokenizer = copy.deepcopy(first.tokenizer)
        self._reading = anyio.CapacityLimiter(1)

    @property
    def is_ready(self) -> bool:
        """Whether requests are answered."""
        return self.loop.is_alive

    async def read(self, how: Callable[..., Result], *what: object) -> Result:
        """Call a method of the reader in a thread, so that a long prompt holds nobody up."""
        return await anyio.to_thread.run_sync(how, *what, limiter=self._reading)

    def answers(self, asked: Asked) -> Answers:
        """The answers to what was read; nothing is computed before they are submitted."""
        return Answers(self.loop, asked, self.decode)

    def decode(self, token_ids: list[int]) -> str:
        """The text of tokens, for the event loop's thread."""
        return decode_text(self._tokenizer, token_ids)
