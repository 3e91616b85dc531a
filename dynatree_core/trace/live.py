"""The trees of one generation while it runs, as the viewer draws them: nothing is written anywhere."""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

from dynatree_core.engine.observer import Observer
from dynatree_core.trace.record import Trace
from dynatree_core.trace.summary import StepSummary

__all__ = ["LiveTrees"]

MOST_WAITING = 64  # iterations of some 50 KB each at most, which a reader that is late may still have
BEGIN, ITERATION = '{"kind":"begin"', '{"kind":"iteration"'  # how lines of a trace begin


class LiveTrees:
    """What the trees of one generation look like, iteration by iteration.

    `observer` is told by the thread that computes the generation; `record` is for another one, which may take longer.
    It holds the latest iterations that were not asked for yet. The prompt is not among them, but their nodes may quote
    it, as all do that prompt lookup has drafted, and each has the token that its tree begins with.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()  # one thread adds to these three, another takes from them
        self._begin: str | None = None  # a line, until it is read
        self._lines: deque[str] = deque(maxlen=MOST_WAITING)  # as in a trace, read where they are wanted
        self._num_dropped = 0  # iterations since the last call
        self._summary: StepSummary | None = None  # None before the generation begins
        # no tokenizer: texts are made where they are shown, not while others wait for the next pass
        self._trace = Trace(None, is_private=True, on_line=self._keep)
        self.observer: Observer = self._trace.observer()

    def _keep(self, line: str) -> None:
        with self._lock:
            if line.startswith(BEGIN):
                self._begin = line
            elif line.startswith(ITERATION):
                self._num_dropped += len(self._lines) == self._lines.maxlen
                self._lines.append(line)

    def record(self, text_of: Callable[[int], str]) -> dict[str, Any]:
        """What a chunk of a stream says of them, as members of a JSON object.

        Args:
            text_of: the text of a token.

        Returns:
            `trees`: the iterations since the last call, each as `Step` in `viewer/src/live.ts`; and, where earlier ones
            were dropped since nobody has asked for them in time, `trees_dropped`: how many.
        """
        with self._lock:
            begin, self._begin = self._begin, None
            lines, num_dropped = [*self._lines], self._num_dropped
            self._lines.clear()
            self._num_dropped = 0
        if begin is not None:
            self._summary = StepSummary(json.loads(begin))
        steps = []
        for line in lines:
            assert self._summary is not None, "a generation begins before its iterations"
            steps.append(self._summary.step(json.loads(line), text_of))
        return {"trees": steps} | ({"trees_dropped": num_dropped} if num_dropped else {})
