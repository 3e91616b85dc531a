"""The steps of `dynatree bench gpu`: what each asks, how long it may take, and how its process is run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attrs

from dynatree_bench.run.machine import provenance
from dynatree_bench.run.pairs import Models
from dynatree_bench.studies import roofline
from dynatree_bench.studies.on_gpu import embedded, layers, probe, recording, sampling, suite, waits
from dynatree_bench.studies.on_gpu.given import LARGE_PAIR, PAIR, Given
from dynatree_bench.studies.study import Asked
from dynatree_core import InputError
from dynatree_core.errors import nearest_match
from dynatree_core.files.writing import write_text

DONE, FAILED, LATE = "done", "failed", "ran out of time"
DRY_SECONDS = 240  # of any step at tiny sizes
NUM_LINES = 8  # of what a step that failed has said


@attrs.frozen
class Step:
    """A part of the study with a process of its own, so that a device left in disorder costs no other part."""

    question: str
    seconds: int  # that it may take
    measure: Callable[[Given], dict[str, Any]]


def _roofline(shape: str) -> Callable[[Given], dict[str, Any]]:
    def measure(given: Given) -> dict[str, Any]:
        models = Models(device=given.device, dtype=given.dtype, synthetic=None if given.is_dry else shape)
        rounds, tokens = (1, (12,)) if given.is_dry else (3, (128,))
        asked = Asked(
            models, Path(given.folder), is_quick=given.is_dry, repeats=rounds, max_new_tokens=tokens, seed=given.seed
        )
        return roofline.measure(asked)

    return measure


# in the order in which they run
STEPS = {
    "probe": Step("versions, kernels of attention and what a new length costs them", 120, probe.measure),
    "tests": Step("do the tests for GPUs pass, and is the text that of `generate`?", 300, suite.measure),
    "waits": Step("how often does an iteration wait, and where?", 180, waits.measure),
    "roofline": Step(f"how near to bandwidth is {PAIR}, with random weights?", 600, _roofline(PAIR)),
    "profile": Step("where does the time of a step and of an iteration go?", 180, layers.measure),
    "llama": Step(f"how near to bandwidth is {LARGE_PAIR}, with random weights?", 600, _roofline(LARGE_PAIR)),
    "recording": Step("how many passes are recorded, how long does it take, does memory grow?", 240, recording.measure),
    "sampling": Step("does a seed give the text that `generate` samples?", 120, sampling.measure),
    "default-model": Step("how much faster is the default model with its drafter?", 420, embedded.measure),
}


def checked_steps(names: tuple[str, ...]) -> list[str]:
    """The steps that are named, in their order; all where none is.

    Raises:
        InputError: there is no such step.
    """
    for name in names:
        if name not in STEPS:
            raise InputError(f"'{name}' is not a step{nearest_match(name, STEPS)}; they are: {', '.join(STEPS)}")
    return [name for name in STEPS if not names or name in names]


def plan(names: tuple[str, ...], *, is_dry: bool) -> list[str]:
    """A line for each step, with the time that it may take, and one for all of them."""
    asked = checked_steps(names)
    bounds = {name: _seconds(name, is_dry) for name in asked}
    lines = [f"{name:14} at most {bounds[name] / 60:4.1f} min: {STEPS[name].question}" for name in asked]
    return [*lines, f"{'in all':14} at most {sum(bounds.values()) / 60:4.1f} min"]


def _seconds(name: str, is_dry: bool) -> int:
    return DRY_SECONDS if is_dry else STEPS[name].seconds


def is_done(file: Path, given: Given) -> bool:
    """Whether a step has left its result there, of the same device and sizes."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and (found.get("state"), found.get("given")) == (DONE, _settings(given))


def _settings(given: Given) -> dict[str, Any]:
    return {"device": given.device, "is_dry": given.is_dry, "seed": given.seed}


def run_step(name: str, given: Given, *, command: str, seconds: float | None = None) -> dict[str, Any]:
    """Run a step in a process of its own, which is ended when its time is over.

    Args:
        name: of the step.
        given: how.
        command: how the study was started.
        seconds: that it may take; None: its own bound.

    Returns:
        Its result: what the step found, its state, what it said last where it failed, and the provenance.
    """
    limit = _seconds(name, given.is_dry) if seconds is None else seconds
    begun = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "dynatree_bench.studies.on_gpu", name, json.dumps(attrs.asdict(given))],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        said, _ = process.communicate(timeout=limit)
        state = DONE if process.returncode == 0 else FAILED
    except subprocess.TimeoutExpired:
        state = LATE
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # with what it has started, such as pytest
    if state == LATE:
        said, _ = process.communicate()
    found: Mapping[str, Any] = {}
    lines = said.splitlines()
    if state == DONE:
        found = json.loads(lines.pop())
    return {
        "step": name,
        "state": state,
        "limit_seconds": limit,
        "seconds": time.perf_counter() - begun,
        "given": _settings(given),
        "provenance": provenance(f"{command} (step {name})"),
        "last_lines": lines[-NUM_LINES:] if state != DONE else [],
        "found": found,
    }


def write_step(file: Path, result: Mapping[str, Any]) -> None:
    """Keep a step's result, for the page and for a later run."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(result, indent=1) + "\n")
