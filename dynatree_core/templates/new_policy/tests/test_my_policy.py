"""The rule on levels made by hand, and what the conformance kit asks of every policy."""

from __future__ import annotations

import pytest
import torch
from dynatree_core import Frontier, InputError, Proposals, TokenTree, build_stack
from dynatree_core.testing import assert_hook_contract, assert_lossless

from dynatree_my_policy import MyPolicy

HAIR = 1e-4  # probabilities come through a logarithm, so they are not exact


def level(*rows: list[float], max_branch: int = 4) -> Frontier:
    """A tree level of one node per row; a row has the draft probabilities of that node's children, best first."""
    probs, width = torch.tensor(rows), len(rows)
    parent = torch.zeros(width, dtype=torch.int64)
    tree = TokenTree.root(torch.tensor([0])).grow(parent, torch.arange(width), torch.zeros(width))
    proposals = Proposals(torch.arange(probs.shape[1]).expand(width, -1), probs.log())
    return Frontier(tree, iteration=0, nodes_left=128, max_branch=max_branch, propose=lambda: proposals)


@pytest.mark.parametrize(
    ("mass", "children"),
    [(0.5 - HAIR, 1), (0.5 + HAIR, 2), (0.75 - HAIR, 2), (0.75 + HAIR, 3), (1.0, 4)],
)
def test_children_hold_the_mass(mass: float, children: int) -> None:
    assert MyPolicy(mass=mass).branch_factor(level([0.5, 0.25, 0.125, 0.0625])).tolist() == [children]


def test_each_node_is_judged_on_its_own() -> None:
    sure, torn, lost = [0.9, 0.05, 0.0, 0.0], [0.45, 0.45, 0.05, 0.0], [0.1, 0.1, 0.1, 0.1]
    assert MyPolicy(mass=0.8).branch_factor(level(sure, torn, lost)).tolist() == [1, 2, 4]


def test_the_mass_is_reached_exactly() -> None:
    certain = level([1.0, 0.0, 0.0, 0.0])
    assert MyPolicy(mass=1.0).branch_factor(certain).tolist() == [1]
    assert MyPolicy(mass=0.0).branch_factor(certain).tolist() == [1]  # never none at all


def test_the_bounds_of_the_width() -> None:
    policy, lost = MyPolicy(max_branch=3), [0.1] * 4
    assert policy.branch_factor(level(lost)).tolist() == [3]
    assert policy.branch_factor(level(lost, max_branch=2)).tolist() == [2]  # the session serves no more


@pytest.mark.parametrize("wrong", [{"mass": 1.1}, {"mass": "most"}, {"max_branch": 0}])
def test_parameters_are_checked(wrong: dict[str, object]) -> None:
    with pytest.raises(InputError, match=f"'{next(iter(wrong))}' must be"):
        MyPolicy(**wrong)  # type: ignore[arg-type]


def test_it_is_composed_by_name() -> None:
    stack = build_stack("my_policy(mass=0.9)+dynamic_depth")
    assert stack.find("my_policy") == MyPolicy(mass=0.9)


def test_it_keeps_the_contract_of_its_hooks() -> None:
    assert_hook_contract("my_policy")


def test_generation_is_lossless() -> None:
    assert_lossless("my_policy")
    assert_lossless("my_policy(mass=0.3)+dynamic_depth+history")
