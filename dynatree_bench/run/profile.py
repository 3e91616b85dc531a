"""Where an iteration's time goes: by stage, by operator, and as a trace for the common viewers; what a start takes."""

from __future__ import annotations

import gzip
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import attrs
from rich import box
from rich.console import Group
from rich.table import Table
from torch import nn
from torch.profiler import ProfilerActivity
from torch.profiler import profile as torch_profile

from dynatree_core import Engine, Session, decode_step, prefill
from dynatree_core.drafters.base import Drafter
from dynatree_core.engine.engine import ENGINE_OPTIONS
from dynatree_core.errors import InputError
from dynatree_core.files.outputs import check_out
from dynatree_core.files.writing import whole_file

PROGRAM = "dynatree profile"
WARM_UP = 4  # iterations before anything is measured
NUM_OPERATORS = 15  # that are shown
NUM_STARTS = 30  # of which the fastest counts
CLOCKS = ("decode", "draft", "draft_forward", "verify")


@attrs.frozen
class Operator:
    """What torch ran under one name, an iteration."""

    name: str
    calls: float
    milliseconds: float  # on the device, or on the CPU where there is none; not what it called itself


@attrs.frozen
class Profile:
    """What was measured, an iteration."""

    num_iterations: int
    tokens_per_iteration: float
    runner: str
    stages: dict[str, float]  # milliseconds, without torch's profiler
    operators: tuple[Operator, ...]  # with it, which slows everything down; the dearest first


def profile(
    target: nn.Module,
    drafter: nn.Module | Drafter | str | None,
    prompt_ids: Sequence[int],
    *,
    num_iterations: int = 20,
    trace: Path | None = None,
    **options: Any,
) -> Profile:
    """Decode the same iterations twice: with a clock alone for the stages, and with torch's profiler for the operators.

    End tokens are ignored.

    Args:
        target, drafter, prompt_ids: as for `dynatree_core.generate`.
        num_iterations: iterations that are measured, after a few to warm up.
        trace: where a trace in Chrome's format goes, for chrome://tracing or ui.perfetto.dev; it shows each stage, each
            operator and, on CUDA, each kernel on a line of time. A name ending in .gz is compressed.
        options: of `dynatree_core.generate`.

    Raises:
        InputError: the context has no room for so many iterations, or the trace cannot be written.
    """
    if trace is not None:
        check_out(trace, f"`{PROGRAM}`", is_trace, is_file=True)
        trace.parent.mkdir(parents=True, exist_ok=True)
    asked = {"max_new_tokens": 8 * (WARM_UP + num_iterations), **options, "eos_token_id": []}
    clocked = Session(target, drafter, prompt_ids, **asked)
    before = _warmed_up(clocked)
    tokens = _run(clocked, num_iterations)
    spent = {name: 1000 * (clocked.clock.seconds(name) - before[name]) / num_iterations for name in CLOCKS}
    watched = Session(target, drafter, prompt_ids, **asked)
    _warmed_up(watched)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if clocked.device.type == "cuda" else [])]
    with torch_profile(activities=activities) as profiler:
        _run(watched, num_iterations)
        profiler.add_metadata("made_by", PROGRAM)  # by which a later run knows that it may replace the file
    if trace is not None:
        with whole_file(trace) as draft:
            profiler.export_chrome_trace(str(draft))
    on_device = clocked.device.type == "cuda"
    operators = [
        Operator(
            event.key,
            event.count / num_iterations,
            (event.self_device_time_total if on_device else event.self_cpu_time_total) / 1000 / num_iterations,
        )
        for event in profiler.key_averages()
    ]
    return Profile(
        num_iterations=num_iterations,
        tokens_per_iteration=tokens / num_iterations,
        runner=clocked.target.runner.computed_by,
        stages={
            "drafter's passes": spent["draft_forward"],
            "the drafter's rest": spent["draft"] - spent["draft_forward"],
            "target's passes": spent["verify"],
            "the rest": spent["decode"] - spent["draft"] - spent["verify"],
        },
        operators=tuple(sorted(operators, key=lambda operator: -operator.milliseconds)),
    )


def is_trace(file: Path) -> bool:
    """Whether a file is a trace that `dynatree profile` has written."""
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
            return PROGRAM.encode() in stream.read()
    except (OSError, EOFError, zlib.error):  # not compressed, or not whole
        return False


@attrs.frozen
class Start:
    """What the start of a generation takes on the host, from the call to the prefill, which does not belong to it."""

    num_starts: int  # of each kind, in turn; the fastest counts
    alone_ms: float  # `Session(target, drafter, ...)`, which looks at the models
    on_engine_ms: float  # `Session.on(engine, ...)`, after the engine's first generation


def start_of_a_generation(
    target: nn.Module,
    drafter: nn.Module | Drafter | str | None,
    prompt_ids: Sequence[int],
    *,
    num_starts: int = NUM_STARTS,
    now: Callable[[], float] = time.perf_counter,
    **options: Any,
) -> Start:
    """Begin generations, with an engine of their own and on one that has begun others, and decode nothing.

    Args:
        target, drafter, prompt_ids: as for `dynatree_core.generate`.
        num_starts: of each kind that are measured, after one that is not.
        now: seconds since any moment.
        options: of `dynatree_core.generate`.
    """
    of_engine = {name: options[name] for name in ENGINE_OPTIONS if name in options}
    others = {name: value for name, value in options.items() if name not in ENGINE_OPTIONS}
    engine = Engine(target, drafter, **of_engine)
    starts: tuple[Callable[[], Session], ...] = (
        lambda: Session(target, drafter, prompt_ids, **options),
        lambda: Session.on(engine, prompt_ids, **others),
    )
    spent: tuple[list[float], ...] = ([], [])
    for _ in range(1 + num_starts):
        for start, seconds in zip(starts, spent, strict=True):
            before = now()
            session = start()
            seconds.append(now() - before)
            del session  # the next one gets its memory
    alone, on_engine = (1000 * min(seconds[1:]) for seconds in spent)
    return Start(num_starts, alone, on_engine)


def _warmed_up(session: Session) -> dict[str, float]:
    """Decode what is not measured; the clock's seconds then."""
    prefill(session)
    _run(session, WARM_UP)
    return {name: session.clock.seconds(name) for name in CLOCKS}


def _run(session: Session, num_iterations: int) -> int:
    """Decode steps; how many tokens they committed."""
    before = len(session.new_token_ids)
    for _ in range(num_iterations):
        if session.stop_reason is not None:
            raise InputError(
                f"a profile of {num_iterations} iterations after {WARM_UP} must not end before, got one that ended "
                f"with '{session.stop_reason}' after {session.num_iterations}; ask for fewer, or raise max_new_tokens"
            )
        decode_step(session)
    return len(session.new_token_ids) - before


def start_shown(found: Start) -> Table:
    """A table for a terminal."""
    table = Table(
        box=box.SIMPLE_HEAD,
        title=f"the start of a generation, up to its prefill: the fastest of {found.num_starts}",
        title_justify="left",
    )
    table.add_column("begun by")
    table.add_column("ms", justify="right")
    table.add_row("Session(target, drafter, ...)", f"{found.alone_ms:.2f}")
    table.add_row("Session.on(engine, ...)", f"{found.on_engine_ms:.2f}")
    return table


def shown(found: Profile) -> Group:
    """Two tables for a terminal."""
    stages = Table(box=box.SIMPLE_HEAD, title=f"an iteration, runner {found.runner}", title_justify="left")
    stages.add_column("stage")
    stages.add_column("ms", justify="right")
    stages.add_column("share", justify="right")
    total = sum(found.stages.values())
    for name, milliseconds in found.stages.items():
        stages.add_row(name, f"{milliseconds:.2f}", f"{milliseconds / total:.0%}")
    stages.add_section()
    stages.add_row("in all", f"{total:.2f}", f"{found.tokens_per_iteration:.2f} tokens")
    operators = Table(box=box.SIMPLE_HEAD, title="operators, under torch's profiler", title_justify="left")
    operators.add_column("operator", overflow="fold")
    operators.add_column("calls", justify="right")
    operators.add_column("ms", justify="right")
    for operator in found.operators[:NUM_OPERATORS]:
        operators.add_row(operator.name, f"{operator.calls:.0f}", f"{operator.milliseconds:.2f}")
    return Group(stages, operators)
