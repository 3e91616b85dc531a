"""A handle: a request that an engine was given, and what has become of it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import attrs

from dynatree_core.engine.lane import Lane, unstarted_result
from dynatree_core.engine.resources import Resources
from dynatree_core.report import GenerationResult, TokenLogprob
from dynatree_core.request.request import Request
from dynatree_core.tree.verdict import StepReport

__all__ = ["Event", "Handle"]


@attrs.frozen(eq=False)
class Event:
    """Something that happened to a sequence in an engine's step."""

    handle: Handle
    # "started" (it has a lane), "prefilled" (a chunk of its prompt), "tokens" (see `report`), "stopped" (it has all its
    # tokens), "cancelled", "preempted" (it waits again, since memory is short), or "failed" (see `handle.error`)
    kind: str
    report: StepReport | None = None  # of "tokens"
    num_tokens: int = 0  # of "prefilled": those of the chunk; of "tokens": those that were committed


class Handle:
    """One request of an engine. `Engine.submit` makes it; it may be read from any thread.

    Attributes:
        request: what was asked.
        number: how many requests the engine was given before.
        submitted_at: seconds on the engine's clock (`now`).
        started_at: when it got a lane; None: it is waiting, or never got one.
        token_times: for each new token, when it was committed.
        ended_at: when it stopped, failed or was cancelled; None while there is more to come.
        error: what has ended it; None where nothing has failed.
    """

    def __init__(
        self,
        engine: Resources,
        request: Request,
        number: int,
        step: Callable[[], object],
        on_report: Callable[[Handle, StepReport], object] | None = None,
    ) -> None:
        self._engine = engine
        self._step = step  # of the engine
        self.request = request
        self.number = number
        self.submitted_at = engine.now()
        self.started_at: float | None = None
        self.token_times: list[float] = []
        self.ended_at: float | None = None
        self.error: BaseException | None = None
        self.on_report = on_report
        self._token_ids: list[int] = []
        self._reports: list[StepReport] = []  # that `reports` has not given yet
        self._keeps_reports = False
        self._num_taken = 0  # tokens that `new_tokens` has given
        self._logprobs: list[TokenLogprob] = []  # that `new_logprobs` has not given yet
        self._lane: Lane | None = None
        self._result: GenerationResult | None = None
        self._done = threading.Event()

    def __repr__(self) -> str:
        return f"<Handle {self.number}: {self.status}, {self.num_tokens} tokens>"

    @property
    def status(self) -> str:
        """ "waiting", "running", "stopped", "cancelled" or "failed"."""
        if not self._done.is_set():
            return "waiting" if self.started_at is None else "running"
        if self.error is not None:
            return "failed"
        return "cancelled" if self.stop_reason == "cancelled" else "stopped"

    @property
    def is_done(self) -> bool:
        """Whether nothing more will come."""
        return self._done.is_set()

    @property
    def stop_reason(self) -> str | None:
        """Why it ended: as in a `GenerationResult`, or "cancelled"; None while there is more to come."""
        return self._result.stop_reason if self._result is not None else None

    @property
    def num_tokens(self) -> int:
        """New tokens so far."""
        return len(self._token_ids)

    @property
    def token_ids(self) -> list[int]:
        """The new tokens so far, a copy."""
        return list(self._token_ids)

    @property
    def first_token_at(self) -> float | None:
        return self.token_times[0] if self.token_times else None

    @property
    def partial(self) -> GenerationResult:
        """What there is by now."""
        lane = self._lane  # read before the result: another thread's step may end it in between
        return self._result or self._result_of(lane, "interrupted")

    def partial_at(self, stop_reason: str) -> GenerationResult:
        """What there is by now, of a sequence that ends for this reason."""
        return self._result_of(self._lane, stop_reason)

    def _result_of(self, lane: Lane | None, stop_reason: str) -> GenerationResult:
        if lane is None:
            return unstarted_result(self._engine, self.request, stop_reason)
        while True:
            num_iterations = lane.num_iterations
            result = lane.result(stop_reason)
            if lane.num_iterations == num_iterations:  # else another thread's step came in between
                return result

    def new_tokens(self) -> list[int]:
        """The tokens since the last call. It does not wait."""
        first, self._num_taken = self._num_taken, len(self._token_ids)
        return self._token_ids[first : self._num_taken]

    def new_logprobs(self) -> list[TokenLogprob]:
        """What the target thought of the tokens since the last call, where that was asked for. It does not wait."""
        found = self._logprobs[:]  # another thread's step may add to the end meanwhile
        del self._logprobs[: len(found)]
        return found

    def reports(self) -> Iterator[StepReport]:
        """Each report from now on; it has the engine make steps until this sequence is done.

        Raises:
            BaseException: what has ended it.
        """
        self._keeps_reports = True
        is_done = False
        while True:
            while self._reports:
                yield self._reports.pop(0)
            if is_done:
                break
            is_done = self._done.is_set()  # another thread's step may have brought more: what there is then is the rest
            if not is_done:
                self._step()
        if self.error is not None:
            raise self.error

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until another thread's steps have ended it, so many seconds at most; whether they have."""
        return self._done.wait(timeout)

    def advance_until_done(self) -> None:
        """Have the engine make steps until this sequence is done, however it ends."""
        while not self._done.is_set():
            self._step()

    def result(self) -> GenerationResult:
        """What came out, a part where it was cancelled. It has the engine make steps until this sequence is done.

        Raises:
            BaseException: what has ended it. A `DynaTreeError` has what was committed as its `partial`.
        """
        self.advance_until_done()
        if self.error is not None:
            raise self.error
        assert self._result is not None, "a handle that is done without an error has a result"
        return self._result

    # what the scheduler tells it

    def start(self, lane: Lane, now: float) -> None:
        """It has a lane."""
        self._lane, self.started_at = lane, now if self.started_at is None else self.started_at

    def hear(self, report: StepReport, now: float) -> None:
        """Tokens were committed.

        Raises:
            Exception: what the caller's `on_report` raises.
        """
        self.catch_up(now)
        if self._keeps_reports:
            self._reports.append(report)
        if self.on_report is not None:
            self.on_report(self, report)

    def catch_up(self, now: float) -> None:
        """Take over what was committed: more than the last report says where a step was broken off behind it."""
        assert self._lane is not None, "tokens come from a lane"
        sequence = self._lane.sequence
        token_ids = sequence.new_ids_from(len(self._token_ids))
        if token_ids and self.request.num_logprobs is not None:
            self._logprobs.extend(sequence.logprobs_from(len(self._token_ids)))
        self.token_times += [now] * len(token_ids)
        self._token_ids += token_ids

    def end(self, result: GenerationResult, now: float, error: BaseException | None = None) -> None:
        """Nothing more will come."""
        if self._lane is not None:
            self.catch_up(now)
        self._result, self.error, self.ended_at, self._lane = result, error, now, None
        self._done.set()
