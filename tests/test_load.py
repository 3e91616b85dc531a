"""What a tree is charged that shares its passes, and policies that decide by it: on a clock that passes move."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import attrs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynatree_core import (
    CostModel,
    Engine,
    Frontier,
    Proposals,
    StepFunction,
    StepReport,
    TokenTree,
    Verdict,
    build_stack,
    hookimpl,
)
from dynatree_core.runners.base import PassOutput, Rows, Runner
from dynatree_core.runners.eager import EagerRunner
from dynatree_core.testing.models import greedy, perturbed, tiny_model
from dynatree_policies.cost_aware import MAX_LOSS, STAKE, CostAware

COUNTS = tuple(range(1, 400))


def linear(a_pass: float, a_row: float, a_level: float) -> CostModel:
    return CostModel(
        StepFunction(COUNTS, tuple(a_pass + a_row * (rows - 1) for rows in COUNTS)),
        StepFunction(COUNTS, (a_level,) * len(COUNTS)),
        0.0,
    )


class Priced(Runner):
    """Passes that take what a cost model says for their rows, of all sequences together, without padding."""

    name = "priced"

    def __init__(self, model: Any, seconds: StepFunction, spend: Callable[[float], None]) -> None:
        self.plain, self.seconds, self.spend = EagerRunner(model), seconds, spend

    @classmethod
    def make(cls, model: Any, kept: Any) -> Runner:
        raise NotImplementedError

    def forward(self, flat: Any, cache: Any, *, is_prompt: bool = False, **options: Any) -> PassOutput:
        self.spend(0.0 if is_prompt else self.seconds(flat.num_rows))
        return self.plain.forward(flat, cache, **options)

    def forward_together(self, parts: Sequence[Rows], **options: Any) -> list[PassOutput]:
        self.spend(self.seconds(sum(part.flat.num_rows for part in parts)))
        return self.plain.forward_together(parts, **options)


def decoded(
    drafter: Any,
    costs: CostModel,
    policy: str,
    num_sequences: int,
    num_tokens: int,
    prompt: Sequence[int] = (2, 3),
) -> tuple[float, int]:
    """Seconds that so many sequences take together, and the nodes that they draft."""
    target = tiny_model("llama")
    now = [0.0]

    def spend(seconds: float) -> None:
        now[0] += seconds

    def make(model: Any, name: str) -> Runner:
        return Priced(model, costs.target_pass_seconds if model is target else costs.drafter_level_seconds, spend)

    engine = Engine(target, drafter, costs=costs, now=lambda: now[0], make_runner=make, max_sequences=num_sequences)
    prompts = [[1 + number, *prompt] for number in range(num_sequences)]
    handles = [engine.submit(p, policy=policy, max_new_tokens=num_tokens, eos_token_id=[]) for p in prompts]
    results = [handle.result() for handle in handles]
    assert [result.token_ids for result in results] == [greedy(target, prompt, num_tokens) for prompt in prompts]
    return now[0], sum(result.report.num_drafted_nodes for result in results)


def test_alone_a_tree_is_charged_what_it_costs():
    costs = linear(1.0, 0.1, 0.2)
    assert costs.beside(1, 0, 0) is costs


@given(st.integers(2, 16), st.integers(0, 8), st.integers(0, 8), st.integers(1, 20))
def test_each_second_that_a_tree_adds_counts_for_every_sequence(num_sequences, rows, width, own):
    costs = attrs.evolve(linear(1.0, 0.1, 0.2), rest_seconds=0.3)
    charged = costs.beside(num_sequences, rows, width)
    # the host lays out and commits one sequence's tree after another's
    assert charged.plain_step_seconds() == pytest.approx(costs.target_pass_seconds(rows + 1) + num_sequences * 0.3)
    added = charged.target_pass_seconds(own) - charged.target_pass_seconds(1)
    assert added == pytest.approx(num_sequences * 0.1 * (own - 1))
    # a level that the drafter looks at anyway costs nothing more, and is shared; one that it would not delays all
    assert charged.drafter_level_seconds(own) == pytest.approx(0.2 if width else num_sequences * 0.2)


def test_rows_that_are_cheap_for_one_are_charged_as_if_all_took_them():
    """Four rows more are free beside the eight that others had last; if all eight sequences take one each, four pay."""
    steps = CostModel(
        StepFunction(COUNTS, tuple(1.0 + 0.25 * max(rows - 12, 0) for rows in COUNTS)), StepFunction((1,), (0.0,)), 0.0
    )
    charged = steps.beside(8, 7, 0).target_pass_seconds
    assert steps.target_pass_seconds(9) == steps.target_pass_seconds(8) == 1.0
    assert charged(1) == 1.0
    assert charged(2) == pytest.approx(1.0 + 0.25 * 4)


@pytest.mark.parametrize("num_sequences", [4, 8])
def test_all_together_draft_no_more_than_pays(num_sequences):
    """Rows are free up to twelve, and dear beyond: who goes by what the others had last draws all into it by turns."""
    costs = CostModel(
        StepFunction(COUNTS, tuple(1.0 + 0.01 * rows + 0.15 * max(rows - 12, 0) for rows in COUNTS)),
        StepFunction(COUNTS, (0.05,) * len(COUNTS)),
        0.0,
    )
    drafter = perturbed("llama", noise=0.02)
    plain, _ = decoded(drafter, costs, "autoregressive", num_sequences, 40)
    seconds, _ = decoded(drafter, costs, "cost_aware", num_sequences, 40)
    assert seconds <= 1.03 * plain


@pytest.mark.parametrize(("num_sequences", "a_row", "is_asked"), [(1, 0.12, True), (8, 0.12, False), (8, 0.01, True)])
def test_a_model_is_tried_once_where_a_usual_chain_is_not_worth_its_rows(num_sequences, a_row, is_asked):
    """Eight sequences share a pass, so a row counts eight times: for half a step, or a thirteenth."""
    costs, policy = linear(1.0, a_row, 0.02), CostAware()
    load = {"num_sequences": num_sequences, "rows_beside": num_sequences - 1, "width_beside": 0}

    def frontier(chance: float) -> Frontier:
        proposals = Proposals(torch.arange(4)[None], torch.tensor([[chance, 0.1, 0.1, 0.1]]).log())
        return Frontier(TokenTree.root(torch.tensor([0])), 0, 64, 4, lambda: proposals, lambda: costs, **load)

    for expected in (True, is_asked):
        assert policy.should_expand(frontier(0.4)) is expected
        policy.branch_factor(frontier(0.4))
    for _ in range(3):  # of a drafter that is sure it is not the usual chain
        policy.branch_factor(frontier(0.999))
    assert policy.should_expand(frontier(0.999)) is True


def test_a_frontier_knows_the_load():
    proposals = Proposals(torch.arange(4)[None], torch.full((1, 4), -2.0))
    load = {"num_sequences": 3, "rows_beside": 5, "width_beside": 0}
    frontier = Frontier(
        TokenTree.root(torch.tensor([0])), 0, 64, 4, lambda: proposals, lambda: linear(1.0, 0.1, 0.2), **load
    )
    assert (frontier.row_seconds, frontier.level_seconds) == (pytest.approx(0.3), pytest.approx(0.6))
    assert not frontier.is_drafter_asked


def test_policies_are_told_the_load_of_their_pass():
    seen: list[tuple[int, int, int]] = []

    class Noting:
        @hookimpl
        def should_expand(self, frontier: Frontier) -> bool:
            seen.append((frontier.num_sequences, frontier.rows_beside, frontier.width_beside))
            return False

        def __deepcopy__(self, memo: Any) -> Any:
            return self

    engine = Engine(tiny_model("llama"), "prompt_lookup")
    engine.submit([1, 2, 3], policy=Noting(), max_new_tokens=9, eos_token_id=[])
    engine.step()
    engine.submit([4, 5], policy="fixed(depth=2,branch=2,tau=0.0)", max_new_tokens=9, eos_token_id=[])
    engine.submit([6, 6, 6, 6], policy="linear(depth=2)", max_new_tokens=9, eos_token_id=[])
    engine.step()
    engine.step()
    assert seen[0] == (1, 0, 0)
    assert seen[1][:2] == (3, 2)
    assert seen[2][0] == 3
    assert seen[2][1] >= 1 + engine.load.num_running - 2


@settings(max_examples=8)
@given(
    st.sampled_from([1, 2, 5]), st.sampled_from([0.01, 0.1, 0.5]), st.sampled_from([0.05, 0.4]), st.sampled_from([1, 2])
)
def test_a_useless_drafter_costs_all_together_no_more_than_the_accounts_allow(num_sequences, a_row, a_level, seed):
    costs = linear(1.0, a_row, a_level)
    num_tokens = 40
    seconds, _ = decoded(tiny_model("llama", seed), costs, "cost_aware", num_sequences, num_tokens)
    step = costs.target_pass_seconds(num_sequences)
    # the stake, what each step adds to the accounts, and what the last tree that was begun costs beyond them
    beyond = costs.target_pass_seconds(3 * num_sequences) + 4 * a_level
    assert seconds <= num_tokens * step * (1 + MAX_LOSS) + STAKE * step + beyond


def test_many_sequences_draft_less_where_rows_are_dear_and_gain_where_they_are_cheap():
    drafter = perturbed("llama", noise=0.005)
    dear, cheap = linear(1.0, 0.2, 0.1), linear(1.0, 0.005, 0.05)
    plain, _ = decoded(drafter, dear, "autoregressive", 6, 30)
    seconds, drafted = decoded(drafter, dear, "cost_aware", 6, 30)
    _, drafted_alone = decoded(drafter, dear, "cost_aware", 1, 30)
    assert drafted / 6 < drafted_alone / 3
    assert seconds <= 1.1 * plain
    plain, _ = decoded(drafter, cheap, "autoregressive", 4, 30)
    seconds, _ = decoded(drafter, cheap, "cost_aware", 4, 30)
    assert seconds < 0.7 * plain


@pytest.mark.parametrize("num_sequences", [1, 4])
def test_a_governor_stops_what_delays_all(num_sequences):
    """Trees of noise: all together lose the stake, the shares, and what trying costs beyond expectation."""
    costs = linear(1.0, 0.05, 0.2)
    num_tokens = 60
    policy = "fixed(depth=3,branch=2,tau=0.0)+governor"
    seconds, _ = decoded(tiny_model("llama", 1), costs, policy, num_sequences, num_tokens)
    step = costs.target_pass_seconds(num_sequences)
    tree = costs.target_pass_seconds(num_sequences * 15) + 3 * 0.2 - step
    assert seconds <= num_tokens * step * 1.015 + step + 3 * tree


def test_a_governor_lets_none_of_many_short_generations_pay_for_trying():
    costs = linear(1.0, 0.2, 0.3)
    policy = "fixed(depth=3,branch=2,tau=0.0)+governor"
    seconds, _ = decoded(tiny_model("llama", 1), costs, policy, 8, 24)
    assert seconds <= 24 * costs.target_pass_seconds(8) * 1.01


def test_many_sequences_gain_by_a_governor_where_rows_are_cheap():
    drafter, cheap = perturbed("llama", noise=0.005), linear(1.0, 0.005, 0.05)
    plain, _ = decoded(drafter, cheap, "autoregressive", 4, 60)
    seconds, _ = decoded(drafter, cheap, "linear(depth=3)+governor", 4, 60)
    assert seconds < 0.7 * plain


def test_a_governor_measures_steps_in_which_nobody_drafts():
    """Beside sequences that draft a step is longer; by that one's length trees would seem to win."""
    root = TokenTree.root(torch.tensor([0]))
    chain = root.grow(torch.tensor([0]), torch.tensor([1]), torch.tensor([0.0]))
    stack = build_stack("governor")

    def step(iteration: int, *, seconds: float, drafted_beside: int) -> bool:
        frontier = Frontier(root, iteration, 9, 4, no_proposals, num_sequences=2)
        drafts = stack.should_expand(frontier).value is not False
        report = StepReport(iteration, chain if drafts else root, Verdict((), (), (1,)), seconds, num_sequences=2)
        stack.on_iteration_end(attrs.evolve(report, rows_beside=1 + drafted_beside))
        return drafts

    assert not any(step(iteration, seconds=2.0, drafted_beside=8) for iteration in range(9))
    assert [step(iteration, seconds=1.0, drafted_beside=0) for iteration in range(9, 12)] == [False, False, True]
    governor = stack.find("governor")
    assert governor is not None
    # a tree that took half of 1 second more than a step holds up two sequences
    before = governor.account
    step(12, seconds=2.0, drafted_beside=1)
    assert governor.account == pytest.approx(before - 2 * 0.5)


def no_proposals() -> Proposals:
    raise AssertionError("the drafter was asked")
