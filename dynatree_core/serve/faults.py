"""What FastAPI and pydantic say of a request that does not fit, as one error that names the field."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from dynatree_core.errors import nearest_match
from dynatree_core.serve.errors import ApiError
from dynatree_core.serve.schema import ChatBody, CompletionBody, TokenizeBody

__all__ = ["as_refusal", "http_fault"]

TYPES = ("str", "int")  # as pydantic names the branches of a union
FIELDS = {
    "/v1/chat/completions": ChatBody.model_fields,
    "/v1/completions": CompletionBody.model_fields,
    "/tokenize": TokenizeBody.model_fields,
}
WORDS = {  # of pydantic, which clients do not know
    r"^Value error, ": "",
    r"^(Input|List|String) should": "it should",
    r"a valid dictionary( or object to extract fields from| or instance of \w+)?": "an object",
    r" after validation": "",
}
LONGEST = 60  # characters of a value that is quoted


def as_refusal(error: RequestValidationError, path: str) -> ApiError:
    """The first thing that is wrong with a body.

    Args:
        error: what FastAPI found.
        path: of the route.
    """
    first = _first(error.errors())
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body must be JSON, got {first['ctx']['error']}", code="invalid_json")
    place = _place(first)
    param = ".".join(place) if place else None
    if first["type"] == "extra_forbidden":
        hint = _hint(place[-1], path) if len(place) == 1 else ""
        return ApiError(
            400, f"'{param:.200}' is no parameter of this route{hint}; leave it out", param, "unknown_parameter"
        )
    if first["type"] == "missing":
        message = "the body must be a JSON object, got none" if param is None else f"'{param}' must be given"
    else:
        what = "the body" if param is None else f"'{param:.200}'"
        message = f"{what} cannot be used: {_reason(first)}"
    return ApiError(400, message, param, "invalid_type")


def _hint(name: str, path: str) -> str:
    """What a field that this route does not have may have been meant to be."""
    others = [route for route, fields in FIELDS.items() if name in fields]
    return f", but of {others[0]}" if others else nearest_match(name, FIELDS.get(path, ()))


def _reason(error: Any) -> str:
    """What must hold, in pydantic's words, and what came."""
    reason = str(error["msg"])
    for words, clearer in WORDS.items():
        reason = re.sub(words, clearer, reason)
    value = error["input"]
    if isinstance(value, dict | list):
        has_wrong_type = error["type"].endswith("_type")
        return f"{reason}, got {'an object' if isinstance(value, dict) else 'a list'}" if has_wrong_type else reason
    text = json.dumps(value)
    return f"{reason}, got {text if len(text) <= LONGEST else text[:LONGEST] + '…'}"


def _first(errors: Sequence[Any]) -> Any:
    """The error to tell: of the first field with one, that of the type that came nearest, which is the innermost.

    Of several as deep it is one that is not about the type itself.
    """
    same = [error for error in errors if _place(error)[:1] == _place(errors[0])[:1]]
    return max(same, key=lambda error: (len(_place(error)), not error["type"].endswith("_type")))


def _place(error: Any) -> list[str]:
    """Where in the body an error is, without the types between that pydantic has tried for a field."""
    *parts, last = error["loc"]
    if error["type"] != "extra_forbidden":  # else it is a field's name, whatever it looks like
        parts, last = [*parts, last], None
    place = [str(part) for part in parts[1:] if _is_field(part)]
    return place if last is None else [*place, str(last)]


def _is_field(part: object) -> bool:
    return isinstance(part, int) or (isinstance(part, str) and part.isidentifier() and part not in TYPES)


def http_fault(error: HTTPException, method: str, path: str) -> ApiError:
    """A route that is not there, or another fault of HTTP.

    Args:
        error: what was raised.
        method: of the request.
        path: of the request.
    """
    words = {
        404: f"there is no such route, got {path:.100}; /openapi.json has those that there are",
        405: f"this route takes another method, got {method:.20} {path:.100}; /openapi.json has those that it takes",
        400: "the body must be JSON",
    }
    code = "invalid_json" if error.status_code == 400 else "http_error"
    return ApiError(error.status_code, words.get(error.status_code, str(error.detail)), code=code)
