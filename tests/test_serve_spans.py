"""`dynatree serve --otel`: a span for each request, which says nothing of prompts unless it is asked to."""

from __future__ import annotations

import http.server
import itertools
import json
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from command import Dynatree, dynatree, is_one_error_line
from opentelemetry.sdk.resources import SERVICE_NAME
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from serving import SECONDS, Running, expected_text, gated, new_engine, new_service, running, until
from test_serve_limits import LONG, one_lane

from dynatree_core.errors import ParameterError
from dynatree_core.serve import spans as spans_module
from dynatree_core.serve.spans import Spans, spans_of_environment

__all__ = ["dynatree"]  # a fixture

BODY = {"model": "tiny", "prompt": "the cat sat", "max_tokens": 6, "temperature": 0}
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Kept:
    """Spans that stay in this process."""

    def __init__(self, **options: Any) -> None:
        self._exporter = InMemorySpanExporter()
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.spans = Spans(provider, **options)

    def taken(self) -> list[ReadableSpan]:
        """Those that have ended since the last call."""
        found = list(self._exporter.get_finished_spans())
        self._exporter.clear()
        return found

    def next(self) -> ReadableSpan:
        """The one that ends next: after a client has its answer."""
        until(self._exporter.get_finished_spans)
        (span,) = self.taken()
        return span


@pytest.fixture(scope="module")
def kept() -> Kept:
    return Kept()


@pytest.fixture(scope="module")
def server(kept: Kept) -> Iterator[Running]:
    with running(new_service(spans=kept.spans)) as server:
        yield server


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("form", ["completions", "chat/completions"])
def test_a_request_has_one_span_with_times_and_figures(kept, server, form, stream):
    asked = {"messages": [{"role": "user", "content": "the cat sat"}]} if form.startswith("chat") else {}
    body = {**BODY, "n": 2, "stream": stream, **asked}
    if asked:
        del body["prompt"]
    answer = server.post(f"/v1/{form}", body, headers={"traceparent": PARENT, "tracestate": "a=1"})
    assert answer.status_code == 200
    span = kept.next()
    assert (span.name, span.kind) == (f"POST /v1/{form}", SpanKind.SERVER)
    assert f"{span.context.trace_id:032x}" == PARENT.split("-")[1]
    assert f"{span.parent.span_id:016x}" == PARENT.split("-")[2]
    found = dict(span.attributes)
    usage = None if stream else answer.json()["usage"]
    assert found["http.response.status_code"] == 200
    assert found["gen_ai.operation.name"] == ("chat" if asked else "text_completion")
    assert found["gen_ai.request.model"] == "tiny"
    assert found["gen_ai.usage.output_tokens"] == 12
    assert found["gen_ai.response.finish_reasons"] == ("length", "length")
    assert found["dynatree.request_id"] == answer.headers["X-Request-Id"]
    assert found["dynatree.policy"] == "fixed(depth=3)"
    assert found["dynatree.prefill_seconds"] > 0
    assert found["dynatree.decode_seconds"] > 0
    assert 0 <= found["dynatree.waiting_seconds"] <= found["dynatree.first_token_seconds"] <= found["dynatree.seconds"]
    if usage is not None:
        figures = {f"dynatree.{name}": value for name, value in usage["dynatree"].items() if value is not None}
        figures["dynatree.position_acceptance"] = tuple(figures["dynatree.position_acceptance"])
        told = {name: found[name] for name in figures if name not in ("dynatree.policy", "dynatree.drafter")}
        assert told.items() <= figures.items()
    moments = [(event.attributes["dynatree.choice"], event.name, event.timestamp) for event in span.events]
    assert [moment[:2] for moment in moments] == [
        (choice, name) for choice in (0, 1) for name in ("started", "first_token", "ended")
    ]
    slack = 5_000_000  # ns between the readings of two clocks
    for choice in (0, 1):
        times = [span.start_time, *(at for number, _, at in moments if number == choice), span.end_time]
        assert all(before <= after + slack for before, after in itertools.pairwise(times)), times


def test_no_text_stands_in_a_span(kept, server):
    spans = []
    with server.http() as client:
        for fields in (
            {"stop": "secret", "user": "secret", "prompt": "secret cat"},
            {"prompt": "secret cat", "temprature": "secret"},
            {"model": "secret"},
        ):
            client.post("/v1/completions", json={**BODY, **fields})
            spans.append(kept.next())
        client.post("/v1/completions", content=b'{"secret', headers={"Content-Type": "application/json"})
        spans.append(kept.next())
    assert "secret" not in "".join(span.to_json() for span in spans)
    assert [span.attributes.get("error.type") for span in spans] == [
        None, "unknown_parameter", "model_not_found", "invalid_json",
    ]  # fmt: skip
    assert {span.status.status_code for span in spans} == {StatusCode.UNSET}  # the client's errors are not the server's


def test_texts_stand_in_a_span_where_they_were_asked_for():
    kept = Kept(has_texts=True)
    with running(new_service(spans=kept.spans)) as server:
        server.post("/v1/completions", BODY)
        whole = kept.next()
        server.post("/v1/chat/completions", {**BODY, "prompt": None, "messages": [{"role": "user", "content": "the"}]})
        chat = kept.next()
    said = json.loads(whole.attributes["gen_ai.input.messages"])
    assert said == [{"role": "user", "parts": [{"type": "text", "content": "the cat sat"}]}]
    written = json.loads(whole.attributes["gen_ai.output.messages"])
    assert written == [{"role": "assistant", "parts": [{"type": "text", "content": expected_text("the cat sat", 6)}]}]
    assert json.loads(chat.attributes["gen_ai.input.messages"])[0]["parts"][0]["content"] == "the"


def test_other_routes_have_none(kept, server):
    with server.http() as client:
        for path in ("/health", "/v1/models", "/metrics", "/v1/completions"):
            client.get(path)
        client.post("/nowhere", json={})
    assert kept.taken() == []


def test_a_parent_that_is_none_begins_a_trace(kept, server):
    server.post("/v1/completions", BODY, headers={"traceparent": "00-zz"})
    assert kept.next().parent is None


def test_a_client_that_goes_leaves_a_span():
    kept = Kept()
    with gated(one_lane(spans=kept.spans)) as (server, gate):
        with server.http() as client, client.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as stream:
            gate.next_handle()
            gate.step(2)
            next(stream.iter_lines())
        assert gate.cancelled.wait(SECONDS)
        gate.open()
    (span,) = kept.taken()
    assert span.attributes["gen_ai.response.finish_reasons"] == ("cut",)
    assert 1 <= span.attributes["gen_ai.usage.output_tokens"] < 100


def test_what_fails_is_an_error_in_its_span():
    kept, engine = Kept(), new_engine()
    with running(new_service({"prompt_lookup": engine}, spans=kept.spans)) as server:
        step = engine.step

        def failing():
            engine.step = step
            raise MemoryError

        engine.step = failing
        answer = server.post("/v1/completions", BODY)
        assert answer.status_code == 503
    (span,) = kept.taken()
    assert span.status.status_code == StatusCode.ERROR
    assert span.attributes["error.type"] == "engine_dead"


def test_times_of_a_span_are_right_though_the_thread_is_left_out_between_two_looks_at_clocks(monkeypatch):
    """Ten seconds, each time but one: before the look at the system's clock or behind it."""
    elapsed = [100.0]
    waits = iter([10.0, 0.0, 0.0, 10.0, 0.001, 0.0, 10.0, 0.0, 0.0, 10.0])

    def now():
        return elapsed[0]

    def wall():
        elapsed[0] += next(waits)
        told = round(elapsed[0] * 1e9) + 7_000_000_000
        elapsed[0] += next(waits)
        return told

    monkeypatch.setattr(spans_module, "time", SimpleNamespace(time_ns=wall))
    assert spans_module._begin_ns(now) == pytest.approx(7e9, abs=1e6)


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"OTEL_TRACES_EXPORTER": "zipkin"}, "must be otlp, console or none, got 'zipkin'"),
        ({"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "OTEL_EXPORTER_OTLP_PROTOCOL must be http/protobuf"),
        ({"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/json"}, "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL must be"),
    ],
)
def test_what_the_environment_cannot_ask_for(variables, words):
    with pytest.raises(ParameterError, match=words):
        spans_of_environment(variables)


@pytest.mark.parametrize(
    ("wish", "has_texts"), [("", False), ("false", False), ("event_only", False), ("true", True), ("SPAN_ONLY", True)]
)
def test_the_environment_says_where_spans_go_and_whether_they_have_texts(monkeypatch, wish, has_texts):
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment=test")
    told = {"OTEL_TRACES_EXPORTER": "none", "OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT": wish}
    spans = spans_of_environment(told)
    assert spans.has_texts is has_texts
    attributes = spans.provider.resource.attributes
    assert (attributes[SERVICE_NAME], attributes["deployment.environment"]) == ("dynatree", "test")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "mine")
    assert spans_of_environment(told).provider.resource.attributes[SERVICE_NAME] == "mine"


def test_without_the_extra_it_says_what_to_install(dynatree: Dynatree, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dynatree_core.cli.serve.OTEL", ("no_such_package.sdk",))
    ran = dynatree("serve", "--otel")
    assert ran.code == 2
    assert is_one_error_line(ran, "--otel needs OpenTelemetry", "pip install 'dynatree[otel]'")


def test_a_collector_gets_the_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the exporter that the command takes: one request over HTTP, with the span's name in it."""
    bodies: list[tuple[str, bytes]] = []

    class Collector(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    collector = http.server.HTTPServer(("127.0.0.1", 0), Collector)
    thread = threading.Thread(target=collector.serve_forever)
    thread.start()
    try:
        monkeypatch.setattr("dynatree_core.serve.spans.SHUTDOWN_SECONDS", SECONDS)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{collector.server_port}")
        with running(new_service(spans=spans_of_environment({}))) as server:
            server.post("/v1/completions", BODY)
    finally:
        collector.shutdown()
        thread.join()
        collector.server_close()
    ((path, sent),) = bodies
    assert path == "/v1/traces"
    assert b"POST /v1/completions" in sent
    assert b"dynatree.accepted_tokens" in sent


def test_a_collector_that_does_not_answer_is_not_waited_for(monkeypatch, caplog):
    monkeypatch.setattr("dynatree_core.serve.spans.SHUTDOWN_SECONDS", 0.05)
    answered = threading.Event()

    class Waiting(InMemorySpanExporter):
        def shutdown(self) -> None:
            answered.wait()

    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(Waiting()))
    try:
        with running(new_service(spans=Spans(provider))):
            pass
        assert not answered.is_set()
        assert "spans_lost" in [record.msg for record in caplog.records]
    finally:
        answered.set()


def test_the_process_has_no_second_wait_for_a_collector():
    assert spans_of_environment({"OTEL_TRACES_EXPORTER": "none"}).provider._atexit_handler is None
