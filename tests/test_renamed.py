"""Old names of public things: they work for one version, and say the new name."""

from __future__ import annotations

import attrs
import pytest
import torch

from dynatree_core import CostModel, Frontier, Proposals, StepFunction, TokenTree
from dynatree_core.cost_model import NOMINAL_COSTS

VERIFY, DRAFT = StepFunction((1, 8), (1.0, 2.0)), StepFunction((1, 4), (0.1, 0.3))
COSTS = CostModel(VERIFY, DRAFT, 0.05)

OLD_NAMES = {
    "verify": (lambda: COSTS.verify, VERIFY, "target_pass_seconds"),
    "draft": (lambda: COSTS.draft, DRAFT, "drafter_level_seconds"),
    "plain_seconds": (COSTS.plain_seconds, COSTS.plain_step_seconds(), "plain_step_seconds"),
    "tree_seconds": (lambda: COSTS.tree_seconds(7, [1, 3]), COSTS.iteration_seconds(7, [1, 3]), "iteration_seconds"),
    "verify=": (lambda: CostModel(verify=VERIFY, drafter_level_seconds=DRAFT, rest_seconds=0.05), COSTS, "target_pass"),
    "draft=": (lambda: CostModel(VERIFY, draft=DRAFT, rest_seconds=0.05), COSTS, "drafter_level_seconds"),
    "evolve": (lambda: attrs.evolve(COSTS, draft=VERIFY), CostModel(VERIFY, VERIFY, 0.05), "drafter_level_seconds"),
}


@pytest.mark.parametrize("old", OLD_NAMES)
def test_old_names_of_costs(old):
    use, expected, new = OLD_NAMES[old]
    with pytest.warns(
        DeprecationWarning, match=rf"CostModel.* is called {new}.*goes with the next version; write {new}"
    ) as told:
        assert use() == expected
    assert len(told) == 1
    assert old == "evolve" or told[0].filename == __file__  # the line that is to be changed


def test_the_old_name_of_a_frontiers_question():
    tree = TokenTree.root(torch.tensor([1]))
    proposals = Proposals(torch.zeros((1, 2), dtype=torch.int64), torch.zeros((1, 2)))
    frontier = Frontier(tree, 0, 8, 2, lambda: proposals)
    for is_asked in (False, True):
        with pytest.warns(DeprecationWarning, match=r"Frontier\.is_asked is called is_drafter_asked now"):
            assert frontier.is_asked is is_asked is frontier.is_drafter_asked
        assert frontier.proposals is proposals


def test_new_names_are_silent(recwarn):
    named = CostModel(target_pass_seconds=VERIFY, drafter_level_seconds=DRAFT, rest_seconds=0.05)
    assert named == COSTS == attrs.evolve(NOMINAL_COSTS, **attrs.asdict(COSTS, recurse=False))
    assert named.plain_step_seconds() == pytest.approx(1.05)
    assert named.iteration_seconds(7, [1, 3]) == pytest.approx(2.0 + 0.1 + 0.3 + 0.05)
    with pytest.raises(TypeError, match="rest_seconds"):
        CostModel(VERIFY, DRAFT)
    assert not recwarn.list
