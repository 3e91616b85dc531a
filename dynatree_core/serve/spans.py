"""A span of OpenTelemetry for each request that is to compute something.

Attributes have the names of OpenTelemetry's conventions for HTTP servers and for generative models where there are
such, else `dynatree.` before them. No text of a prompt or an answer is among them unless the environment asks for it
by the variable of these conventions, `OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT`.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from opentelemetry import propagate
from opentelemetry.propagators.textmap import Getter
from opentelemetry.sdk.resources import SERVICE_NAME, OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter, SpanExporter
from opentelemetry.trace import Span, SpanKind, StatusCode
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dynatree_core.engine.handle import Handle
from dynatree_core.errors import ParameterError
from dynatree_core.serve.answers import Answers
from dynatree_core.serve.figures import usage
from dynatree_core.serve.logs import log
from dynatree_core.serve.records import CHAT, Head
from dynatree_core.serve.schema import ChatBody, CompletionBody, GenerationBody

__all__ = ["Spans", "spans_of_environment"]

PATHS = ("/v1/completions", "/v1/chat/completions")
TEXTS_VARIABLE = "OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT"
TEXTS = ("true", "span_only", "span_and_event")  # its values that ask for texts in spans
PROTOCOL_VARIABLES = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
PROTOCOL = "http/protobuf"
SHUTDOWN_SECONDS = 5.0  # in which the last spans have to be sent


class Spans:
    """Begins a span with each request of a generation, and ends it with the last byte of the answer.

    Args:
        provider: of spans, which knows where they go.
        has_texts: whether they have prompts and answers.
    """

    def __init__(self, provider: TracerProvider, *, has_texts: bool = False) -> None:
        self.provider = provider
        self.has_texts = has_texts
        self._tracer = provider.get_tracer("dynatree_core.serve")

    def around(self, app: ASGIApp) -> ASGIApp:
        """The application, with a span around each of these requests: `state.span`."""

        async def spanned(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http" or scope["method"] != "POST" or scope["path"] not in PATHS:
                await app(scope, receive, send)
                return
            with self._begun(scope) as span:
                await _noted(app, span, scope, receive, send)

        return spanned

    def _begun(self, scope: Scope) -> Any:
        """A span, beneath the client's own where it has sent a `traceparent`."""
        route, state = scope["path"], scope["state"]
        attributes = {
            "http.request.method": "POST",
            "http.route": route,
            "url.path": route,
            "url.scheme": scope["scheme"],
            "dynatree.request_id": state["request_id"],
        }
        # what an exception says may quote a prompt, so spans have the code of an error alone
        return self._tracer.start_as_current_span(
            f"POST {route}",
            propagate.extract(Headers(scope=scope), getter=_HeaderGetter()),
            SpanKind.SERVER,
            attributes,
            record_exception=False,
            set_status_on_exception=False,
        )

    def watch(self, span: Span, body: GenerationBody, head: Head, answers: Answers, now: Callable[[], float]) -> None:
        """Have the span say what is asked now, and what came of it when the answers are closed.

        Args:
            span: of the request.
            body: of the request.
            head: of its records.
            answers: that were submitted.
            now: the engine's clock.
        """
        if span.is_recording():
            span.set_attributes(_asked(body, head, answers))
            answers.at_close(lambda: self._close(span, body, answers, now))

    def _close(self, span: Span, body: GenerationBody, answers: Answers, now: Callable[[], float]) -> None:
        num_prompts = len(answers.asked.requests) // body.n
        span.set_attributes(_answered(answers, num_prompts))
        begin_ns = _begin_ns(now)
        for choice, handle in enumerate(answers.handles):
            for name, seconds in _moments(handle):
                span.add_event(name, {"dynatree.choice": choice}, begin_ns + round(seconds * 1e9))
        errors = [type(handle.error).__name__ for handle in answers.handles if handle.error is not None]
        if errors:  # in a stream the status was 200 by then
            span.set_attribute("error.type", errors[0])
            span.set_status(StatusCode.ERROR)
        if self.has_texts:
            span.set_attributes(_texts(body, answers))

    def shutdown(self) -> None:
        """Send what was not sent yet. A collector that takes longer than `SHUTDOWN_SECONDS` does not get it."""
        sending = threading.Thread(target=self.provider.shutdown, name="dynatree-spans", daemon=True)
        sending.start()
        sending.join(SHUTDOWN_SECONDS)
        if sending.is_alive():  # the SDK's own bounds are half a minute, and it tries again until then
            log("spans_lost", level=logging.WARNING, seconds=SHUTDOWN_SECONDS)


async def _noted(app: ASGIApp, span: Span, scope: Scope, receive: Receive, send: Send) -> None:
    """Have the request answered, and its span say with which status and code."""
    state, context = scope["state"], span.get_span_context()
    state["span"] = span
    if context.is_valid:
        state["line"]["trace_id"] = f"{context.trace_id:032x}"

    async def send_noting(message: Message) -> None:
        if message["type"] == "http.response.start":
            span.set_attribute("http.response.status_code", message["status"])
            if message["status"] >= 500:
                span.set_status(StatusCode.ERROR)
        await send(message)

    try:
        await app(scope, receive, send_noting)
    except Exception as error:
        span.set_attribute("error.type", type(error).__name__)
        span.set_status(StatusCode.ERROR)
        raise
    if "code" in state["line"]:
        span.set_attribute("error.type", state["line"]["code"])


def _asked(body: GenerationBody, head: Head, answers: Answers) -> dict[str, Any]:
    asked = {
        "gen_ai.operation.name": "chat" if head.form is CHAT else "text_completion",
        "gen_ai.provider.name": "dynatree",
        "gen_ai.request.model": body.model,
        "gen_ai.response.model": head.model,
        "gen_ai.response.id": head.id,
        "gen_ai.request.max_tokens": answers.asked.requests[0].max_new_tokens,
        "gen_ai.request.temperature": body.temperature,
        "gen_ai.request.top_p": body.top_p,
        "gen_ai.request.choice.count": body.n,
        "gen_ai.request.stream": body.stream,
        "dynatree.policy": answers.asked.policy,
        "dynatree.drafter": answers.asked.drafter,
    }
    return {name: value for name, value in asked.items() if value is not None}


def _answered(answers: Answers, num_prompts: int) -> dict[str, Any]:
    told = usage(answers.handles, num_prompts=num_prompts)
    reports = [handle.partial.report for handle in answers.handles]
    figures = told["dynatree"] | {
        "prefill_seconds": sum(report.prefill_seconds for report in reports),
        "decode_seconds": sum(report.decode_seconds for report in reports),
    }
    figures = {name: value for name, value in figures.items() if name not in ("policy", "drafter")}
    own = {f"dynatree.{name}": value for name, value in figures.items() if value is not None}
    return own | {
        "gen_ai.usage.input_tokens": told["prompt_tokens"],
        "gen_ai.usage.output_tokens": told["completion_tokens"],
        "gen_ai.usage.cache_read.input_tokens": told["prompt_tokens_details"]["cached_tokens"],
        "gen_ai.response.finish_reasons": [choice.finish_reason or "cut" for choice in answers.choices],
    }


def _begin_ns(now: Callable[[], float]) -> int:
    """When the engine's clock was 0, on that of spans: by the two readings in a row between which least time passed."""
    readings = []
    for _ in range(5):  # a machine may leave this thread out between two
        before, at_ns, after = now(), time.time_ns(), now()
        readings.append((after - before, at_ns - round((before + after) / 2 * 1e9)))
    return min(readings)[1]


def _moments(handle: Handle) -> Iterator[tuple[str, float]]:
    """What a span has events of, in seconds on the engine's clock."""
    moments = {"started": handle.started_at, "first_token": handle.first_token_at, "ended": handle.ended_at}
    return ((name, at) for name, at in moments.items() if at is not None)


def _texts(body: GenerationBody, answers: Answers) -> dict[str, str]:
    """Prompts and answers as the conventions have messages."""
    if isinstance(body, ChatBody):
        said = [(message.role, message.text) for message in body.messages]
    else:
        assert isinstance(body, CompletionBody), "there are two kinds of bodies"
        said = [("user", prompt if isinstance(prompt, str) else answers.decode(prompt)) for prompt in body.prompts]
    written = [("assistant", answers.decode(handle.token_ids)) for handle in answers.handles]
    return {"gen_ai.input.messages": _messages(said), "gen_ai.output.messages": _messages(written)}


def _messages(said: Sequence[tuple[str, str]]) -> str:
    return json.dumps([{"role": role, "parts": [{"type": "text", "content": text}]} for role, text in said])


class _HeaderGetter(Getter[Headers]):
    """How a context is read from headers."""

    def get(self, carrier: Headers, key: str) -> list[str] | None:
        return carrier.getlist(key) or None

    def keys(self, carrier: Headers) -> list[str]:
        return carrier.keys()


def spans_of_environment(environment: Mapping[str, str] | None = None) -> Spans:
    """Spans that go where OpenTelemetry's own variables say; else to a collector on this machine, port 4318.

    Args:
        environment: where `OTEL_TRACES_EXPORTER`, the protocol and the wish for texts stand; None: the process's own,
            from which the SDK reads everything else.

    Raises:
        ParameterError: they ask for what is not installed with the extra.
    """
    environment = os.environ if environment is None else environment
    exporter = _exporter(environment)
    resource = Resource.create().merge(Resource({SERVICE_NAME: "dynatree"})).merge(OTELResourceDetector().detect())
    # not at the process's exit: without a bound, and a second time where `shutdown` was over
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    if exporter is not None:
        provider.add_span_processor(BatchSpanProcessor(exporter))
    return Spans(provider, has_texts=environment.get(TEXTS_VARIABLE, "").strip().lower() in TEXTS)


def _exporter(environment: Mapping[str, str]) -> SpanExporter | None:
    kind = environment.get("OTEL_TRACES_EXPORTER", "").strip() or "otlp"
    if kind == "none":
        return None
    if kind == "console":
        return ConsoleSpanExporter()
    if kind != "otlp":
        raise ParameterError(f"OTEL_TRACES_EXPORTER must be otlp, console or none, got '{kind:.60}'")
    named = next((name for name in PROTOCOL_VARIABLES if environment.get(name)), None)
    if named is not None and environment[named] != PROTOCOL:
        raise ParameterError(
            f"{named} must be {PROTOCOL}, which the extra 'otel' brings, got '{environment[named]:.60}'"
        )
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    return OTLPSpanExporter()
