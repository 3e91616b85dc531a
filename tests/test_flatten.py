"""Masks and positions against brute force, for single trees, batches, chains and drafter levels."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from test_tree import ancestors

from dynatree_core.testing import strategies as ours
from dynatree_core.tree.flatten import flatten, flatten_chain, flatten_level


@given(st.lists(st.tuples(ours.trees(), st.integers(0, 7)), min_size=1, max_size=3), st.integers(0, 12))
def test_flatten(batch, min_rows):
    trees, prefix_lens = zip(*batch, strict=True)
    flat = flatten(trees, prefix_lens, min_rows=min_rows)
    rows = max(min_rows, *(tree.num_nodes for tree in trees))
    slots = max(prefix_lens) + rows
    assert flat.token_ids.shape == flat.position_ids.shape == (len(trees), rows)
    assert flat.visible.shape == (len(trees), rows, slots)
    for i, (tree, prefix_len) in enumerate(batch):
        parents = tree.parent.tolist()
        for row in range(rows):
            seen = set(flat.visible[i, row].nonzero().flatten().tolist())
            if row < tree.num_nodes:
                assert seen == set(range(prefix_len)) | {prefix_len + node for node in ancestors(parents, row)}
                assert flat.token_ids[i, row] == tree.token_ids[row]
                assert flat.position_ids[i, row] == prefix_len + tree.depth[row]
                assert flat.slot_positions[i, prefix_len + row] == flat.position_ids[i, row]
            else:
                assert seen == {prefix_len + row}  # padding sees itself, or softmax would make NaN
        assert flat.slot_positions[i, :prefix_len].tolist() == list(range(prefix_len))


@given(st.lists(ours.token_ids, min_size=1, max_size=9), st.integers(0, 9))
def test_flatten_chain(tokens, prefix_len):
    flat = flatten_chain(torch.tensor(tokens), prefix_len)
    assert flat.token_ids.tolist() == [tokens]
    assert flat.position_ids.tolist() == [list(range(prefix_len, prefix_len + len(tokens)))]
    for row in range(len(tokens)):
        assert flat.visible[0, row].tolist() == [slot <= prefix_len + row for slot in range(prefix_len + len(tokens))]


@given(ours.trees(), st.integers(1, 7), st.data())
def test_flatten_level(tree, prefix_len, data):
    """The drafter's rows: the root is committed, so node i stands in slot prefix_len + i − 1."""
    if tree.max_depth == 0:
        return  # the root's own pass is a chain
    depth = data.draw(st.integers(1, tree.max_depth), label="first level that the drafter has not seen")
    first = sum(tree.level_sizes[:depth])
    flat = flatten_level(tree, prefix_len, first - 1)
    parents, rows = tree.parent.tolist(), range(first, tree.num_nodes)
    assert flat.token_ids[0].tolist() == tree.token_ids[first:].tolist()
    assert flat.position_ids[0].tolist() == [prefix_len - 1 + tree.depth[node].item() for node in rows]
    assert flat.visible.shape == (1, len(rows), prefix_len + tree.num_drafted)
    for row, node in enumerate(rows):
        above = {prefix_len + n - 1 for n in ancestors(parents, node) if n}
        assert set(flat.visible[0, row].nonzero().flatten().tolist()) == set(range(prefix_len)) | above
    assert flat.slot_positions[0].tolist() == [*range(prefix_len), *(tree.depth[1:] + prefix_len - 1).tolist()]
    assert flat.num_places == len(set(flat.position_ids[0].tolist()))
    if depth == tree.max_depth:
        assert torch.equal(flatten_level(tree, prefix_len).visible, flat.visible)
