"""A look that takes no pass of the drafter's model is known to be free before it is taken, and priced so."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any
from unittest import mock

import attrs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_following import BY_NODE, Rows, frontier
from test_load import linear
from test_student import Sure

from dynatree_core import (
    Engine,
    Frontier,
    StepFunction,
    StepReport,
    TokenTree,
    Verdict,
    build_drafter,
    build_stack,
    generate,
    hookimpl,
)
from dynatree_core.clock import StageClock
from dynatree_core.drafters import union as module
from dynatree_core.drafters.base import DraftPlan, _ElsewhereState, bounds_of_rest_of
from dynatree_core.drafters.model import ModelDrafter
from dynatree_core.drafters.prompt_lookup import PromptLookupDrafter, PromptLookupState
from dynatree_core.drafters.union import UnionDrafter
from dynatree_core.runners.around import RunnerAround
from dynatree_core.runners.eager import EagerRunner
from dynatree_core.testing.models import VOCAB, greedy, perturbed, tiny_model
from dynatree_core.trace import read, replay
from dynatree_policies.cost_aware import FREE_MAX_LOSS, FREE_STAKE, MAX_LOSS, STAKE, CostAware

CPU = torch.device("cpu")
COPIED = [7] * 110  # which the target goes on with for ever
NEW = [3, 1, 4, 1, 5, 9]  # what it says behind these repeats hardly anything
DEAR = linear(1.0, 0.02, 9.0)  # no look at the model pays, and copied text is cheap to verify


def union(*, last: Any = None, model: Any = None) -> UnionDrafter:
    first = ModelDrafter(perturbed("llama") if model is None else model)
    return UnionDrafter([first, build_drafter("prompt_lookup") if last is None else last])


class Timed:
    """Sequences of an engine whose passes take what `DEAR` says, whoever takes part in them."""

    def __init__(self, policy: Any, prompts: list[list[int]], num_tokens: int) -> None:
        self.seconds, self.rows_of_drafter = 0.0, Rows()
        target = tiny_model("llama")

        def around(model: Any, name: str) -> RunnerAround:
            prices = DEAR.target_pass_seconds if model is target else DEAR.drafter_level_seconds
            return RunnerAround(EagerRunner(model), lambda parts, is_prompt: self.passing(prices, parts, is_prompt))

        engine = Engine(
            target, union(model=self.rows_of_drafter.model), costs=DEAR, now=lambda: self.seconds, make_runner=around,
            trust_model=True,
        )  # fmt: skip
        handles = [engine.submit(one, policy=policy, max_new_tokens=num_tokens, eos_token_id=[]) for one in prompts]
        self.results = [handle.result() for handle in handles]
        assert [one.token_ids for one in self.results] == [greedy(target, one, num_tokens) for one in prompts]

    def passing(self, prices: Any, parts: Any, is_prompt: bool) -> Any:
        self.seconds += 0.0 if is_prompt else prices(sum(part.flat.num_rows for part in parts))
        return nullcontext()


@pytest.mark.parametrize("policy", ["cost_aware", "linear(depth=4)+governor", "cost_aware+governor"])
@pytest.mark.parametrize("num_sequences", [1, 3])
def test_copied_text_is_drafted_where_the_model_is_never_asked(policy, num_sequences):
    """110 tokens are too many for a governor to have them read for 16 new ones."""
    timed = Timed(policy, [COPIED[place:] for place in range(num_sequences)], 16)
    assert timed.rows_of_drafter.of_passes == []
    assert timed.seconds < 0.75 * 16
    assert all(one.report.num_drafted_nodes > 8 for one in timed.results)


def test_what_is_not_copied_is_not_drafted():
    timed = Timed("cost_aware", [NEW], 12)
    assert timed.rows_of_drafter.of_passes == []
    assert timed.results[0].report.num_drafted_nodes <= 12  # tokens that came before, by chance
    assert timed.seconds <= (1 + MAX_LOSS + FREE_MAX_LOSS) * 12 + STAKE + FREE_STAKE


def test_a_model_that_has_lost_its_account_does_not_stop_free_looks():
    policy = CostAware()
    policy.account = -3.0
    assert not policy.should_expand(frontier(DEAR, 0))
    assert policy.should_expand(frontier(DEAR, 0, is_free=True))
    policy.free_account = -0.1
    assert not policy.should_expand(frontier(DEAR, 0, is_free=True))


def test_free_looks_that_lose_do_not_cost_the_model_its_account():
    policy = CostAware()
    policy.free_account = -3.0
    assert policy.should_expand(frontier(linear(1.0, 0.02, 0.1), 0))


def test_a_text_that_is_not_copied_is_searched_ever_less():
    """Whether a look is free takes a search of the text, which no account counts."""
    searched: list[int] = []

    def is_free() -> bool:
        searched.append(iteration)
        return False

    policy, tree = CostAware(), TokenTree.root(torch.tensor([0]))
    for iteration in range(400):
        assert not policy.should_expand(attrs.evolve(frontier(DEAR, 0), is_look_free=is_free))
        policy.on_iteration_end(StepReport(iteration, tree, Verdict((), (), (1,))))
    assert len([one for one in searched if one < 20]) == 20
    assert 0 < len([one for one in searched if one >= 200]) < 0.5 * 200


class Compares:
    """Asks at each level whether the look is free, and then looks."""

    def __init__(self) -> None:
        self.seen: list[tuple[bool, bool, bool]] = []  # free before, asked before, free behind the look

    @hookimpl
    def should_expand(self, frontier: Frontier) -> bool:
        if frontier.depth == 3:
            return False
        before, is_asked = frontier.is_look_free, frontier.is_drafter_asked
        self.seen.append((before, is_asked, frontier.proposals.is_free))
        return True

    @hookimpl
    def branch_factor(self, frontier: Frontier) -> int:
        return 1

    def __deepcopy__(self, memo: Any) -> Any:
        return self


@pytest.mark.parametrize("last", [None, Sure(0.95), Sure(0.1), Sure(0.95, only_even=True)])
@pytest.mark.parametrize("num_sequences", [1, 3])
def test_what_is_said_before_the_look_is_what_the_look_says(last, num_sequences):
    target, policy = tiny_model("llama"), Compares()
    engine = Engine(target, union(last=last))
    prompts = [COPIED[:20], NEW, [1, 2, 3, 1, 2]][:num_sequences]
    handles = [engine.submit(one, policy=policy, max_new_tokens=12, eos_token_id=[]) for one in prompts]
    assert [one.result().token_ids for one in handles] == [greedy(target, one, 12) for one in prompts]
    assert all(before == behind and not is_asked for before, is_asked, behind in policy.seen)
    assert len(policy.seen) > 6


def test_who_was_asked_whether_a_look_is_free_is_not_asked_again():
    lookup, texts = build_drafter("prompt_lookup"), []

    class Counts(type(lookup)):  # type: ignore[misc]
        def start(self, plan: DraftPlan) -> Any:
            state = lookup.start(plan)
            propose = state.propose
            state.propose = lambda *given: texts.append(given) or propose(*given)
            return state

    plan = DraftPlan(VOCAB, 40, 16, CPU, StageClock(CPU), tiny_model("llama"))
    both = union(last=Counts())
    state, plain = both.start(plan), union().start(plan)
    there = _ElsewhereState(state, plan, CPU)
    for text in (torch.tensor(COPIED[:8]), torch.tensor([*COPIED[:8], 7, 9])):
        tree = TokenTree.root(text[-1:])
        for depth in range(3):
            with torch.inference_mode():
                is_free = there.is_look_free(text, tree, 2)
                assert there.is_look_free(text, tree, 2) == is_free
                found, expected = there.propose(text, tree, 2), plain.propose(text, tree, 2)
            assert len(texts) == depth + 1
            assert is_free == found.is_free == expected.is_free
            assert torch.equal(found.token_ids, expected.token_ids)
            assert torch.equal(found.logprobs, expected.logprobs)
            tree = tree.grow(torch.tensor([depth]), found.token_ids[0, :1], found.logprobs[0, :1])
        there.commit(())
        plain.commit(())
        texts.clear()


@given(
    text=st.lists(st.integers(0, 3), min_size=1, max_size=30),
    picks=st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=3), min_size=1, max_size=5),
    k=st.sampled_from([2, 16]),
    is_nested=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_what_a_union_need_not_read_is_what_it_would_have_read(text, picks, k, is_nested):
    """Whom it asks is the same where it reads at each level, also where somebody else has proposed nodes."""
    plan = DraftPlan(VOCAB, 40, 16, CPU, StageClock(CPU), tiny_model("llama"))
    states = []
    for _ in range(2):
        both = union()
        state = (UnionDrafter([both, Sure(0.2, only_even=True)]) if is_nested else both).start(plan)
        states.append((state, state.states[0] if is_nested else state))
    (state, inner), (plain, inner_plain) = states
    lookup = inner_plain.states[1]
    lookup.bounds_of_rest = lambda *_, **__: (0.0, 1.0)  # says nothing, so that all is read
    ids = torch.tensor(text)
    tree, was_free = TokenTree.root(ids[-1:]), False
    with torch.inference_mode(), mock.patch.object(module, "_most_left_over", wraps=module._most_left_over) as reads:
        for level in picks:
            before = reads.call_count
            found = state.propose(ids, tree, k)
            num_read = reads.call_count - before
            expected = plain.propose(ids, tree, k)
            assert inner._is_of_first == inner_plain._is_of_first  # or its model is asked
            assert torch.equal(found.token_ids, expected.token_ids)
            assert torch.equal(found.logprobs, expected.logprobs)
            is_known = inner._rest_of_root == 1 or (was_free and k == 16)
            assert is_nested or num_read == (tree.max_depth == 0 or not is_known)
            was_free = found.is_free
            possible = (found.logprobs > -torch.inf).flatten().nonzero().flatten()
            chosen = possible[sorted({pick % possible.numel() for pick in level})]
            parents = tree.last_level.start + chosen // k
            tree = tree.grow(parents, found.token_ids.flatten()[chosen], found.logprobs.flatten()[chosen])


class Weighed(PromptLookupState):
    """Leaves another rest than it says."""

    def propose(self, committed_ids, tree, k):
        found = super().propose(committed_ids, tree, k)
        return attrs.evolve(found, logprobs=found.logprobs - 3.0)


def test_bounds_are_not_those_of_a_state_that_proposes_otherwise():
    drafter = PromptLookupDrafter()
    for kind, wanted in ((PromptLookupState, (1.0, 1.0)), (Weighed, (0.0, 1.0))):
        assert bounds_of_rest_of(kind(drafter), 1, 16, 1.0, is_own=True) == wanted


def test_a_drafter_that_cannot_say_has_no_free_look():
    plan = DraftPlan(VOCAB, 40, 16, CPU, StageClock(CPU), tiny_model("llama"))
    text = torch.tensor(COPIED[:8])
    root = TokenTree.root(text[-1:])
    lookup, model = build_drafter("prompt_lookup"), ModelDrafter(perturbed("llama"))
    for drafter in (lookup, model, UnionDrafter([lookup, model]), UnionDrafter([union(), Sure(0.9)])):
        state = drafter.start(plan)
        with torch.inference_mode():
            assert state.is_look_free(text, root, 2) is False
            assert state.propose(text, root, 2).is_free is False


def test_a_free_look_has_no_price():
    free, other = (frontier(BY_NODE, 20, is_free=is_free) for is_free in (True, False))
    assert (free.level_seconds, free.catch_up_seconds) == (0.0, 0.0)
    assert (other.level_seconds, other.catch_up_seconds) == (pytest.approx(0.3), pytest.approx(0.2))
    assert not free.is_drafter_asked


def test_following_is_priced_by_what_was_measured():
    measured = attrs.evolve(BY_NODE, drafter_follow_seconds=StepFunction((4, 16), (0.01, 0.05)))
    assert [frontier(measured, behind).catch_up_seconds for behind in (0, 3, 16, 160)] == pytest.approx(
        [0.0, 0.0075, 0.05, 0.5]
    )
    assert frontier(measured, 16, num_sequences=3, rows_beside=2).catch_up_seconds == pytest.approx(0.15)


def test_what_free_looks_win_says_nothing_about_the_model():
    policy, costs = CostAware(), linear(1.0, 0.02, 0.6)
    for _ in range(20):
        root = frontier(costs, 200, is_free=True)
        assert policy.should_expand(root)
        assert policy.branch_factor(root).item() > 0
        policy.on_iteration_end(StepReport(0, root.tree, Verdict((), (), (1,))))
        policy.free_account = FREE_STAKE
    assert policy.free_look_value > 0.8
    assert policy.look_value == pytest.approx(0.5)
    assert policy.debt == 0.0
    assert not policy.should_expand(frontier(costs, 0))
    policy.look_value = policy.free_look_value
    assert policy.should_expand(frontier(costs, 0))


def test_a_governor_lets_a_tree_grow_where_looks_are_free_and_no_further():
    stack = build_stack("governor")
    governor = stack.find("governor")
    for _ in range(2):
        assert stack.should_expand(frontier(DEAR, 300, 20)).value is False
        stack.on_iteration_end(StepReport(0, TokenTree.root(torch.tensor([0])), Verdict((), (), (1,)), 1.0))
    root = frontier(DEAR, 300, 20, is_free=True)
    assert stack.should_expand(root).value is not False
    assert root.proposals
    tree = root.tree.grow(torch.tensor([0]), torch.tensor([1]), torch.tensor([0.0]))
    for is_free in (False, True):
        deeper = attrs.evolve(frontier(DEAR, 300, 20, is_free=is_free), tree=tree)
        assert (stack.should_expand(deeper).value is not False) == is_free
    account = governor.account
    stack.on_iteration_end(StepReport(0, tree, Verdict((), (), (1,)), 1.5))
    assert governor.debt == 0.0  # nothing was followed, so what was lost is charged at once
    assert governor.account == pytest.approx(account - 0.5)
    assert stack.should_expand(frontier(DEAR, 300, 20)).value is False


def test_a_replay_knows_which_looks_were_free(tmp_path):
    file = tmp_path / "trace.jsonl"
    options = {"policy": "cost_aware", "max_new_tokens": 24, "eos_token_id": [], "costs": DEAR}
    generate(tiny_model("llama"), union(), COPIED[:20], trace=file, **options)
    (sequence,) = read(file).sequences
    drafted = [step.num_committed for step in replay(sequence, policy="cost_aware", costs=DEAR).steps]
    assert drafted == [len(one.committed) for one in sequence.iterations]
    assert max(drafted) > 3
