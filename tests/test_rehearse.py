"""Rehearsing a policy over a known text: the trees of a real run, at given prices."""

from __future__ import annotations

import attrs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynatree_bench.run.known import KnownTarget, Text, known_session
from dynatree_bench.run.pairs import Models
from dynatree_bench.studies import rehearse
from dynatree_bench.studies.rehearse import BEST, SEARCHED, Rehearsal, relative, searched
from dynatree_bench.studies.study import Asked, run_study
from dynatree_core import CostModel, Session, StepFunction, build_drafter, run
from dynatree_core.drafters.model import ModelDrafter
from dynatree_core.drafters.union import UnionDrafter
from dynatree_core.runners.around import RunnerAround
from dynatree_core.runners.choice import made_runner
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
    sizes = {"max_new_tokens": num_tokens, "eos_token_id": list(end_ids)}
    real = Session(target, DRAFTERS[name], prompt, policy=policy, costs=COSTS, **sizes)
    rehearsed = known_session(target, DRAFTERS[name], text, policy, costs=COSTS)
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
    expected, num_levels, num_pending = 0.0, 0, 3  # the prompt, which the first look reads
    for report in run(session):
        # each level was looked at but the deepest; the root's pass has the accepted one of those too
        rows = [num_pending, *report.tree.level_sizes[1:-1]]
        rows = rows if report.tree.num_drafted else []
        expected += COSTS.iteration_seconds(report.tree.num_drafted, rows)
        num_levels += len(rows)
        num_pending = 1 + (report.num_accepted == 2)
    found = rehearse.rehearse(tiny_model("llama"), DRAFTERS["model"], text, policy, COSTS)
    assert found.seconds == pytest.approx(expected)
    assert (found.num_passes, found.num_tokens) == (num_levels, 20)
    assert found.plain_seconds == pytest.approx(20 * COSTS.plain_step_seconds())


def test_what_a_model_was_left_out_of_is_paid_for_once_it_is_asked():
    """A copy of twelve tokens that the lookup alone drafts, then a token that was never there."""
    loop = [7, 3, 5]
    text = Text("tiny", tuple(loop * 4), (*loop * 4, 11, 12, 13), 15)
    prices, rows = rehearse.Prices(COSTS), []

    def noting(model, name):
        if isinstance(model, KnownTarget):  # what it costs is not looked at here
            return made_runner(model, name)
        return RunnerAround(prices.runner(model, name), rehearse.charged(rows.append))

    session = known_session(tiny_model("llama"), DRAFTERS["union"], text, "fixed(depth=3,branch=1)", make_runner=noting)
    passes = [(prices.num_passes, len(report.token_ids)) for report in run(session)]
    asked = [before[0] < after[0] for before, after in zip([(0, 0), *passes], passes, strict=False)]
    assert not any(asked[:3]), "the lookup knows how the loop goes on"
    assert any(asked[3:])
    assert len(rows) == prices.num_passes
    assert rows[0] >= 12, "the copied tokens go through it at once"
    assert prices.seconds == pytest.approx(sum(map(COSTS.drafter_level_seconds, rows)))


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
    def one(*by_kind: float) -> dict[str, object]:
        return {"ratio": sum(by_kind) / 2, "by_kind": dict(zip("xy", by_kind, strict=True))}

    policies = {"mine": one(1.0, 1.5), "a": one(2.0, 1.5), "b": one(3.0, 1.0)}
    table, beside = rehearse.tables({"policies": policies, "grid": ["a", "b"], "relative_to_searched": {}})
    assert beside is None
    assert [row[:4] for row in table.rows] == [
        ("mine", "1.25", "1.00", "1.50"), (BEST, "2.00", "3.00", "1.50"), ("which is", "b", "b", "a"),
    ]  # fmt: skip


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


def test_a_template_is_a_grid():
    assert len(rehearse.filled_in("fixed(depth={depth},branch={branch},tau={tau})")) == 54
    assert rehearse.filled_in("fixed(branch={branch})") == ["fixed(branch=1)", "fixed(branch=2)", "fixed(branch=3)"]
    assert rehearse.is_grid("fixed(branch={branch})")
    assert not rehearse.is_grid("phase3")


def test_the_study_on_a_tiny_target(character_target, tmp_path, monkeypatch):
    monkeypatch.setattr(rehearse, "measured_costs", lambda *pair: COSTS)
    asked = Asked(
        Models(str(character_target), ("prompt_lookup",)), tmp_path, is_quick=True, num_prompts=6, max_new_tokens=(6,),
        policies=("phase1", "fixed(depth={depth},branch=2)"),
    )  # fmt: skip
    found = run_study("rehearse", asked, command="the command")
    policies, grid = found.found["policies"], found.found["grid"]
    assert (next(iter(policies)), len(grid), len(policies)) == ("phase1", 6, 7)
    assert all(1 <= one["tokens_per_iteration"] <= 6 for one in policies.values())
    assert found.said["num_texts"] == {"prose": 2, "code": 2, "copying": 2}
    for one in found.found["relative_to_searched"]["phase1"].values():
        assert 0 < one["low"] <= one["value"] <= one["high"]
    first, _ = found.tables
    assert [row[0] for row in first.rows] == ["phase1", SEARCHED, BEST, "which is"]
