"""Replaying traces: the recorded stack does what was recorded, and others what they do with the same proposals."""

from __future__ import annotations

import json
from pathlib import Path

import attrs
import pytest
import torch
from command import Dynatree, dynatree, is_one_error_line
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_observer import COSTS, DRAFTER, PROMPT, TARGET, Fails

from dynatree_core import InputError, Session, generate, hookimpl, run
from dynatree_core.testing import strategies as ours
from dynatree_core.trace import Trace, fitted_costs, read, recorded, replay

__all__ = ["dynatree"]  # a fixture


def traced(path: Path, policy: object, drafter: object = DRAFTER, **options: object):
    options = {"max_new_tokens": 24, "tau": 0.0, **options}
    generate(TARGET, drafter, PROMPT, policy=policy, trace=path, **options)
    (sequence,) = read(path).sequences
    return sequence


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data(), ours.prompts, st.one_of(ours.stacks(), ours.stacks().flatmap(ours.compositions)), ours.limits)
def test_the_recorded_stack_does_what_was_recorded(tmp_path, data, prompt, policy, limits):
    """Over random drafters, policies and limits, by clocks too; and torch's global generator is left alone."""
    drafter = data.draw(ours.drafters("llama", 0))
    with Trace(tmp_path / "run.jsonl", is_private=data.draw(st.booleans())) as trace:
        options = {"policy": policy, "max_new_tokens": 14, "costs": data.draw(st.sampled_from([None, COSTS]))}
        list(run(Session(TARGET, drafter, prompt, observer=trace.observer(), **options, **limits)))
    (sequence,) = read(trace.path).sequences
    before = torch.random.get_rng_state()
    assert replay(sequence, policy, **limits).steps == recorded(sequence).steps
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    "policy", ["phase3", "phase3+governor", "cost_aware", "sequoia", "best_first(nodes=4)+fixed", "autoregressive"]
)
def test_built_in_stacks_with_the_recorded_limits(tmp_path, policy):
    """Limits that the caller had given need not be given again."""
    sequence = traced(tmp_path / "run.jsonl", policy, max_nodes=9, max_depth=3)
    again = replay(sequence, policy)
    assert again.steps == recorded(sequence).steps
    assert again.unknown_share == 0
    assert (again.num_tokens, again.policy) == (24, policy)


def test_a_recording_without_a_drafter_asks_for_nothing(tmp_path):
    """Otherwise each node that was never asked about would count as unknown."""
    sequence = traced(tmp_path / "run.jsonl", "best_first", drafter=None)
    found = replay(sequence, "best_first")
    assert found.steps == recorded(sequence).steps
    assert sum(step.num_asked for step in found.steps) == 0


def test_each_step_of_a_private_recording_takes_the_recorded_time(tmp_path):
    """The first one's root is a token of the prompt, which is not known; what a stack does may hang on its time."""
    sequences = []
    for is_private in (False, True):
        seconds = iter(range(1000))
        with Trace(tmp_path / f"{is_private}.jsonl", is_private=is_private) as trace:
            options = {"policy": "linear(depth=2)", "costs": COSTS, "max_new_tokens": 9, "now": lambda: next(seconds)}  # noqa: B023
            list(run(Session(TARGET, DRAFTER, PROMPT, observer=trace.observer(), **options)))
        sequences += read(trace.path).sequences
    for sequence in sequences:
        hears = Hears()
        replay(sequence, [hears, "linear(depth=2)"])
        assert hears.seconds == [iteration.seconds["iteration"] for iteration in sequence.iterations]


def test_where_the_text_ends_by_a_token_or_a_caller(tmp_path):
    plain = traced(tmp_path / "plain.jsonl", "fixed(depth=3)").token_ids
    sequence = traced(tmp_path / "run.jsonl", "fixed(depth=3)", eos_token_id=plain[10])
    assert sequence.end["stop_reason"] == "eos"
    assert replay(sequence, "fixed(depth=3)").steps == recorded(sequence).steps
    sampled = traced(tmp_path / "sampled.jsonl", "phase3", do_sample=True, seed=1, repetition_penalty=1.2)
    assert replay(sampled, "phase3").steps == recorded(sampled).steps


def test_a_smaller_tree_is_known_and_does_what_it_does(tmp_path):
    """What a real run of the smaller tree does, since all of its nodes were proposed."""
    wide = traced(tmp_path / "wide.jsonl", "fixed(depth=6,branch=3)", max_nodes=2000)
    real = traced(tmp_path / "small.jsonl", "fixed(depth=2,branch=2)", max_nodes=2000)
    found = replay(wide, "fixed(depth=2,branch=2)", max_nodes=2000)
    assert found.unknown_share < 0.2  # behind the bonus token of the last iterations nothing was proposed
    shapes = [(step.start, step.num_verified, step.num_committed) for step in found.steps]
    expected = [(step.start, step.num_verified, step.num_committed) for step in recorded(real).steps]
    assert found.tokens_per_iteration <= recorded(real).tokens_per_iteration
    assert len(set(shapes) & set(expected)) > 0


def test_what_was_never_proposed_is_said(tmp_path):
    sequence = traced(tmp_path / "run.jsonl", "linear(depth=1)")
    assert replay(sequence, "linear(depth=1)").unknown_share == 0
    found = replay(sequence, "fixed(depth=6,branch=3)")
    assert found.unknown_share > 0.5
    assert found.num_tokens == 24
    nothing = traced(tmp_path / "none.jsonl", "autoregressive")
    assert replay(nothing, "fixed(depth=2)").unknown_share == 1
    assert replay(nothing, "fixed(depth=2)").tokens_per_iteration == 1


class Hears:
    """A policy that keeps the seconds that it is told."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def __deepcopy__(self, memo: dict) -> Hears:
        return self  # so that the test sees what a session's copy has heard

    @hookimpl
    def on_iteration_end(self, report) -> None:
        self.seconds.append(report.seconds)


def test_policies_hear_the_recorded_seconds_where_the_tree_is_the_recorded_one(tmp_path):
    sequence, hears = traced(tmp_path / "run.jsonl", "fixed(depth=2)", costs=COSTS), Hears()
    replay(sequence, ["fixed(depth=2)", hears])
    assert hears.seconds == [one.seconds["iteration"] for one in sequence.iterations]
    hears.seconds.clear()
    found = replay(sequence, ["linear(depth=1)", hears])
    trees = {one.start: one.num_drafted for one in sequence.iterations}
    for step, heard in zip(found.steps, hears.seconds, strict=True):
        if trees.get(step.start) != step.num_verified:
            assert heard == step.expected_seconds


def test_costs_of_the_trace_or_fitted_to_it(tmp_path):
    sequence = traced(tmp_path / "run.jsonl", "fixed(depth=2,branch=2)", costs=COSTS)
    assert sequence.costs == COSTS
    asked = recorded(sequence).steps[0]
    assert asked.expected_seconds == COSTS.iteration_seconds(asked.num_verified, [1, 2])
    bare = attrs.evolve(sequence, end={**sequence.end, "costs": None})
    found = fitted_costs(bare.iterations)
    assert found.target_pass_seconds.at[-1] == max(one.num_drafted for one in bare.iterations) + 1
    assert sum(step.expected_seconds for step in recorded(bare).steps) == pytest.approx(
        sum(one.seconds["iteration"] for one in bare.iterations), rel=2.0
    )
    with pytest.raises(InputError, match="got a trace without one"):
        fitted_costs([])


def test_a_run_that_fell_back_is_replayed_as_far_as_it_is_known(tmp_path):
    with pytest.warns(RuntimeWarning, match="drafting is off"):
        sequence = traced(tmp_path / "run.jsonl", "fixed", Fails(), on_error="fallback")
    assert replay(sequence, "fixed").num_tokens == 24


def test_the_command(dynatree: Dynatree, tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    traced(path, "fixed(depth=3)")
    rows = dynatree("replay", path, "--policy", "fixed(depth=3)", "--policy", "linear(depth=1)", "--json").document
    assert [(row["policy"], row["is_recorded"]) for row in rows] == [
        ("fixed(depth=3)", True), ("fixed(depth=3)", False), ("linear(depth=1)", False)
    ]  # fmt: skip
    first, second, third = ({name: value for name, value in row.items() if name != "is_recorded"} for row in rows)
    assert first == second
    assert third["nodes_per_iteration"] < 1 <= third["tokens_per_iteration"] < second["tokens_per_iteration"]
    ran = dynatree("replay", path, "--policy", "linear(depth=1)", "--max-depth", 0)
    assert ran.code == 0
    assert "(recorded)" in ran.out
    assert "what was proposed in the recorded run" in " ".join(ran.err.split())
    assert is_one_error_line(dynatree("replay", path, "--policy", "linaer"), "did you mean 'linear'")
    ran = dynatree("replay", path, "--policy", "linear", "--sequence", 4)
    assert ran.code == 2
    assert is_one_error_line(ran, "must have a generation with an iteration, got none")
    assert json.loads(path.read_text().splitlines()[0])["kind"] == "header"
