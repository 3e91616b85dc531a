"""Rehearsing a policy over a known text: the trees of a real run, at given prices."""

from __future__ import annotations

import json
import sys

import attrs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynatree_bench.studies import rehearse
from dynatree_bench.studies.rehearse import (
    BEST,
    GRID,
    SEARCHED,
    Rehearsal,
    Text,
    best_of,
    known_session,
    ratio,
    relative,
    searched,
)
from dynatree_core import CostModel, Session, StepFunction, build_drafter, run
from dynatree_core.drafters.model import ModelDrafter
from dynatree_core.drafters.union import UnionDrafter
from dynatree_core.models import embedded
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
    new_ids = tuple(greedy(tiny_model("llama"), prompt, num_tokens))
    return Text("tiny", tuple(prompt), new_ids, num_tokens)


@settings(max_examples=40)
@given(
    ours.prompts, st.sampled_from(sorted(DRAFTERS)), st.sampled_from(POLICIES), st.integers(1, 24), st.integers(0, 24)
)
def test_trees_and_accepted_nodes_are_those_of_a_real_run(prompt, name, policy, num_tokens, end):
    """Also where an end token comes before as many tokens as there might be."""
    target, text = tiny_model("llama"), known_text(prompt, num_tokens)
    end_ids = text.new_ids[end : end + 1]
    text = cut_behind(text, end_ids)
    real = Session(target, DRAFTERS[name], prompt, policy=policy, max_new_tokens=num_tokens, eos_token_id=list(end_ids))
    rehearsed = known_session(target, DRAFTERS[name], text, policy)
    real.measure_costs = rehearsed.measure_costs = lambda: COSTS
    reports = [list(run(session)) for session in (real, rehearsed)]
    for theirs, mine in zip(*reports, strict=True):
        assert torch.equal(mine.tree.token_ids, theirs.tree.token_ids)
        assert torch.equal(mine.tree.parent, theirs.tree.parent)
        assert mine.verdict == theirs.verdict
    assert tuple(rehearsed.new_token_ids) == text.new_ids


def cut_behind(text: Text, end_ids: tuple[int, ...]) -> Text:
    ends = [i for i, token in enumerate(text.new_ids) if token in end_ids]
    new_ids = text.new_ids[: ends[0] + 1] if ends else text.new_ids
    return attrs.evolve(text, new_ids=new_ids, end_ids=end_ids)


def test_passes_cost_what_the_cost_model_says():
    text, policy = known_text([1, 2, 3], 20), "fixed(depth=2,branch=2,tau=0.0)"
    session = known_session(tiny_model("llama"), DRAFTERS["model"], text, policy)
    expected, num_levels, last_accepted = 0.0, 0, 0
    for report in run(session):
        # each level was looked at but the deepest; the root's pass has the accepted one of those too
        rows = [1 + (last_accepted == 2), *report.tree.level_sizes[1:-1]]
        rows = rows if report.tree.num_drafted else []
        expected += COSTS.iteration_seconds(report.tree.num_drafted, rows)
        num_levels += len(rows)
        last_accepted = report.num_accepted
    found = rehearse.rehearse(tiny_model("llama"), DRAFTERS["model"], text, policy, COSTS)
    assert found.seconds == pytest.approx(expected)
    assert (found.num_passes, found.num_tokens) == (num_levels, 20)
    assert found.plain_seconds == pytest.approx(20 * COSTS.plain_step_seconds())


def test_what_a_model_was_left_out_of_is_paid_for_once_it_is_asked():
    """A copy of twelve tokens that the lookup alone drafts, then a token that was never there."""
    loop = [7, 3, 5]
    text = Text("tiny", tuple(loop * 4), (*loop * 4, 11, 12, 13), 15)
    prices = rehearse.Prices(COSTS)
    session = known_session(tiny_model("llama"), DRAFTERS["union"], text, "fixed(depth=3,branch=1)")
    [model] = rehearse._runners(session.draft_state)
    rows: list[int] = []
    forward = model.forward

    def noted(flat, *arguments, **options):
        rows.append(flat.num_rows)
        return forward(flat, *arguments, **options)

    model.forward = noted
    prices.charge(model)
    passes = [(prices.num_passes, len(report.token_ids)) for report in run(session)]
    asked = [before[0] < after[0] for before, after in zip([(0, 0), *passes], passes, strict=False)]
    assert not any(asked[:3]), "the lookup knows how the loop goes on"
    assert any(asked[3:])
    decoding = rows[-prices.num_passes :]
    assert decoding[0] >= 12, "the copied tokens go through it at once"
    assert prices.seconds == pytest.approx(sum(map(COSTS.drafter_level_seconds, decoding)))


def test_a_text_that_the_policy_does_not_reach_is_an_error(monkeypatch):
    monkeypatch.setattr(Session, "stop_reason", property(lambda self: "length" if self.num_iterations else None))
    with pytest.raises(RuntimeError, match="of the known text"):
        rehearse.rehearse(tiny_model("llama"), DRAFTERS["model"], known_text([1, 2], 30), "fixed(depth=2)", COSTS)


def test_policies_hear_the_priced_seconds():
    drafter, text = DRAFTERS["model"], known_text([1, 2, 3], 30)
    dear = attrs.evolve(COSTS, drafter_level_seconds=StepFunction((1,), (50.0,)))
    cheap, priced_out = (
        rehearse.rehearse(tiny_model("llama"), drafter, text, "fixed+governor", costs) for costs in (COSTS, dear)
    )
    assert priced_out.num_passes < cheap.num_passes / 2


def test_the_best_of_each_kind_is_chosen_afterwards():
    def one(kind: str, seconds: float) -> Rehearsal:
        return Rehearsal(kind, 10, 5, 20, 9, seconds, 12.0)

    results = {"a": [one("x", 6.0), one("y", 8.0)], "b": [one("x", 4.0), one("y", 12.0)]}
    assert best_of(results, ["a", "b"]) == {"x": "b", "y": "a"}
    assert ratio(results["a"]) == pytest.approx(24 / 14)


def test_a_search_is_judged_on_texts_that_it_has_not_seen():
    """Each of two trees is the best of one text; chosen by the other text of the kind, each text gets the wrong one."""

    def of(kind: str, *seconds: float) -> list[Rehearsal]:
        return [Rehearsal(kind, 10, 5, 20, 9, one, 12.0) for one in seconds]

    results = {"a": of("x", 4.0, 9.0) + of("y", 1.0), "b": of("x", 8.0, 5.0) + of("y", 2.0)}
    found = searched(results, ["a", "b"])
    assert [(one.kind, one.seconds) for one in found] == [("x", 8.0), ("x", 9.0)]  # y has no other text
    ours = of("x", 4.0, 4.5)
    assert attrs.astuple(relative(ours, found)) == pytest.approx((2.0, 2.0, 2.0, 2))
    assert attrs.astuple(relative(of("x", 8.0, 3.0), found)) == pytest.approx((17 / 11, 1.0, 3.0, 2))


@pytest.mark.real_model
@pytest.mark.skipif(not embedded.is_installed(), reason="the default model is missing: dynatree models install")
def test_the_command_on_a_few_tokens(monkeypatch, capsys, tmp_path):
    path, output = tmp_path / "prompts.jsonl", tmp_path / "result.json"
    prompts = [{"category": "mine", "prompt": text} for text in ("a b c a b c a b c", "one two")]
    path.write_text("\n".join(map(json.dumps, prompts)))
    monkeypatch.setattr(rehearse, "GRID", GRID[:2])
    monkeypatch.setattr(rehearse, "measured_costs", lambda *pair: COSTS)
    arguments = ["--grid", "--prompts", str(path), "--max-new-tokens", "6", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["rehearse", *arguments])
    assert rehearse.main() == 0
    printed = capsys.readouterr().out
    for expected in ("mine", "tok/it", "passes", SEARCHED, BEST, "depth=2", *rehearse.POLICIES):
        assert expected in printed
    found = json.loads(output.read_text())
    assert set(found["policies"]) == {*rehearse.POLICIES, *GRID[:2]}
    for one in (found["relative_to_searched"][policy]["mine"] for policy in rehearse.POLICIES):
        assert 0 < one["low"] <= one["value"] <= one["high"]
    assert all(1 <= policy["tokens_per_iteration"] <= 6 for policy in found["policies"].values())
