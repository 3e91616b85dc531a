"""What every request goes through before a route sees it: its id and its line in the log, the key, the body's size.

Written against ASGI itself, where Starlette's own base for this would hide from the routes that a client has gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import re
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from fastapi.responses import JSONResponse, Response
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dynatree_core.errors import ParameterError
from dynatree_core.serve.clients import Clients
from dynatree_core.serve.errors import ApiError, error_record
from dynatree_core.serve.keys import Keys
from dynatree_core.serve.logs import REQUEST_ID, log, log_fault

__all__ = ["Gate", "RequestLog", "check_host_names", "error_response"]

OPEN_PATHS = ("/", "/health", "/health/live", "/health/ready")  # without a key; the page asks for one
BODY_SECONDS = 60.0  # in which a body has to arrive
_HOST_NAME = re.compile(r"\*|(\*\.)?[^\s/:*\[\]]+")
_ID = re.compile(r"[\w.:-]{1,100}", re.ASCII)


def error_response(error: ApiError) -> Response:
    """An error as an answer."""
    headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error_record(error), error.status, headers)


class RequestLog:
    """Gives each request an id, writes its line when it is over, and answers what nobody foresaw with 500.

    A client's own `X-Request-Id` is taken where it is a word. Routes put what the line is to say besides into
    `request.state.line`; with an error, its code.
    """

    def __init__(self, app: ASGIApp, count_refusal: Callable[[str], None]) -> None:
        self._app = app
        self._count_refusal = count_refusal

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _ID.fullmatch(given) else uuid.uuid4().hex
        line: dict[str, Any] = {}
        scope.setdefault("state", {}).update(request_id=request_id, line=line)
        REQUEST_ID.set(request_id)
        begin, status = time.perf_counter(), 0

        async def send_noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_noting)
        except Exception as error:
            log_fault("unforeseen", error)
            if status:  # it has begun: the connection breaks off, which is all that can be told
                raise
            fault = ApiError(500, "the server has failed; its log says why", code="internal_error")
            line["code"] = fault.code
            await error_response(fault)(scope, receive, send_noting)
        finally:
            seconds = round(time.perf_counter() - begin, 6)
            if "code" in line:
                self._count_refusal(line["code"])
            log("request", method=scope["method"], path=scope["path"], status=status, seconds=seconds, **line)


class Gate:
    """Lets a request through to the routes, or answers it with what is in the way.

    A client's requests are counted from before their bodies are read, since reading many large ones takes memory and
    time, too, until the last byte of the answer, after which the client may ask again. Those without a body, such as
    health checks, are not.
    """

    def __init__(
        self, app: ASGIApp, keys: Keys, clients: Clients, max_body_bytes: int, hosts: Sequence[str] = ()
    ) -> None:
        self._app = app
        self._keys = keys
        self._clients = clients
        self._max_body_bytes = max_body_bytes
        self._hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        app, line = self._app, scope["state"]["line"]
        with contextlib.ExitStack() as counted:
            try:
                self._check_host(Headers(scope=scope).get("host", ""))
                line["client"] = client = self._client(scope)
                if scope["method"] == "POST":
                    check_media_type(Headers(scope=scope).get("content-type", ""))
                    counted.enter_context(self._clients.counted(client))
                body = await self._body(scope, receive)
            except ApiError as error:
                line["code"] = error.code
                app = error_response(error)
            else:
                if body is None:  # the client has gone
                    return
                receive = _replayed(body, receive)
            await app(scope, receive, _telling_the_end(send, counted.close))

    def _check_host(self, host: str) -> None:
        """Refuse a name that somebody else may have pointed at this server, so that a page of theirs can ask it.

        Where there are keys no page has one, and names do not matter.
        """
        if not self._keys and not is_own_host(host, self._hosts):
            message = f"the server is not known as '{host:.100}' here; --allow-host makes it so, or ask by its address"
            raise ApiError(400, message, code="host_not_allowed")

    def _client(self, scope: Scope) -> str:
        """Who asks: the name of the key, or the address."""
        if self._keys and scope["path"] not in OPEN_PATHS:
            name = self._keys.name_of(Headers(scope=scope).get("authorization"))
            if name is None:
                message = "a valid API key must come in the header 'Authorization: Bearer KEY'"
                raise ApiError(401, message, code="invalid_api_key")
            return name
        return scope["client"][0] if scope.get("client") else "unknown"

    async def _body(self, scope: Scope, receive: Receive) -> bytes | None:
        """The whole body; None: the client has gone."""
        length = Headers(scope=scope).get("content-length", "")
        if length.isdecimal() and (len(length) > 15 or int(length) > self._max_body_bytes):
            raise self._too_large()
        parts, num_bytes = [], 0
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    parts.append(message.get("body", b""))
                    num_bytes += len(parts[-1])
                    if num_bytes > self._max_body_bytes:
                        raise self._too_large()
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            words = f"a body must arrive within {BODY_SECONDS:.0f} seconds"
            raise ApiError(408, words, code="body_timeout") from None

    def _too_large(self) -> ApiError:
        message = (
            f"a body may have {self._max_body_bytes} bytes at most; shorten the prompt, or ask in several requests"
        )
        return ApiError(413, message, code="body_too_large")


def check_media_type(header: str) -> None:
    """Refuse a body that is not said to be JSON, as any page in a browser may send it without asking first.

    Raises:
        ApiError: naming what came.
    """
    kind = header.partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        what = f"got '{kind:.100}'" if kind else "there is none"
        message = f"the header Content-Type must say application/json, {what}; send JSON, and say so"
        raise ApiError(415, message, code="not_json")


def check_host_names(names: Sequence[str]) -> None:
    """Refuse what no `Host` header would match, since its port is left out before it is compared.

    Raises:
        ParameterError: naming it, and what to do.
    """
    for name in names:
        if _HOST_NAME.fullmatch(name) or is_address(name):
            continue
        with_port = re.fullmatch(r"(.+):[0-9]*", name)
        hint = f"'{with_port[1]:.100}'" if with_port and "/" not in name else "the name alone"
        raise ParameterError(
            f"--allow-host must be a name without scheme and port, which holds at each port, got '{name:.100}'; "
            f"give {hint}"
        )


def is_address(host: str) -> bool:
    """Whether a text is an address of IPv4 or IPv6."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def is_own_host(header: str, names: Sequence[str]) -> bool:
    """Whether a `Host` header names this server: by an address, which no name server can point elsewhere, or a name.

    Args:
        header: as it came, with a port or without; empty where there is none, which no browser does.
        names: beside loopback's; "*.example.org" stands for all below it, "*" for all.
    """
    host = header.partition("]")[0].removeprefix("[") if header.startswith("[") else header.partition(":")[0]
    host = host.lower().rstrip(".")
    if not host or host == "localhost" or host.endswith(".localhost") or is_address(host):
        return True
    allowed = [name.lower().rstrip(".") for name in names]
    return any(name in ("*", host) or (name.startswith("*.") and host.endswith(name[1:])) for name in allowed)


def _telling_the_end(send: Send, end: Callable[[], object]) -> Send:
    """A `send` that calls `end` with an answer's last bytes, before anything else can come on a connection.

    Routes return some turns of the event loop later, when what they have begun beside the answer has ended.
    """

    async def telling(message: Message) -> None:
        await send(message)
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            end()

    return telling


def _replayed(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives this body, then what the client does."""
    is_given = False

    async def replay() -> Message:
        nonlocal is_given
        if is_given:
            return await receive()
        is_given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
