"""What is said of the machine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import NamedTuple

import pytest

from dynatree_bench.run import machine


@pytest.mark.parametrize(("share", "state"), [(0.02, "idle"), (0.03, "busy, so the ratios are not to be believed")])
def test_the_machine_is_judged_by_the_whole_run(monkeypatch, share, state):
    """A percent of four cores' time is four percent of one core."""
    monkeypatch.setattr(machine.psutil, "cpu_count", lambda: 4)
    monkeypatch.setattr(machine.LoadMeter, "share", lambda meter: share)
    others = machine.LoadMeter().meanwhile()
    sentence = f"the machine was {state}: others used {400 * share:.0f} % of a core meanwhile"
    assert machine.idle_or_busy(others, what="ratios") == sentence


def test_the_machine_is_judged_by_its_busiest_moment():
    others = {"before": 11.0, "after": 1.0}
    expected = "the machine was busy, so the times are not to be believed: "
    assert machine.idle_or_busy(others) == expected + "others used 11 % of a core before, 1 % of a core after"


class Used(NamedTuple):
    """Processor seconds of the system or of a process, as far as they are read."""

    user: float = 0.0
    system: float = 0.0
    children_user: float = 0.0
    children_system: float = 0.0
    idle: float = 0.0


@pytest.mark.parametrize(("of_children", "share"), [(0.0, 0.5), (1.5, 0.125), (2.0, 0.0)])
def test_programs_that_a_study_starts_are_no_others(monkeypatch, of_children, share):
    """Four cores for a second, of which two seconds are used by others or by the study's own, ended, programs."""
    now = [0.0]
    process = SimpleNamespace(cpu_times=lambda: Used(children_user=of_children * now[0]))
    system = SimpleNamespace(
        cpu_count=lambda: 4, cpu_times=lambda: Used(user=2 * now[0], idle=2 * now[0]), Process=lambda: process
    )
    monkeypatch.setattr(machine, "psutil", system)
    monkeypatch.setattr(machine.time, "perf_counter", lambda: now[0])
    meter = machine.LoadMeter()
    now[0] = 1.0
    assert meter.share() == pytest.approx(share)
