"""`governor`: what drafting may lose is bounded, by a clock that only these tests move."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import attrs
import pytest
import torch

from dynatree_core import Frontier, Session, StepReport, TokenTree, Verdict, build_stack, generate, hookimpl, run
from dynatree_core.testing.models import greedy, perturbed, tiny_model

MAX_LOSS, STAKE = 0.015, 1  # the defaults


@attrs.frozen
class Outcome:
    """What an iteration that drafted so many levels comes to; a step without drafting takes 1 second."""

    num_accepted: int
    seconds: float


@attrs.frozen
class Played:
    """A generation with `governor` alone, simulated."""

    seconds: float
    num_tokens: int
    drafted: list[int]  # the depth of the tree in each iteration, 0 for none

    @property
    def throughput(self) -> float:
        """Relative to autoregressive decoding."""
        return self.num_tokens / self.seconds


def chain(depth: int) -> TokenTree:
    tree = TokenTree.root(torch.tensor([0]))
    for _ in range(depth):
        tree = tree.grow(torch.tensor([tree.num_nodes - 1]), torch.tensor([1]), torch.tensor([0.0]))
    return tree


CHAINS = [chain(depth) for depth in range(9)]


def play(
    outcome: Callable[[int, int], Outcome],
    num_tokens: int,
    *,
    policy: str = "governor",
    max_depth: int = 8,
    plain: Callable[[int], float] = lambda iteration: 1.0,
) -> Played:
    """Decode so many tokens.

    Args:
        outcome: of an iteration, by the tokens committed before it and by the depth that was drafted.
        plain: seconds of a step without drafting, by the iteration.
    """
    stack = build_stack(policy)
    seconds, committed, drafted = 0.0, 0, []
    while committed < num_tokens:
        depth = 0
        while depth < max_depth and stack.should_expand(Frontier(CHAINS[depth], len(drafted), 99, 16, fail)).value:
            depth += 1
        result = outcome(committed, depth) if depth else Outcome(0, plain(len(drafted)))
        path = tuple(range(1, result.num_accepted + 1))
        verdict = Verdict(path, path, (1,) * (result.num_accepted + 1))
        stack.on_iteration_end(StepReport(len(drafted), CHAINS[depth], verdict, result.seconds))
        seconds += result.seconds
        committed += result.num_accepted + 1
        drafted.append(depth)
    return Played(seconds, committed, drafted)


def fail():
    raise AssertionError("the drafter was asked")


@pytest.mark.parametrize("num_tokens", [32, 64, 128, 1000])
@pytest.mark.parametrize("loss", [0.01, 0.1, 0.3, 0.7, 0.99, 1.3, 2.5, 10.0])
def test_a_useless_drafter_loses_no_more_than_the_bound(loss, num_tokens):
    """Every probe, of two levels, loses `loss` steps. The first, of which nothing is known, may exceed the stake."""
    played = play(lambda at, depth: Outcome(0, 1 + loss * depth / 2), num_tokens)
    assert played.seconds - num_tokens <= max(STAKE, loss) + MAX_LOSS * num_tokens + 1e-9
    assert any(played.drafted)
    if num_tokens >= 128 and loss <= 2.5:
        assert played.throughput >= 0.97


def test_slow_first_steps_do_not_make_useless_drafting_look_cheap():
    """A tree of which nothing is accepted has won nothing, however long a step without drafting took."""
    found = play(lambda committed, depth: Outcome(0, 1.1), 300, plain=lambda iteration: 1.3 if iteration < 2 else 1.0)
    assert 300 / (found.seconds - 0.6) >= 0.97
    assert 0 < sum(map(bool, found.drafted)) < 60


@pytest.mark.parametrize("max_loss", [0.0, 0.003, 0.05])
def test_the_bound_is_the_parameter(max_loss):
    """What may be spent on trying is spent, and no more."""
    played = play(lambda at, depth: Outcome(0, 1.5), 5000, policy=f"governor(max_loss={max_loss})")
    num_plain = played.drafted.count(0)
    assert played.seconds - 5000 == pytest.approx(STAKE + max_loss * num_plain, abs=0.6)
    once = play(lambda at, depth: Outcome(0, 1.5), 50, policy="governor(stake=0,max_loss=0.0)")
    assert sum(map(bool, once.drafted)) == 1


def test_a_good_drafter_stays_on():
    """All but the first two steps and one after every `refresh` draft, and the depth is soon the stack's own."""
    played = play(lambda at, depth: Outcome(depth, 1 + 0.2 * depth), 2000)
    assert played.drafted[:7] == [0, 0, 2, 4, 8, 8, 8]
    num_plain = played.drafted.count(0)
    assert num_plain == pytest.approx(2 + len(played.drafted) / 33, abs=1.5)
    assert played.throughput > 0.93 * 9 / 2.6  # what drafting in every iteration would give


@pytest.mark.parametrize("loss", [0.3, 1.0])
def test_it_adapts_when_the_text_changes(loss):
    """1000 tokens that cannot be predicted, 1000 that can, 1000 that cannot."""

    def outcome(at: int, depth: int) -> Outcome:
        return Outcome(depth if 1000 <= at < 2000 else 0, 1 + loss * depth / 4)

    played = play(outcome, 3000)
    ends, at = [], 0
    for depth in played.drafted:
        at += 1 + (depth if 1000 <= at < 2000 else 0)
        ends.append(at)
    good = [depth for depth, end in zip(played.drafted, ends, strict=True) if 1000 < end <= 2000]
    first = next(i for i, depth in enumerate(good) if depth)
    assert first <= loss / 2 / MAX_LOSS + 2  # as many steps as it takes to earn a probe
    assert sum(map(bool, good[first:])) >= 0.95 * len(good[first:])
    bad = [depth for depth, end in zip(played.drafted, ends, strict=True) if end > 2000]
    last_deep = max((i for i, depth in enumerate(bad) if depth > 2), default=0)
    assert last_deep <= 8 / (2 * loss) + 2  # what it has won is spent before it is off: 8 steps at most
    assert played.throughput > 1.2


def test_a_drafter_that_is_silent_and_costs_nothing_loses_nothing():
    """It stays on, so that what it knows later is not missed."""
    stack, drafted = build_stack("governor"), []
    for iteration in range(40):
        drafted.append(bool(stack.should_expand(Frontier(CHAINS[0], iteration, 99, 16, fail)).value))
        stack.on_iteration_end(StepReport(iteration, CHAINS[0], Verdict((), (), (1,)), 1.0))
    assert drafted == [False, False, *[True] * 32, False, *[True] * 5]  # one after every `refresh` goes without


def test_an_iteration_in_which_nobody_asks_is_a_plain_step():
    stack = build_stack("governor")
    policy = stack.find("governor")
    for seconds in (1.0, 3.0, 2.0):
        stack.on_iteration_end(StepReport(0, CHAINS[0], Verdict((), (), (1,)), seconds))
    assert list(policy.seen[1].plain) == [1.0, 3.0, 2.0]
    assert policy.account == 1.0 + 0.015 * 2.0  # the stake is in the lower of the first two


def test_a_step_that_is_done_again_by_one_of_two_sequences_is_a_plain_step_of_one():
    """Its draft had made the target overflow, so nobody is asked again, and a step of one sequence was never seen."""
    stack = build_stack("governor")
    policy = stack.find("governor")
    for iteration in range(3):
        drafts = stack.should_expand(Frontier(CHAINS[0], iteration, 99, 16, fail, num_sequences=2)).value
        again = {"num_sequences": 2, "rows_beside": 1} if iteration < 2 else {}
        stack.on_iteration_end(StepReport(iteration, CHAINS[0], Verdict((), (), (1,)), 1.0, **again))
    assert drafts is True
    assert (list(policy.seen[1].plain), list(policy.seen[2].wins)) == ([1.0], [])


def test_it_is_asked_before_a_policy_that_looks_at_the_drafter():
    """Off, it costs no drafter pass, though it stands at the right of the stack."""

    class Looks:
        @hookimpl
        def should_expand(self, frontier: Frontier) -> torch.Tensor:
            return frontier.confidence > 0.5

    stack = build_stack([Looks(), "governor"])
    assert stack.should_expand(Frontier(CHAINS[0], 0, 99, 16, fail)).value is False


# whole generations, on a clock that the models' forward passes move


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Give a model a price: seconds a pass, and seconds a row more than one."""
    now = [0.0]
    monkeypatch.setattr("dynatree_core.clock.time.perf_counter", lambda: now[0])
    handles = []

    def price(model: torch.nn.Module, a_pass: float, a_row: float) -> None:
        def charge(module, args, kwargs):
            now[0] += a_pass + a_row * (kwargs["input_ids"].shape[1] - 1)

        handles.append(model.register_forward_pre_hook(charge, with_kwargs=True))

    yield price
    for handle in handles:
        handle.remove()


def test_a_report_has_the_time_of_its_step(passes):
    target, drafter = tiny_model("llama"), perturbed("llama")
    passes(target, 1.0, 0.05)
    passes(drafter, 0.25, 0.0)
    session = Session(target, drafter, [1, 2, 3], policy="linear(depth=4)", max_new_tokens=20)
    reports = list(run(session))
    assert [report.seconds for report in reports] == pytest.approx(
        [1.0 + 0.05 * report.tree.num_drafted + 0.25 * report.tree.max_depth for report in reports]
    )
    assert sum(report.seconds for report in reports) == pytest.approx(session.result().report.decode_seconds)
    assert session.last_report is reports[-1]


@pytest.mark.parametrize("policy", ["phase3", "fixed(depth=5,tau=0.0)", "best_first", "sequoia"])
def test_generations_with_a_useless_model_lose_less_than_three_percent(passes, policy):
    """A drafter of other random weights, a level of which costs a third of a step."""
    target, drafter, prompt = tiny_model("llama"), tiny_model("llama", 7), [1, 2, 3]
    passes(target, 1.0, 0.05)
    passes(drafter, 0.33, 0.01)
    options = {"max_new_tokens": 120, "eos_token_id": []}
    plain = generate(target, None, prompt, **options)
    alone = generate(target, drafter, prompt, policy=policy, **options)
    governed = generate(target, drafter, prompt, policy=f"{policy}+governor", **options)
    assert plain.report.decode_seconds == pytest.approx(120)
    assert alone.report.decode_seconds > 150  # the drafter is as useless as it should be
    assert governed.report.decode_seconds <= 120 / 0.97
    assert governed.token_ids == plain.token_ids == greedy(target, prompt, 120)


def test_generations_with_a_good_model_keep_most_of_what_it_wins(passes):
    target, drafter, prompt = tiny_model("llama"), perturbed("llama", noise=0.005), [1, 2, 3]
    passes(target, 1.0, 0.02)
    passes(drafter, 0.1, 0.01)
    options = {"max_new_tokens": 120, "eos_token_id": []}
    alone = generate(target, drafter, prompt, policy="fixed(depth=5,branch=1,tau=0.0)", **options).report
    governed = generate(target, drafter, prompt, policy="fixed(depth=5,branch=1,tau=0.0)+governor", **options).report
    assert alone.tokens_per_second > 2
    assert governed.tokens_per_second > 0.8 * alone.tokens_per_second
