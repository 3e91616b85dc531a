"""Verification against a walk down the tree."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dynatree_core import TokenTree, ops
from dynatree_core.engine.verify import _greatest, longest_match
from dynatree_core.errors import NonFiniteLogitsError
from dynatree_core.testing import strategies as ours
from dynatree_core.testing.models import VOCAB


def walk(tree: TokenTree, best: list[int]) -> tuple[list[int], list[int]]:
    """Descend while a child carries the target's choice."""
    parents, tokens = tree.parent.tolist(), tree.token_ids.tolist()
    node, path = 0, []
    while True:
        children = [n for n, parent in enumerate(parents) if parent == node and n and tokens[n] == best[node]]
        if not children:
            return path, [*(tokens[n] for n in path), best[node]]
        node = children[0]
        path.append(node)


@given(ours.trees(max_depth=6, max_width=6), st.data())
def test_equals_a_walk(tree, data):
    # the target's choice at a node is one of its children's tokens more often than chance would have it
    choices = [st.sampled_from(sorted(set(tree.token_ids.tolist()))) | ours.token_ids] * tree.num_nodes
    best = data.draw(st.tuples(*choices))
    logits = torch.randn(tree.num_nodes, VOCAB, dtype=torch.float64)
    logits[torch.arange(tree.num_nodes), torch.tensor(best)] = 10.0
    verdict = longest_match(tree, logits)
    path, tokens = walk(tree, list(best))
    assert list(verdict.path) == path
    assert list(verdict.token_ids) == tokens
    assert list(verdict.draft_path) == path


def chain(*tokens: int) -> TokenTree:
    tree = TokenTree.root(torch.tensor([0]))
    for token in tokens:
        tree = tree.grow(torch.tensor([tree.num_nodes - 1]), torch.tensor([token]), torch.tensor([-0.5]))
    return tree


def test_ties_are_broken_as_generate_does():
    """generate() compares in float32 and takes the first of equals, so float64 logits are rounded first."""
    logits = torch.zeros(2, 5, dtype=torch.float64)
    logits[0, 1], logits[0, 3] = 1.0, 1.0 + 1e-12  # one number in float32
    logits[1, 4] = 1.0
    assert longest_match(chain(1), logits).token_ids == (1, 4)
    assert longest_match(chain(3), logits).token_ids == (1,)


@given(
    st.lists(st.lists(st.sampled_from([-torch.inf, -1.0, 0.0, 2.0, torch.inf, torch.nan]), min_size=7, max_size=7),
             min_size=1, max_size=5),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    st.booleans(),
)  # fmt: skip
def test_the_greatest_is_the_first_of_equals_and_nan_is_no_token(rows, dtype, is_turned):
    logits = torch.tensor(rows, dtype=dtype)
    if is_turned:
        logits = logits.t().contiguous().t()
    plain = [-1 if any(x != x for x in row) else row.index(max(row)) for row in rows]
    assert _greatest(logits).tolist() == plain
    if dtype == torch.float32:  # in which passes give totals
        assert _greatest(logits, ops.totals(logits.contiguous())[None]).tolist() == plain


def test_a_pruned_tree_reports_where_its_nodes_were_drafted():
    tree = TokenTree.root(torch.tensor([0])).grow(
        torch.tensor([0, 0]), torch.tensor([1, 2]), torch.tensor([-0.1, -0.2])
    )
    pruned = tree.subtree(torch.tensor([True, False, True]))
    logits = torch.eye(5)[[2, 3]]
    verdict = longest_match(pruned, logits)
    assert (verdict.path, verdict.draft_path, verdict.token_ids) == ((1,), (2,), (2, 3))


def test_nan_is_an_error():
    logits = torch.zeros(2, 5)
    logits[1, 3] = torch.nan
    with pytest.raises(NonFiniteLogitsError, match="got NaN"):
        longest_match(chain(0), logits)
    # a wrong draft may overflow where the target's own text never goes
    assert longest_match(chain(2), logits).token_ids == (0,)


def test_on_every_device(device):
    tree = TokenTree.root(torch.tensor([0], device=device)).grow(
        torch.tensor([0, 0], device=device), torch.tensor([1, 2], device=device), torch.zeros(2, device=device)
    )
    assert longest_match(tree, torch.eye(4, device=device)[[2, 0, 3]]).token_ids == (2, 3)
