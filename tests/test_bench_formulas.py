"""The expected-value formulas, against enumeration and against published numbers."""

from __future__ import annotations

import itertools
import random

import pytest

from dynatree_bench.report.formulas import (
    RankTree,
    best_chain,
    best_tree,
    best_tree_speedup,
    chain_tokens,
    fixed_tokens,
    path_products,
    speedup,
    tree_tokens,
)

ACCEPTANCE = (0.65, 0.14, 0.06, 0.03)
MISSED = -1  # the target's token is none of the ranks


def accepted_by_walking(tree: RankTree, text: tuple[int, ...]) -> int:
    """How many nodes are accepted when the target's tokens have these ranks, by walking down."""
    node, accepted = -1, 0
    for rank in text:
        children = [i for i, parent in enumerate(tree.parent) if parent == node and tree.rank[i] == rank]
        if not children:
            break
        node, accepted = children[0], accepted + 1
    return accepted


def tokens_by_enumeration(tree: RankTree, acceptance: tuple[float, ...]) -> float:
    """Expected tokens: over all texts as long as the tree is deep, their probability times what is accepted, plus 1."""
    law = {**dict(enumerate(acceptance)), MISSED: 1 - sum(acceptance)}
    total = 0.0
    for text in itertools.product(law, repeat=tree.depth):
        probability = 1.0
        for rank in text:
            probability *= law[rank]
        total += probability * (1 + accepted_by_walking(tree, text))
    return total


def chain(length: int) -> RankTree:
    return RankTree(tuple(range(-1, length - 1)), (0,) * length)


def full_tree(depth: int, branch: int) -> RankTree:
    parents, ranks, level = [], [], [-1]
    for _ in range(depth):
        grown = []
        for parent in level:
            for rank in range(branch):
                parents.append(parent)
                ranks.append(rank)
                grown.append(len(parents) - 1)
        level = grown
    return RankTree(tuple(parents), tuple(ranks))


def all_trees(num_nodes: int, max_rank: int, max_depth: int) -> set[frozenset[tuple[int, ...]]]:
    """Every tree as the set of its nodes' paths of ranks, grown node by node; a sibling comes after the one before."""
    trees: set[frozenset[tuple[int, ...]]] = {frozenset()}
    for _ in range(num_nodes):
        trees = {
            tree | {(*path, rank)}
            for tree in trees
            for path in [(), *tree]
            for rank in range(max_rank)
            if len(path) < max_depth and (*path, rank) not in tree and (rank == 0 or (*path, rank - 1) in tree)
        }
    return trees


def tokens_of_paths(tree: frozenset[tuple[int, ...]], acceptance: tuple[float, ...]) -> float:
    total = 1.0
    for path in tree:
        product = 1.0
        for rank in path:
            product *= acceptance[rank]
        total += product
    return total


@pytest.mark.parametrize("length", [0, 1, 4])
def test_a_chain_by_enumeration(length):
    assert chain_tokens(0.65, length) == pytest.approx(tokens_by_enumeration(chain(length), (0.65,)))
    assert chain_tokens(0.65, length) == pytest.approx(tree_tokens(chain(length), (0.65,)))


def test_a_chain_that_is_always_or_never_accepted():
    assert chain_tokens(1.0, 6) == 7
    assert chain_tokens(0.0, 6) == 1


@pytest.mark.parametrize(("depth", "branch"), [(1, 3), (2, 2), (3, 2)])
def test_a_fixed_tree_by_enumeration(depth, branch):
    tree = full_tree(depth, branch)
    assert fixed_tokens(ACCEPTANCE, depth, branch) == pytest.approx(tokens_by_enumeration(tree, ACCEPTANCE))
    assert fixed_tokens(ACCEPTANCE, depth, branch) == pytest.approx(tree_tokens(tree, ACCEPTANCE))


def test_random_trees_by_enumeration():
    rng = random.Random(0)
    for _ in range(20):
        trees = sorted(all_trees(4, 3, 4), key=sorted)
        paths = sorted(rng.choice(trees), key=len)
        tree = RankTree(
            tuple(paths.index(path[:-1]) if len(path) > 1 else -1 for path in paths), tuple(path[-1] for path in paths)
        )
        assert tree_tokens(tree, ACCEPTANCE) == pytest.approx(tokens_by_enumeration(tree, ACCEPTANCE))
        assert tree_tokens(tree, ACCEPTANCE) == pytest.approx(tokens_of_paths(frozenset(paths), ACCEPTANCE))


@pytest.mark.parametrize("max_depth", [1, 2, 6])
@pytest.mark.parametrize("num_nodes", [0, 1, 3, 6])
@pytest.mark.parametrize("acceptance", [ACCEPTANCE[:3], (0.4, 0.3, 0.2), (0.3, 0.3, 0.3)])
def test_no_tree_of_as_many_nodes_is_better_than_the_best(acceptance, num_nodes, max_depth):
    best = best_tree(acceptance, num_nodes, max_depth=max_depth)
    expected = max(
        (tokens_of_paths(tree, acceptance) for tree in all_trees(num_nodes, len(acceptance), max_depth)), default=None
    )
    if expected is None:  # so many nodes do not fit: all that fit are taken
        assert best.num_nodes == len(acceptance) < num_nodes
    else:
        assert tree_tokens(best, acceptance) == pytest.approx(expected)
        assert best.num_nodes == num_nodes
    assert best.depth <= max_depth


def test_nodes_that_are_never_accepted_are_left_out():
    assert best_tree((0.5, 0.0), 5, max_depth=2).rank == (0, 0)
    assert best_tree((), 5).num_nodes == best_tree((0.5,), 5, max_depth=0).num_nodes == 0


def test_acceptances_that_do_not_descend_are_refused():
    with pytest.raises(ValueError, match="must descend"):
        best_tree((0.1, 0.5), 3)


def test_the_best_speedup_by_trying_every_tree():
    costs = {"level_cost": 0.2, "node_cost": 0.05}
    tried = [
        speedup(tokens_of_paths(tree, ACCEPTANCE), max(map(len, tree), default=0), len(tree), **costs)
        for num_nodes in range(7)
        for tree in all_trees(num_nodes, 3, 6)
    ]
    best = best_tree_speedup(ACCEPTANCE[:3], max_nodes=6, **costs)
    assert best.speedup == pytest.approx(max(tried))
    tokens = tree_tokens(best.tree, ACCEPTANCE)
    assert best.speedup == pytest.approx(speedup(tokens, best.tree.depth, best.tree.num_nodes, **costs))


def test_where_drafting_is_dear_nothing_is_drafted():
    assert best_tree_speedup(ACCEPTANCE, level_cost=1.0, node_cost=0.1).tree.num_nodes == 0
    assert best_chain(0.65, level_cost=1.0, node_cost=0.1).speedup == 1


# worked out independently for the acceptances above, in autoregressive steps
@pytest.mark.parametrize(
    ("level_cost", "node_cost", "tree", "chain", "num_nodes", "depth"),
    [(0.02, 0.002, 3.36, 2.40, 78, 7), (0.10, 0.01, 2.13, 1.76, 21, 4), (0.30, 0.01, 1.52, 1.28, 12, 2)],
)
def test_what_trees_are_worth(level_cost, node_cost, tree, chain, num_nodes, depth):
    best = best_tree_speedup(ACCEPTANCE, level_cost=level_cost, node_cost=node_cost)
    assert best.speedup == pytest.approx(tree, abs=0.006)
    assert (best.tree.num_nodes, best.tree.depth) == (num_nodes, depth)
    assert best_chain(0.65, level_cost=level_cost, node_cost=node_cost).speedup == pytest.approx(chain, abs=0.006)


def test_the_products_of_a_tree_by_hand():
    tree = RankTree((-1, -1, 0, 0, 2), (0, 1, 0, 1, 7))
    assert path_products(tree, (0.5, 0.25)) == [0.5, 0.25, 0.25, 0.125, 0.0]
    assert tree.depths() == [1, 1, 2, 2, 3]
    assert tree_tokens(tree, (0.5, 0.25)) == 2.125
