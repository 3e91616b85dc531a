"""What are trees worth on the default model, and where does an iteration's time go?

Question: tokens per target pass, speed relative to autoregressive decoding on the same runtime, the part of an
iteration outside the models' forward passes, and peak memory, for `phase3` and `fixed` with `prompt_lookup` drafts.

Method: every prompt is decoded by all methods one after another, in rotating order, in one process after a warm-up; a
speed is the ratio of two runs of the same prompt, and its median and range are shown. The machine is watched while
it runs, because a busy one says nothing about speed. Memory is measured in a process per method: the highest resident
size during one generation, the peak counter being reset after loading; once as it comes, and once without the work
space that the matrix library keeps for itself.

Output: a table per kind of prompt, then overhead as a share of an autoregressive step, and peak memory relative to
autoregressive decoding. Exit code 1 if any output differed from autoregressive decoding.

Command: python -m dynatree_bench.studies.smoke [--prompts FILE.jsonl] [--per-kind N] [--max-new-tokens N]
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import attrs
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from dynatree_bench.data.prompts import BUILT_IN, chat_ids, in_turns, load_prompts, parsed_arguments
from dynatree_bench.run.machine import LoadMeter, idle_or_busy, runtime
from dynatree_core import GenerationResult, LoadedModel, generate, load_model
from dynatree_core.cli.exits import end_process

BASELINE = "autoregressive"
METHODS = (BASELINE, "fixed", "phase3")
DRAFTER = "prompt_lookup"
# heading -> what it stands for
COLUMNS = {
    "tok/it": "committed tokens per iteration",
    "path": "path acceptance",
    "node": "node acceptance",
    "nodes": "drafted nodes per iteration",
    "draft": "ms per iteration in the drafter",
    "verify": "in the target's forward pass",
    "rest": "in all else",
    "over": "outside forward passes",
    "speedup": "median of the prompts' ratios to autoregressive",
    "range": "lowest and highest of them",
    "rep": "repetition",
    "same": "outputs equal to autoregressive ones",
}
# A matrix library keeps work space for products of several rows, for each thread; it is the greater part of what trees
# seem to cost a small model. With that switched off, what DynaTree itself holds is left.
MEMORY_SETTINGS: dict[str, dict[str, str]] = {
    "as it comes": {},
    "without the matrix library's buffers": {"MKL_DISABLE_FAST_MM": "1", "OMP_NUM_THREADS": "1"},
}


@attrs.frozen
class Run:
    """One generation of one prompt by one method."""

    result: GenerationResult
    speedup: float  # decoding time of the baseline on this prompt ÷ this method's
    is_identical: bool  # to the baseline's tokens


def main() -> int:
    arguments = _parse_arguments()
    if arguments.memory_of:
        print(peak_memory(arguments.memory_of, arguments.max_new_tokens))
        return 0
    console = Console(width=None if sys.stdout.isatty() else 110, highlight=False)
    kinds = load_prompts(arguments.prompts, arguments.per_kind)
    console.print(f"{runtime()}, float32, drafter {DRAFTER}, {arguments.max_new_tokens} new tokens at most")
    default = load_model(None, device="cpu")
    meter = LoadMeter()
    runs = measure(default, kinds, arguments.max_new_tokens)
    others = meter.meanwhile()
    for kind in kinds:
        console.print(_table(kind, {method: runs[kind, method] for method in METHODS}))
    console.print("; ".join(f"{heading}: {meaning}" for heading, meaning in COLUMNS.items()) + "\n")
    _print_overhead(console, runs)
    if not arguments.no_memory:
        _print_memory(console, arguments.max_new_tokens)
    console.print(idle_or_busy(others))
    differing = sum(not run.is_identical for group in runs.values() for run in group)
    console.print(f"outputs that differ from autoregressive decoding: {differing} of {sum(map(len, runs.values()))}")
    return 1 if differing else 0


def measure(default: LoadedModel, kinds: dict[str, list[str]], max_new_tokens: int) -> dict[tuple[str, str], list[Run]]:
    """Every prompt by every method, interleaved: (kind, method) -> runs, in the order of the prompts."""
    runs: defaultdict[tuple[str, str], list[Run]] = defaultdict(list)
    prompts = [(kind, prompt) for kind, texts in kinds.items() for prompt in texts]
    turns = in_turns([text for _, text in prompts], METHODS, functools.partial(decode, default), max_new_tokens)
    for (kind, _), results in zip(prompts, turns, strict=True):
        baseline = results[BASELINE]
        for method, result in results.items():
            speedup = baseline.report.decode_seconds / result.report.decode_seconds
            runs[kind, method].append(Run(result, speedup, result.token_ids == baseline.token_ids))
    return dict(runs)


def decode(default: LoadedModel, prompt: str, method: str, max_new_tokens: int) -> GenerationResult:
    """One prompt through the chat template and one method."""
    ids = chat_ids(default, prompt)
    drafter = None if method == BASELINE else DRAFTER
    return generate(default.model, drafter, ids, policy=method, max_new_tokens=max_new_tokens)


def peak_memory(method: str, max_new_tokens: int) -> int:
    """Highest resident size of this process during one generation, in bytes; 0 where the system cannot tell."""
    default = load_model(None, device="cpu")
    prompt = BUILT_IN["copying"][1]
    decode(default, prompt, BASELINE, 4)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM, the peak resident size, to the present size
    except OSError:
        return 0
    decode(default, prompt, method, max_new_tokens)
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def _table(kind: str, by_method: dict[str, list[Run]]) -> Table:
    table = Table(
        title=f"{kind}: {len(by_method[BASELINE])} prompts", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    table.add_column("method", no_wrap=True)
    for heading in COLUMNS:
        table.add_column(heading, justify="right", no_wrap=True)
    for method, runs in by_method.items():
        reports = [run.result.report for run in runs]
        iterations = sum(report.num_iterations for report in reports)
        speedups = [run.speedup for run in runs]
        tokens = sum(report.num_new_tokens for report in reports)
        nodes = sum(report.num_drafted_nodes for report in reports)
        accepted = sum(report.num_accepted_tokens for report in reports)
        path = [report.path_acceptance for report in reports if report.path_acceptance is not None]
        per_iteration = (
            f"{1000 * sum(seconds) / iterations:.1f}"
            for seconds in zip(
                *((r.draft_seconds, r.verify_seconds, r.rest_seconds, r.overhead_seconds) for r in reports), strict=True
            )
        )
        table.add_row(
            method,
            f"{tokens / iterations:.2f}",
            f"{statistics.mean(path):.2f}" if path else "-",
            f"{accepted / nodes:.2f}" if nodes else "-",
            f"{nodes / iterations:.1f}",
            *per_iteration,
            f"{statistics.median(speedups):.2f}",
            f"{min(speedups):.2f}–{max(speedups):.2f}",
            f"{statistics.mean(report.repetition or 0 for report in reports):.2f}",
            f"{sum(run.is_identical for run in runs)}/{len(runs)}",
        )
    return table


def _print_overhead(console: Console, runs: dict[tuple[str, str], list[Run]]) -> None:
    """Overhead per iteration against an autoregressive step, both over all prompts."""

    def per_iteration(method: str, field: str) -> float:
        reports = [run.result.report for (_, of), group in runs.items() if of == method for run in group]
        return sum(getattr(report, field) for report in reports) / sum(report.num_iterations for report in reports)

    step = per_iteration(BASELINE, "decode_seconds")
    for method in METHODS:
        overhead = per_iteration(method, "overhead_seconds")
        console.print(
            f"overhead of {method}: {1000 * overhead:.2f} ms an iteration, {100 * overhead / step:.1f} % of an "
            f"autoregressive step of {1000 * step:.1f} ms"
        )


def _print_memory(console: Console, max_new_tokens: int) -> None:
    command = [
        sys.executable,
        "-m",
        "dynatree_bench.studies.smoke",
        "--max-new-tokens",
        str(max_new_tokens),
        "--memory-of",
    ]
    for title, setting in MEMORY_SETTINGS.items():
        environment = {**os.environ, **setting}
        peaks = {}
        for method in METHODS:
            done = subprocess.run([*command, method], check=True, capture_output=True, text=True, env=environment)
            peaks[method] = int(done.stdout)
        if not peaks[BASELINE]:
            console.print("peak memory: not measured, this system does not tell a process its peak")
            return
        for method, peak in peaks.items():
            console.print(
                f"peak memory {title}, {method}: {peak / 2**20:.1f} MiB, {100 * (peak / peaks[BASELINE] - 1):+.2f} % "
                f"against {BASELINE}"
            )


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m dynatree_bench.studies.smoke", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--no-memory", action="store_true", help="leave out the memory measurement")
    parser.add_argument("--memory-of", choices=METHODS, help=argparse.SUPPRESS)  # how this program calls itself
    return parsed_arguments(parser, max_new_tokens=64)


if __name__ == "__main__":
    end_process(main)
