"""The steps of `dynatree bench gpu`: what each asks, how long it may take, and how its process is run."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attrs
import torch

from dynatree_bench.run.machine import provenance, source_commit
from dynatree_bench.studies import roofline
from dynatree_bench.studies.on_gpu import embedded, layers, probe, recording, sampling, suite, triton, waits
from dynatree_bench.studies.on_gpu.given import LARGE_PAIR, PAIR, Given
from dynatree_core import InputError
from dynatree_core.errors import nearest_match
from dynatree_core.files.writing import write_text

DONE, FAILED, LATE = "done", "failed", "ran out of time"
DRY_SECONDS = 240  # of any step at tiny sizes
NUM_LINES = 8  # of what a step that failed has said
END_SECONDS = 10  # in which a process that was ended is gone, unless the device's driver holds it


@attrs.frozen
class Step:
    """A part of the study with a process of its own, so that a device left in disorder costs no other part."""

    question: str
    seconds: int  # that it may take
    measure: Callable[[Given], dict[str, Any]]
    # a line for each reason why what it found is bad; given that, and whether it was a dry run
    faults: Callable[[Mapping[str, Any], bool], list[str]] = lambda found, is_dry: []


def _roofline(shape: str) -> Callable[[Given], dict[str, Any]]:
    return lambda given: roofline.measure(given.asked(shape))


# in the order in which they run
STEPS = {
    "probe": Step("versions, kernels of attention and what a new length costs them", 120, probe.measure),
    "tests": Step("do the tests for GPUs pass, and is the text that of `generate`?", 300, suite.measure, suite.faults),
    "waits": Step("how often does an iteration wait, and where?", 180, waits.measure),
    "roofline": Step(f"how near to bandwidth is {PAIR}, with random weights?", 600, _roofline(PAIR)),
    "profile": Step("where does the time of a step and of an iteration go?", 180, layers.measure),
    "llama": Step(f"how near to bandwidth is {LARGE_PAIR}, with random weights?", 600, _roofline(LARGE_PAIR)),
    "recording": Step(
        "how many passes are recorded, how long does it take, does memory grow?",
        240,
        recording.measure,
        recording.faults,
    ),
    "sampling": Step("does a seed give the text that `generate` samples?", 120, sampling.measure, sampling.faults),
    "triton": Step(
        "does the `triton` runner decode what `generate` does, and how fast?", 420, triton.measure, triton.faults
    ),
    "default-model": Step(
        "how much faster is the default model with its drafter?", 420, embedded.measure, embedded.faults
    ),
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
    """Whether a step has left its result there, of this device, these sizes and this source, and a good one."""
    if not file.exists():
        return False
    result = read_step(file, given)
    return not isinstance(result, str) and result["state"] == DONE and not faults(result)


def read_step(file: Path, given: Given) -> dict[str, Any] | str:
    """The result that a step has left, or why it is none of a run like this one, whose numbers it cannot stand for."""
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"it cannot be read ({type(error).__name__}: {error})"
    if not isinstance(result, dict) or result.get("step") != file.stem or not isinstance(result.get("found"), dict):
        return "it is not the result of this step"
    if result.get("given") != _settings(given):
        return f"it was made with {_listed(result.get('given'))}, and this run is with {_listed(_settings(given))}"
    said = result.get("provenance", {})
    if said.get("commit") != source_commit():
        return f"it was made at commit {said.get('commit')}, and this run is at {source_commit()}"
    own = _device_name(given)
    if said.get("device", own) != own:  # another GPU, which torch calls "cuda" too
        return f"it was made on {said['device']}, and this run is on {own}"
    return result


def _listed(settings: Any) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items()) if isinstance(settings, dict) else "nothing"


def faults(result: Mapping[str, Any]) -> list[str]:
    """Why the result of a step that is done is bad: a line for each reason."""
    step = STEPS[result["step"]]
    return step.faults(result["found"], result["given"]["is_dry"]) if result["state"] == DONE else []


def _device_name(given: Given) -> str:
    return str(_provenance("", given)["device"])


def _provenance(command: str, given: Given) -> dict[str, Any]:
    try:
        return provenance(command, torch.device(given.device))
    except (RuntimeError, AssertionError):  # torch knows no such device, or cannot ask it: the step fails and says so
        return {**provenance(command), "device": given.device}


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
    said = _provenance(f"{command} (step {name})", given)
    begun = time.perf_counter()
    found: Mapping[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        left, log = Path(folder) / "found.json", Path(folder) / "said.txt"  # a pipe would wait for all that hold it
        with log.open("wb") as stream:
            process = subprocess.Popen(
                [sys.executable, "-m", "dynatree_bench.studies.on_gpu", name, json.dumps(attrs.asdict(given)), left],
                stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        try:
            state = DONE if process.wait(timeout=limit) == 0 else FAILED
        except subprocess.TimeoutExpired:
            state = LATE
        finally:
            _end(process)
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        if state == DONE:
            try:
                found = _left(left)
            except (OSError, ValueError) as error:
                state = FAILED
                lines.append(f"what it has left cannot be read ({type(error).__name__}: {error})")
    return {
        "step": name,
        "state": state,
        "limit_seconds": limit,
        "seconds": time.perf_counter() - begun,
        "given": _settings(given),
        "provenance": said,
        "last_lines": lines[-NUM_LINES:] if state != DONE else [],
        "found": found,
    }


def _left(file: Path) -> dict[str, Any]:
    """What a step's process has found; ValueError: it is no JSON object."""
    found = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise ValueError(f"a step must find a dict, got {type(found).__name__}")
    return found


def _end(process: subprocess.Popen[bytes]) -> None:
    """End what a step has started, such as pytest, whether its own process has ended or not."""
    with contextlib.suppress(ProcessLookupError):  # nothing of it is left
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):  # the driver holds it: the other steps go on
        process.wait(timeout=END_SECONDS)


def write_step(file: Path, result: Mapping[str, Any]) -> None:
    """Keep a step's result, for the page and for a later run."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(result, indent=1) + "\n")
