"""Recording a trace: an observer for each generation, which writes a line for each iteration."""

from __future__ import annotations

import contextlib
import datetime
import functools
import gzip
import json
import os
import platform
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from math import isfinite
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

import attrs
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from dynatree_core import ops
from dynatree_core.engine.observer import (
    Commit,
    End,
    Fault,
    Feedback,
    Level,
    Observer,
    Prefill,
    Pruning,
    Verification,
)
from dynatree_core.errors import ParameterError
from dynatree_core.files.outputs import check_out
from dynatree_core.plugins.params import as_python
from dynatree_core.policy.stack import Decision, PolicyStack
from dynatree_core.report import GenerationReport
from dynatree_core.text.stream import IncrementalText
from dynatree_core.trace.format import OUTCOMES, SCHEMA, dumps, float_list, int_list, is_compressed, is_trace
from dynatree_core.trace.nodes import Nodes, nodes_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Recorder", "Trace", "check_trace", "tracing"]

PRUNED = OUTCOMES.index("pruned")
REPORTED = tuple(field.name for field in attrs.fields(GenerationReport) if field.name != "steps")
LONGEST_LIST = 64  # items of a policy's list that are recorded
# iterations that wait to be written, and how long the first of them may: what is turned into lines right after a pass
# finds nothing of itself in the processor's caches, which takes thrice as long; dozens at once find each other's
MOST_WAITING, LONGEST_WAIT = 64, 1.0  # seconds
COMPRESSION = 1  # of gzip: the fastest; a trace is numbers, and smaller by a quarter at most with the best


class Trace:
    """A file that generations are recorded in: `observer()` gives each of them its observer.

    The file is made when the first generation begins. Up to 64 iterations wait to be written together, a second at
    most while there are more to come: 64 are missing at most should the process die. What is written is flushed, so
    that it can be read while the generation runs; compressed traces (`.gz`) are not.

    Args:
        path: the file; compressed if its name ends in `.gz`. An earlier trace there is replaced. None: no file.
        tokenizer: the target's, for the texts of tokens. None: the trace has their ids alone.
        is_private: whether the prompts' tokens and texts are left out. What was drafted and generated stays, and may
            quote the prompt.
        on_record: called with each record, as it will be read, when it has been written: then nothing waits.
        on_line: called with each line likewise, for whoever reads it later, elsewhere.

    Raises:
        InputError: the path is something else than an earlier trace, or cannot be written.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        is_private: bool = False,
        on_record: Callable[[Mapping[str, Any]], object] | None = None,
        on_line: Callable[[str], object] | None = None,
    ) -> None:
        self.path = None if path is None else Path(path)
        self.is_private = is_private
        self.texts = _Texts(tokenizer)
        self._on_record, self._on_line = on_record, on_line
        if self.path is not None:
            check_trace(self.path)
        self._lock = threading.RLock()  # several generations may write at once, and who is called back may write, too
        self._waiting: list[_Iteration] = []
        self._waiting_since = 0.0  # the first of them
        self._faults: dict[int, list[str]] = {}  # by sequence: what could not be written, and nobody was told of
        self._file: IO[bytes] | None = None  # None before the first line
        self._is_closed = False  # or broken: nothing more is written
        self._num_sequences = 0

    def observer(self) -> Recorder:
        """An observer for one generation after another, or for those of one engine. Others that run at the same time
        need one each.

        Its first generation is the sequence with the number of observers that were made before.
        """
        return Recorder(self, self.begin_sequence())

    def begin(self) -> None:
        """Make the file, with its header.

        Raises:
            OSError: naming the file.
        """
        with self._lock:
            if self.path is not None and not self._is_closed:
                with self._naming_the_file():
                    self._opened(self.path)

    def begin_sequence(self) -> int:
        """The number of one more generation."""
        with self._lock:
            self._num_sequences += 1
            return self._num_sequences - 1

    def write(self, line: str, sequence: int) -> None:
        """Write a line of JSON of a sequence, behind all that waits.

        Raises:
            OSError: naming the file. From then on nothing is written: the generation has ended with this error.
            ValueError: as for `write_later`.
        """
        with self._lock:
            self._write(line)
            self._raise_faults(sequence)

    def write_later(self, iteration: _Iteration) -> None:
        """Write an iteration's line, with others that wait.

        Raises:
            OSError: as for `write`.
            ValueError: an iteration of this sequence that cannot be written, this one or one before. No other is lost.
        """
        with self._lock:
            now = time.monotonic()
            if not self._waiting:
                self._waiting_since = now
            self._waiting.append(iteration)
            is_long = len(self._waiting) >= MOST_WAITING or now - self._waiting_since >= LONGEST_WAIT
            if is_long or self._on_record is not None or self._on_line is not None:
                self._write()
            self._raise_faults(iteration.sequence)

    def flush(self, sequence: int | None = None) -> None:
        """Write what waits.

        Args:
            sequence: whose faults are raised; None: those of all that were not told of theirs.

        Raises:
            OSError: as for `write`.
            ValueError: iterations that cannot be written. All others that waited are in the file.
        """
        with self._lock:
            self._write()
            self._raise_faults(sequence)

    def close(self) -> None:
        """Write what waits, and close the file. Generations that are still observed write no more.

        Raises:
            OSError: naming the file.
            ValueError: as for `flush`.
        """
        with self._lock:
            try:
                self.flush()
            finally:
                with self._naming_the_file():
                    if not self._is_closed and self._file is not None:
                        self._file.close()
                    self._is_closed = True

    def _write(self, *others: str) -> None:
        """Write what waits, and these lines behind it."""
        waiting, self._waiting = self._waiting, []
        if self._is_closed:
            return
        lines = [*self._lines(waiting), *others]
        if self.path is not None and lines:
            with self._naming_the_file(waiting):
                file = self._opened(self.path)
                file.write("".join(f"{line}\n" for line in lines).encode("ascii"))
                if not isinstance(file, gzip.GzipFile):  # whose blocks would become small, and the file large
                    file.flush()
        for line in lines:
            if self._on_record is not None:
                self._on_record(json.loads(line))
            if self._on_line is not None:
                self._on_line(line)

    def _lines(self, iterations: Sequence[_Iteration]) -> Iterator[str]:
        """Their lines, for which all are read at once; those that cannot be written are left out, and noted."""
        for one, nodes in zip(iterations, _nodes(iterations) if iterations else (), strict=True):
            try:
                if isinstance(nodes, Exception):
                    raise nodes
                yield one.line(nodes, self.texts)
            except Exception as error:  # noqa: BLE001  # whatever is wrong with one, the others are written
                fault = f"{_named([one])} cannot be written and is missing: {type(error).__name__}: {error}"
                self._faults.setdefault(one.sequence, []).append(fault)

    def _raise_faults(self, sequence: int | None) -> None:
        """Tell a sequence, or all, of iterations that could not be written: each once."""
        whose = [*self._faults] if sequence is None else [sequence]
        faults = [fault for one in whose for fault in self._faults.pop(one, ())]
        if faults:
            raise ValueError("; ".join(faults))

    def __enter__(self) -> Trace:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _opened(self, path: Path) -> IO[bytes]:
        if self._file is None:
            self._file = _open(path)
            self._file.write(self._header().encode("ascii") + b"\n")
        return self._file

    @contextlib.contextmanager
    def _naming_the_file(self, written: Sequence[_Iteration] = ()) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._is_closed = True
            if self._file is not None:
                with contextlib.suppress(OSError):  # it says the same again
                    self._file.close()
            what = error.strerror or str(error)
            if written:
                what += f"; {_named(written)} had still to be written, and the last of them are missing"
            raise OSError(error.errno, what, str(self.path)) from error

    def _header(self) -> str:
        return dumps(
            {
                "kind": "header",
                "schema": SCHEMA,
                "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                "versions": {name: version(name) for name in ("dynatree", "torch", "transformers")}
                | {"python": platform.python_version()},
                "outcomes": list(OUTCOMES),
                "is_private": self.is_private,
            }
        )


def check_trace(path: str | os.PathLike[str]) -> None:
    """Refuse a place for a trace that cannot be written, or that holds anything but a trace.

    Raises:
        InputError: with the reason.
    """
    check_out(Path(path), "a trace", is_trace, is_file=True)


@contextlib.contextmanager
def tracing(
    trace: Trace | str | os.PathLike[str] | None, tokenizer: PreTrainedTokenizerBase | None
) -> Iterator[Callable[[], Observer] | None]:
    """What makes an observer for each generation that is to be traced; None for no trace.

    A trace that is given stays open; one that is made of a path is closed at the end.

    Raises:
        InputError: it is neither a trace nor a path, or the path cannot be written.
    """
    if trace is None:
        yield None
    elif isinstance(trace, Trace):
        yield trace.observer
    elif isinstance(trace, str | os.PathLike):
        with Trace(trace, tokenizer=tokenizer) as made:
            yield made.observer
    else:
        raise ParameterError(f"trace must be a path or a dynatree_core.trace.Trace, got {trace!r:.60}")


def _open(path: Path) -> IO[bytes]:
    if is_compressed(path):
        return cast("IO[bytes]", gzip.open(path, "wb", compresslevel=COMPRESSION))
    return path.open("wb")


class Recorder(Observer):
    """Writes what happens in generations. Made by `Trace.observer`.

    Those of one engine may share it, since every record says whose it is. Sessions follow one after another.
    """

    wants_logits = True

    def __init__(self, trace: Trace, number: int) -> None:
        self._trace = trace
        self._generations = {0: _Generation(trace, number)}  # by the number of their handles; 0 for sessions
        self._is_first = True  # whether nobody has come yet, who then has the number

    def _of(self, sequence: int) -> _Generation:
        found = self._generations.get(sequence)
        if found is None:
            if self._is_first:  # of an engine that has had others before
                found = self._generations.pop(0)
            else:
                found = _Generation(self._trace, self._trace.begin_sequence())
            self._generations[sequence] = found
        self._is_first = False
        return found

    def on_prefill(self, prefill: Prefill) -> None:
        self._of(prefill.sequence).on_prefill(prefill)

    def on_level(self, level: Level) -> None:
        self._of(level.sequence).on_level(level)

    def on_prune(self, pruning: Pruning) -> None:
        self._of(pruning.sequence).on_prune(pruning)

    def on_verify(self, verification: Verification) -> None:
        self._of(verification.sequence).on_verify(verification)

    def on_commit(self, commit: Commit) -> None:
        self._of(commit.sequence).on_commit(commit)

    def on_feedback(self, feedback: Feedback) -> None:
        self._of(feedback.sequence).on_feedback(feedback)

    def on_fault(self, fault: Fault) -> None:
        self._of(fault.sequence).on_fault(fault)

    def on_end(self, end: End) -> None:
        try:
            self._of(end.sequence).on_end(end)
        except Exception:
            self._forget(end.sequence)
            raise
        self._forget(end.sequence)

    def _forget(self, sequence: int) -> None:
        if sequence != 0:  # an engine gives its number to nobody else, and goes on with none that has ended
            del self._generations[sequence]


class _Generation:
    """One generation that is being written, and after it the next one with the same number."""

    def __init__(self, trace: Trace, number: int) -> None:
        self._trace = trace
        self._number = number  # of the generation
        self._is_over = True  # whether what begins next is another generation
        self._begun: Prefill | None = None  # what the generation began with
        self._committed: list[int] = []  # prompt and new tokens
        self._early_faults: list[Fault] = []  # of a generation that has not begun
        self._levels: list[Level] = []  # of the tree that is growing
        self._commit: Commit | None = None  # that has not been written
        self._undrafted: int | None = None  # the first iteration without a draft, because of a fault
        self._has_drafter = True

    # what is told

    def on_prefill(self, prefill: Prefill) -> None:
        if prefill.seconds is not None:
            self._write(
                kind="prefill",
                sequence=self._number,
                num_tokens=len(prefill.token_ids),
                num_reused_tokens=prefill.num_reused_tokens,
                seconds=dict(prefill.seconds),
            )
        elif self._is_over or not self._goes_on(prefill):
            self._begin(prefill)

    def on_level(self, level: Level) -> None:
        if level.tree.num_drafted == 0:
            self._levels = []  # a tree that is begun again, too
        self._levels.append(level.copied())

    def on_prune(self, pruning: Pruning) -> None:
        self._pruning = pruning.copied()

    def on_verify(self, verification: Verification) -> None:
        self._wanted = _Wanted.of(verification)

    def on_commit(self, commit: Commit) -> None:
        self._commit = commit

    def on_feedback(self, feedback: Feedback) -> None:
        self._write_iteration(feedback.report.seconds, feedback.stack)

    def on_fault(self, fault: Fault) -> None:
        if self._is_over:
            self._early_faults.append(fault)
            return
        self._flush()
        self._has_drafter &= fault.then != "fallback"
        self._undrafted = fault.iteration if fault.then == "root alone" else None
        self._write(
            kind="fault",
            sequence=self._number,
            iteration=fault.iteration,
            error=type(fault.error).__name__,
            message=str(fault.error),
            then=fault.then,
        )

    def on_end(self, end: End) -> None:
        if self._is_over:  # nothing was to be generated
            self._trace.begin()
            return
        self._flush()
        self._is_over = end.stop_reason not in ("interrupted", "error")
        self._write(
            kind="end",
            sequence=self._number,
            stop_reason=end.stop_reason,
            text=self._text.finish() if self._text is not None else None,
            report={name: getattr(end.report, name) for name in REPORTED},
            costs=None if end.costs is None else attrs.asdict(end.costs),
        )

    # what is written

    def _write(self, **record: Any) -> None:
        self._trace.write(dumps(record), self._number)

    def _goes_on(self, prefill: Prefill) -> bool:
        """Whether it is the interrupted generation that goes on."""
        before = self._begun
        return (
            before is not None
            and list(prefill.token_ids) == self._committed
            and (prefill.policy, prefill.settings) == (before.policy, before.settings)
        )

    def _begin(self, prefill: Prefill) -> None:
        if self._begun is not None:  # another one
            self._number = self._trace.begin_sequence()
        self._trace.flush(self._number)  # texts of tokens stand in the first line that has them
        self._begun = prefill
        self._is_over = False
        self._commit = None
        self._has_drafter = prefill.drafter is not None
        self._undrafted = None
        self._committed = list(prefill.token_ids)
        self._states = _states(prefill.stack)
        texts, is_private = self._trace.texts, self._trace.is_private
        self._text = texts.incremental()
        prompt = prefill.token_ids[: prefill.num_prompt_tokens]
        limits = attrs.asdict(prefill.limits)
        new_texts = None if is_private else texts.unseen(prompt)
        self._write(
            kind="begin",
            sequence=self._number,
            prompt=None if is_private else prompt,
            prompt_text=None if is_private else texts.whole(prompt),
            num_prompt_tokens=prefill.num_prompt_tokens,
            policy=prefill.policy,
            policies=self._states,
            drafter=prefill.drafter,
            limits=limits,
            limits_by={
                limit: [policy for policy, state in self._states.items() if state.get(limit) == value]
                for limit, value in limits.items()
            },
            settings=dict(prefill.settings),
            texts=new_texts,
        )
        texts.tell(new_texts)
        early, self._early_faults = self._early_faults, []
        for fault in early:
            self.on_fault(fault)

    def _flush(self) -> None:
        """Write what waits, and an iteration of which the policies have not learnt since something failed."""
        if self._commit is not None:
            self._write_iteration(self._commit.report.seconds, None)
        self._trace.flush(self._number)

    def _write_iteration(self, seconds: float, stack: PolicyStack | None) -> None:
        commit, self._commit = self._commit, None
        levels, self._levels = self._levels, []
        before = self._states
        if stack is not None:
            self._states = _states(stack)
        assert commit is not None, "policies learn of what was committed"
        assert self._begun is not None, "iterations follow a prefill"
        iteration = _Iteration(
            sequence=self._number,
            start=len(self._committed),
            levels=levels,
            pruning=self._pruning,
            wanted=self._wanted,
            commit=commit,
            seconds=seconds,
            before=before,
            after=self._states,
            max_depth=self._begun.limits.max_depth,
            has_drafter=self._has_drafter and self._undrafted != commit.report.iteration,
            text=self._text,
        )
        self._committed += commit.report.verdict.token_ids
        self._trace.write_later(iteration)


@attrs.frozen(eq=False)
class _Iteration:
    """What an iteration's line is made of: nothing of it changes any more, so that it can be made later."""

    sequence: int
    start: int  # tokens committed before
    levels: Sequence[Level]
    pruning: Pruning
    wanted: _Wanted
    commit: Commit
    seconds: float  # of the whole step
    before: Mapping[str, Mapping[str, Any]]  # the policies' fields
    after: Mapping[str, Mapping[str, Any]]
    max_depth: int  # the limit
    has_drafter: bool  # in this iteration
    text: IncrementalText | None  # of the generation, up to this iteration

    def line(self, nodes: Nodes, texts: _Texts) -> str:
        """The line, in which none of its nodes is pruned yet."""
        verdict = self.commit.report.verdict
        pruned = _pruned(self.pruning, nodes.parent)
        for node in (node for cut in pruned.values() for node in cut):
            nodes.outcome[node] = PRUNED
        stages = [stage for stage in self.commit.seconds if stage != "decode"]  # which is of the step before
        new_texts = texts.unseen([*nodes.token, *self.wanted.tokens, *verdict.token_ids])
        line = dumps(
            {
                "kind": "iteration",
                "sequence": self.sequence,
                "iteration": self.commit.report.iteration,
                "start": self.start,
                "num_drafted": self.pruning.drafted.num_drafted,
                "path": verdict.draft_path,
                "committed": verdict.token_ids,
                "bonus": verdict.token_ids[-1] if len(verdict.token_ids) > len(verdict.path) else None,
                "text": self.text.push(*verdict.token_ids) if self.text is not None else None,
                "stop": verdict.stop_reason,
                "seconds": {"iteration": self.seconds, **{stage: self.commit.seconds[stage] for stage in stages}},
                "policies": _changes(self.before, self.after),
                "levels": [self._described(level) for level in self.levels],
                "pruned": pruned,
                "texts": new_texts,
            }
        )
        line = f"{line[:-1]},{self.wanted.json(self.pruning)},{nodes.json()}}}"
        texts.tell(new_texts)  # behind all that may fail
        return line

    def _described(self, level: Level) -> dict[str, Any]:
        """How a level came about, or why there is none."""
        return {
            "first": level.tree.last_level.start,
            "width": level.tree.level_sizes[-1],
            "nodes_left": level.nodes_left,
            "end": level.end,
            "end_by": self._ended_by(level),
            "is_free": None if level.proposals is None else level.proposals.is_free,
            "expand": _votes(level.expand),
            "branch": _votes(level.branch),
        }

    def _ended_by(self, level: Level) -> str | None:
        """The policy or the limit that ended a tree; None for several refusals."""
        if level.end == "expand":
            return level.expand.decider if level.expand is not None else None
        if level.end == "width":
            return level.branch.decider if level.branch is not None else None
        if level.end == "nodes":
            return "max_nodes"
        if level.end != "depth":
            return None
        if not self.has_drafter:
            return "no_drafter"
        return "max_depth" if level.tree.max_depth >= self.max_depth else "length"


def _nodes(iterations: Sequence[_Iteration]) -> Sequence[Nodes | Exception]:
    """The nodes of each, or what is wrong with it."""
    try:
        return nodes_of([(one.pruning.drafted, one.levels) for one in iterations])
    except Exception as error:  # noqa: BLE001  # of any of them
        return [error] if len(iterations) == 1 else [found for one in iterations for found in _nodes([one])]


def _named(iterations: Sequence[_Iteration]) -> str:
    """Such as "iterations 3 to 7 of sequence 0, iteration 2 of sequence 1"."""
    numbers: dict[int, list[int]] = {}
    for one in iterations:
        numbers.setdefault(one.sequence, []).append(one.commit.report.iteration)
    return ", ".join(
        f"iteration{'s' if len(found) > 1 else ''} {found[0]}{f' to {found[-1]}' if len(found) > 1 else ''} "
        f"of sequence {sequence}"
        for sequence, found in numbers.items()
    )


@attrs.frozen(eq=False)
class _Wanted:
    """What the target says at each verified node, by its own unprocessed logits."""

    tokens: list[int]  # the most probable
    logprobs: list[float]
    committed_logprobs: list[float]  # of the tokens that were committed

    @classmethod
    def of(cls, verification: Verification) -> _Wanted:
        assert verification.logits is not None, "wants_logits"
        verdict = verification.verdict
        logits = verification.logits.float()  # in which generate() chooses
        # the token after a node was chosen by that node's logits
        chosen_by, chosen = [0, *verdict.path][: len(verdict.token_ids)], list(verdict.token_ids)
        if logits.device.type != "cpu":
            logprobs = torch.log_softmax(logits, dim=-1)
            tokens = logits.argmax(dim=-1)
            found = torch.cat([logprobs.gather(1, tokens[:, None])[:, 0], logprobs[chosen_by, chosen]]).tolist()
            return cls(tokens.tolist(), found[: len(tokens)], found[len(tokens) :])
        # Little else may be done here: right after a pass nothing is in the processor's caches
        given = verification.totals
        if given is None:
            given = ops.totals(logits.contiguous())  # a softmax of all tokens takes five times as long
        totals = given.tolist()
        return cls(
            [int(place) for _, _, place in totals],
            [greatest - greatest - total for greatest, total, _ in totals],  # what is no number is written as null
            [
                (greatest if token == place else logits[row, token].item()) - greatest - total
                for row, token in zip(chosen_by, chosen, strict=True)
                for greatest, total, place in [totals[row]]
            ],
        )

    def json(self, pruning: Pruning) -> str:
        """What is wanted at each drafted node, null where it was not verified, as members of a JSON object."""
        tokens: list[int | None] = list(self.tokens)
        logprobs: list[float | None] = list(self.logprobs)
        if pruning.kept is not pruning.drafted:
            tokens, logprobs = [None] * pruning.drafted.num_nodes, [None] * pruning.drafted.num_nodes
            for place, node in enumerate(pruning.kept.draft_index.tolist()):
                tokens[node], logprobs[node] = self.tokens[place], self.logprobs[place]
        wanted = f'"wanted":{{"token":{int_list(tokens)},"logprob":{float_list(logprobs)}}}'
        return f'{wanted},"committed_logprob":{float_list(self.committed_logprobs)}'


class _Texts:
    """The texts of tokens, each told once in a trace.

    Args:
        tokenizer: None: nothing has a text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self._tokenizer = tokenizer
        self._told: set[int] = set()
        # decoders such as Llama 2's take a space off the beginning of a text, so tokens are decoded behind another one
        self._before: list[int] = [] if tokenizer is None else tokenizer.encode("a", add_special_tokens=False)[-1:]
        self._before_text = self._decode([self._before])[0] if self._before else ""

    def incremental(self) -> IncrementalText | None:
        """The text of one generation's tokens as they come."""
        if self._tokenizer is None:
            return None
        return IncrementalText(lambda token_ids: self._decode([token_ids], skip_special_tokens=True)[0])

    def whole(self, token_ids: Sequence[int]) -> str | None:
        """The text of a prompt, its special tokens among it."""
        return None if self._tokenizer is None else self._decode([list(token_ids)])[0]

    def unseen(self, token_ids: Sequence[int]) -> dict[str, str] | None:
        """The texts of these tokens that were not told before; `tell` is for when they stand in a line."""
        if self._tokenizer is None:
            return None
        new = [token for token in dict.fromkeys(token_ids) if token not in self._told]
        return dict(zip(map(str, new), self._texts(new) if new else [], strict=True))

    def tell(self, texts: Mapping[str, str] | None) -> None:
        """Note that these stand in the trace."""
        self._told.update(map(int, texts or ()))

    def _texts(self, token_ids: Sequence[int]) -> list[str]:
        """The text of each of these tokens, as it is behind another one."""
        texts = self._decode([[*self._before, token] for token in token_ids])
        is_behind = [text.startswith(self._before_text) for text in texts]
        others = [[token] for token, fits in zip(token_ids, is_behind, strict=True) if not fits]
        alone = iter(self._decode(others) if others else ())
        return [
            text.removeprefix(self._before_text) if fits else next(alone)
            for text, fits in zip(texts, is_behind, strict=True)
        ]

    def _decode(self, sequences: list[list[int]], *, skip_special_tokens: bool = False) -> list[str]:
        assert self._tokenizer is not None, "without one there are no texts"
        if _is_plain(self._tokenizer):
            # one by one, since its batches wake threads; its own decode() first looks at each token in Python
            decode: Any = self._tokenizer.backend_tokenizer.decode
            return [decode(one, skip_special_tokens=skip_special_tokens) for one in sequences]
        options = {"skip_special_tokens": skip_special_tokens, "clean_up_tokenization_spaces": False}
        return self._tokenizer.batch_decode(sequences, **options)


def _is_plain(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether its decoding is that of its backend; a class of its own may do more, as CPM's does with spaces."""
    own, plain = type(tokenizer), PreTrainedTokenizerFast
    return issubclass(own, plain) and own._decode is plain._decode and own.decode is plain.decode


def _pruned(pruning: Pruning, parent: Sequence[int]) -> dict[str, list[int]]:
    """Who cut which nodes of the drafted tree: a node goes with its parent; else its first objector has cut it."""
    if pruning.kept is pruning.drafted:
        return {}
    kept = set(pruning.kept.draft_index.tolist())
    votes = {name: vote.tolist() for name, vote in pruning.keep.votes.items() if isinstance(vote, Tensor)}
    by: dict[int, str] = {}
    for node in range(pruning.drafted.num_nodes):  # parents first
        if node not in kept:
            objectors = (name for name, keeps in votes.items() if not keeps[node])
            by[node] = by.get(parent[node]) or next(objectors, "fixed_width")
    return {name: [node for node, one in by.items() if one == name] for name in dict.fromkeys(by.values())}


def _votes(decision: Decision[Any] | None) -> dict[str, Any] | None:
    """Who voted what; None where nobody was asked."""
    if decision is None:
        return None
    return {name: vote.tolist() if isinstance(vote, Tensor) else vote for name, vote in decision.votes.items()}


def _states(stack: PolicyStack) -> dict[str, dict[str, Any]]:
    """Policy -> field -> value: parameters and what it keeps for itself, as they are now."""
    return {name: _state(policy) for name, policy in stack.policies.items()}


def _state(policy: object) -> dict[str, Any]:
    """What of a policy's fields can be written: numbers, texts and short lists of them. It does not change any more."""
    kind: type = type(policy)
    names = _field_names(kind) or tuple(getattr(policy, "__dict__", ()))
    values = [getattr(policy, name, None) for name in names]  # a field may be without a value yet
    # most are numbers, and a call for each would take half of the time
    plain = [one if type(one) in _PLAIN or (type(one) is float and isfinite(one)) else _plain(one) for one in values]
    return {name: one for name, one in zip(names, plain, strict=True) if one is not _NOT_PLAIN}


@functools.cache
def _field_names(kind: type) -> tuple[str, ...]:
    """The fields of a class of attrs; none of another class."""
    return tuple(field.name for field in attrs.fields(kind)) if attrs.has(kind) else ()


_NOT_PLAIN = object()
_PLAIN = frozenset((int, bool, str, type(None)))


def _plain(value: object) -> Any:
    """A number, a text, or a short list of these, as JSON has them; what is no finite number is a text."""
    if type(value) is float:
        return value if isfinite(value) else str(value)
    if type(value) in _PLAIN:
        return value
    if isinstance(value, list | tuple | deque):
        if len(value) > LONGEST_LIST:
            return _NOT_PLAIN
        parts = [one if type(one) in _PLAIN else _plain(one) for one in value]
        return _NOT_PLAIN if any(one is _NOT_PLAIN for one in parts) else parts
    if isinstance(value, Tensor):
        return _NOT_PLAIN  # reading it may wait for the device
    value = as_python(value)
    if isinstance(value, float) and not isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, bool | int | float | str) else _NOT_PLAIN


def _changes(before: Mapping[str, Mapping[str, Any]], after: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Policy -> field -> [before, after], of what has changed and can be written."""
    changes = {policy: _changed(before.get(policy, {}), fields) for policy, fields in after.items()}
    return {policy: fields for policy, fields in changes.items() if fields}


def _changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, list[Any]]:
    return {name: [before.get(name), now] for name, now in after.items() if now != before.get(name)}
