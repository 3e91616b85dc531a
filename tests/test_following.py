"""A drafter's model follows the text when it is asked, not before; policies know what that will take."""

from __future__ import annotations

import copy
from typing import Any

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_load import decoded, linear

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
    generate,
    hookimpl,
)
from dynatree_core.clock import StageClock
from dynatree_core.drafters.base import DraftPlan
from dynatree_core.drafters.model import ModelDrafter
from dynatree_core.testing.models import VOCAB, greedy, perturbed, tiny_model
from dynatree_policies.cost_aware import FREE_MAX_LOSS, FREE_STAKE, MAX_LOSS, STAKE, CostAware, level_seconds

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
DEAR = linear(1.0, 2.0, 9.0)  # no look pays
CPU = torch.device("cpu")


class Rows:
    """The rows of each pass of a model of its own."""

    def __init__(self, family: str = "llama", noise: float = 0.02) -> None:
        self.model = copy.deepcopy(perturbed(family, noise=noise))
        self.of_passes: list[int] = []
        self.model.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, module: Any, given: Any, named: Any) -> None:
        self.of_passes.append(named["input_ids"].numel())


class Asking:
    """A policy that looks at the root's proposals in these iterations only."""

    def __init__(self, *iterations: int) -> None:
        self.iterations = iterations
        self.behind: list[int] = []  # of each iteration, what the frontier says

    @hookimpl
    def should_expand(self, frontier: Frontier) -> bool:
        if frontier.depth > 0:
            return False
        self.behind.append(frontier.num_behind)
        return frontier.iteration in self.iterations

    @hookimpl
    def branch_factor(self, frontier: Frontier) -> int:
        return 1

    def __deepcopy__(self, memo: Any) -> Any:
        return self


@pytest.mark.parametrize("policy", ["autoregressive", "cost_aware"])
@pytest.mark.parametrize("num_sequences", [1, 3])
def test_a_model_that_nobody_asks_makes_no_pass(policy, num_sequences):
    target, drafter = tiny_model("llama"), Rows()
    engine = Engine(target, drafter.model, costs=DEAR, trust_model=True)
    handles = [
        engine.submit(PROMPT[place:], policy=policy, max_new_tokens=12, eos_token_id=[])
        for place in range(num_sequences)
    ]
    assert [handle.result().token_ids for handle in handles] == [
        greedy(target, PROMPT[place:], 12) for place in range(num_sequences)
    ]
    assert drafter.of_passes == []


def test_a_sequence_that_does_not_ask_has_no_rows_in_the_passes_of_those_that_do():
    drafter = Rows()
    engine = Engine(tiny_model("llama"), drafter.model, trust_model=True)
    options = {"max_new_tokens": 9, "eos_token_id": [], "tau": 0.0}
    silent = engine.submit([7] * 30, policy="autoregressive", **options)
    asking = engine.submit([5, 6], policy="linear(depth=1)", **options)
    late = engine.submit([8] * 20, policy=Asking(), **options)
    for handle in (silent, asking, late):
        handle.result()
    assert max(drafter.of_passes) <= 2 + 1  # what is asked about, and a node that nobody has looked behind


def test_the_first_look_has_it_follow_all_in_one_pass():
    drafter, policy = Rows(), Asking(0, 1, 5)
    result = generate(
        tiny_model("llama"), drafter.model, PROMPT, policy=policy, max_new_tokens=20, max_depth=1, eos_token_id=[],
        tau=0.0, trust_model=True,
    )  # fmt: skip
    assert result.token_ids == greedy(tiny_model("llama"), PROMPT, 20)
    first, second, third = drafter.of_passes
    assert first == len(PROMPT)
    assert second in (1, 2)
    assert policy.behind[0] == len(PROMPT) - 1
    assert third == policy.behind[5] + 1 >= 4
    assert policy.behind[2:6] == list(range(policy.behind[2], policy.behind[2] + 4))


def test_a_long_text_is_followed_in_chunks(monkeypatch):
    monkeypatch.setattr("dynatree_core.drafters.model.PREFILL_CHUNK", 4)
    drafter, prompt = Rows(), PROMPT * 2
    result = generate(
        tiny_model("llama"), drafter.model, prompt, policy=Asking(0), max_new_tokens=3, eos_token_id=[],
        trust_model=True,
    )  # fmt: skip
    assert result.token_ids == greedy(tiny_model("llama"), prompt, 3)
    assert drafter.of_passes == [4, 4, 4, 4]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@given(st.data())
def test_it_says_what_one_says_that_was_asked_all_the_time(family, data):
    """Bit for bit: of tokens in one pass as of tokens one by one."""
    drafter = ModelDrafter(perturbed(family))
    text = data.draw(st.lists(st.integers(0, VOCAB - 1), min_size=2, max_size=24))
    asked = data.draw(st.sets(st.integers(1, len(text))))
    plan = DraftPlan(VOCAB, 40, 8, CPU, StageClock(CPU), tiny_model(family))
    eager, lazy = drafter.start(plan), drafter.start(plan)
    with torch.inference_mode():
        lazy.prefill(torch.tensor(text[:1]))
        for end in range(1, len(text) + 1):
            committed = torch.tensor(text[:end])
            expected = eager.propose(committed, TokenTree.root(committed[-1:]), 5)
            if end in asked:
                assert eager.num_behind(end) == 0
                found = lazy.propose(committed, TokenTree.root(committed[-1:]), 5)
                assert torch.equal(found.token_ids, expected.token_ids)
                assert torch.equal(found.logprobs, expected.logprobs)
                lazy.commit(())
            eager.commit(())


def frontier(
    costs: CostModel, num_behind: int, tokens_left: int | None = None, *, is_free: bool = False, **load: int
) -> Frontier:
    probs = torch.tensor([[0.9, 0.05, 0.02, 0.01]])
    proposals = Proposals(torch.arange(4)[None], probs.log(), is_free=is_free)
    root = TokenTree.root(torch.tensor([0]))
    told = {"num_behind": num_behind, "num_tokens_left": tokens_left, "is_look_free": lambda: is_free, **load}
    return Frontier(root, 0, 64, 4, lambda: proposals, lambda: costs, **told)


WIDTHS = tuple(range(1, 400))
BY_NODE = CostModel(  # a level takes a tenth of a step, and a hundredth more for each node
    StepFunction(WIDTHS, tuple(1.0 + 0.01 * rows for rows in WIDTHS)),
    StepFunction(WIDTHS, tuple(0.09 + 0.01 * width for width in WIDTHS)),
    0.0,
)


def test_the_price_of_a_look_has_that_of_catching_up_in_it():
    assert frontier(BY_NODE, 0).level_seconds == pytest.approx(0.1)
    assert frontier(BY_NODE, 20).level_seconds == pytest.approx(0.1 + 0.2)
    beside = frontier(BY_NODE, 20, num_sequences=3, rows_beside=2)
    assert beside.catch_up_seconds == pytest.approx(3 * 0.2)


def test_a_look_has_to_pay_its_share_of_catching_up():
    """A look wins half a token at first, so 0.35 steps are left of it over 32 looks: 11 steps, or 1100 tokens."""
    assert CostAware().should_expand(frontier(BY_NODE, 300))
    assert not CostAware().should_expand(frontier(BY_NODE, 1300))
    assert not CostAware().should_expand(frontier(BY_NODE, 300, tokens_left=8))


@given(
    st.lists(st.tuples(st.floats(0.0, 1.0), st.booleans(), st.booleans()), min_size=1, max_size=80),
    st.integers(0, 300), st.floats(0.0, 0.05), st.booleans(),
)  # fmt: skip
def test_what_is_lost_by_catching_up_is_bounded(iterations, prompt, a_token, is_measured):
    """By the cost model no more than the account allows, one iteration, and what was not charged when it asked last.

    Looks that are free have an account of their own.
    """
    seconds = tuple(0.1 + a_token * width for width in range(500))
    costs = attrs.evolve(BY_NODE, drafter_level_seconds=StepFunction(tuple(range(1, 501)), seconds))
    if is_measured:
        costs = attrs.evolve(costs, drafter_follow_seconds=StepFunction((1,), (a_token,)))
    policy, behind, owed, caught = CostAware(max_depth=1), prompt, 0.0, 0.0
    losses: dict[bool, list[float]] = {False: [0.0], True: [0.0]}  # of an iteration, by whether its look is free
    for number, (claim, is_right, is_free) in enumerate(iterations, 1):
        root, tree, own = frontier(costs, behind, is_free=is_free), TokenTree.root(torch.tensor([0])), 0.0
        root = attrs.evolve(root, propose=lambda claim=claim, is_free=is_free: claimed(claim, is_free))
        asks = policy.should_expand(root)
        if asks:
            own = level_seconds(costs, 1, is_free=is_free)
            if policy.branch_factor(root).item():
                tree = tree.grow(torch.tensor([0]), torch.tensor([1]), torch.tensor([claim]).log())
            caught += root.catch_up_seconds
            behind = behind if is_free else 0
        path = (1,) if is_right and tree.num_drafted else ()
        policy.on_iteration_end(StepReport(0, tree, Verdict(path, path, (1,) * (1 + len(path)))))
        step = costs.plain_step_seconds()
        own += costs.iteration_seconds(tree.num_drafted, []) - step * (1 + len(path))
        losses[asks and is_free].append(own)
        behind += 1 + len(path)
        owed = policy.debt + policy.instalment if asks and not is_free else owed
        lost = sum(losses[False]) + caught
        assert lost <= (STAKE + MAX_LOSS * number + owed) * step + max(losses[False]) + 1e-6
        assert sum(losses[True]) <= (FREE_STAKE + FREE_MAX_LOSS * number) * step + max(losses[True]) + 1e-6
        assert policy.debt * step <= a_token * (prompt + number * 3) + 1e-6


def claimed(claim: float, is_free: bool) -> Proposals:
    return Proposals(torch.arange(4)[None], torch.tensor([[claim, 0.0, 0.0, 0.0]]).log(), is_free=is_free)


@pytest.mark.parametrize("num_sequences", [1, 2, 4])
def test_a_useless_model_that_has_to_read_long_prompts_costs_all_together_little(num_sequences):
    """Prices of passes over prompts count: the drafter's reading takes as long as three steps of each sequence."""
    costs = attrs.evolve(linear(1.0, 0.05, 0.1), drafter_level_seconds=BY_NODE.drafter_level_seconds)
    for policy in ("cost_aware", "fixed(depth=3,branch=2,tau=0.0)+governor"):
        seconds, _ = decoded(
            tiny_model("llama", 1), costs, policy, num_sequences, 40, prompt=[place % VOCAB for place in range(60)]
        )
        step = costs.target_pass_seconds(num_sequences)
        stake = 1.0 + 0.015 * 40
        read = num_sequences * 0.01 * 60  # once
        tree = costs.target_pass_seconds(num_sequences * 15) + 3 * costs.drafter_level_seconds(16) - step
        assert seconds <= 40 * step + stake * step + read + 3 * tree


# a governor by itself, in iterations that are made up


class Played:
    """A generation with `governor` alone among others; a step without any tree takes a second."""

    def __init__(self, num_sequences: int, num_behind: int, tokens_left: int) -> None:
        self.stack = build_stack("governor")
        self.num_sequences, self.num_behind, self.left = num_sequences, num_behind, tokens_left
        self.drafted: list[bool] = []

    def step(
        self, *, accepted: bool, a_tree: float, a_token: float = 0.0, drafted_beside: int = 0, is_free: bool = False
    ) -> float:
        """Play an iteration, and say what it took."""
        root = frontier(BY_NODE, self.num_behind, self.left, is_free=is_free, num_sequences=self.num_sequences)
        drafts = self.stack.should_expand(root).value is not False
        seconds, tree = 1.0 + a_tree * drafted_beside, root.tree
        if drafts:
            assert root.proposals
            seconds += a_tree + (0.0 if is_free else a_token * self.num_behind)
            self.num_behind = self.num_behind if is_free else 0
            tree = tree.grow(torch.tensor([0]), torch.tensor([1]), torch.tensor([0.0]))
        path = (1,) if accepted and drafts else ()
        self.num_behind += 1 + len(path)
        self.left -= 1 + len(path)
        rows = self.num_sequences - 1 + drafted_beside
        report = StepReport(
            0, tree, Verdict(path, path, (1,) * (1 + len(path))), seconds, num_sequences=self.num_sequences,
            rows_beside=rows,
        )  # fmt: skip
        self.stack.on_iteration_end(report)
        self.drafted.append(drafts)
        return seconds


def test_a_governor_does_not_have_a_prompt_read_for_a_short_text():
    played = Played(1, 1000, 60)
    for _ in range(50):
        played.step(accepted=True, a_tree=0.1, a_token=0.01)
    assert not any(played.drafted)
    played = Played(1, 200, 600)
    seconds = sum(played.step(accepted=True, a_tree=0.1, a_token=0.01) for _ in range(200))
    assert sum(played.drafted) > 150
    assert seconds < 0.7 * (600 - played.left)


@given(
    st.integers(1, 4), st.integers(0, 300), st.floats(0.0, 0.03), st.floats(0.05, 2.0),
    st.lists(st.booleans(), min_size=120, max_size=120),
)  # fmt: skip
def test_a_governor_loses_its_bound_and_what_it_has_not_been_charged_for(num_sequences, prompt, a_token, a_tree, free):
    """When it has drafted last: that is charged later, and then it does not draft."""
    played, lost, largest, owed = Played(num_sequences, prompt, 400), 0.0, 0.0, 0.0
    governor = played.stack.find("governor")
    for is_free in free:
        behind = played.num_behind
        seconds = played.step(accepted=False, a_tree=a_tree, a_token=a_token, is_free=is_free)
        if played.drafted[-1]:
            lost += (seconds - 1.0) * num_sequences
            largest = max(largest, a_tree * num_sequences + min(behind, 8) * a_token * num_sequences)
            owed = governor.debt + governor.instalment
    assert lost <= 1.0 + 0.015 * 120 + owed + 3 * largest + 1e-6


@pytest.mark.parametrize("accepted", [True, False])
def test_a_governor_beside_sequences_that_always_draft_is_not_starved(accepted):
    """There is no step in which nobody drafts, so it goes by those in which only the others do."""
    played = Played(2, 0, 10_000)
    for _ in range(300):
        played.step(accepted=accepted, a_tree=0.1, drafted_beside=5)
    num_drafted = sum(played.drafted)
    assert num_drafted > 200 if accepted else 0 < num_drafted < 60
    # the others end, and so does what it went by
    for _ in range(80):
        played.step(accepted=accepted, a_tree=0.1)
    governor = played.stack.find("governor")
    assert list(governor.seen[2].plain)[-1] == 1.0
    assert governor._step_seconds() == 1.0


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 6)), min_size=40, max_size=160), st.floats(0.02, 1.0))
def test_a_governor_loses_no_more_beside_whatever_the_others_do(iterations, a_tree):
    played, lost = Played(3, 0, 10_000), 0.0
    for accepted, drafted_beside in iterations:
        played.step(accepted=accepted, a_tree=a_tree, drafted_beside=drafted_beside)
        if played.drafted[-1]:
            lost += a_tree * 3 - (1 + a_tree * drafted_beside) * accepted
    num_off = played.drafted.count(False)
    longest = 1 + 6 * a_tree
    assert lost <= longest + 0.015 * num_off * longest + 3 * a_tree * 9 + 8 * 6 * a_tree * 3
