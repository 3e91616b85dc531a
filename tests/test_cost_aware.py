"""`cost_aware`: it takes what pays by the costs that it is told, and leaves what does not."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import attrs
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from dynatree_core import (
    AcceptanceEstimator,
    CostModel,
    Engine,
    Frontier,
    Proposals,
    Session,
    StepFunction,
    StepReport,
    TokenTree,
    Verdict,
    build_stack,
    generate,
    hookimpl,
    run,
)
from dynatree_core.errors import InputError, ParameterError
from dynatree_core.testing.models import greedy, perturbed, tiny_model
from dynatree_policies.cost_aware import (
    FREE_MAX_LOSS,
    FREE_STAKE,
    LEVEL_SHARE,
    MAX_LOSS,
    STAKE,
    CostAware,
    level_seconds,
)

ROWS = tuple(range(1, 200))


def linear_costs(a_pass: float, a_row: float, a_level: float, a_node: float = 0.0) -> CostModel:
    return CostModel(
        StepFunction(ROWS, tuple(a_pass + a_row * (rows - 1) for rows in ROWS)),
        StepFunction(ROWS, tuple(a_level + a_node * (width - 1) for width in ROWS)),
        0.0,
    )


def root_frontier(probs: list[float], costs: CostModel, max_branch: int = 16) -> Frontier:
    logprobs = torch.full((1, max_branch), -torch.inf)
    logprobs[0, : len(probs)] = torch.tensor(probs).log()
    proposals = Proposals(torch.arange(max_branch)[None], logprobs)
    return Frontier(TokenTree.root(torch.tensor([0])), 0, 64, max_branch, lambda: proposals, lambda: costs)


def widths(probs: list[float], costs: CostModel) -> int:
    stack = build_stack("cost_aware(max_depth=1)")
    frontier = root_frontier(probs, costs)
    if stack.should_expand(frontier).value is False:
        return 0
    return stack.branch_factor(frontier).value.item()


@pytest.mark.parametrize(
    ("a_row", "expected"),
    [(0.0, 4), (0.04, 4), (0.06, 3), (0.15, 2), (0.25, 1), (0.55, 0)],
)
def test_a_child_is_worth_its_row(a_row, expected):
    """Without levels to come: a child of probability p pays where p tokens exceed the row's share of a step."""
    assert widths([0.5, 0.2, 0.1, 0.05], linear_costs(1.0, a_row, 0.0)) == expected


def test_a_level_is_not_looked_at_where_the_drafter_is_too_dear():
    def fail() -> Proposals:
        raise AssertionError("the drafter was asked")

    frontier = Frontier(TokenTree.root(torch.tensor([0])), 0, 64, 16, fail, lambda: linear_costs(1.0, 0.0, 0.9))
    assert build_stack("cost_aware").should_expand(frontier).value is False


def test_a_level_is_not_free_where_the_drafter_is():
    frontier = root_frontier([0.9], linear_costs(1.0, 0.0, 0.0))
    policy = CostAware(max_depth=1)
    policy.look_value = 0.9 * LEVEL_SHARE  # tokens of a level, a step taking a second at a token a second
    assert policy.should_expand(frontier) is False
    policy.look_value = 1.1 * LEVEL_SHARE
    assert policy.should_expand(frontier) is True


def test_one_dear_row_pays_with_a_chain_behind_it():
    """The second row costs 0.75 steps, more nothing: one likely child does not pay, with its descendants it does."""
    dear = CostModel(StepFunction((1, 200), (1.0, 1.75)), StepFunction((1,), (0.0,)), 0.0)
    assert widths([0.7], dear) == 0  # max_depth=1
    deep = build_stack("cost_aware")
    frontier = root_frontier([0.7], dear)
    assert deep.should_expand(frontier).value is True
    assert deep.branch_factor(frontier).value.tolist() == [1]


def test_what_does_not_pay_in_the_end_is_not_verified():
    stack = build_stack("cost_aware")
    stack.should_expand(root_frontier([0.9], linear_costs(1.0, 0.3, 0.0)))
    tree = TokenTree.root(torch.tensor([0]))
    tree = tree.grow(torch.tensor([0, 0, 0]), torch.arange(3), torch.tensor([0.6, 0.31, 0.05]).log())
    tree = tree.grow(torch.tensor([1, 1]), torch.arange(2), torch.tensor([0.55, 0.4]).log())
    assert stack.keep_nodes(tree).value.tolist()[1:] == [True, True, False, True, False]


def test_the_rate_that_was_reached_is_what_more_tree_is_measured_by():
    """A child of probability 0.4 pays at one token a second, and no more once iterations yield 3 a second."""
    costs = linear_costs(1.0, 0.3, 0.0)
    policy = CostAware(max_depth=1)
    frontier = root_frontier([0.4], costs)
    assert policy.branch_factor(frontier).tolist() == [1]
    policy.tokens, policy.seconds = 30.0, 10.0
    assert policy.branch_factor(frontier).tolist() == [0]


@given(
    iterations=st.lists(st.tuples(st.floats(0.01, 1.0), st.booleans()), min_size=1, max_size=80),
    a_row=st.floats(0.0, 0.5),
    a_level=st.floats(0.0, 0.5),
)
@example([(1.0, False)] * 300, 0.0, 0.05)
def test_what_drafting_may_lose_is_bounded(iterations, a_row, a_level):
    """Whatever the drafter claims, and whenever it is right: by the cost model no more than the account allows."""
    costs, policy, losses = linear_costs(1.0, a_row, a_level), CostAware(max_depth=1), []
    for claim, is_right in iterations:
        frontier, tree, seconds = root_frontier([claim], costs), TokenTree.root(torch.tensor([0])), 0.0
        if policy.should_expand(frontier):
            seconds = level_seconds(costs, 1)
            if policy.branch_factor(frontier).item():
                tree = tree.grow(torch.tensor([0]), torch.tensor([1]), torch.tensor([claim]).log())
        path = (1,) if is_right and tree.num_drafted else ()
        policy.on_iteration_end(StepReport(0, tree, Verdict(path, path, (1,) * (1 + len(path)))))
        losses.append(seconds + costs.iteration_seconds(tree.num_drafted, []) - 1 - len(path))
    assert sum(losses) <= STAKE + MAX_LOSS * len(losses) + max(losses) + 1e-6
    assert len(losses) < 300 or any(losses[200:])  # it is tried again


def test_a_level_that_was_proposed_without_the_model_costs_no_pass():
    costs, accounts = linear_costs(1.0, 0.02, 0.3), []
    for is_free in (False, True):
        policy, frontier = CostAware(), root_frontier([1e-5] * 16, costs)
        free = attrs.evolve(frontier.proposals, is_free=is_free)
        policy.look_value = 9.0
        frontier = attrs.evolve(frontier, propose=lambda free=free: free)
        assert policy.should_expand(frontier) is True
        policy.branch_factor(frontier)
        policy.on_iteration_end(StepReport(0, frontier.tree, Verdict((), (), (1,))))
        accounts += policy.account, policy.free_account
    asked, free = STAKE + MAX_LOSS, FREE_STAKE + FREE_MAX_LOSS
    assert accounts == pytest.approx([asked - 0.3 - LEVEL_SHARE, free, asked, free - LEVEL_SHARE])


@pytest.mark.parametrize("beside", ["fixed", "confidence"])
def test_looks_are_counted_where_another_policy_decides_widths(beside):
    """A drafter that is sure of noise, at 0.1 steps a look and 0.04 for the host."""
    costs, stack, num_looks, seconds = linear_costs(1.0, 0.02, 0.1), build_stack(f"cost_aware+{beside}"), 0, 0.0
    for _ in range(300):
        frontier, tree = root_frontier([0.99], costs), TokenTree.root(torch.tensor([0]))
        if stack.should_expand(frontier).value is not False:
            stack.branch_factor(frontier)
            num_looks += 1
            tree = tree.grow(torch.tensor([0]), frontier.top_token_ids[0, :1], frontier.top_logprobs[0, :1])
            seconds += level_seconds(costs, 1) + 0.02
        stack.on_iteration_end(StepReport(0, tree, Verdict((), (), (1,))))
    assert seconds <= STAKE + MAX_LOSS * 300 + 0.16
    assert 0 < num_looks < 40


def test_a_level_that_another_policy_turns_down_costs_nothing():
    class Never:
        @hookimpl(trylast=True)
        def should_expand(self, frontier):
            return False

    stack, costs, tree = (
        build_stack(["cost_aware", Never()]),
        linear_costs(1.0, 0.02, 0.9),
        TokenTree.root(torch.tensor([0])),
    )
    stack.find("cost_aware").look_value = 9.0
    for _ in range(20):
        assert stack.should_expand(root_frontier([0.9], costs)).value is False
        stack.on_iteration_end(StepReport(0, tree, Verdict((), (), (1,))))
    assert stack.find("cost_aware").account == pytest.approx(STAKE + 20 * MAX_LOSS)


def test_a_drafter_that_has_nothing_to_say_is_asked_ever_less():
    """Each look costs 0.14 steps; in the long run those that win nothing take 1 % of the time."""
    costs, policy, tree = linear_costs(1.0, 0.02, 0.1), CostAware(), TokenTree.root(torch.tensor([0]))
    is_asked = []
    for _ in range(600):
        frontier = root_frontier([1e-5] * 16, costs)
        is_asked.append(bool(policy.should_expand(frontier)))
        if is_asked[-1]:
            assert policy.branch_factor(frontier).item() == 0
        policy.on_iteration_end(StepReport(0, tree, Verdict((), (), (1,))))
    assert 0 < sum(is_asked[200:]) * level_seconds(costs, 1) <= 0.01 * 400


def test_it_decides_where_another_dtype_is_the_default():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        engine = Engine(tiny_model("llama"), "prompt_lookup", costs=linear_costs(1.0, 0.0, 0.0))
        found = engine.submit([1, 2, 3], policy="cost_aware", max_new_tokens=40).result()
    finally:
        torch.set_default_dtype(before)
    assert found.token_ids == greedy(tiny_model("llama"), [1, 2, 3], 40)
    assert found.report.num_drafted_nodes > 0


def test_depth_doubles_when_a_tree_is_accepted_in_full():
    policy, costs, tree, depths = CostAware(), linear_costs(1.0, 0.0, 0.0), TokenTree.root(torch.tensor([0])), []
    policy.account = 100.0
    for num_accepted in (3, 4, 4, 8, 16):
        path = tuple(range(1, num_accepted + 1))
        policy.on_iteration_end(StepReport(0, tree, Verdict(path, path, (1,) * (1 + num_accepted))))
        grown, depth = tree, 0
        while policy.should_expand(Frontier(grown, 0, 64, 4, pytest.fail, lambda: costs)):
            grown, depth = grown.grow(torch.tensor([depth]), torch.tensor([1]), torch.tensor([0.0])), depth + 1
        depths.append(depth)
    assert depths == [4, 8, 8, 16, 16]  # 16 is max_depth


def test_acceptance_is_remembered_from_one_generation_to_the_next(tmp_path, monkeypatch):
    monkeypatch.setattr("dynatree_core.engine.resources.measured_costs", lambda *_, **__: linear_costs(1.0, 0.01, 0.01))
    file, target, drafter = tmp_path / "acceptance.json", tiny_model("llama"), perturbed("llama", noise=0.02)
    seen = []
    for _ in range(2):
        found = generate(
            target, drafter, [1, 2, 3], policy=f"cost_aware(remember={str(file)!r})", max_new_tokens=40, eos_token_id=[]
        )
        assert found.token_ids == greedy(target, [1, 2, 3], 40)
        seen.append(float(CostAware(remember=str(file)).estimator.counts[-1][1].sum()))
    assert 0 < seen[0] < seen[1]


@pytest.mark.parametrize("beside", [[], ["governor"]])
def test_a_policy_object_remembers_what_its_copies_have_learnt(tmp_path, monkeypatch, beside):
    monkeypatch.setattr("dynatree_core.engine.resources.measured_costs", lambda *_, **__: linear_costs(1.0, 0.01, 0.01))
    policy, target, drafter = CostAware(remember=str(tmp_path / "file")), tiny_model("llama"), perturbed("llama")
    seen = []
    for _ in range(3):
        generate(target, drafter, [1, 2, 3], policy=[policy, *beside], max_new_tokens=20, eos_token_id=[])
        seen.append(float(CostAware(remember=str(tmp_path / "file")).estimator.counts[-1][1].sum()))
    assert 0 < seen[0] < seen[1] < seen[2]


def test_it_decides_where_another_device_is_the_default(monkeypatch):
    """What it makes for itself is on the tree's device or on the CPU, whatever `torch.set_default_device` says."""
    costs = linear_costs(1.0, 0.01, 0.01)
    frontier, policy = root_frontier([0.6, 0.3], costs), CostAware()
    report = StepReport(0, frontier.tree, Verdict((), (), (1,)))
    expected = policy.branch_factor(frontier).tolist()
    policy = CostAware()
    with torch.device("meta"):  # tensors without numbers
        assert policy.should_expand(frontier) is True
        assert policy.branch_factor(frontier).tolist() == expected
        policy.on_iteration_end(report)


def test_a_memory_that_cannot_be(tmp_path, monkeypatch):
    with pytest.raises(ParameterError, match="must be a file in a folder that exists"):
        build_stack(f"cost_aware(remember={str(tmp_path / 'none' / 'file')!r})")
    (tmp_path / "file").write_text("a shopping list")
    with pytest.raises(InputError, match="must hold acceptance counts"):
        CostAware(remember=str(tmp_path / "file"))
    monkeypatch.setattr(AcceptanceEstimator, "save", lambda self, path: (tmp_path / "none" / "file").write_text(""))
    target = tiny_model("llama")
    with pytest.warns(RuntimeWarning, match="what cost_aware has learnt cannot be kept"):
        found = generate(target, target, [1], policy=CostAware(remember=str(tmp_path / "new")), max_new_tokens=4)
    assert len(found.token_ids) == 4


def test_reports_know_the_costs():
    costs = linear_costs(1.0, 0.1, 0.2)
    assert StepReport(0, TokenTree.root(torch.tensor([0])), Verdict((), (), (1,)), measure=lambda: costs).costs is costs
    session = Session(tiny_model("llama"), tiny_model("llama"), [1, 2], policy="cost_aware", max_new_tokens=4)
    [*_] = run(session)
    assert session.last_report.costs is session.measure_costs()


# whole generations, on a clock that the models' forward passes move


@pytest.fixture
def price(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[CostModel, torch.nn.Module, torch.nn.Module], None]]:
    """Make the passes of target and drafter take what a cost model says, and tell it to the sessions."""
    now = [0.0]
    monkeypatch.setattr("dynatree_core.clock.time.perf_counter", lambda: now[0])
    handles = []

    def charge(seconds: StepFunction) -> Callable[..., None]:
        def add(module, args, kwargs):
            now[0] += seconds(kwargs["input_ids"].shape[1])

        return add

    def set_up(costs: CostModel, target: torch.nn.Module, drafter: torch.nn.Module) -> None:
        monkeypatch.setattr("dynatree_core.engine.resources.measured_costs", lambda *_, **__: costs)
        for model, seconds in ((target, costs.target_pass_seconds), (drafter, costs.drafter_level_seconds)):
            handles.append(model.register_forward_pre_hook(charge(seconds), with_kwargs=True))

    yield set_up
    for handle in handles:
        handle.remove()


MACHINES = {
    "cheap rows": linear_costs(1.0, 0.01, 0.1),
    "dear rows": CostModel(StepFunction((1, 4, 16, 64), (1.0, 1.8, 2.0, 4.0)), StepFunction((1, 64), (0.1, 0.2)), 0.0),
    "dear levels": linear_costs(1.0, 0.02, 0.45),
}


def speeds(price, machine: str, drafter: torch.nn.Module, policies: list[str]) -> dict[str, float]:
    """Tokens a second of each policy over two prompts."""
    target = tiny_model("llama")
    price(MACHINES[machine], target, drafter)
    found = {}
    for policy in policies:
        reports = []
        for prompt in ([1, 2, 3], [5, 30, 2, 7]):
            result = generate(target, drafter, prompt, policy=policy, max_new_tokens=100, eos_token_id=[])
            assert result.token_ids == greedy(target, prompt, 100)
            reports.append(result.report)
        found[policy] = 200 / sum(report.decode_seconds for report in reports)
    return found


FIXED = [f"fixed(depth={depth},branch={branch},tau=0.0)" for depth, branch in ((1, 2), (2, 1), (2, 2), (4, 1), (6, 1))]


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("noise", [0.005, 0.02])
def test_it_keeps_up_with_fixed_trees_that_were_chosen_afterwards(price, machine, noise):
    found = speeds(price, machine, perturbed("llama", noise=noise), ["cost_aware", *FIXED])
    assert found["cost_aware"] >= 0.8 * max(found.values())
    assert found["cost_aware"] >= 0.97


@pytest.mark.parametrize("machine", MACHINES)
def test_a_useless_drafter_costs_little(price, machine):
    found = speeds(price, machine, tiny_model("llama", 7), ["cost_aware", "cost_aware+governor"])
    assert min(found.values()) >= 0.96  # 0.97 without the iteration that was begun with the last of the account
