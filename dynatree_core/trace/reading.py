"""Reading a trace: each line is held against the schema, and each iteration against itself."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from dynatree_core.cost_model import CostModel, StepFunction
from dynatree_core.errors import InputError
from dynatree_core.trace.format import OUTCOMES, SCHEMA, fault_of, open_binary

__all__ = ["Iteration", "SequenceTrace", "TraceFile", "iteration_of", "read"]


@attrs.frozen(eq=False)
class Iteration:
    """One iteration; `record` has all its fields, which docs/trace.md explains."""

    record: Mapping[str, Any]

    @property
    def number(self) -> int:
        number: int = self.record["iteration"]
        return number

    @property
    def start(self) -> int:
        """Tokens that were committed before it, the prompt among them; the last of these is the tree's root."""
        start: int = self.record["start"]
        return start

    @property
    def num_drafted(self) -> int:
        """Nodes of the drafted tree without the root; in `nodes` the refused proposals stand behind them."""
        number: int = self.record["num_drafted"]
        return number

    @property
    def nodes(self) -> Mapping[str, Sequence[Any]]:
        """Column -> value of each node: the root, the drafted nodes, the refused proposals."""
        nodes: Mapping[str, Sequence[Any]] = self.record["nodes"]
        return nodes

    @property
    def path(self) -> Sequence[int]:
        """The accepted nodes, by depth."""
        path: Sequence[int] = self.record["path"]
        return path

    @property
    def committed(self) -> Sequence[int]:
        """The tokens that it committed."""
        token_ids: Sequence[int] = self.record["committed"]
        return token_ids

    @property
    def levels(self) -> Sequence[Mapping[str, Any]]:
        levels: Sequence[Mapping[str, Any]] = self.record["levels"]
        return levels

    @property
    def seconds(self) -> Mapping[str, float]:
        seconds: Mapping[str, float] = self.record["seconds"]
        return seconds

    def outcome(self, node: int) -> str:
        """What became of a node: one of `OUTCOMES`."""
        return OUTCOMES[self.nodes["outcome"][node]]

    def refused_by(self, node: int) -> str | None:
        """The policy or the limit because of which a node was not drafted or not verified; None for one that was."""
        outcome = self.outcome(node)
        if outcome == "verified":
            return None
        if outcome == "pruned":
            pruned: Mapping[str, Sequence[int]] = self.record["pruned"]
            return next(name for name, cut in pruned.items() if node in cut)
        if outcome in ("below_tau", "over_budget"):
            return {"below_tau": "tau", "over_budget": "max_nodes"}[outcome]
        parent = self.nodes["parent"][node]
        level = next(one for one in self.levels if one["first"] <= parent < one["first"] + one["width"])
        if outcome == "beyond_width":
            opinions = [name for name, vote in (level["branch"] or {}).items() if vote is not None]
            return opinions[-1] if opinions else None
        row = parent - level["first"]
        for name, vote in (level["expand"] or {}).items():
            if vote is False or (isinstance(vote, list) and not vote[row]):
                return str(name)
        return None


@attrs.frozen(eq=False)
class SequenceTrace:
    """One generation of a trace."""

    number: int
    begin: Mapping[str, Any]  # the record of its kind
    prefills: Sequence[Mapping[str, Any]]  # several where it was interrupted and has gone on
    iterations: Sequence[Iteration]
    faults: Sequence[Mapping[str, Any]]
    end: Mapping[str, Any] | None  # the last one; None where the trace ends before the generation

    @property
    def prompt(self) -> Sequence[int] | None:
        """The prompt's tokens; None in a private trace."""
        prompt: Sequence[int] | None = self.begin["prompt"]
        return prompt

    @property
    def token_ids(self) -> list[int]:
        """The new tokens."""
        return [token for iteration in self.iterations for token in iteration.committed]

    @property
    def costs(self) -> CostModel | None:
        """What iterations took on that machine; None where nobody had asked."""
        found = None if self.end is None else self.end["costs"]
        if found is None:
            return None
        passes, levels, follow = (
            found.get(name) and StepFunction(tuple(found[name]["at"]), tuple(found[name]["seconds"]))
            for name in ("target_pass_seconds", "drafter_level_seconds", "drafter_follow_seconds")
        )  # the last one is not in traces of versions that did not measure it
        return CostModel(passes, levels, found["rest_seconds"], follow)


@attrs.frozen(eq=False)
class TraceFile:
    """A trace that was read."""

    header: Mapping[str, Any]
    sequences: Sequence[SequenceTrace]  # by number
    texts: Mapping[int, str]  # token id -> text, of all that were told
    is_truncated: bool  # whether the file ends within a line or a compressed block, as where a process was killed


def read(path: str | os.PathLike[str]) -> TraceFile:
    """Read a trace and check it.

    Args:
        path: the file, compressed or not.

    Returns:
        What is there. A file that breaks off is read up to there, and says so.

    Raises:
        InputError: it is no trace, one of another version, or a line of it is wrong; with the line and the fault.
        OSError: it cannot be read.
    """
    path = Path(path)
    lines = _Lines(path)
    records: dict[int, dict[str, list[Any]]] = {}
    header: Mapping[str, Any] | None = None
    texts: dict[int, str] = {}
    for number, line in lines:
        record = _record(path, number, line)
        if header is None:
            header = _header(path, record)
            continue
        fault = fault_of(record) or (_inner_fault(record) if record["kind"] == "iteration" else None)
        if fault is None and record["kind"] == "header":
            fault = "must be the first line's kind alone, got another header"
        if fault is None and record["kind"] != "begin" and record["sequence"] not in records:
            fault = f"must follow the beginning of its sequence, got sequence {record['sequence']}"
        if fault is not None:
            raise InputError(f"{path}, line {number}: {fault}; the trace is damaged, or not by DynaTree")
        found = records.setdefault(record["sequence"], {})
        found.setdefault(record["kind"], []).append(record)
        texts |= {int(token): text for token, text in (record.get("texts") or {}).items()}
    if header is None:
        raise InputError(f"{path} must be a trace of DynaTree, got a file without a line; make one with --trace {path}")
    sequences = [_sequence(number, found) for number, found in sorted(records.items())]
    return TraceFile(header, sequences, texts, lines.is_truncated)


def iteration_of(record: Mapping[str, Any]) -> Iteration:
    """An iteration of one record, as `Trace(on_record=...)` gives it while the generation runs.

    Raises:
        InputError: it is no record of an iteration, or a wrong one.
    """
    fault = fault_of(record)
    if fault is None and record["kind"] != "iteration":
        fault = f"kind must be iteration, got {record['kind']}"
    if fault is None:
        fault = _inner_fault(record)
    if fault is not None:
        raise InputError(f"a record must be that of an iteration: {fault}")
    return Iteration(record)


class _Lines:
    """The whole lines of a trace with their numbers; then `is_truncated` says whether something was left over."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.is_truncated = False

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        number = 0
        with open_binary(self._path) as file:
            try:
                for number, line in enumerate(file, 1):
                    if not line.endswith(b"\n"):
                        self.is_truncated = True
                        return
                    yield number, line
            except EOFError:  # a compressed file that ends too early
                self.is_truncated = True
            except (zlib.error, OSError) as error:
                if isinstance(error, OSError) and error.errno is not None:
                    raise
                raise InputError(
                    f"{self._path} must be packed as gzip does, got {error} after line {number}; the file is damaged"
                ) from error


def _record(path: Path, number: int, line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        what = "must be a trace of DynaTree" if number == 1 else f"must have a JSON object in line {number}"
        raise InputError(f"{path} {what}, got {line[:40]!r} ({error}); make one with --trace") from error


def _header(path: Path, record: Any) -> Mapping[str, Any]:
    schema = record.get("schema") if isinstance(record, dict) else None
    if schema != SCHEMA:
        kind, _, version = str(schema).partition("/")
        if kind == SCHEMA.partition("/")[0]:
            raise InputError(
                f"{path} must be a trace of version 1, got version {version}; read it with the DynaTree that made it"
            )
        raise InputError(f"{path} must begin with the header of a trace, got {record!r:.60}; make one with --trace")
    fault = fault_of(record)
    if fault is not None:
        raise InputError(f"{path}, line 1: {fault}; the trace is damaged")
    header: Mapping[str, Any] = record
    return header


def _inner_fault(record: Mapping[str, Any]) -> str | None:
    """What in an iteration does not fit together; None where everything does."""
    nodes, drafted = record["nodes"], record["num_drafted"] + 1
    num_nodes = len(nodes["token"])
    lengths = {name: len(column) for name, column in nodes.items() if isinstance(column, list)}
    if len(set(lengths.values())) != 1:
        return f"the columns of nodes must be of one length, got {lengths}"
    if drafted > num_nodes:
        return f"nodes must have the root and num_drafted={drafted - 1} nodes at least, got {num_nodes}"
    parents = enumerate(nodes["parent"])
    if next(parents)[1] != -1 or not all(0 <= parent < min(node, drafted) for node, parent in parents):
        return "nodes.parent must be -1 for the root and an earlier drafted node for the others"
    if any(one >= len(OUTCOMES) for one in nodes["outcome"]):
        return f"nodes.outcome must be below {len(OUTCOMES)}, got {max(nodes['outcome'])}"
    for name in ("token", "logprob"):
        if len(record["wanted"][name]) != drafted:
            return f"wanted.{name} must have {drafted} values, got {len(record['wanted'][name])}"
    before = 0
    for node in record["path"]:
        if not 0 < node < drafted or nodes["parent"][node] != before:
            return f"path must lead from parent to child, got {record['path']}"
        before = node
    if [nodes["token"][node] for node in record["path"]] != record["committed"][: len(record["path"])]:
        return "the tokens of path must be the first that are committed"
    if "source" in nodes and not all(-1 <= one < len(record.get("sources") or ()) for one in nodes["source"]):
        return "nodes.source must be places in sources"
    return None


def _sequence(number: int, found: Mapping[str, Sequence[Any]]) -> SequenceTrace:
    return SequenceTrace(
        number=number,
        begin=found["begin"][0],
        prefills=found.get("prefill", []),
        iterations=[Iteration(record) for record in found.get("iteration", [])],
        faults=found.get("fault", []),
        end=found["end"][-1] if "end" in found else None,
    )
