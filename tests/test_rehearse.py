"""Rehearsing a policy over a known text: the trees of a real run, at given prices."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynatree_bench import rehearse
from dynatree_bench.rehearse import BEST, GRID, Rehearsal, RehearsedSession, Text, best_of, ratio
from dynatree_core import CostModel, Session, StepFunction, build_drafter, embedded, generate, run
from dynatree_core.drafters.model import ModelDrafter
from dynatree_core.drafters.union import UnionDrafter
from dynatree_core.testing import strategies as ours
from dynatree_core.testing.models import greedy, perturbed, tiny_model

COSTS = CostModel(StepFunction((1, 4, 16, 64), (1.0, 1.1, 1.5, 3.0)), StepFunction((1, 64), (0.125, 0.25)), 0.0625)
POLICIES = ("phase3", "cost_aware", "fixed(depth=3,branch=2,tau=0.0)", "best_first(nodes=6)")
DRAFTERS = {
    "model": ModelDrafter(perturbed("llama", noise=0.02)),
    "prompt_lookup": build_drafter("prompt_lookup"),
    "union": UnionDrafter([ModelDrafter(perturbed("llama", noise=0.02)), build_drafter("prompt_lookup")]),
}


def known_text(prompt: list[int], num_tokens: int) -> Text:
    return Text("tiny", tuple(prompt), tuple(greedy(tiny_model("llama"), prompt, num_tokens)))


@settings(max_examples=40)
@given(ours.prompts, st.sampled_from(sorted(DRAFTERS)), st.integers(1, 24), st.data())
def test_trees_and_accepted_nodes_are_those_of_a_real_run(prompt, name, num_tokens, data):
    policy = data.draw(st.sampled_from(POLICIES))
    text = known_text(prompt, num_tokens)
    real = Session(
        tiny_model("llama"), DRAFTERS[name], prompt, policy=policy, max_new_tokens=num_tokens, eos_token_id=[]
    )
    real.costs = COSTS
    rehearsed = RehearsedSession(tiny_model("llama"), DRAFTERS[name], text, policy, COSTS)
    reports = [list(run(session)) for session in (real, rehearsed)]
    for theirs, mine in zip(*reports, strict=True):
        assert torch.equal(mine.tree.token_ids, theirs.tree.token_ids)
        assert torch.equal(mine.tree.parent, theirs.tree.parent)
        assert mine.verdict == theirs.verdict
    assert real.result().report.steps == rehearsed.result().report.steps


def test_passes_cost_what_the_cost_model_says():
    text = known_text([1, 2, 3], 20)
    session = RehearsedSession(tiny_model("llama"), DRAFTERS["model"], text, "fixed(depth=2,branch=2,tau=0.0)", COSTS)
    expected = 0.0
    for report in run(session):
        widths = report.tree.level_sizes[:-1]  # each was looked at, and the deepest one was not
        expected += COSTS.tree_seconds(report.tree.num_drafted, widths)
        if report.tree.max_depth == 2:
            assert report.seconds == pytest.approx(COSTS.tree_seconds(report.tree.num_drafted, widths))
    assert session.priced_clock.now == pytest.approx(expected)


def test_levels_that_no_model_was_asked_about_cost_nothing():
    loop = Text("tiny", tuple([7, 3, 5] * 4), tuple([7, 3, 5] * 6))  # a text that repeats itself
    asked = {}
    for name in DRAFTERS:
        session = RehearsedSession(tiny_model("llama"), DRAFTERS[name], loop, "fixed(depth=5,branch=1)", COSTS)
        steps = [(report.tree.num_drafted, report.seconds) for report in run(session)]
        asked[name] = session.num_levels
        if not session.num_levels:
            assert steps == [(drafted, pytest.approx(COSTS.tree_seconds(drafted, []))) for drafted, _ in steps]
    assert asked["model"] >= 15
    assert asked["prompt_lookup"] == asked["union"] == 0


def test_a_text_that_the_policy_does_not_reach_is_an_error(monkeypatch):
    monkeypatch.setattr(Session, "stop_reason", property(lambda self: "length" if self.num_iterations else None))
    with pytest.raises(RuntimeError, match="of the known text"):
        rehearse.rehearse(tiny_model("llama"), DRAFTERS["model"], known_text([1, 2], 30), "fixed(depth=2)", COSTS)


def test_the_best_of_each_kind_is_chosen_afterwards():
    def one(kind: str, seconds: float) -> Rehearsal:
        return Rehearsal(kind, 10, 5, 20, 9, seconds, 12.0)

    results = {"a": [one("x", 6.0), one("y", 8.0)], "b": [one("x", 4.0), one("y", 12.0)]}
    assert best_of(results, ["a", "b"]) == {"x": "b", "y": "a"}
    assert ratio(results["a"]) == pytest.approx(24 / 14)


@pytest.mark.real_model
@pytest.mark.skipif(not embedded.is_installed(), reason="the default model is missing: dynatree models install")
def test_the_command_on_a_few_tokens(monkeypatch, capsys, tmp_path):
    path, output = tmp_path / "prompts.jsonl", tmp_path / "result.json"
    path.write_text(json.dumps({"category": "mine", "prompt": "a b c a b c a b c"}))
    monkeypatch.setattr(rehearse, "GRID", GRID[:2])
    monkeypatch.setattr(rehearse, "measured_costs", lambda *pair: COSTS)
    arguments = ["--grid", "--prompts", str(path), "--max-new-tokens", "6", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["rehearse", *arguments])
    assert rehearse.main() == 0
    printed = capsys.readouterr().out
    for expected in ("mine", "tok/it", "asked levels", BEST, "depth=2", *rehearse.POLICIES):
        assert expected in printed
    found = json.loads(output.read_text())
    assert set(found["policies"]) == {*rehearse.POLICIES, *GRID[:2]}
    assert all(1 <= policy["tokens_per_iteration"] <= 6 for policy in found["policies"].values())


def test_what_was_generated_is_what_is_rehearsed():
    """A text that ends with an end token is decoded again as it stands."""
    target = tiny_model("llama")
    plain = generate(target, None, [1, 2, 3], policy="autoregressive", max_new_tokens=12, eos_token_id=[])
    end = plain.token_ids[4]
    cut = generate(target, None, [1, 2, 3], policy="autoregressive", max_new_tokens=12, eos_token_id=end)
    found = rehearse.rehearse(target, DRAFTERS["model"], Text("a", (1, 2, 3), tuple(cut.token_ids)), "phase1", COSTS)
    assert found.num_tokens == len(cut.token_ids) < 12
