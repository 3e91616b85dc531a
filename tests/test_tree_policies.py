"""Policies that choose whole trees, held against a search of all of them: `best_first`."""

from __future__ import annotations

import itertools
import random

import attrs
import pytest
import torch

from dynatree_core import Drafter, DraftPlan, DraftState, Proposals, Session, TokenTree, build_stack, run
from dynatree_core.testing.models import VOCAB, tiny_model

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
