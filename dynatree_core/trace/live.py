"""The trees of one generation while it runs, as the viewer draws them: nothing is written anywhere."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from dynatree_core.engine.observer import Observer
from dynatree_core.trace.record import Trace
from dynatree_core.trace.summary import StepSummary

__all__ = ["LiveTrees"]


class LiveTrees:
    """What the trees of one generation look like, iteration by iteration.

    `observer` is told by the thread that computes the generation; `steps` is for another one, which may take longer.
    It holds the iterations that were not asked for yet, and nothing of the prompt.
    """

    def __init__(self) -> None:
        self._records: deque[Mapping[str, Any]] = deque()  # appended by one thread, taken by another
        self._summary: StepSummary | None = None  # None before the generation begins
        # no tokenizer: texts are made where they are shown, not while others wait for the next pass
        self.observer: Observer = Trace(None, is_private=True, on_record=self._records.append).observer()

    def steps(self, text_of: Callable[[int], str]) -> Iterator[dict[str, Any]]:
        """The iterations since the last call, each as `Step` in `viewer/src/live.ts`.

        Args:
            text_of: the text of a token.
        """
        while self._records:
            record = self._records.popleft()
            if record["kind"] == "begin":
                self._summary = StepSummary(record)
            elif record["kind"] == "iteration":
                assert self._summary is not None, "a generation begins before its iterations"
                yield self._summary.step(record, text_of)
