"""Where an iteration's time goes, measured at the borders of the stages and not inside them."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

__all__ = ["StageClock"]


class StageClock:
    """Adds up seconds by name.

    On CUDA a pass is measured with events on the stream, which neither wait for the device nor miss its work;
    they are read when `seconds` or `lap` is asked, which do wait.

    Args:
        device: where the passes run.
        now: seconds since any moment; None: the host's own clock.
    """

    def __init__(self, device: torch.device, now: Callable[[], float] | None = None) -> None:
        self._device = device
        self._read = now
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._begun: dict[str, float] = {}  # when the last block of a name began
        self._left_out = 0.0  # seconds that count for nothing, so far
        self._lapped: dict[str, float] = {}  # totals at the last lap

    @contextmanager
    def measure(self, name: str, *, on_device: bool = False) -> Iterator[None]:
        """Add the time of the block to `name`; with `on_device`, the device's time where there is one.

        Where torch's profiler is on, the block has its name in the trace too.
        """
        if torch.autograd.profiler._is_profiler_enabled:
            with torch.profiler.record_function(f"dynatree: {name}"), self._measured(name, on_device):
                yield
        else:
            with self._measured(name, on_device):
                yield

    @contextmanager
    def _measured(self, name: str, on_device: bool) -> Iterator[None]:
        if on_device and self._device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            stream = torch.cuda.current_stream(self._device)
            start.record(stream)
            try:
                yield
            finally:
                end.record(stream)
                self._events.append((name, start, end))
        else:
            begin = self._begun[name] = self._now()
            try:
                yield
            finally:
                self._seconds[name] += self._now() - begin

    def since(self, name: str) -> float:
        """Seconds since the last block of that name began, as long as it is measured on the host; 0.0 without one."""
        return self._now() - self._begun[name] if name in self._begun else 0.0

    @contextmanager
    def leave_out(self) -> Iterator[None]:
        """The time of the block belongs to no stage, whatever is being measured around it."""
        begin = self._now()
        try:
            yield
        finally:
            self._left_out += self._now() - begin

    def _now(self) -> float:
        return (self._read or time.perf_counter)() - self._left_out

    def lap(self) -> dict[str, float]:
        """Seconds by name since the last lap, of the blocks that ended in it."""
        self._read_events()
        lapped, self._lapped = self._lapped, dict(self._seconds)
        spent = {name: total - lapped.get(name, 0.0) for name, total in self._lapped.items()}
        return {name: seconds for name, seconds in spent.items() if seconds}

    def seconds(self, name: str) -> float:
        """Total of all blocks of that name so far; 0.0 for a name never measured."""
        self._read_events()
        return self._seconds[name]

    def _read_events(self) -> None:
        """Add up what was measured on the device, for which it waits."""
        if self._events:
            torch.cuda.synchronize(self._device)
            for event_name, start, end in self._events:
                self._seconds[event_name] += start.elapsed_time(end) / 1000  # ms to s
            self._events.clear()
