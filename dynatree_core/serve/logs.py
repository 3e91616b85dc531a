"""The server's log: a line for each request and each fault, on standard error.

A line has fields: time, level, event, and the request's id. No text of a prompt or an answer is among them unless the
server was told so.
"""

from __future__ import annotations

import contextvars
import datetime
import json
import logging
import re
from typing import Any

__all__ = ["REQUEST_ID", "log", "log_fault", "set_up_logs"]

REQUEST_ID: contextvars.ContextVar[str | None] = contextvars.ContextVar("request_id", default=None)
_LOGGER = logging.getLogger("dynatree.serve")
_PERHAPS_UNPRINTABLE = re.compile(r"[^ -~\n]")
LIBRARIES = ("uvicorn", "uvicorn.error", "fastapi", "opentelemetry", "py.warnings")


def log(event: str, *, level: int = logging.INFO, **fields: object) -> None:
    """Write one line."""
    _LOGGER.log(level, event, extra=_extra(fields))


def log_fault(event: str, error: BaseException, **fields: object) -> None:
    """Write one line about an error, with its traceback."""
    _LOGGER.error(event, exc_info=error, extra=_extra(fields))


def _extra(fields: dict[str, object]) -> dict[str, object]:
    """What a record has beside its message: the fields, the id of the request that is being answered before them."""
    return {"fields": {"request_id": REQUEST_ID.get(), **fields}}


def set_up_logs(form: str, *, level: int = logging.INFO) -> None:
    """Have this server's lines, uvicorn's and warnings written to standard error.

    Args:
        form: "json": an object a line; "text": for a reader.
        level: of the lines to write, as `logging` has them.
    """
    logging.captureWarnings(True)  # such as those of a policy that has failed
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines() if form == "json" else TextLines())
    for name in ("dynatree.serve", *LIBRARIES):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level if name == "dynatree.serve" else max(level, logging.WARNING))


def _fields(record: logging.LogRecord, formatter: logging.Formatter) -> dict[str, Any]:
    """What a line says, in order; what is None is left out."""
    when = datetime.datetime.fromtimestamp(record.created, datetime.UTC).isoformat(timespec="milliseconds")
    fields: dict[str, Any] = {"time": when, "level": record.levelname.lower(), "event": record.getMessage()}
    fields |= getattr(record, "fields", {})  # those of libraries have none
    if record.exc_info:
        fields["error"] = formatter.formatException(record.exc_info)
    return {name: value for name, value in fields.items() if value is not None}


class JsonLines(logging.Formatter):
    """An object of JSON in each line."""

    def format(self, record: logging.LogRecord) -> str:
        return shown(json.dumps(_fields(record, self), ensure_ascii=False, default=str))


class TextLines(logging.Formatter):
    """The same fields as words; a traceback follows in lines of its own."""

    def format(self, record: logging.LogRecord) -> str:
        fields = _fields(record, self)
        error = fields.pop("error", None)
        words = [str(fields.pop(name)) for name in ("time", "level", "event")]
        words += [f"{name}={json.dumps(value, ensure_ascii=False, default=str)}" for name, value in fields.items()]
        return shown(" ".join(words)) + (f"\n{shown(error)}" if error else "")


def shown(text: str) -> str:
    """A text without characters that a terminal acts on, or that no file can have: they stand as in JSON."""
    if text.isprintable():
        return text
    return _PERHAPS_UNPRINTABLE.sub(lambda found: _shown_character(found[0]), text)


def _shown_character(one: str) -> str:
    return one if one.isprintable() else json.dumps(one)[1:-1]
