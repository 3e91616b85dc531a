"""What FastAPI and pydantic say of a request that does not fit, as one error that names the field."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from dynatree_core.errors import nearest_match
from dynatree_core.serve.errors import ApiError
from dynatree_core.serve.schema import ChatBody, CompletionBody

__all__ = ["as_refusal", "http_fault"]

TYPES = ("str", "int")  # as pydantic names the branches of a union
FIELDS = sorted({*ChatBody.model_fields, *CompletionBody.model_fields})


def as_refusal(error: RequestValidationError) -> ApiError:
    """The first thing that is wrong with a body."""
    first = _first(error.errors())
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body must be JSON, got {first['ctx']['error']}", code="invalid_json")
    place = _place(first)
    param = ".".join(place) if place else None
    if first["type"] == "extra_forbidden":
        hint = nearest_match(place[-1], FIELDS)
        return ApiError(
            400, f"'{param:.200}' is no parameter of this route{hint}; leave it out", param, "unknown_parameter"
        )
    what = "the body" if param is None else f"'{param}'"
    return ApiError(400, f"{what} cannot be used: {first['msg']}", param, "invalid_type")


def _first(errors: Sequence[Any]) -> Any:
    """The error to tell: of the first field with one, the innermost: the type that came nearest."""
    same = [error for error in errors if _place(error)[:1] == _place(errors[0])[:1]]
    return max(same, key=lambda error: len(_place(error)))


def _place(error: Any) -> list[str]:
    """Where in the body an error is, without the types between that pydantic has tried for a field."""
    *parts, last = error["loc"]
    if error["type"] != "extra_forbidden":  # else it is a field's name, whatever it looks like
        parts, last = [*parts, last], None
    place = [str(part) for part in parts[1:] if _is_field(part)]
    return place if last is None else [*place, str(last)]


def _is_field(part: object) -> bool:
    return isinstance(part, int) or (isinstance(part, str) and part.isidentifier() and part not in TYPES)


def http_fault(error: HTTPException) -> ApiError:
    """A route that is not there, or another fault of HTTP."""
    words = {404: "there is no such route", 405: "this route takes another method", 400: "the body must be JSON"}
    code = "invalid_json" if error.status_code == 400 else "http_error"
    return ApiError(error.status_code, words.get(error.status_code, str(error.detail)), code=code)
