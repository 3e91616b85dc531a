"""What a benchmark run leaves behind, and how it is written and read.

A run is a folder of two files: `run.json` says what was run and where, `records.jsonl` has one line for each output,
appended when it is done. Tables and figures are made from these two alone (docs/benchmarks.md explains the fields).
"""

from __future__ import annotations

import functools
import json
import math
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import attrs

from dynatree_bench.run.machine import BUSY_PERCENT
from dynatree_core.errors import InputError
from dynatree_core.files.writing import write_text

SCHEMA = 1
INFO_FILE = "run.json"
LOCK_FILE = ".lock"
RECORDS_FILE = "records.jsonl"
MAX_PROBABILITY = 1.001  # rounding in half precision may exceed 1 a little
KINDS = ("dynatree", "hf", "rival")

Record = TypeVar("Record")


class ResultsError(InputError):
    """A results file that is missing or not as the schema has it; the message names file and line."""


def _check_range(instance: Any, low: float, high: float, *names: str) -> None:
    """Refuse a number, or one of a tuple of numbers, that is not in [low, high]; None is not looked at."""
    for name in names:
        value = getattr(instance, name)
        numbers = value if isinstance(value, tuple) else () if value is None else (value,)
        if numbers and not (low <= min(numbers) and max(numbers) <= high):
            raise ValueError(f"'{name}' must be from {low} to {high}, got {min(numbers)} to {max(numbers)}")


def _check_lengths(instance: Any) -> None:
    lengths = {field.name: len(getattr(instance, field.name)) for field in attrs.fields(type(instance))}
    if len(set(lengths.values())) > 1:
        shown = ", ".join(f"{name} has {length}" for name, length in lengths.items())
        raise ValueError(f"lists that belong together must be equally long, {shown}")


@attrs.frozen
class ModelInfo:
    """A model that took part."""

    name: str
    sha256: str | None  # of its weights, where they are a file
    dtype: str
    num_parameters: int

    def __attrs_post_init__(self) -> None:
        _check_range(self, 0, math.inf, "num_parameters")


@attrs.frozen
class MethodInfo:
    """A way to generate, by a name that is unique in its run."""

    name: str
    kind: str
    policy: str | None  # the stack's canonical spelling; None for foreign methods
    drafter: str | None
    options: dict[str, Any]

    def __attrs_post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"'kind' must be one of {', '.join(map(repr, KINDS))}, got {self.kind!r}")


@attrs.frozen
class MemoryInfo:
    """The device's memory, read before the outputs were made, and what of it a step of plain decoding reads."""

    bytes_per_second: float
    cache_bytes: int | None  # of the device's last caches; None where the system does not tell
    step_bytes: int  # weights that a pass over one row reads

    def __attrs_post_init__(self) -> None:
        if self.bytes_per_second <= 0:
            raise ValueError(f"'bytes_per_second' must be more than 0, got {self.bytes_per_second}")
        _check_range(self, 0, math.inf, "cache_bytes", "step_bytes")


@attrs.frozen
class RunInfo:
    """Where a run's numbers come from."""

    experiment: str
    command: str
    version: str  # of dynatree
    commit: str | None  # of its source, with "-dirty" where files had been changed; None outside a checkout
    started: str  # ISO date and time
    target: ModelInfo
    drafter: ModelInfo | None
    device: str
    device_name: str
    threads: int
    libraries: dict[str, str]  # name -> version
    seed: int
    is_synthetic: bool  # the models' text is that of a random source, see dynatree_bench.data.synthetic
    ignore_eos: bool
    methods: tuple[MethodInfo, ...]
    axes: dict[str, Any]  # what is varied -> its values
    settings: dict[str, Any] = attrs.field(factory=dict)  # of prompts and measurement; a run goes on with the same only
    continued: tuple[str, ...] = ()  # ISO dates of later starts
    notes: tuple[str, ...] = ()
    memory: MemoryInfo | None = None  # None: not measured, as by earlier versions
    schema: int = SCHEMA

    def __attrs_post_init__(self) -> None:
        _check_range(self, 1, math.inf, "threads")
        if self.schema != SCHEMA:
            raise ValueError(f"'schema' must be {SCHEMA}, the one that this version reads, got {self.schema}")


@attrs.frozen
class Steps:
    """What each iteration of an output did."""

    num_drafted: tuple[int, ...]
    depth: tuple[int, ...]
    num_accepted: tuple[int, ...]
    num_committed: tuple[int, ...]

    def __attrs_post_init__(self) -> None:
        _check_lengths(self)
        _check_range(self, 0, math.inf, "num_drafted", "depth", "num_accepted", "num_committed")
        for drafted, depth, accepted, committed in self.rows():
            if not (accepted <= depth <= drafted and accepted <= committed <= accepted + 1):
                raise ValueError(
                    "a step must have num_accepted ≤ depth ≤ num_drafted and commit num_accepted tokens or one more, "
                    f"got {drafted} drafted, depth {depth}, {accepted} accepted, {committed} committed"
                )

    def rows(self) -> Iterator[tuple[int, int, int, int]]:
        """(num_drafted, depth, num_accepted, num_committed) of each iteration."""
        return zip(self.num_drafted, self.depth, self.num_accepted, self.num_committed, strict=True)


@attrs.frozen
class Trials:
    """Each drafted node whose parent was accepted (the root is): what the drafter said, and what came of it."""

    depth: tuple[int, ...]
    rank: tuple[int, ...]  # 0 is the drafter's first choice at the parent
    probability: tuple[float, ...]  # the drafter's, given the parent
    is_accepted: tuple[bool, ...]

    def __attrs_post_init__(self) -> None:
        _check_lengths(self)
        _check_range(self, 1, math.inf, "depth")
        _check_range(self, 0, math.inf, "rank")
        _check_range(self, 0, MAX_PROBABILITY, "probability")


@attrs.frozen
class Replay:
    """What the drafter thinks of each new token, given the true text before it."""

    rank: tuple[int, ...]  # −1: not among its proposals
    probability: tuple[float, ...]

    def __attrs_post_init__(self) -> None:
        _check_lengths(self)
        _check_range(self, -1, math.inf, "rank")
        _check_range(self, 0, MAX_PROBABILITY, "probability")


@attrs.frozen
class OutputRecord:
    """One output of one method."""

    experiment: str
    method: str
    prompt_id: str
    category: str
    axes: dict[str, Any]  # the point of the experiment's axes that this is
    repeat: int
    order: int  # place among the methods that decoded this prompt one after another
    num_prompt_tokens: int
    token_ids: tuple[int, ...]
    stop_reason: str
    prefill_seconds: float
    decode_seconds: float
    total_seconds: float
    draft_seconds: float | None
    verify_seconds: float | None
    rest_seconds: float | None
    overhead_seconds: float | None
    peak_memory_bytes: int | None
    is_identical: bool | None  # to the greedy reference of the same prompt and length; None: there is none
    error: str | None  # one line
    load: float | None  # share of the CPU that other processes used meanwhile
    steps: Steps | None
    trials: Trials | None
    replay: Replay | None
    cache_sha256: str | None = None  # of its keys and values, where they are compared
    is_bitwise: bool | None = None  # whether they are the reference's, bit by bit

    def __attrs_post_init__(self) -> None:
        counts = ("repeat", "order", "num_prompt_tokens", "token_ids", "peak_memory_bytes", "load")
        times = [field.name for field in attrs.fields(OutputRecord) if field.name.endswith("_seconds")]
        _check_range(self, 0, math.inf, *counts, *times)
        num_tokens = len(self.token_ids)
        if self.steps is not None and sum(self.steps.num_committed) != num_tokens:
            raise ValueError(
                f"steps must commit the {num_tokens} tokens of the output, got {sum(self.steps.num_committed)}"
            )
        if self.replay is not None and len(self.replay.rank) != num_tokens:
            raise ValueError(
                f"replay must have an entry for each of the {num_tokens} tokens, got {len(self.replay.rank)}"
            )
        if self.error is not None and "\n" in self.error:
            raise ValueError(f"an error must be one line, got {self.error!r}")

    @property
    def key(self) -> tuple[str, str, str, int]:
        """What no two records of a run share: method, prompt, axes and repeat."""
        return record_key(self.method, self.prompt_id, self.axes, self.repeat)


def record_key(method: str, prompt_id: str, axes: Mapping[str, Any], repeat: int) -> tuple[str, str, str, int]:
    """The key of the record that an output will have."""
    return method, prompt_id, json.dumps(dict(axes), sort_keys=True), repeat


@attrs.frozen
class Results:
    """A run as it was read."""

    folder: Path
    info: RunInfo
    records: tuple[OutputRecord, ...]


def run_warnings(results: Results) -> list[str]:
    """What is wrong with a run as a whole, a sentence each: a machine that was busy, outputs that are missing."""
    settings, found = results.info.settings, []
    loads = [record.load for record in results.records if record.load is not None]
    num_busy = sum(100 * load * settings.get("cores", 0) > BUSY_PERCENT for load in loads)
    if num_busy:
        found.append(
            f"the machine was busy during {num_busy} of {len(loads)} outputs: others used more than {BUSY_PERCENT} % "
            "of a core, so times are not to be believed"
        )
    num_missing = settings.get("outputs", 0) - len(results.records)
    if num_missing > 0:
        found.append(f"{num_missing} of {settings['outputs']} outputs are missing; the same command goes on")
    return found


def is_busy(results: Results) -> bool:
    """Whether others used the machine before the run, as its notes say, or during an output."""
    return any("busy" in sentence for sentence in (*results.info.notes, *run_warnings(results)))


# writing


def write_info(folder: Path, info: RunInfo) -> None:
    """Write `run.json`, with the folder if need be; a run that goes on writes it anew with one more date."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(attrs.asdict(info), indent=1, allow_nan=False, ensure_ascii=False)
    write_text(folder / INFO_FILE, text + "\n")  # whole, so that a kill leaves the old one or the new one


def append_record(folder: Path, record: OutputRecord) -> None:
    """Add a line to `records.jsonl`; it is in the file when this returns."""
    line = json.dumps(attrs.asdict(record), allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    with (folder / RECORDS_FILE).open("a", encoding="utf-8", newline="\n") as file:
        file.write(line + "\n")


def drop_torn_line(folder: Path) -> bool:
    """Cut off the piece of a line that a killed run may leave at the end of its records; whether there was one.

    A run that goes on does this before it appends.
    """
    path = folder / RECORDS_FILE
    if not path.exists():
        return False
    with path.open("r+b") as file:
        text = file.read()
        end = text.rfind(b"\n") + 1
        file.truncate(end)
    return end < len(text)


# reading


def is_run(folder: Path) -> bool:
    """Whether `dynatree bench` has made a folder; a run that was ended before it began has left its lock alone."""
    files = {entry.name for entry in folder.iterdir()}
    if files == {LOCK_FILE}:
        return True
    try:
        info = json.loads((folder / INFO_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(info, dict) and {"experiment", "methods", "target"} <= set(info)


def read_results(folder: Path) -> Results:
    """A run's folder.

    Raises:
        ResultsError: naming file, line and what is wrong.
    """
    return Results(folder, read_info(folder), read_records(folder))


def read_info(folder: Path) -> RunInfo:
    """A run's `run.json`.

    Raises:
        ResultsError: naming the file and what is wrong.
    """
    path = folder / INFO_FILE
    if not path.is_file():
        raise ResultsError(
            f"a results folder must hold {INFO_FILE} and {RECORDS_FILE}, and {folder} does not; "
            f"`dynatree bench` writes such folders"
        )
    return _parse(RunInfo, path.read_text(encoding="utf-8"), str(path))


def read_records(folder: Path) -> tuple[OutputRecord, ...]:
    """A run's outputs in the order in which they were made; a torn last line is left out.

    Raises:
        ResultsError: naming file, line and what is wrong.
    """
    path = folder / RECORDS_FILE
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []  # behind the last newline is a torn line
    seen: dict[tuple[str, str, str, int], int] = {}
    records = []
    for number, line in enumerate(lines, start=1):
        record = _parse(OutputRecord, line, f"{path}, line {number}")
        first = seen.setdefault(record.key, number)
        if first != number:
            raise ResultsError(f"{path}, line {number}: must be an output that is not there yet, line {first} has it")
        records.append(record)
    return tuple(records)


def _parse(cls: type[Record], text: str | bytes, where: str) -> Record:
    try:
        made: Record = _made(cls, json.loads(text, parse_constant=_refuse_constant), "")
    except (ValueError, TypeError) as error:  # a UnicodeDecodeError and a JSONDecodeError are ValueErrors
        raise ResultsError(f"{where}: {error}") from error
    return made


def _refuse_constant(name: str) -> None:
    raise ValueError(f"a number must be finite, got {name}")


def _made(hint: Any, value: Any, place: str) -> Any:
    """A JSON value as the type that is annotated, at a place such as "steps.depth"."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if attrs.has(hint):
        return _made_record(hint, value, place)
    if origin is types.UnionType:  # only with None
        return None if value is None else _made(arguments[0], value, place)
    if origin is dict and isinstance(value, dict):
        return {key: _made(arguments[1], item, f"{place}.{key}") for key, item in value.items()}
    if origin is tuple and isinstance(value, list):
        if arguments[0] in (int, bool) and set(map(type, value)) <= {arguments[0]}:
            return tuple(value)  # most of a file; a call for each would take most of the reading
        return tuple(_made(arguments[0], item, f"{place}[{i}]") for i, item in enumerate(value))
    if hint is float and type(value) is int:
        return float(value)
    if origin is None and type(value) is hint:
        return value
    wanted = {dict: "an object", tuple: "a list"}.get(origin) or f"of type {hint.__name__}"
    raise ValueError(f"{place} must be {wanted}, got {value!r:.60}")


def _made_record(cls: Any, value: Any, place: str) -> Any:
    fields = attrs.fields_dict(cls)
    if not isinstance(value, Mapping):
        raise ValueError(f"{place or 'it'} must be an object, got {value!r:.60}")
    # one with a default may be missing: a file of an earlier version does not have it
    missing = [name for name, field in fields.items() if name not in value and field.default is attrs.NOTHING]
    unknown = [name for name in value if name not in fields]
    if missing or unknown:
        raise ValueError(
            f"{place or 'it'} must have exactly the fields of {cls.__name__}, "
            f"missing: {', '.join(missing) or 'none'}, unknown: {', '.join(unknown) or 'none'}"
        )
    hints = _hints(cls)
    prefix = f"{place}." if place else ""
    return cls(**{name: _made(hints[name], value[name], prefix + name) for name in fields if name in value})


_hints = functools.cache(typing.get_type_hints)
