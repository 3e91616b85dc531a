"""The routes, as a FastAPI application."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import anyio.to_thread
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException

from dynatree_core.errors import DynaTreeError, InputError
from dynatree_core.serve.asked import Asked
from dynatree_core.serve.errors import ApiError, as_api_error
from dynatree_core.serve.faults import as_refusal, http_fault
from dynatree_core.serve.gate import Gate, RequestLog, error_response
from dynatree_core.serve.logs import log_fault
from dynatree_core.serve.metrics import CONTENT_TYPE
from dynatree_core.serve.records import CHAT, COMPLETION, Form
from dynatree_core.serve.schema import ChatBody, CompletionBody, GenerationBody, StreamOptions, TokenizeBody
from dynatree_core.serve.service import Service
from dynatree_core.serve.start_page import start_page
from dynatree_core.serve.stream import event_stream, whole_answer

__all__ = ["make_app"]


def make_app(service: Service) -> FastAPI:
    """The application of one service. The engines run from its startup to its shutdown."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await service.start()
        try:
            yield
        finally:
            service.loop.stop()
            if service.spans is not None:
                await anyio.to_thread.run_sync(service.spans.shutdown)

    app = FastAPI(title="DynaTree", docs_url=None, redoc_url=None, lifespan=lifespan)
    _add_faults(app)
    _add_generation(app, service)
    _add_models(app, service)
    _add_health(app, service)
    _add_page(app)
    _add_metrics(app, service)
    # the last one added is the first that a request meets
    settings = service.settings
    app.add_middleware(
        Gate,
        keys=service.keys,
        clients=service.clients,
        max_body_bytes=settings.max_body_bytes,
        hosts=settings.hosts,
    )
    if service.settings.cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=service.settings.cors_origins, allow_methods=["*"], allow_headers=["*"]
        )
    if service.spans is not None:
        app.add_middleware(service.spans.around)
    app.add_middleware(RequestLog, count_refusal=service.metrics.refuse)
    return app


def _add_faults(app: FastAPI) -> None:
    """Errors in OpenAI's shape, whatever has raised them."""

    def answer(request: Request, error: ApiError) -> Response:
        request.state.line["code"] = error.code
        return error_response(error)

    @app.exception_handler(ApiError)
    async def _(request: Request, error: ApiError) -> Response:
        return answer(request, error)

    @app.exception_handler(DynaTreeError)
    async def _(request: Request, error: DynaTreeError) -> Response:
        if not isinstance(error, InputError):
            log_fault("failed", error)
        return answer(request, as_api_error(error))

    @app.exception_handler(RequestValidationError)
    async def _(request: Request, error: RequestValidationError) -> Response:
        return answer(request, as_refusal(error, request.url.path))

    @app.exception_handler(HTTPException)
    async def _(request: Request, error: HTTPException) -> Response:
        return answer(request, http_fault(error, request.method, request.url.path))


def _add_generation(app: FastAPI, service: Service) -> None:
    async def answer(request: Request, body: GenerationBody, form: Form, asked: Asked, num_prompts: int) -> Response:
        answers, head = service.submitted(asked), service.new_head(form)
        request.state.line.update(asked.line(), stream=body.stream, user=body.user)
        answers.at_close(lambda: request.state.line.update(answers.line(), **service.told(answers)))
        if service.spans is not None:
            engine = service.loop.engines[asked.drafter]
            service.spans.watch(request.state.span, body, head, answers, engine.now)
        if not body.stream:
            return await whole_answer(request, head, answers, num_prompts)
        return event_stream(head, answers, num_prompts, body.stream_options or StreamOptions())

    @app.post("/v1/completions")
    async def completions(body: CompletionBody, request: Request) -> Response:
        """Go on with a text."""
        asked = await service.read(service.reader.completion, body)
        return await answer(request, body, COMPLETION, asked, len(body.prompts))

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatBody, request: Request) -> Response:
        """Answer in a conversation."""
        asked = await service.read(service.reader.chat, body)
        return await answer(request, body, CHAT, asked, 1)


def _add_models(app: FastAPI, service: Service) -> None:
    def record(name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": service.created,
            "owned_by": "dynatree",
            "root": name,  # which vLLM's benchmark asks for
            "max_model_len": service.context_limit,
            "dynatree": service.choices(),
        }

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The names that the model is served by."""
        return {"object": "list", "data": [record(name) for name in service.settings.model_names]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        """One of them."""
        service.reader.check_model(name)
        return record(name)

    @app.post("/tokenize")
    async def tokenize(body: TokenizeBody) -> dict[str, Any]:
        """The tokens of a text or a conversation."""
        ids = await service.read(service.reader.tokenized, body)
        return {"count": len(ids), "max_model_len": service.context_limit, "tokens": ids}


def _add_page(app: FastAPI) -> None:
    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        """A chat in the browser."""
        return HTMLResponse(start_page().html, headers=start_page().headers)


def _add_metrics(app: FastAPI, service: Service) -> None:
    @app.get("/metrics")
    async def metrics() -> Response:
        """What Prometheus reads."""
        return Response(service.metrics.text(), media_type=CONTENT_TYPE)


def _add_health(app: FastAPI, service: Service) -> None:
    @app.get("/health/live")
    async def live() -> Response:
        """Whether the engines' thread runs: if not, the process is to be started anew."""
        is_alive = service.loop.error is None
        return JSONResponse({"status": "alive" if is_alive else "dead"}, 200 if is_alive else 503)

    @app.get("/health/ready")
    @app.get("/health")
    async def ready() -> Response:
        """Whether requests are answered."""
        status = "ready" if service.is_ready else "not ready"
        return JSONResponse({"status": status}, 200 if service.is_ready else 503)
