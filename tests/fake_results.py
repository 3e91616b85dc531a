"""Results of benchmark runs that nobody ran: the text of a synthetic source, decoded on paper.

Trees follow the source's ranks as a real session would; times follow a cost for each pass, with noise. So the figures
have something to show, in no time. `python tests/fake_results.py FOLDER` writes a run of each experiment, and a report.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import numpy as np

from dynatree_bench.data.synthetic import MarkovSource
from dynatree_bench.run.experiments import EXPERIMENTS, Cell, Experiment, cells, chosen_methods
from dynatree_bench.run.records import (
    MemoryInfo,
    MethodInfo,
    ModelInfo,
    OutputRecord,
    Replay,
    RunInfo,
    Steps,
    Trials,
    append_record,
    write_info,
)
from dynatree_core import parse_stack

STEP, LEVEL, ROW = 0.030, 0.003, 0.0006  # seconds of an autoregressive step, a drafted level, a further row
READING = 0.0155  # seconds in which the memory's bandwidth lets the weights be read: half of a step and its rest
SOURCE = MarkovSource.draw(8192)
LENGTHS = {"scalability": (100, 200, 500, 1000)}

Widths = Callable[[float, int], int]  # (confidence, depth) of a node -> children that it gets


def write_run(folder: Path, name: str, *, num_prompts: int = 6, max_new_tokens: int = 120) -> Path:
    """A run of an experiment in a folder of its own; its path."""
    experiment = EXPERIMENTS[name]
    form = attrs.evolve(experiment.full, max_new_tokens=LENGTHS.get(name, (max_new_tokens,)))
    methods = chosen_methods(experiment, with_rivals=True)
    run = folder / name
    axes: dict[str, Any] = {"max_new_tokens": list(form.max_new_tokens)}
    axes |= {name: list(dict.fromkeys(point[name] for point in form.points)) for name in form.points[0]}
    axes |= {"dataset": list(form.workloads)} if name == "datasets" else {}
    axes |= {"prompt_tokens": list(form.prompt_tokens)} if form.prompt_tokens != (None,) else {}
    write_info(run, _info(experiment, axes))
    rng = np.random.default_rng(0)
    sizes = itertools.product(form.workloads, form.prompt_tokens, range(num_prompts))
    for dataset, prompt_tokens, prompt in sizes:
        base: dict[str, Any] = {"dataset": dataset} if name == "datasets" else {}
        base |= {"prompt_tokens": prompt_tokens} if prompt_tokens is not None else {}
        for order, cell in enumerate(cells(methods, form, base)):
            append_record(run, output(cell, name, f"{dataset}-{prompt}", order, rng, start=prompt * 1300))
    return run


def output(cell: Cell, experiment: str, prompt_id: str, order: int, rng: Any, *, start: int) -> OutputRecord:
    """What a method would have made of a prompt, in about the time that it would have taken."""
    length = cell.max_new_tokens
    token_ids = tuple(SOURCE.text(start, length))
    record = OutputRecord(
        experiment=experiment, method=cell.method.name, prompt_id=prompt_id, category="prose", axes=dict(cell.axes),
        repeat=0, order=order, num_prompt_tokens=50, token_ids=token_ids, stop_reason="length", prefill_seconds=0.2,
        decode_seconds=0.0, total_seconds=0.2, draft_seconds=None, verify_seconds=None, rest_seconds=None,
        overhead_seconds=None, peak_memory_bytes=10**9, is_identical=True, error=None, load=0.02, steps=None,
        trials=None, replay=None,
    )  # fmt: skip
    if cell.method.name == "dejavuu":
        error = "RuntimeError: the chain mode does not run on this version of transformers"
        return attrs.evolve(record, error=error, token_ids=(), stop_reason="error", is_identical=None)
    noise = float(rng.lognormal(0, 0.05))
    if cell.method.kind != "dynatree":
        seconds = length * STEP * noise * {"hf": 1.15, "rival": 0.8}[cell.method.kind]
        is_identical = cell.method.name != "economize" or start > 0  # all but the first prompt
        return attrs.evolve(record, decode_seconds=seconds, total_seconds=seconds + 0.2, is_identical=is_identical)
    steps, trials = decode_on_paper(start, length, widths_of(cell.policy))
    iterations, nodes, levels = len(steps.depth), sum(steps.num_drafted), sum(steps.depth)
    draft = LEVEL * levels * noise
    verify = (STEP * iterations + ROW * nodes) * noise
    rest = 0.001 * iterations * noise
    is_plain = cell.policy == "autoregressive"
    ranks = tuple(
        rank if rank < 16 else -1 for rank in SOURCE.rank[SOURCE.order[(start - 1 + np.arange(length)) % 8192]].tolist()
    )
    return attrs.evolve(
        record, decode_seconds=draft + verify + rest, total_seconds=draft + verify + rest + 0.2, draft_seconds=draft,
        verify_seconds=verify, rest_seconds=rest, overhead_seconds=rest, steps=steps,
        peak_memory_bytes=10**9 + (0 if is_plain else 10**7), trials=None if is_plain else trials,
        replay=None if is_plain else Replay(ranks, (0.5,) * length),
    )  # fmt: skip


def decode_on_paper(start: int, length: int, widths: Widths) -> tuple[Steps, Trials]:
    """The iterations that decode so many tokens of the source's text, and the trials on their paths."""
    steps, trials = [], []
    done = 0
    while done < length:
        token = int(SOURCE.order[(start + done - 1) % 8192])
        on_path, drafted, deepest, accepted, off_path = True, 0, 0, 0, 0
        for depth in range(length - done - 1):
            grown = min(off_path, 6) * widths(0.65, depth)  # some of the wrong nodes are expanded too
            if on_path:
                confidence, rank = float(SOURCE.confidence[token]), int(SOURCE.rank[token])
                width = widths(confidence, depth)
                probs = [confidence, *((1 - confidence) * 0.4 * 0.6**r for r in range(width))]
                trials += [(depth + 1, r, probs[r], r == rank) for r in range(width)]
                on_path = rank < width
                accepted, token = accepted + on_path, int(SOURCE.next_ids[token])
                grown += width
            if not grown:
                break
            drafted, deepest, off_path = drafted + grown, depth + 1, grown - on_path
        steps.append((drafted, deepest, accepted, accepted + 1))
        done += accepted + 1
    return Steps(*zip(*steps, strict=True)), Trials(*zip(*trials, strict=True)) if trials else Trials((), (), (), ())


def widths_of(policy: str) -> Widths:
    """How a built-in stack branches, roughly."""
    names = {"phase1": "fixed+confidence", "phase2": "confidence+dynamic_depth", "phase3": "confidence+dynamic_depth"}
    stack = {spec.name: spec.parameters for spec in parse_stack(names.get(policy, policy))}
    if "autoregressive" in stack:
        return lambda confidence, depth: 0
    if "linear" in stack:
        return lambda confidence, depth: int(depth < 6)
    base: Any = stack.get("fixed", {}).get("depth") or stack.get("dynamic_depth", {}).get("base_depth") or 5
    branch: Any = stack.get("fixed", {}).get("branch", 2)
    own: Any = stack.get("confidence", {})

    def widths(confidence: float, depth: int) -> int:
        deep = depth < 8 and confidence > 0.95 if "dynamic_depth" in stack else False
        if depth >= base and not deep:
            return 0
        if "confidence" not in stack:
            return int(branch)
        if confidence > own.get("high", 0.9):
            return int(own.get("min_branch", 1))
        return int(own.get("max_branch", 3)) if confidence < own.get("low", 0.4) else 2

    return widths


def _info(experiment: Experiment, axes: dict[str, Any]) -> RunInfo:
    drafter = "model(model='synthetic tiny, drafter')"
    methods = [
        MethodInfo(m.name, m.kind, m.policy, drafter if m.is_drafting else None, dict(m.options))
        for m in chosen_methods(experiment, with_rivals=True)
    ]
    return RunInfo(
        experiment=experiment.name,
        command=f"dynatree bench {experiment.name} --replay",
        version="0.1.0",
        commit="0123456789abcdef-dirty",
        started="2026-11-22T04:00:00+00:00",
        target=ModelInfo("made up, target", None, "float32", 135_000_000),
        drafter=ModelInfo("made up, drafter", None, "float32", 10_000_000),
        device="cpu",
        device_name="a processor that does not exist",
        threads=2,
        libraries={"torch": "2.13.0", "transformers": "5.23.0"},
        seed=0,
        is_synthetic=True,
        ignore_eos=False,
        methods=tuple(methods),
        axes=axes,
        memory=MemoryInfo(bytes_per_second=540e6 / READING, cache_bytes=2**25, step_bytes=540_000_000),
    )


def write_all(folder: Path) -> Iterator[Path]:
    """A run of each experiment."""
    for name in EXPERIMENTS:
        yield write_run(folder, name)


if __name__ == "__main__":
    from dynatree_bench.report.page import report

    for _ in write_all(Path(sys.argv[1])):
        pass
    print(report(Path(sys.argv[1])))
