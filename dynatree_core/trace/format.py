"""The form of a trace: JSON lines, held against `schema.json` (docs/trace.md says what the fields mean)."""

from __future__ import annotations

import functools
import gzip
import json
import math
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import IO, Any, cast

__all__ = [
    "OUTCOMES",
    "SCHEMA",
    "dumps",
    "fault_of",
    "float_list",
    "int_list",
    "is_compressed",
    "is_trace",
    "json_schema",
    "open_binary",
]

SCHEMA = "dynatree-trace/1"

# what became of a node, by the number in `nodes.outcome`: the names of `engine.observer.Outcome`, where an admitted
# child is one that was verified, and one more for those that were cut after the tree was drafted
OUTCOMES = ("verified", "no_token", "not_expanded", "beyond_width", "below_tau", "over_budget", "pruned")

KINDS: dict[str, set[type]] = {  # of a schema -> what Python's json makes of it; a bool is no number
    "object": {dict},
    "array": {list},
    "string": {str},
    "integer": {int},
    "number": {int, float},
    "boolean": {bool},
    "null": {type(None)},
}


@functools.cache
def json_schema() -> Mapping[str, Any]:
    """The JSON Schema (draft 2020-12) of one line of a trace."""
    text = files("dynatree_core.trace").joinpath("schema.json").read_text(encoding="utf-8")
    return cast("Mapping[str, Any]", json.loads(text))


# writing


def dumps(value: Any) -> str:
    """One line of ASCII JSON: also what is no text of UTF-8, such as half of a surrogate pair, is kept as data.

    Raises:
        ValueError: a number that JSON does not have.
    """
    return _ENCODER.encode(value)


_ENCODER = json.JSONEncoder(separators=(",", ":"), allow_nan=False)  # made once: that takes as long as a short line


def int_list(values: Sequence[int | None]) -> str:
    """A JSON list of whole numbers, and of nulls. One format operation makes it, in half the time of `str`."""
    if None in values:
        return f"[{','.join('null' if value is None else str(value) for value in values)}]"
    return f"[{('%d,' * len(values) % tuple(values))[:-1]}]"


def float_list(values: Sequence[float | None]) -> str:
    """A JSON list of float32 numbers, with as many digits as make each exact again; null for what is no number.

    One format operation makes the list: it is ten times as fast as the digits of a float64, and half as long.
    """
    if None not in values:
        text = "%.9g," * len(values) % tuple(cast("Sequence[float]", values))
        if "n" not in text:  # as in nan and inf
            return f"[{text[:-1]}]"
    numbers = ("null" if value is None or not math.isfinite(value) else f"{value:.9g}" for value in values)
    return f"[{','.join(numbers)}]"


# files


def is_compressed(path: Path) -> bool:
    """Whether a trace of that name is compressed."""
    return path.suffix == ".gz"


def open_binary(path: Path) -> IO[bytes]:
    """A trace for reading, unpacked where its first bytes say that it is compressed, whatever it is called.

    Raises:
        OSError: it cannot be read.
    """
    file = path.open("rb")
    magic = file.read(2)
    file.seek(0)
    return cast("IO[bytes]", gzip.GzipFile(fileobj=file)) if magic == b"\x1f\x8b" else file


def is_trace(path: Path) -> bool:
    """Whether a file begins as traces do, of whatever version."""
    try:
        with open_binary(path) as file:
            head = json.loads(file.readline(1 << 16))
    except (OSError, EOFError, ValueError):
        return False
    return isinstance(head, dict) and str(head.get("schema", "")).startswith(SCHEMA.partition("/")[0])


# checking


def fault_of(record: object) -> str | None:
    """What is wrong with one line's record, by the schema; None where nothing is.

    The schema has one definition for each kind of record, so a fault is named by the kind that the record says it is.
    """
    kinds = list(json_schema()["$defs"]["kinds"]["enum"])
    if not isinstance(record, dict) or record.get("kind") not in kinds:
        came = record.get("kind") if isinstance(record, dict) else record
        return f"must be an object whose kind is one of {', '.join(kinds)}, got {came!r:.60}"
    return _fault(record, json_schema()["$defs"][record["kind"]], "")


def _fault(value: Any, schema: Mapping[str, Any], at: str) -> str | None:
    """The first fault of a value: the keywords that `schema.json` uses, which a test holds it to."""
    if "$ref" in schema:
        schema = json_schema()["$defs"][schema["$ref"].rpartition("/")[2]]
    allowed = schema.get("type")
    if allowed is not None:
        names = [allowed] if isinstance(allowed, str) else allowed
        if not any(type(value) in KINDS[name] for name in names):
            return f"{at or 'it'} must be {' or '.join(names)}, got {value!r:.60}"
    if "const" in schema and value != schema["const"]:
        return f"{at} must be {schema['const']!r}, got {value!r:.60}"
    if "enum" in schema and value not in schema["enum"]:
        return f"{at} must be one of {', '.join(map(str, schema['enum']))}, got {value!r:.60}"
    if "minimum" in schema and isinstance(value, int | float) and value < schema["minimum"]:
        return f"{at} must be at least {schema['minimum']}, got {value!r}"
    if isinstance(value, dict):
        return _fault_inside(value, schema, at)
    if isinstance(value, list) and "items" in schema:
        return _fault_of_items(value, schema["items"], at)
    return None


def _fault_inside(value: Mapping[str, Any], schema: Mapping[str, Any], at: str) -> str | None:
    missing = [name for name in schema.get("required", ()) if name not in value]
    if missing:
        return f"{at or 'it'} must have {', '.join(missing)}, got {', '.join(value) or 'nothing'}"
    properties = schema.get("properties", {})
    pattern = schema.get("propertyNames", {}).get("pattern")
    for name, part in value.items():
        if pattern is not None and not re.search(pattern, name):
            return f"a key of {at} must match {pattern}, got {name!r:.60}"
        # what is not named is what a later version of this schema may add
        inner = properties.get(name, schema.get("additionalProperties", {}))
        fault = _fault(part, inner, f"{at}.{name}" if at else name)
        if fault is not None:
            return fault
    return None


def _fault_of_items(values: Sequence[Any], schema: Mapping[str, Any], at: str) -> str | None:
    names = schema.get("type")
    if set(schema) <= {"type", "minimum"} and names is not None:  # numbers: a look at all of them at once
        kinds: set[type] = set().union(*(KINDS[name] for name in ([names] if isinstance(names, str) else names)))
        if set(map(type, values)) <= kinds and not (kinds & {dict, list}):
            numbers = [one for one in values if one is not None] if type(None) in kinds else values
            if "minimum" not in schema or not numbers or min(numbers) >= schema["minimum"]:
                return None
    for place, one in enumerate(values):
        fault = _fault(one, schema, f"{at}[{place}]")
        if fault is not None:
            return fault
    return None
