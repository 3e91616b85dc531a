"""The scheduler: which sequences run, and what each step of an engine does for them.

Sequences wait in the order in which they came. One gets a lane when one is free, has its prompt filled in, chunk by
chunk between the others' iterations, and then takes part in every iteration until it is done. What fails ends the
sequence that it belongs to, and no other.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import attrs

from dynatree_core.engine.handle import Event, Handle
from dynatree_core.engine.lane import Lane
from dynatree_core.engine.recovery import ended_by, filled, named_lack_of_memory, note_observers, steps
from dynatree_core.engine.resources import Resources
from dynatree_core.errors import OutOfMemoryError, ParameterError, QueueFullError
from dynatree_core.request.request import Request
from dynatree_core.runners.passes import PREFILL_CHUNK
from dynatree_core.tree.verdict import StepReport

__all__ = ["Load", "Scheduler"]


@attrs.frozen
class Load:
    """How busy an engine is."""

    num_waiting: int  # requests without a lane
    num_running: int  # sequences with one
    # the longest time between two iterations of one sequence so far, others' prompts and iterations among it
    longest_pause_seconds: float
    num_preempted: int  # times that a sequence had to wait again since memory was short


@attrs.define(eq=False)
class _Running:
    """A sequence that has a lane."""

    handle: Handle
    lane: Lane
    chunks: Iterator[int] | None  # of its prompt, those that are not filled in yet; None: it takes part in iterations
    last_iteration_at: float | None = None
    num_bytes: int = 0  # that it was last known to need
    num_bytes_moving: int = 0


class Scheduler:
    """The sequences of one engine. It does not hold the engine, which is given to each call.

    Args:
        max_sequences: lanes, so sequences that run at once.
        max_waiting: requests that may wait for one.
    """

    def __init__(self, max_sequences: int, max_waiting: int) -> None:
        self.max_sequences = max_sequences
        self.max_waiting = max_waiting
        self._waiting: deque[Handle] = deque()
        self._running: list[_Running] = []
        self._cancelled: set[Handle] = set()  # to be ended by the next step
        self._num_submitted = 0
        self._num_lanes = max_sequences  # fewer after memory was short, until a sequence ends
        self._suspended: dict[Handle, Lane] = {}  # of those that wait again
        self._placed: dict[Handle, Lane] = {}  # of the first in the line, which has caches, but no memory for them yet
        self._num_put_back = 0
        self._longest_pause = 0.0
        # of what other threads read and change: who waits, runs and is cancelled. They only add to the line's end. One
        # thread may come here twice: garbage collection may close whatever cancels a sequence at any point
        self._lock = threading.RLock()
        self._stepping = threading.Lock()
        self._stepper: int | None = None  # the thread that makes a step, or ends a sequence between two

    @property
    def load(self) -> Load:
        with self._lock:
            return Load(len(self._waiting), len(self._running), self._longest_pause, self._num_put_back)

    def submit(
        self,
        engine: Resources,
        requests: Sequence[Request],
        step: Callable[[], object],
        on_report: Callable[[Handle, StepReport], object] | None,
    ) -> list[Handle]:
        """Put requests at the end of the waiting line: all, or none.

        Args:
            engine: which computes them.
            requests: what is asked.
            step: has the engine make a step, for who waits for a sequence's end.
            on_report: called after each iteration of one of them.

        Raises:
            QueueFullError: the line has no room for all.
        """
        with self._lock:
            num_free = self.max_sequences + self.max_waiting - len(self._running) - len(self._waiting)
            if len(requests) > num_free:
                more = "one more" if len(requests) == 1 else f"{len(requests)} more where {num_free} fit"
                raise QueueFullError(
                    f"an engine has room for {self.max_sequences} running and {self.max_waiting} waiting requests, got "
                    f"{more}; submit again when others are done, or give the engine a larger max_waiting"
                )
            first, self._num_submitted = self._num_submitted, self._num_submitted + len(requests)
            handles = [Handle(engine, one, number, step, on_report) for number, one in enumerate(requests, start=first)]
            self._waiting += handles
        return handles

    def cancel(self, engine: Resources, handle: Handle) -> None:
        """End a sequence: at once where no step is being made, else with that step. It may be done already."""
        with self._lock:
            if not handle.is_done:
                self._cancelled.add(handle)
        self._drop_between_steps(engine)

    def step(self, engine: Resources) -> list[Event]:
        """One iteration of everybody who can take part; before it, waiting ones start and a chunk is filled in.

        Returns:
            What has happened, in that order.
        """
        if self._stepper == threading.get_ident():
            raise ParameterError(
                "a step of an engine cannot be made inside of another one, got a call from a callback of it; ask for "
                "`handle.new_tokens()` or `handle.partial` there, and for results outside"
            )
        try:
            with self._stepping:
                self._stepper = threading.get_ident()
                try:
                    events = self._drop_cancelled(engine)
                    events += self._start(engine)
                    events += self._fill(engine)
                    events += self._make_room(engine)
                    events += self._iterate(engine)
                    return events + self._drop_cancelled(engine)
                finally:
                    self._stepper = None
        finally:
            self._drop_between_steps(engine)

    def _drop_between_steps(self, engine: Resources) -> None:
        """End who is cancelled, unless a step is being made: then whoever makes it comes here when it is over.

        So nobody is left who is cancelled after a step has looked for the last time and before it is over.
        """
        while self._cancelled and self._stepping.acquire(blocking=False):
            try:
                self._stepper = threading.get_ident()  # an observer that is told of an end makes no step either
                self._drop_cancelled(engine)
            finally:
                self._stepper = None
                self._stepping.release()

    def _drop_cancelled(self, engine: Resources) -> list[Event]:
        with self._lock:
            cancelled, self._cancelled = self._cancelled, set()
            waiting = [handle for handle in self._waiting if handle in cancelled]
            for handle in waiting:
                self._waiting.remove(handle)
        for handle in waiting:
            self._suspended.pop(handle, None)
            self._placed.pop(handle, None)
            handle.end(handle.partial_at("cancelled"), engine.now())
        running = [running for running in self._running if running.handle in cancelled]
        for one in running:
            self._end(engine, one, "cancelled")
        return [Event(handle, "cancelled") for handle in (*waiting, *(one.handle for one in running))]

    def _start(self, engine: Resources) -> list[Event]:
        """Give free lanes to those who have waited longest."""
        events: list[Event] = []
        while self._waiting and len(self._running) < self._num_lanes:
            handle = self._waiting[0]  # it stays there until it runs, so that nobody else is promised its room
            try:
                lane = self._placed.get(handle) or self._lane_of(engine, handle)
                self._suspended.pop(handle, None)
                self._placed[handle] = lane
                if not self._has_memory(engine, lane, events):
                    return events
            except Exception as error:  # noqa: BLE001  # whatever it is belongs to this sequence
                with self._lock:
                    self._waiting.popleft()
                self._suspended.pop(handle, None)
                self._placed.pop(handle, None)
                handle.end(handle.partial_at("error"), engine.now(), named_lack_of_memory(error))
                events.append(Event(handle, "failed"))
                continue
            lane.neighbours = lambda: [one.lane for one in self._running]
            handle.start(lane, engine.now())
            events.append(Event(handle, "started"))
            one = _Running(handle, lane, filled(lane))
            with self._lock:
                self._waiting.popleft()
                self._running.append(one)
                del self._placed[handle]
            if lane.stop_reason is not None:  # nothing is asked for
                self._end(engine, one)
                events.append(Event(handle, "stopped"))
        return events

    def _lane_of(self, engine: Resources, handle: Handle) -> Lane:
        """The lane of a sequence that is to start, or to go on. It has caches, which take no memory yet."""
        lane = self._suspended.get(handle)
        if lane is None:
            is_growing = engine.max_bytes is not None
            return Lane(engine, handle.request, number=handle.number, is_growing=is_growing)
        lane.resume()
        return lane

    def _has_memory(self, engine: Resources, lane: Lane, events: list[Event]) -> bool:
        """Whether a sequence may start beside those that run; prefixes that are kept make room for it.

        Raises:
            OutOfMemoryError: it does not fit alone.
        """
        if engine.max_bytes is None:
            return True
        self._check_fits(engine, lane)
        left = engine.max_bytes - self._num_bytes_needed(engine, events) - lane.num_bytes_needed
        if left < 0:
            return False
        self._shrink_prefixes(engine, left)
        return True

    @property
    def _num_bytes_known(self) -> int:
        """The same as it was last known."""
        moving = max((one.num_bytes_moving for one in self._running), default=0)
        return sum(one.num_bytes for one in self._running) + moving

    def _num_bytes_needed(self, engine: Resources, events: list[Event]) -> int:
        """What all that run will take up in the next iteration, one of them growing at a time.

        Whose drafter cannot say it ends here.
        """
        for one in [*self._running]:
            with self._own_faults(engine, one, events):
                one.num_bytes, one.num_bytes_moving = one.lane.num_bytes_needed, one.lane.num_bytes_moving
        return self._num_bytes_known

    def _check_fits(self, engine: Resources, lane: Lane) -> None:
        needed = lane.num_bytes_needed + lane.num_bytes_moving
        if engine.max_bytes is not None and needed > engine.max_bytes:
            raise OutOfMemoryError(
                f"the caches of one sequence must fit into max_bytes={engine.max_bytes}, got {needed} bytes "
                f"for {lane.num_slots_needed} slots; give the engine more, shorten the prompt, or lower max_nodes"
            )

    def _shrink_prefixes(self, engine: Resources, num_bytes: int) -> None:
        if engine.prefix_cache is not None and engine.prefix_cache.num_bytes > num_bytes:
            engine.prefix_cache.shrink(num_bytes)

    def _make_room(self, engine: Resources) -> list[Event]:
        """Give each sequence the slots that its next iteration needs.

        When they are short, prefixes that are kept are forgotten, and then the youngest wait again.
        """
        events: list[Event] = []
        if engine.max_bytes is None:
            return events
        while (needed := self._num_bytes_needed(engine, events)) > engine.max_bytes and len(self._running) > 1:
            events.append(self._put_back())
        self._shrink_prefixes(engine, max(engine.max_bytes - needed, 0))
        for one in [one for one in self._running if one.chunks is None]:
            with self._own_faults(engine, one, events):
                self._check_fits(engine, one.lane)
                one.lane.make_room()
        return events

    def _put_back(self) -> Event:
        """Have the youngest sequence wait again, before all others, until one that runs has ended."""
        youngest = max(self._running, key=lambda one: one.handle.number)
        youngest.lane.suspend()
        handle = youngest.handle
        self._suspended[handle] = youngest.lane
        with self._lock:
            self._running.remove(youngest)
            self._waiting.appendleft(handle)
            self._num_put_back += 1
        self._num_lanes = len(self._running)
        return Event(handle, "preempted")

    def _fill(self, engine: Resources) -> list[Event]:
        """Fill in prompts, in the order of their arrival: one chunk, or several that are as short together."""
        events: list[Event] = []
        num_left = PREFILL_CHUNK
        for one in [one for one in self._running if one.chunks is not None]:
            if one.lane.stop_reason is not None:
                one.chunks = None
            while one.chunks is not None and num_left > 0:
                with self._own_faults(engine, one, events):
                    num_tokens = next(one.chunks, None)
                    if num_tokens is None:
                        one.chunks = None
                    else:
                        num_left -= num_tokens
                        events.append(Event(one.handle, "prefilled", num_tokens=num_tokens))
        return events

    def _iterate(self, engine: Resources) -> list[Event]:
        """One iteration of all whose prompts are done."""
        events: list[Event] = []
        ready = {one.lane: one for one in self._running if one.chunks is None}
        for lane, one in [*ready.items()]:
            if lane.stop_reason is not None:  # it had all its tokens when a step was broken off
                del ready[lane]
                self._end(engine, one)
                events.append(Event(one.handle, "stopped"))
        if not ready:
            return events
        try:
            outcomes = steps([*ready])
        except BaseException:  # such as Ctrl-C: caches may lack rows now, or have too many
            for one in ready.values():
                one.chunks = filled(one.lane)
            raise
        now = engine.now()
        short_of_memory: list[_Running] = []
        for lane, one in ready.items():
            with self._own_faults(engine, one, events):
                outcome = outcomes[lane]
                if isinstance(outcome, OutOfMemoryError) and len(self._running) > 1:
                    short_of_memory.append(one)
                    continue
                if isinstance(outcome, Exception):
                    raise outcome
                if one.last_iteration_at is not None:
                    self._longest_pause = max(self._longest_pause, now - one.last_iteration_at)
                one.last_iteration_at = now
                events.append(Event(one.handle, "tokens", outcome, len(outcome.token_ids)))
                one.handle.hear(outcome, now)
                if lane.stop_reason is not None:
                    self._end(engine, one)
                    events.append(Event(one.handle, "stopped"))
        for one in short_of_memory:  # the step is over for it, and with one sequence less the next may fit
            one.chunks = filled(one.lane)
        if short_of_memory and len(self._running) > 1:
            events.append(self._put_back())
        return events

    @contextlib.contextmanager
    def _own_faults(self, engine: Resources, one: _Running, events: list[Event]) -> Iterator[None]:
        """What the block raises ends this sequence; what is not meant for it, such as Ctrl-C, leaves it as it was."""
        try:
            yield
        except Exception as error:  # noqa: BLE001  # whatever it is belongs to this sequence
            self._end(engine, one, "error", ended_by(one.lane, error))
            events.append(Event(one.handle, "failed"))
        except BaseException:
            one.chunks = filled(one.lane)  # its caches may lack rows now
            raise

    def _end(
        self, engine: Resources, one: _Running, reason: str | None = None, error: BaseException | None = None
    ) -> None:
        try:
            one.lane.report_end(reason)
        except Exception as raised:  # noqa: BLE001  # an observer's own: it belongs to this sequence, too
            if error is not None:
                note_observers(error, raised)
            reason, error = "error", error or raised
        one.lane.keep_prefix(engine.max_bytes and max(engine.max_bytes - self._num_bytes_known, 0))
        result = one.lane.result(reason)
        one.lane.release()
        with self._lock:
            self._running.remove(one)
        self._num_lanes = self.max_sequences
        one.handle.end(result, engine.now(), error)
