"""Several threads at an engine: whatever one does at any moment of another's call, neither sees a half-made change."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from interleaved import each_moment

from dynatree_core import Engine, Observer
from dynatree_core.engine.handle import Handle
from dynatree_core.engine.observer import End
from dynatree_core.engine.scheduler import Scheduler
from dynatree_core.errors import ParameterError, QueueFullError
from dynatree_core.testing.models import greedy, tiny_model

PROMPT = [3, 1, 4, 1, 5, 3, 1, 4]
NUM_TOKENS = 6
EXPECTED = greedy(tiny_model("llama"), PROMPT, NUM_TOKENS)


def new_engine(max_waiting: int = 8) -> Engine:
    return Engine(tiny_model("llama"), "prompt_lookup", max_sequences=1, max_waiting=max_waiting)


def submitted(engine: Engine) -> Handle:
    return engine.submit(PROMPT, max_new_tokens=NUM_TOKENS, eos_token_id=[], logprobs=0, policy="linear(depth=2)")


def begun() -> Iterator[tuple[Engine, Handle]]:
    """Engines with a sequence that has some tokens, and more to come."""
    while True:
        engine = new_engine()
        handle = submitted(engine)
        engine.step()
        assert 0 < handle.num_tokens < NUM_TOKENS
        yield engine, handle


def run_dry(engine: Engine) -> None:
    while engine.load.num_running or engine.load.num_waiting:
        engine.step()


def by_another_thread(steps: Callable[[Engine], object], engine: Engine) -> Callable[[], None]:
    """Have an engine make steps, unless it makes one: then another thread would wait."""
    return lambda: None if engine._scheduler._stepping.locked() else steps(engine)


@pytest.mark.parametrize("meanwhile", [Engine.step, run_dry], ids=["a step", "the end"])
def test_a_result_that_is_read_while_another_thread_makes_steps_is_of_one_moment(meanwhile):
    reading = Handle.partial.fget, Handle._result_of
    for there, (engine, handle) in zip(each_moment(*reading), begun(), strict=False):
        num_before = handle.num_tokens
        with there(by_another_thread(meanwhile, engine)):
            found = handle.partial
        num_found = len(found.token_ids)
        assert num_before <= num_found <= handle.num_tokens
        assert found.token_ids == EXPECTED[:num_found]
        assert [one.token_id for one in found.logprobs] == found.token_ids
        assert sum(step.num_committed for step in found.report.steps) == found.report.num_new_tokens == num_found


def test_a_result_is_of_one_moment_where_a_step_is_recorded_while_its_figures_are_made(monkeypatch):
    engine, handle = next(begun())
    lane = handle._lane
    report, steps = lane.report, iter([engine.step])

    def reporting():
        for step in steps:
            step()
        return report()

    monkeypatch.setattr(lane, "report", reporting)
    found = handle.partial
    assert found.token_ids == EXPECTED[: handle.num_tokens]
    assert len(found.logprobs) == found.report.num_new_tokens == len(found.token_ids)


@pytest.mark.parametrize("meanwhile", [Engine.step, run_dry], ids=["a step", "the end"])
def test_reports_are_all_there_when_another_thread_makes_the_last_steps(meanwhile):
    for there, (engine, handle) in zip(each_moment(Handle.reports), begun(), strict=False):
        num_before = handle.num_tokens
        reports = handle.reports()
        first = next(reports)
        with there(by_another_thread(meanwhile, engine)):
            rest = [*reports]
        assert [token for report in (first, *rest) for token in report.token_ids] == EXPECTED[num_before:]


@pytest.mark.parametrize("reads_while_it_steps", [False, True])
def test_each_token_and_its_log_probability_is_given_once(reads_while_it_steps):
    moments = each_moment(*((Handle.catch_up,) if reads_while_it_steps else (Handle.new_tokens, Handle.new_logprobs)))
    for there, (engine, handle) in zip(moments, begun(), strict=False):
        tokens, logprobs = [], []

        def read(handle=handle, tokens=tokens, logprobs=logprobs):
            tokens.extend(handle.new_tokens())
            logprobs.extend(handle.new_logprobs())

        first, second = (engine.step, read) if reads_while_it_steps else (read, engine.step)
        with there(second):
            first()
        run_dry(engine)
        read()
        assert tokens == EXPECTED
        assert [one.token_id for one in logprobs] == EXPECTED


def test_who_is_cancelled_at_any_moment_of_a_step_has_ended_when_it_is_over():
    """The last such moment is after a step has looked for whom to end, and before others may.

    Some of these moments are those at which no other thread comes, but garbage collection does.
    """
    engine = new_engine()
    for there in each_moment(Scheduler.step, Scheduler._drop_cancelled, Scheduler._drop_between_steps):
        running, waiting = submitted(engine), submitted(engine)
        engine.step()
        told = []

        def cancel(handles=(running, waiting), told=told):
            told.append(True)
            for handle in handles:
                engine.cancel(handle)

        with there(cancel):
            engine.step()
        if not told:
            assert running.status == "running"
            return
        assert (running.status, waiting.status) == ("cancelled", "cancelled")
        assert running.result().token_ids == EXPECTED[: running.num_tokens]
        assert (engine.load.num_running, engine.load.num_waiting) == (0, 0)


def test_who_is_told_that_a_sequence_is_cancelled_makes_no_step_either():
    class Impatient(Observer):
        def on_end(self, end: End) -> None:
            engine.step()

    engine = new_engine()
    handle = engine.submit(PROMPT, max_new_tokens=NUM_TOKENS, observer=Impatient())
    engine.step()
    engine.cancel(handle)
    with pytest.raises(ParameterError, match="cannot be made inside of another one"):
        handle.result()


def test_a_clock_may_ask_for_the_load_and_cancel():
    """It is read while a request is put into the line."""
    asked = []

    def now():
        if is_looking:
            asked.append(engine.load)
            engine.cancel(first)
        return 0.0

    is_looking = False
    engine = Engine(tiny_model("llama"), max_sequences=1, max_waiting=1, now=now)
    first = submitted(engine)
    is_looking = True
    second = submitted(engine)
    is_looking = False
    assert asked[0].num_waiting == 1
    assert first.status == "cancelled"
    assert second.result().token_ids == EXPECTED


def test_a_line_that_is_full_is_full_at_every_moment_of_a_step():
    engine = new_engine(max_waiting=0)
    for there in each_moment(Scheduler.step, Scheduler._start):
        handle = submitted(engine)
        refused = []

        def submit(refused=refused):
            refused.append(True)
            if not engine._scheduler._lock._is_owned():  # else another thread would wait
                with pytest.raises(QueueFullError):
                    submitted(engine)

        with there(submit):
            engine.step()
        assert handle.status == "running"
        engine.cancel(handle)
        if not refused:
            return
