"""`dynatree serve`: what fails ends the requests that it belongs to, and is told as what it is."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from command import BrokenDrafter, BrokenState, more_plugins
from serving import SECONDS, TARGET, Gate, Running, events, expected_text, gated, new_engine, new_service, running
from torch import nn

from dynatree_core import DraftPlan, DraftState, Engine
from dynatree_core.engine.handle import Handle
from dynatree_core.errors import QueueFullError
from dynatree_core.runners.base import PassOutput, Runner
from dynatree_core.runners.choice import made_runner
from dynatree_core.serve.schema import CompletionBody

__all__ = ["more_plugins"]  # a fixture

BODY = {"model": "tiny", "prompt": "the cat sat", "max_tokens": 20, "temperature": 0, "ignore_eos": True}
EXPECTED = expected_text(BODY["prompt"], 20, eos_token_id=[])


class Forgetful(BrokenDrafter):
    """A drafter that has no memory left."""

    def start(self, plan: DraftPlan) -> DraftState:
        return ForgetfulState()


class ForgetfulState(BrokenState):
    def propose(self, *_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory, says a test")


def answered(server: Running, **fields: Any) -> tuple[int, Any]:
    """Status, and the answer's text or the error."""
    answer = server.post("/v1/completions", {**BODY, **fields})
    record = answer.json()
    return answer.status_code, record["error"] if "error" in record else record["choices"][0]["text"]


def streamed_error(server: Running, **fields: Any) -> Any:
    """The error that a stream ends with, after what was right until then."""
    with server.http() as http, http.stream("POST", "/v1/completions", json={**BODY, "stream": True, **fields}) as one:
        *records, last = events(one.iter_lines())
    assert EXPECTED.startswith("".join(record["choices"][0]["text"] for record in records))
    return last["error"]


@pytest.mark.usefixtures("more_plugins")
def test_a_policy_that_raises():
    mishap = {"dynatree": {"policy": "mishap(at=2)"}}
    policies = ("fixed(depth=3)", "mishap(at=2)")
    with running(new_service(policies=policies, on_error="raise")) as server:
        status, error = answered(server, **mishap)
        assert (status, error["type"], error["code"]) == (500, "server_error", "failed")
        assert "lines" not in error["message"]  # what it raised stands in the log alone
        assert streamed_error(server, **mishap)["code"] == "failed"
        assert answered(server) == (200, EXPECTED)
    with running(new_service(policies=policies)) as server, pytest.warns(RuntimeWarning, match="mishap"):
        assert answered(server, **mishap) == (200, EXPECTED)


def test_a_drafter_that_raises_beside_one_that_does_not():
    engines = {"prompt_lookup": new_engine(), "broken": new_engine(BrokenDrafter())}
    with running(new_service(engines, on_error="raise")) as server:
        status, error = answered(server, dynatree={"drafter": "broken"})
        assert (status, error["code"]) == (500, "failed")
        assert answered(server) == (200, EXPECTED)
    with running(new_service({"broken": new_engine(BrokenDrafter())})) as server, pytest.warns(RuntimeWarning):
        assert answered(server) == (200, EXPECTED)


def test_a_drafter_without_memory():
    with running(new_service({"forgetful": new_engine(Forgetful())}, on_error="raise")) as server:
        status, error = answered(server)
        assert (status, error["code"]) == (503, "out_of_memory")
        assert streamed_error(server)["code"] == "out_of_memory"


class Full:
    """Makes runners whose passes of several rows find no memory while `is_full`."""

    is_full = False

    def __call__(self, model: nn.Module, name: str) -> Runner:
        runner = made_runner(model, name)
        forward = runner.forward

        def without_memory(*arguments: Any, **options: Any) -> PassOutput:
            if self.is_full:
                raise torch.OutOfMemoryError("CUDA out of memory, says a test")
            return forward(*arguments, **options)

        runner.forward = without_memory  # type: ignore[method-assign]
        return runner


def test_a_device_without_memory():
    full = Full()
    with running(new_service({"prompt_lookup": new_engine(make_runner=full)})) as server:
        assert answered(server) == (200, EXPECTED)
        full.is_full = True
        status, error = answered(server)
        assert (status, error["code"]) == (503, "out_of_memory")
        full.is_full = False
        assert answered(server) == (200, EXPECTED)


def test_engines_that_die_end_all_requests_with_an_error():
    service = new_service()
    with gated(service) as (server, gate), server.http() as http:
        service.loop.on_death = None  # else the server ends before anybody can ask for its health
        engine = service.loop.engines["prompt_lookup"]
        with http.stream("POST", "/v1/completions", json={**BODY, "stream": True}) as stream:
            gate.next_handle()
            gate.step()
            records = events(stream.iter_lines())
            assert next(records)["choices"][0]["text"]
            engine.step = died
            gate.step()
            *_, last = records
        assert (last["error"]["type"], last["error"]["code"]) == ("server_error", "engine_dead")
        assert http.get("/health/live").status_code == http.get("/health").status_code == 503
        status, error = answered(server)
        assert (status, error["code"]) == (503, "engine_dead")


def died() -> None:
    raise RuntimeError("the bits have fallen out")


def test_a_process_whose_engines_have_died_ends():
    service = new_service()
    service.loop.engines["prompt_lookup"].step = died
    with running(service) as server:
        assert answered(server)[1]["code"] == "engine_dead"
        server.thread.join(SECONDS)
        assert not server.thread.is_alive()
    assert isinstance(server.process.error, RuntimeError)


def test_warming_up_waits_where_others_have_filled_the_line(monkeypatch):
    monkeypatch.setattr("dynatree_core.serve.service.FULL_SECONDS", 0.01)
    engine = new_engine(max_sequences=1, max_waiting=0)
    service = new_service({"prompt_lookup": engine}, warms_up=True)
    gate, submit, refused = Gate(service), service.loop.submit, threading.Event()

    def noting(*arguments: Any) -> list[Handle]:
        try:
            return submit(*arguments)
        except QueueFullError:
            refused.set()
            raise

    service.loop.submit = noting
    engine.submit([1, 2, 3], max_new_tokens=1)
    with running(service):
        assert refused.wait(SECONDS)
        gate.open()
        for _ in service.settings.policies:
            handle = gate.next_handle()
            assert handle.wait(SECONDS)
            assert handle.status == "stopped"
        assert service.loop.is_alive


def test_what_cannot_be_warmed_up_ends_the_server():
    service = new_service({"broken": Engine(TARGET, BrokenDrafter(), tokenizer=new_engine().tokenizer)}, warms_up=True)
    with running(service) as server:
        server.thread.join(SECONDS)
        assert not server.thread.is_alive()
    assert "no draft" in str(server.process.error)
    assert not service.is_ready


def test_what_the_engines_thread_calls_has_not_the_readers_tokenizer(monkeypatch):
    service = new_service()
    (request,) = service.reader.completion(CompletionBody(**BODY, stop=["zzzz"])).requests
    monkeypatch.setattr(service.reader.tokenizer, "decode", None)
    assert service.loop.engines["prompt_lookup"].submit(request).result().report.num_new_tokens == BODY["max_tokens"]
