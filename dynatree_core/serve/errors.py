"""Errors as OpenAI's API has them: a status, and a record with message, type, parameter and code."""

from __future__ import annotations

from typing import Any

import attrs

from dynatree_core.errors import DynaTreeError, InputError, OutOfMemoryError, QueueFullError
from dynatree_core.runners.passes import is_out_of_memory

__all__ = ["ApiError", "EngineDeadError", "as_api_error", "error_record", "refused"]

TYPES = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class EngineDeadError(DynaTreeError):
    """The thread that drives the engines has ended with an error, so nothing can be computed any more."""


@attrs.frozen(eq=False)
class ApiError(Exception):
    """What a client is told, and nothing else: no path, no traceback."""

    status: int
    message: str
    param: str | None = None  # the field of the request that is the matter
    code: str | None = None  # a word for programs
    retry_after: int | None = None  # seconds after which it may be asked again

    def __str__(self) -> str:
        return self.message


def refused(param: str, message: str, code: str = "invalid_value") -> ApiError:
    """A field of a request that cannot be honoured."""
    return ApiError(400, message, param, code)


def error_record(error: ApiError) -> dict[str, Any]:
    """The body of an answer with this error."""
    kind = TYPES.get(error.status, "server_error" if error.status >= 500 else "invalid_request_error")
    record = {"message": error.message, "type": kind, "param": error.param, "code": error.code}
    # what it quotes may have halves of characters, which no answer can
    return {"error": {name: value and value.encode(errors="replace").decode() for name, value in record.items()}}


def as_api_error(error: BaseException, *, retry_after: int = 1) -> ApiError:
    """What a client is told of an error of a generation.

    Args:
        error: what was raised.
        retry_after: seconds until another try may have room.
    """
    match error:
        case ApiError():
            return error
        case InputError():
            return ApiError(400, str(error), code="invalid_value")
        case QueueFullError():
            message = "the server's waiting line is full; ask again later"
            return ApiError(429, message, code="queue_full", retry_after=retry_after)
        case EngineDeadError():
            return ApiError(503, "the engine has failed and the server is about to end", code="engine_dead")
    if isinstance(error, OutOfMemoryError) or _is_lack_of_memory(error.__cause__):
        message = "the device has no memory for this request; ask for fewer tokens, or again later"
        return ApiError(503, message, code="out_of_memory", retry_after=retry_after)
    return ApiError(500, f"the generation failed ({type(error).__name__}); the server's log says why", code="failed")


def _is_lack_of_memory(cause: BaseException | None) -> bool:
    """Whether a drafter's or a policy's fault was that there is no memory."""
    return isinstance(cause, Exception) and is_out_of_memory(cause)
