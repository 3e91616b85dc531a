"""A server with a tiny model in this process, on loopback, and clients that ask it."""

from __future__ import annotations

import contextlib
import json
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import attrs
import httpx2
import openai
from tiny_folder import tiny_tokenizer

from dynatree_core import Engine, generate
from dynatree_core.engine.handle import Handle
from dynatree_core.serve.app import make_app
from dynatree_core.serve.keys import Keys
from dynatree_core.serve.process import Listen, ServerProcess
from dynatree_core.serve.service import Service
from dynatree_core.serve.settings import Settings
from dynatree_core.testing.models import tiny_model

SECONDS = 60.0  # for each answer; a test that needs them has failed
TARGET = tiny_model("llama")
POLICIES = ("fixed(depth=3)", "autoregressive")


def new_engine(drafter: Any = "prompt_lookup", **options: Any) -> Engine:
    return Engine(TARGET, drafter, tokenizer=tiny_tokenizer(), **options)


def new_service(
    engines: dict[str, Engine] | None = None, keys: Keys | None = None, spans: Any = None, **settings: Any
) -> Service:
    """A service for "tiny", with two policies and prompt lookup."""
    engines = {"prompt_lookup": new_engine()} if engines is None else engines
    told = {"model_names": ("tiny", "alias"), "policies": POLICIES, "drafters": tuple(engines), **settings}
    return Service(engines, Settings(**told), keys, spans=spans)


@attrs.frozen
class Running:
    """A server that runs, and its address."""

    service: Service
    process: ServerProcess
    address: str
    thread: threading.Thread

    def openai(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(**self._options(), **options)

    def async_openai(self, **options: Any) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(**self._options(), **options)

    def _options(self) -> dict[str, Any]:
        return {"base_url": f"{self.address}/v1", "api_key": "none", "timeout": SECONDS, "max_retries": 0}

    def http(self, **options: Any) -> httpx2.Client:
        return httpx2.Client(base_url=self.address, timeout=SECONDS, trust_env=False, **options)

    def post(self, path: str, body: Any, **options: Any) -> httpx2.Response:
        with self.http() as client:
            return client.post(path, json=body, **options)


@contextlib.contextmanager
def running(service: Service, listen: Listen | None = None) -> Iterator[Running]:
    """Serve in a thread while the block runs."""
    listener = socket.create_server(("127.0.0.1", 0))  # it takes connections from here on
    process = ServerProcess(make_app(service), service, listen or Listen())
    thread = threading.Thread(target=process.run, args=([listener],))
    thread.start()
    try:
        yield Running(service, process, f"http://127.0.0.1:{listener.getsockname()[1]}", thread)
    finally:
        process.should_exit = True
        thread.join(SECONDS)
        assert not thread.is_alive(), "a server ends when it is told to"


def expected_text(prompt: str, max_new_tokens: int, **options: Any) -> str:
    """The answer of `generate` to a text."""
    tokenizer = tiny_tokenizer()
    result = generate(
        TARGET, None, tokenizer(prompt).input_ids, policy="autoregressive", max_new_tokens=max_new_tokens,
        tokenizer=tokenizer, **options,
    )  # fmt: skip
    return tokenizer.decode(result.token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def chat_text(*contents: str) -> str:
    """What the tiny tokenizer's chat template makes of messages."""
    return "".join(f"{content}! " for content in contents)


class Gate:
    """Lets an engine make its steps one by one, so that a test says what has happened when something else does.

    Attributes:
        submitted: the handles, as they come.
        cancelled: is set when a handle, or all, are to be cancelled.
    """

    def __init__(self, service: Service) -> None:
        self._permits = threading.Semaphore(0)
        self._is_open = False
        self.submitted: queue.SimpleQueue[Handle] = queue.SimpleQueue()
        self.cancelled = threading.Event()
        loop, (engine,) = service.loop, service.loop.engines.values()
        loop.submit = self._then(loop.submit, lambda handles: [self.submitted.put(handle) for handle in handles])
        loop.cancel = self._then(loop.cancel, lambda _: self.cancelled.set())
        loop.cancel_all = self._then(loop.cancel_all, lambda _: self.cancelled.set())
        step = engine.step

        def step_with_permit() -> Any:
            if not self._is_open:
                assert self._permits.acquire(timeout=SECONDS), "a test lets each step happen"
            return step()

        engine.step = step_with_permit

    @staticmethod
    def _then(call: Callable[..., Any], tell: Callable[[Any], Any]) -> Callable[..., Any]:
        def both(*arguments: Any) -> Any:
            answer = call(*arguments)
            tell(answer)
            return answer

        return both

    def step(self, number: int = 1) -> None:
        """Let so many steps happen."""
        self._permits.release(number)

    def open(self) -> None:
        """Let all steps happen from here on."""
        self._is_open = True
        self._permits.release(1000)

    def next_handle(self) -> Handle:
        """The next request that the engine is given."""
        return self.submitted.get(timeout=SECONDS)


@contextlib.contextmanager
def gated(service: Service) -> Iterator[tuple[Running, Gate]]:
    """A server whose engine makes the steps that a test lets happen; all of them when the block ends."""
    gate = Gate(service)
    with running(service) as server:
        try:
            yield server, gate
        finally:
            gate.open()


def until(holds: Callable[[], object]) -> None:
    """Wait until something holds."""
    begin = time.monotonic()
    while not holds():
        assert time.monotonic() < begin + SECONDS, "what is waited for comes"
        time.sleep(0.01)


def events(lines: Iterator[str]) -> Iterator[Any]:
    """The records of server-sent events, without `[DONE]`."""
    for line in lines:
        if line.startswith("data: ") and line != "data: [DONE]":
            yield json.loads(line.removeprefix("data: "))
