"""What share of an iteration does recording a trace take?

Greedy generations of the default model with and without a trace alternate, so a busy moment meets both. A text is the
same every time, iteration by iteration: of each iteration the fastest of all repeats counts, and the sums are compared.
What waited to be written is written in the same iterations every time, or at the end, which counts like an iteration.
Printed are the milliseconds of an iteration, what the trace adds, and its share. "inside" is what the recorder's own
methods take, by the same rule: what they do to the caches of the CPU is not in it.

    python tests/trace_speed.py [POLICY] [REPEATS] [NEW_TOKENS]
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dynatree_core import Engine, Session, run
from dynatree_core.engine.observer import HEARD_BY
from dynatree_core.models.load import load_model
from dynatree_core.text.prompt import encode_prompt
from dynatree_core.trace import Trace

PROMPT = (
    "Summarise this text and quote it where you can: The committee met on Tuesday to discuss the new bridge. The new "
    "bridge will cross the river north of the old bridge. The committee agreed that it should carry trams."
)
WAYS = {"without": None, "jsonl": "run.jsonl", "jsonl.gz": "run.jsonl.gz"}


class Stopwatch:
    """What the methods of an observer take, since it was last read."""

    def __init__(self, observer: Any) -> None:
        self.seconds = 0.0
        for name in set(HEARD_BY.values()):
            setattr(observer, name, self._timed(getattr(observer, name)))

    def _timed(self, method: Callable[[Any], None]) -> Callable[[Any], None]:
        def call(record: Any) -> None:
            start = time.perf_counter()
            method(record)
            self.seconds += time.perf_counter() - start

        return call

    def read(self) -> float:
        seconds, self.seconds = self.seconds, 0.0
        return seconds


def one_run(session: Session, stopwatch: Stopwatch | None, trace: Trace | None) -> tuple[list[float], list[float]]:
    """The seconds of each iteration and of the end, and what of them the recorder's methods take."""
    whole, inside = [], []
    steps = run(session)
    next(steps)  # with the prompt's pass
    if stopwatch is not None:
        stopwatch.read()
    start = time.perf_counter()
    is_over = False
    while not is_over:
        is_over = next(steps, None) is None
        if is_over and trace is not None:
            trace.close()
        whole.append(time.perf_counter() - start)
        inside.append(0.0 if stopwatch is None else stopwatch.read())
        start = time.perf_counter()
    return whole, inside


def main(policy: str = "cost_aware", repeats: str = "12", new_tokens: str = "48") -> None:
    """Measure and print."""
    loaded = load_model(None, weights="stored")
    assert loaded.tokenizer is not None, "the default model has one"
    engine = Engine(loaded.model, "distilled+prompt_lookup", tokenizer=loaded.tokenizer)
    prompt = encode_prompt(PROMPT, loaded.tokenizer)
    seen: dict[str, list[tuple[list[float], list[float]]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(int(repeats) + 1):
            for way, name in WAYS.items():
                trace = None if name is None else Trace(Path(folder) / name, tokenizer=loaded.tokenizer)
                observer = None if trace is None else trace.observer()
                stopwatch = None if observer is None else Stopwatch(observer)
                options = {"policy": policy, "max_new_tokens": int(new_tokens), "observer": observer}
                found = one_run(Session.on(engine, prompt, **options), stopwatch, trace)
                if repeat:  # the first one warms up
                    seen[way].append(found)
        sizes = {name: (Path(folder) / name).stat().st_size for name in WAYS.values() if name is not None}
    counts = {len(whole) for runs in seen.values() for whole, _ in runs}
    if len(counts) > 1:
        sys.exit(f"{policy} does not decide the same every time ({sorted(counts)} iterations): nothing can be compared")
    count = counts.pop() - 1
    plain = sum(map(min, zip(*(whole for whole, _ in seen["without"]), strict=True)))
    print(f"{policy}, {count} iterations of {1000 * plain / count:.2f} ms, the fastest of {repeats}")
    for way, name in WAYS.items():
        if name is None:
            continue
        whole = sum(map(min, zip(*(whole for whole, _ in seen[way]), strict=True)))
        inside = sum(map(min, zip(*(inside for _, inside in seen[way]), strict=True)))
        print(
            f"{way}: {1000 * (whole - plain) / count:.3f} ms more, {(whole - plain) / plain:.1%}; inside "
            f"{1000 * inside / count:.3f} ms, {inside / plain:.1%}; {sizes[name] / count:.0f} bytes an iteration"
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
