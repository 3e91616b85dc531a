"""Policies that choose whole trees, held against a search of all of them: `best_first` and `sequoia`."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path as File

import attrs
import pytest
import torch
from torch import Tensor

from dynatree_core import (
    CostModel,
    Drafter,
    DraftPlan,
    DraftState,
    Proposals,
    Session,
    StepFunction,
    StepReport,
    TokenTree,
    Verdict,
    build_stack,
    run,
)
from dynatree_core.errors import ParameterError
from dynatree_core.testing.models import VOCAB, tiny_model
from dynatree_policies.sequoia import Plan, Planner

Path = tuple[int, ...]  # the rank of each node among its siblings, from the root down


@attrs.frozen(slots=False)
class Landscape(Drafter):
    """Proposes `branch` children at each node, with probabilities that depend on the node's path alone."""

    seed: int
    branch: int = 4

    def start(self, plan: DraftPlan) -> LandscapeState:
        return LandscapeState(self)

    def probs(self, path: Path) -> list[float]:
        source = random.Random(f"{self.seed}{path}")
        shares = sorted((source.random() ** 3 for _ in range(self.branch)), reverse=True)
        return [share / (sum(shares) + 0.1) for share in shares]


class LandscapeState(DraftState):
    """Tokens are ranks, so that a node's tokens are its path."""

    def __init__(self, drafter: Landscape) -> None:
        self.drafter = drafter

    def prefill(self, committed_ids: torch.Tensor) -> None:
        pass

    def propose(self, committed_ids: torch.Tensor, tree: TokenTree, k: int) -> Proposals:
        paths = paths_of(tree)[tree.last_level]
        probs = torch.zeros(len(paths), k)
        probs[:, : self.drafter.branch] = torch.tensor([self.drafter.probs(path) for path in paths])
        return Proposals(torch.arange(k).repeat(len(paths), 1), probs.log())

    def commit(self, draft_path: tuple[int, ...]) -> None:
        pass

    def rollback(self) -> None:
        pass


def paths_of(tree: TokenTree) -> list[Path]:
    """Each node's path, for a drafter whose tokens are ranks."""
    paths: list[Path] = [()]
    for parent, token in zip(tree.parent.tolist()[1:], tree.token_ids.tolist()[1:], strict=True):
        paths.append((*paths[parent], token))
    return paths


def first_tree(drafter: Drafter, policy: str, **options: object) -> TokenTree:
    """The tree that is verified in the first iteration."""
    session = Session(tiny_model("llama"), drafter, [1, 2], policy=policy, max_new_tokens=20, **options)
    return next(run(session)).tree


def all_paths(drafter: Landscape, depth: int) -> dict[Path, float]:
    """Every path that could be drafted, with its probability."""
    values: dict[Path, float] = {(): 1.0}
    for length in range(1, depth + 1):
        for path in itertools.product(range(drafter.branch), repeat=length):
            values[path] = values[path[:-1]] * drafter.probs(path[:-1])[path[-1]]
    del values[()]
    return values


# best_first


@pytest.mark.parametrize("nodes", [1, 2, 7, 16, 40])
@pytest.mark.parametrize("seed", range(6))
def test_best_first_verifies_the_best_of_all_paths(seed, nodes):
    """With a beam as wide as the tree nothing better was left undrafted."""
    drafter = Landscape(seed)
    tree = first_tree(drafter, f"best_first(nodes={nodes},depth=5,beam={nodes})")
    values = all_paths(drafter, 5)
    best = sorted(values, key=values.__getitem__, reverse=True)[:nodes]
    assert set(paths_of(tree)[1:]) == set(best)


@pytest.mark.parametrize("seed", range(6))
def test_best_first_with_a_beam_verifies_the_best_of_what_was_expanded(seed):
    """Level by level the 3 best nodes are expanded; of all their children the 12 best are verified (EAGLE-2)."""
    drafter = Landscape(seed)
    tree = first_tree(drafter, "best_first(nodes=12,depth=4,beam=3,branch=3)")
    values, level, drafted = all_paths(drafter, 4), [()], []
    for _ in range(4):
        children = [(*path, rank) for path in level for rank in range(3)]
        drafted += children
        level = sorted(children, key=values.__getitem__, reverse=True)[:3]
    best = sorted(drafted, key=values.__getitem__, reverse=True)[:12]
    assert set(paths_of(tree)[1:]) == set(best)


def test_best_first_drafts_no_level_that_cannot_pay():
    """All paths of a level together are an upper bound of the tokens that the next one adds."""
    drafter = Landscape(1)
    values = all_paths(drafter, 5)
    mass = [sum(value for path, value in values.items() if len(path) == depth) for depth in range(1, 6)]
    least = (mass[1] + mass[2]) / 2
    tree = first_tree(drafter, f"best_first(nodes=400,depth=5,beam=400,min_gain={least},tau=0.0)", max_nodes=2000)
    assert tree.max_depth == 3  # level 3 was drafted since level 2 weighs more than `least`, which level 3 does not


def test_best_first_stops_asking_when_nothing_better_can_come():
    asked = []

    class Counted(LandscapeState):
        def propose(self, committed_ids, tree, k):
            asked.append(tree.max_depth)
            return super().propose(committed_ids, tree, k)

    class Certain(Landscape):
        def start(self, plan):
            return Counted(self)

        def probs(self, path):
            return [0.5, 0.3, 0.1, 0.05] if not path else [0.01] * 4  # no second level beats the first

    tree = first_tree(Certain(0), "best_first(nodes=4,depth=6)")
    assert tree.level_sizes == (1, 4)
    assert asked == [0, 1]  # level 1 has to be looked at once to see it


def test_best_first_brings_limits_for_what_it_ranks():
    policy = build_stack("eagle2").find("best_first")
    assert (policy.nodes, policy.depth, policy.beam, policy.branch) == (60, 6, 10, 10)
    session = Session(tiny_model("llama"), None, [1], policy="eagle2", max_new_tokens=4)
    assert (session.limits.max_nodes, session.limits.tau) == (360, 0.0)
    assert first_tree(Landscape(3, branch=VOCAB // 4), "eagle2").num_drafted == 60


# sequoia

REFERENCE = json.loads((File(__file__).parent / "sequoia_trees.json").read_text(encoding="utf-8"))


def float32(numbers: list[float]) -> list[float]:
    """Numbers as they were published, in float32."""
    return torch.tensor(numbers, dtype=torch.float32).tolist()


@pytest.mark.parametrize(("vector", "size", "levels", "expected"), REFERENCE["cases"])
def test_sequoia_reproduces_published_trees(vector, size, levels, expected):
    planner = Planner(float32(REFERENCE["vectors"][vector]["p"]), size, levels)
    assert planner.value(size, levels) == pytest.approx(expected, rel=0, abs=1e-12)


def subtrees(size: int, levels: int, branch: int) -> Iterator[tuple]:
    """Every tree of so many nodes, as a tuple of the subtrees under its root."""
    if levels == 1:
        if size == 1:
            yield ()
        return
    for num_children in range(min(branch, size - 1) + 1):
        for cuts in itertools.combinations(range(1, size - 1), num_children - 1) if num_children else [()]:
            ends = (0, *cuts, size - 1)
            sizes = [b - a for a, b in itertools.pairwise(ends)] if num_children else []
            if sum(sizes) == size - 1:
                yield from itertools.product(*(subtrees(s, levels - 1, branch) for s in sizes))


def value_of(tree: tuple, p: list[float]) -> float:
    return 1 + sum(p[rank] * value_of(child, p) for rank, child in enumerate(tree))


def value_of_shape(shape: list[list[int]], p: list[float]) -> float:
    """The sum over the nodes of the product of p along the path."""
    total, level = 0.0, [1.0]
    for widths in shape:
        assert len(widths) == len(level)
        total += sum(level)
        level = [value * p[rank] for value, width in zip(level, widths, strict=True) for rank in range(width)]
    return total


def greedy_value(p: list[float], size: int, levels: int) -> float:
    """What the best-first tree yields: the most probable node within reach, one by one."""
    children = {(): 0}
    values = {(): 1.0}
    while len(values) < size:
        reach = {
            (*path, rank): values[path] * p[rank]
            for path, rank in children.items()
            if rank < len(p) and len(path) < levels - 1
        }
        best = max(reach, key=reach.__getitem__)
        children[best[:-1]] += 1
        children[best], values[best] = 0, reach[best]
    return sum(values.values())


VECTORS = [
    [0.6, 0.2, 0.1],
    [0.1, 0.6, 0.05],  # the second choice is the good one
    [0.05, 0.05, 0.8],
    [0.3, 0.0, 0.5],
    [0.0, 0.0, 0.0],
    [0.9],
]


@pytest.mark.parametrize("levels", [1, 2, 3, 5])
@pytest.mark.parametrize("p", VECTORS, ids=str)
def test_sequoia_finds_the_best_of_all_trees(p, levels):
    planner = Planner(p, 8, levels)
    for size in range(1, 9):
        trees = list(subtrees(size, levels, len(p)))
        if not trees:
            assert planner.value(size, levels) == -float("inf")
            continue
        assert planner.value(size, levels) == pytest.approx(max(value_of(tree, p) for tree in trees), abs=1e-12)
        shape = planner.shape(size, levels)
        assert sum(len(widths) for widths in shape) == size
        assert len(shape) <= levels
        assert value_of_shape(shape, p) == pytest.approx(planner.value(size, levels), abs=1e-12)


def test_the_search_of_all_trees_is_complete():
    """Trees of n nodes are counted by the Catalan numbers."""
    assert [len(set(subtrees(size, size, size))) for size in range(1, 8)] == [1, 1, 2, 5, 14, 42, 132]


@pytest.mark.parametrize("p", [[0.1, 0.6, 0.05], [0.3, 0.0, 0.5]], ids=str)
def test_sequoia_beats_best_first_where_acceptance_rises_with_rank(p):
    planner = Planner(p, 12, 5)
    gains = [planner.value(size, 5) - greedy_value(p, size, 5) for size in range(1, 13)]
    assert min(gains) > -1e-12
    assert max(gains) > 0.05


def test_sequoia_equals_best_first_where_acceptance_falls():
    p = [0.6, 0.2, 0.1, 0.05]
    assert Planner(p, 20, 6).value(20, 6) == pytest.approx(greedy_value(p, 20, 6), abs=1e-12)


@pytest.mark.parametrize("a_row", [0.0, 0.01, 0.05, 0.2])
@pytest.mark.parametrize("a_level", [0.0, 0.05, 0.3])
def test_sequoia_sizes_its_tree_by_costs(a_row, a_level):
    """No other size or number of levels yields more tokens a second."""
    p, counts = [0.6, 0.2, 0.1, 0.05], tuple(range(1, 40))
    costs = CostModel(
        StepFunction(counts, tuple(1 + a_row * (rows - 1) for rows in counts)), StepFunction((99,), (a_level,)), 0.1
    )
    planner = Planner(p, 25, 7)
    size, levels = planner.fastest(costs)
    rates = {
        (n, depth): planner.value(n, depth) / (1.1 + a_row * (n - 1) + a_level * (depth - 1))
        for n in range(2, 26)
        for depth in range(2, 8)
    }
    assert rates[size, levels] == pytest.approx(max(rates.values()))
    assert size == 25 if a_row == 0.0 else size < 25 or a_row < 0.05, "rows that cost nothing are all taken"
    assert first_tree(Landscape(1), "sequoia(nodes=24)").num_drafted >= 1


def shape_of(tree: TokenTree) -> list[list[int]]:
    parents = tree.parent.tolist()
    nodes = iter(range(tree.num_nodes))
    return [[parents.count(next(nodes)) for _ in range(size)] for size in tree.level_sizes]


@pytest.mark.parametrize("acceptance", ["0.6,0.2,0.1", "0.1,0.6,0.05", "0.05,0.05,0.8"])
def test_sequoia_grows_its_plan(acceptance):
    p = [float(number) for number in acceptance.split(",")]
    tree = first_tree(Landscape(2), f"sequoia(nodes=14,depth=4,size='full',acceptance='{acceptance}')")
    planner = Planner(p, 15, 5)
    assert shape_of(tree) == planner.shape(*planner.largest())
    assert tree.num_drafted == 14


def test_sequoia_keeps_to_the_rest_of_its_plan_where_nodes_are_missing():
    """The drafter has nothing to say below some nodes, and others hold more than the plan: ranks name the nodes."""
    shape = [[3], [2, 0, 2], [1, 0, 0, 1], [0, 0]]
    plan = Plan.of_shape(shape, torch.device("cpu"))
    assert plan.depth == 3

    def widths(tree: TokenTree) -> Tensor:
        above = None if tree.max_depth == 0 else found[tree.level_sizes[:-1]]
        nodes = found[tree.level_sizes] = plan.nodes(tree, above)
        assert torch.equal(nodes, plan.nodes(tree)), "level by level or from the root on"
        return plan.num_children[nodes]

    found: dict[tuple[int, ...], Tensor] = {}
    tree = TokenTree.root(torch.tensor([0]))
    assert widths(tree).tolist() == [3]
    tree = tree.grow(torch.tensor([0, 0]), torch.tensor([0, 1]), torch.zeros(2))  # the third child is missing
    assert widths(tree).tolist() == [2, 0]
    tree = tree.grow(torch.tensor([1, 2, 2]), torch.tensor([0, 0, 1]), torch.zeros(3))  # one missing, two too many
    assert widths(tree).tolist() == [1, 0, 0]


def judged(tree: TokenTree, path: tuple[int, ...], stop_reason: str | None = None) -> StepReport:
    return StepReport(0, tree, Verdict(path, path, (0,) * (len(path) + 1), stop_reason))


def counted(policy):
    """Of the first three ranks, verdicts about such a child, and those that accepted it; there are none of others."""
    assert policy.counts[:, 3:].sum() == 0
    return policy.counts[:, :3].tolist()


def test_sequoia_counts_ranks():
    """Each node on the path judges its children; nodes beside it, leaves, and what comes after a stop judge nobody."""
    tree = TokenTree.root(torch.tensor([0]))
    tree = tree.grow(torch.tensor([0, 0, 0]), torch.arange(3), torch.zeros(3))
    tree = tree.grow(torch.tensor([1, 2, 2]), torch.arange(3), torch.zeros(3))  # nodes 4; 5 and 6
    stack = build_stack("sequoia")
    policy = stack.find("sequoia")
    stack.on_iteration_end(judged(tree, (2, 6)))
    assert counted(policy) == [[2, 2, 1], [0, 2, 0]]
    stack.on_iteration_end(judged(tree, ()))
    assert counted(policy) == [[3, 3, 2], [0, 2, 0]]
    stack.on_iteration_end(judged(tree, (1,), "eos"))
    stack.on_iteration_end(judged(TokenTree.root(torch.tensor([0])), ()))
    assert counted(policy) == [[3, 3, 2], [0, 2, 0]]
    cut = tree.subtree(torch.tensor([True, False, True, False, False, False, True]))  # nodes 2 and 6, second children
    stack.on_iteration_end(judged(cut, (1, 2)))
    assert counted(policy) == [[3, 5, 2], [0, 4, 0]]
    policy.counts = torch.tensor([[3, 3, 2], [0, 2, 0]])
    assert policy.rates(2) == pytest.approx([4 * 0.6 / 7, (4 * 0.15 + 2) / 7])
    assert policy.rates(5)[4] == pytest.approx(0.6 / 25)  # never tried


def test_sequoia_learns_which_rank_is_accepted():
    """A drafter that lists the target's choice third: the plan comes to give the root three children."""
    target = tiny_model("llama")

    class ThirdIsRight(Landscape):
        def start(self, plan):
            return ThirdState(self)

    class ThirdState(LandscapeState):
        def propose(self, committed_ids, tree, k):
            level = tree.last_level
            ids = torch.zeros(tree.level_sizes[-1], k, dtype=torch.int64)
            for row, node in enumerate(range(level.start, level.stop)):
                path = tree.token_ids[tree.ancestor_mask[node]][1:]
                with torch.no_grad():
                    logits = target(torch.cat([committed_ids, path])[None]).logits[0, -1]
                ids[row, :3] = logits.topk(3).indices.flip(0)
            probs = torch.zeros(ids.shape)
            probs[:, :3] = torch.tensor([0.5, 0.3, 0.1])
            return Proposals(ids, probs.log())

    session = Session(
        target, ThirdIsRight(0), [1, 2], policy="sequoia(nodes=9,depth=3,size='full')", max_new_tokens=100
    )
    trees = [report.tree for report in run(session)]
    policy = session.stack.find("sequoia")
    hits = policy.counts[1].tolist()
    assert hits[:2] == [0, 0]
    assert hits[2] == sum(step.num_accepted for step in session.steps[:-1]) > 20
    late = trees[-5]
    assert shape_of(late)[0] == [3]
    assert shape_of(late)[1][2] == 3  # the third child is the one that is followed
    assert [session.steps[-5].depth, session.steps[-5].num_accepted] == [3, 3]


@pytest.mark.parametrize("acceptance", ["0.6,x", "1.5", "-0.1", "0.6,0.6", "nan", ","])
def test_sequoia_refuses_what_are_no_probabilities(acceptance):
    with pytest.raises(ParameterError, match="'acceptance' must be empty or numbers from 0 to 1"):
        build_stack(f"sequoia(acceptance='{acceptance}')")
