"""What share of an iteration does recording a trace take?

Greedy generations of the default model go hand in hand: one without a trace, one with a trace, one with a compressed
one. Each does an iteration, then each the next, in an order that changes from iteration to iteration, so a busy moment
meets all of them. They commit the same tokens, so the difference between two such iterations is what the trace takes.
Of each iteration the median over all repeats counts, and the sums are compared. The end of a generation, where the last
lines are written and the file is closed, counts like an iteration; its beginning, where the file is made, does not. So
what an iteration takes falls with the number of iterations; texts go on behind their end to have enough of them.
Iterations wait to be written together until they are 64 or the generation ends, whatever the clock says: so they are
written at the same place every time. On its own a generation writes once a second too, which is some 45 iterations.

Printed are the milliseconds of an iteration, what the trace adds, and its share, each with an interval of 95 %
(bootstrap over repeats). "inside" is what the recorder's own methods take, by the same rule: what they do to the caches
of the CPU is not in it. Last comes what each of these methods takes of an iteration.

    python tests/trace_speed.py [POLICY] [REPEATS] [NEW_TOKENS]
"""

from __future__ import annotations

import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import numpy.typing as npt

from dynatree_core import Engine, Session, StepReport, run
from dynatree_core.engine.observer import HEARD_BY
from dynatree_core.models.load import load_model
from dynatree_core.text.prompt import encode_prompt
from dynatree_core.trace import Trace, record

PROMPT = (
    "Summarise this text and quote it where you can: The committee met on Tuesday to discuss the new bridge. The new "
    "bridge will cross the river north of the old bridge. The committee agreed that it should carry trams."
)
WAYS = {"without": None, "jsonl": "run.jsonl", "jsonl.gz": "run.jsonl.gz"}
ORDERS = tuple(itertools.permutations(WAYS))
NUM_RESAMPLES = 2000

Times = npt.NDArray[np.float64]  # [repeats, iterations], seconds


@attrs.define
class Run:
    """One generation, stepped by hand."""

    steps: Iterator[StepReport]
    trace: Trace | None
    inside: dict[str, float]  # seconds in each of the recorder's methods so far
    seconds: list[float] = attrs.field(factory=list)  # of each iteration, and of the end
    seconds_inside: list[dict[str, float]] = attrs.field(factory=list)
    committed: list[tuple[int, ...]] = attrs.field(factory=list)
    is_over: bool = False

    @classmethod
    def begun(cls, engine: Engine, prompt: Any, policy: str, new_tokens: int, trace: Trace | None) -> Run:
        """With the prompt's pass and the first iteration done."""
        observer = None if trace is None else trace.observer()
        inside = {} if observer is None else timed_methods(observer)
        steps = run(
            Session.on(engine, prompt, policy=policy, max_new_tokens=new_tokens, observer=observer, eos_token_id=[])
        )
        next(steps)
        return cls(steps, trace, inside)

    def step(self) -> None:
        before = dict(self.inside)
        start = time.perf_counter()
        report = next(self.steps, None)
        if report is None and self.trace is not None:
            self.trace.close()
        self.seconds.append(time.perf_counter() - start)
        self.seconds_inside.append({name: seconds - before[name] for name, seconds in self.inside.items()})
        self.committed.append(() if report is None else report.verdict.token_ids)
        self.is_over = report is None


def timed_methods(observer: Any) -> dict[str, float]:
    """Seconds that are spent in each method of an observer, from here on."""
    seconds = dict.fromkeys(HEARD_BY.values(), 0.0)

    def timed(name: str, method: Callable[[Any], None]) -> Callable[[Any], None]:
        def call(told: Any) -> None:
            start = time.perf_counter()
            method(told)
            seconds[name] += time.perf_counter() - start

        return call

    for name in seconds:
        setattr(observer, name, timed(name, getattr(observer, name)))
    return seconds


def hand_in_hand(runs: dict[str, Run], first_order: int) -> None:
    """Step all to their ends, in changing orders."""
    for number in itertools.count(first_order):
        for way in ORDERS[number % len(ORDERS)]:
            runs[way].step()
        if len({one.is_over for one in runs.values()}) > 1 or len({one.committed[-1] for one in runs.values()}) > 1:
            sys.exit("the policy does not decide the same with a trace as without: nothing can be compared")
        if all(one.is_over for one in runs.values()):
            return


def summed(times: Times) -> float:
    """The sum over all iterations, of the median over repeats of each."""
    return float(np.median(times, axis=0).sum())


def interval(statistic: Callable[[npt.NDArray[np.int64]], float], repeats: int) -> tuple[float, float]:
    """Of 95 %, of a statistic of some of the repeats."""
    chance = np.random.default_rng(0)
    found = [statistic(chance.integers(repeats, size=repeats)) for _ in range(NUM_RESAMPLES)]
    low, high = np.quantile(found, (0.025, 0.975))
    return float(low), float(high)


def main(policy: str = "cost_aware", repeats: str = "20", new_tokens: str = "192") -> None:
    """Measure and print."""
    record.LONGEST_WAIT = float("inf")
    loaded = load_model(None, weights="stored")
    assert loaded.tokenizer is not None, "the default model has one"
    engine = Engine(loaded.model, "distilled+prompt_lookup", tokenizer=loaded.tokenizer)
    prompt = encode_prompt(PROMPT, loaded.tokenizer)
    seen: list[dict[str, Run]] = []
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(int(repeats) + 1):
            runs = {}
            for way, name in WAYS.items():
                trace = None if name is None else Trace(Path(folder) / name, tokenizer=loaded.tokenizer)
                runs[way] = Run.begun(engine, prompt, policy, int(new_tokens), trace)
            hand_in_hand(runs, repeat)
            if repeat:  # the first one warms up
                seen.append(runs)
        sizes = {name: (Path(folder) / name).stat().st_size for name in WAYS.values() if name is not None}
    if any(one["without"].committed != seen[0]["without"].committed for one in seen):
        sys.exit(f"{policy} does not decide the same every time: nothing can be compared")
    times = {way: np.array([runs[way].seconds for runs in seen]) for way in WAYS}
    plain = times["without"]
    num_repeats, count = plain.shape[0], plain.shape[1] - 1
    print(f"{policy}, {count} iterations of {1000 * summed(plain) / count:.2f} ms, the medians of {num_repeats}")
    for way, name in WAYS.items():
        if name is None:
            continue
        more = times[way] - plain
        by_method = {
            method: summed(np.array([[one[method] for one in runs[way].seconds_inside] for runs in seen]))
            for method in HEARD_BY.values()
        }
        inside = summed(np.array([[sum(one.values()) for one in runs[way].seconds_inside] for runs in seen]))
        low, high = interval(lambda some, more=more: summed(more[some]), num_repeats)
        least, most = interval(lambda some, more=more: summed(more[some]) / summed(plain[some]), num_repeats)
        print(
            f"{way}: {1000 * summed(more) / count:.3f} ms more "
            f"({1000 * low / count:.3f} to {1000 * high / count:.3f}), "
            f"{summed(more) / summed(plain):.2%} ({least:.2%} to {most:.2%}); "
            f"inside {1000 * inside / count:.3f} ms, {inside / summed(plain):.2%}; "
            f"{sizes[name] / count:.0f} bytes an iteration"
        )
        methods = (f"{method} {1000 * seconds / count:.3f}" for method, seconds in by_method.items() if seconds)
        print(f"  ms in {', '.join(methods)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
