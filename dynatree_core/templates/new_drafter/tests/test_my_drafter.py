"""The rule on texts made by hand, and what the conformance kit asks of every drafter."""

from __future__ import annotations

import pytest
import torch
from dynatree_core import DraftPlan, InputError, TokenTree, build_drafter
from dynatree_core.clock import StageClock
from dynatree_core.testing import assert_drafter_contract, assert_lossless

from dynatree_my_drafter import MyDrafter

CPU = torch.device("cpu")


def proposed(text: list[int], drafter: MyDrafter, k: int = 2) -> dict[int, float]:
    """The children of the root of a tree behind the text: token -> probability."""
    plan = DraftPlan(10, 64, 32, CPU, StageClock(CPU), torch.nn.Identity())  # ten tokens, and a target of no matter
    state, committed_ids = drafter.start(plan), torch.tensor(text)
    state.prefill(committed_ids[:-1])
    found = state.propose(committed_ids, TokenTree.root(committed_ids[-1:]), k)
    pairs = zip(found.token_ids[0].tolist(), found.logprobs[0].exp().tolist(), strict=True)
    return {token: round(prob, 3) for token, prob in pairs if prob > 0}


def test_children_are_what_followed() -> None:
    assert proposed([1, 5, 1, 5, 1, 7, 1], MyDrafter(), k=3) == {5: 0.5, 7: 0.25}
    assert proposed([1, 5, 1, 5, 1, 7, 1], MyDrafter(), k=1) == {5: 0.5}  # the best alone


def test_the_weight_of_what_never_followed() -> None:
    assert proposed([1, 5, 1], MyDrafter(unseen=3)) == {5: 0.25}


def test_a_token_that_is_new_has_no_children() -> None:
    assert proposed([1, 5, 2], MyDrafter()) == {}
    assert proposed([1], MyDrafter()) == {}


@pytest.mark.parametrize("wrong", [0, 1.5, "many"])
def test_parameters_are_checked(wrong: object) -> None:
    with pytest.raises(InputError, match="'unseen' must be"):
        MyDrafter(unseen=wrong)  # type: ignore[arg-type]


def test_it_is_made_by_name() -> None:
    assert build_drafter("my_drafter(unseen=2)") == MyDrafter(unseen=2)
    assert str(build_drafter("my_drafter(unseen=2)")) == "my_drafter(unseen=2)"


def test_it_keeps_the_contract_of_drafters() -> None:
    assert_drafter_contract("my_drafter")


def test_generation_is_lossless() -> None:
    assert_lossless("fixed(depth=3)", drafter="my_drafter")
    assert_lossless("confidence+dynamic_depth+history", drafter="my_drafter(unseen=2)")
