"""The thread that drives the engines: it makes their steps, and tells those who wait what has come.

Each drafter has an engine of its own. All engines have the same target, and the thread makes a step of each that has
something to do, in turn. Whatever else may touch an engine is done by this thread too, so between two steps; only
`submit` comes from others, since it must be told at once that the line is full.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping

import attrs

from dynatree_core.engine.engine import Engine
from dynatree_core.engine.handle import Event, Handle
from dynatree_core.engine.scheduler import Load
from dynatree_core.report import GenerationResult, TokenLogprob
from dynatree_core.request.request import Request
from dynatree_core.serve.errors import EngineDeadError

__all__ = ["EngineLoop", "Listener", "Update"]


@attrs.frozen
class Update:
    """What an engine's step has brought one sequence."""

    token_ids: tuple[int, ...] = ()  # that were committed
    logprobs: tuple[TokenLogprob, ...] = ()  # of these, where they were asked for
    num_accepted: int = 0  # of the tokens, the first ones, had been drafted
    num_drafted: int = 0  # nodes of the tree
    is_last: bool = False  # whether nothing more will come
    result: GenerationResult | None = None  # at the end, unless an error has ended it
    error: BaseException | None = None  # what has ended it


USUAL = 8  # sequences that the usual time is about
Listener = Callable[[Update], None]  # called by the engines' thread; it must not wait and must not raise


@attrs.frozen(eq=False)
class _Open:
    """A sequence that is not done."""

    engine: Engine
    listener: Listener


class EngineLoop:
    """Engines by a name, and the thread that drives them.

    Args:
        engines: with one target, by the name of their drafter.

    Attributes:
        error: what has ended the thread; None while it runs, and where it was stopped.
        on_events: called by the thread with what each step has brought; must not raise.
        on_death: called by the thread when it ends with an error, after all who wait were told.
    """

    def __init__(self, engines: Mapping[str, Engine]) -> None:
        self.engines = dict(engines)
        self.error: BaseException | None = None
        self.on_death: Callable[[BaseException], None] | None = None
        self.on_events: Callable[[list[Event]], None] | None = None
        self._open: dict[Handle, _Open] = {}  # sequences that are not done
        self._to_cancel: set[Handle] = set()
        self._is_stopping = False
        self._fault: BaseException | None = None  # that somebody else has found, and that ends the thread
        self._changed = threading.Condition()  # guards the four above
        self._usual_seconds = 0.0  # from lane to end, of the latest sequences; the thread's own
        self._thread = threading.Thread(target=self._run, name="dynatree-engines", daemon=True)

    def start(self) -> None:
        """Begin to make steps."""
        self._thread.start()

    def stop(self, timeout: float | None = None) -> None:
        """End the thread after its step. Who still waits is told that it is cancelled."""
        with self._changed:
            self._is_stopping = True
            self._to_cancel |= set(self._open)
            self._changed.notify()
        self._thread.join(timeout)

    @property
    def is_alive(self) -> bool:
        """Whether steps are made."""
        return self._thread.is_alive() and self.error is None

    @property
    def num_open(self) -> int:
        """Sequences that are not done."""
        with self._changed:
            return len(self._open)

    @property
    def seconds_to_room(self) -> int:
        """A guess, from how long sequences took so far, of when one more may find room; from 1 to 60."""
        num_before = max((load.num_waiting / max(load.num_running, 1) for load in self.loads), default=0.0)
        return min(max(math.ceil(self._usual_seconds * num_before), 1), 60)

    @property
    def loads(self) -> list[Load]:
        """How busy each engine is."""
        return [engine.load for engine in self.engines.values()]

    def submit(self, drafter: str, listeners: Mapping[Request, Listener]) -> list[Handle]:
        """Have sequences computed by the engine with this drafter: all, or none. May be called from any thread.

        Args:
            drafter: the name of one of the engines.
            listeners: for each request, made by that engine's `request`, who is told of each update, until one
                `is_last`.

        Raises:
            QueueFullError: the waiting line has no room for all.
            EngineDeadError: the thread has ended.
        """
        with self._changed:
            if self.error is not None or self._is_stopping:
                raise EngineDeadError("sequences are computed while the engines' thread runs, but it has ended")
            engine = self.engines[drafter]
            handles = engine.submit_all([*listeners])
            self._open |= {
                handle: _Open(engine, listener) for handle, listener in zip(handles, listeners.values(), strict=True)
            }
            self._changed.notify()
        return handles

    def cancel(self, handle: Handle) -> None:
        """End a sequence before the next step. May be called from any thread, also for one that is done."""
        with self._changed:
            if handle in self._open:
                self._to_cancel.add(handle)
                self._changed.notify()

    def fail(self, error: BaseException) -> None:
        """End the thread with this error. May be called from any thread."""
        with self._changed:
            self._fault = error
            self._changed.notify()

    def cancel_all(self) -> None:
        """End all sequences before the next step. May be called from any thread."""
        with self._changed:
            self._to_cancel |= set(self._open)
            self._changed.notify()

    # the thread

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                self._cancel_all()
                for engine in self.engines.values():
                    if is_busy(engine):
                        self._tell(engine.step())
            self._cancel_all()
        except BaseException as error:  # noqa: BLE001  # it is told to all who wait, and ends the server
            self._die(error)

    def _wait_for_work(self) -> bool:
        """Wait until there is something to do; False where the thread is to end."""
        with self._changed:
            while not (self._is_stopping or self._fault or self._to_cancel or any(map(is_busy, self.engines.values()))):
                self._changed.wait()
            if self._fault is not None:
                raise self._fault
            return not self._is_stopping

    def _cancel_all(self) -> None:
        with self._changed:
            handles, self._to_cancel = self._to_cancel, set()
            found = {handle: self._open[handle] for handle in handles if handle in self._open}
        for handle, one in found.items():
            one.engine.cancel(handle)
            self._tell([Event(handle, "cancelled")])

    def _tell(self, events: list[Event]) -> None:
        """Tell listeners what a step has brought."""
        if self.on_events is not None:
            self.on_events(events)
        for event in events:
            is_last = event.kind in ("stopped", "failed", "cancelled")
            if event.kind != "tokens" and not is_last:
                continue
            if event.kind == "stopped":
                self._note_seconds(event.handle)
            with self._changed:
                one = self._open.pop(event.handle, None) if is_last else self._open.get(event.handle)
            if one is not None:
                one.listener(update_of(event, is_last=is_last))

    def _note_seconds(self, handle: Handle) -> None:
        if handle.started_at is not None and handle.ended_at is not None:
            seconds = handle.ended_at - handle.started_at
            self._usual_seconds += (seconds - self._usual_seconds) / USUAL if self._usual_seconds else seconds

    def _die(self, error: BaseException) -> None:
        with self._changed:
            self.error = error
            left, self._open = self._open, {}
        dead = EngineDeadError("a sequence is computed while the engines' thread runs, but it has ended with an error")
        dead.__cause__ = error
        for one in left.values():
            one.listener(Update(is_last=True, error=dead))
        if self.on_death is not None:
            self.on_death(error)


def is_busy(engine: Engine) -> bool:
    """Whether a step of this engine would do anything."""
    load = engine.load
    return load.num_waiting + load.num_running > 0


def update_of(event: Event, *, is_last: bool) -> Update:
    """What a listener is told of an event: tokens that nobody was told of before, and how it ended."""
    handle, report = event.handle, event.report
    return Update(
        token_ids=tuple(handle.new_tokens()),
        logprobs=tuple(handle.new_logprobs()),
        num_accepted=report.num_accepted if report is not None else 0,
        num_drafted=report.tree.num_nodes - 1 if report is not None else 0,
        is_last=is_last,
        result=handle.partial if is_last and handle.error is None else None,
        error=handle.error if is_last else None,
    )
