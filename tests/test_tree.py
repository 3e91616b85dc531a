"""Tree invariants after growth and pruning, and the mask against brute force."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dynatree_core import Frontier, Session, TokenTree, hookimpl
from dynatree_core.engine.draft import draft
from dynatree_core.engine.faults import Faults
from dynatree_core.errors import TreeError
from dynatree_core.testing import strategies as ours
from dynatree_core.testing.models import tiny_model
from dynatree_core.testing.strategies import HostileDrafter


def tree_of(session: Session) -> TokenTree:
    """The tree of one session, or what went wrong."""
    faults = Faults()
    trees = draft([session], faults)
    for error in faults.errors.values():
        raise error
    return trees[session]


def ancestors(parents: list[int], node: int) -> set[int]:
    """The node and everything above it, by walking up."""
    found = {node}
    while parents[node] >= 0:
        node = parents[node]
        found.add(node)
    return found


def assert_is_tree(tree: TokenTree) -> None:
    parents, depth = tree.parent.tolist(), tree.depth.tolist()
    assert parents[0] == -1
    assert depth[0] == 0
    assert all(0 <= parent < node for node, parent in enumerate(parents) if node)  # parents before children
    assert all(depth[node] == depth[parent] + 1 for node, parent in enumerate(parents) if node)
    assert depth == sorted(depth)  # breadth first
    assert parents == sorted(parents)  # children of one parent adjacent
    assert tree.level_sizes == tuple(depth.count(level) for level in range(max(depth) + 1))
    assert tree.num_nodes == len(parents) == tree.num_drafted + 1
    assert tree.max_depth == max(depth)
    for node in range(tree.num_nodes):
        assert set(tree.ancestor_mask[node].nonzero().flatten().tolist()) == ancestors(parents, node)
        if node:
            expected = tree.cum_logprob[parents[node]] + tree.logprob[node]
            torch.testing.assert_close(tree.cum_logprob[node], expected, rtol=0, atol=1e-6)
    level = tree.last_level
    assert depth[level] == [tree.max_depth] * tree.level_sizes[-1]


@given(ours.trees())
def test_growth_keeps_the_invariants(tree):
    assert_is_tree(tree)
    assert tree.draft_index.tolist() == list(range(tree.num_nodes))


@given(ours.trees(), st.data())
def test_pruning_keeps_the_invariants(tree, data):
    keep = torch.tensor(data.draw(st.lists(st.booleans(), min_size=tree.num_nodes, max_size=tree.num_nodes)))
    closed = tree.close_under_ancestors(keep)
    parents = tree.parent.tolist()
    wanted = {0} | {node for node, is_kept in enumerate(keep.tolist()) if is_kept}
    assert set(closed.nonzero().flatten().tolist()) == {n for n in wanted if ancestors(parents, n) <= wanted}
    pruned = tree.subtree(closed)
    assert_is_tree(pruned)
    kept = closed.nonzero().flatten()
    assert pruned.draft_index.tolist() == kept.tolist()
    assert pruned.token_ids.tolist() == tree.token_ids[kept].tolist()
    for node, draft_node in enumerate(kept.tolist()):  # every node stands at the end of the same text as before
        before = tree.token_ids[tree.ancestor_mask[draft_node]].tolist()
        assert pruned.token_ids[pruned.ancestor_mask[node]].tolist() == before


@given(ours.trees(), st.data())
def test_a_tree_may_grow_in_two_ways(tree, data):
    """Trees share memory, which must not show: what grows from one leaves the others as they were."""
    widths = st.lists(st.integers(tree.last_level.start, tree.num_nodes - 1), min_size=1, max_size=4)
    grown, before = [], tree.ancestor_mask.clone()
    for start in (100, 200):
        parent = torch.tensor(sorted(data.draw(widths)))
        tokens = torch.arange(start, start + parent.numel())
        grown.append((tree.grow(parent, tokens, -torch.ones(parent.numel())), parent, tokens))
    assert torch.equal(tree.ancestor_mask, before)
    for one, parent, tokens in grown:
        assert_is_tree(one)
        level = one.last_level
        assert (one.parent[level].tolist(), one.token_ids[level].tolist()) == (parent.tolist(), tokens.tolist())
        assert torch.equal(one.ancestor_mask[: tree.num_nodes, : tree.num_nodes], before)


def test_growing_among_proposals_equals_growing_by_the_children_themselves():
    tree = TokenTree.root(torch.tensor([7])).grow(
        torch.tensor([0, 0]), torch.tensor([1, 2]), torch.tensor([-0.5, -1.0])
    )
    token_ids, logprobs = torch.tensor([[3, 4], [5, 6]]), torch.tensor([[-0.1, -2.0], [-0.3, -0.7]])
    scores, chosen = tree.cum_logprob[tree.last_level, None] + logprobs, torch.tensor([0, 2, 3])
    among = tree.grow_among(chosen, token_ids, logprobs, scores)
    plain = tree.grow(torch.tensor([1, 2, 2]), torch.tensor([3, 5, 6]), torch.tensor([-0.1, -0.3, -0.7]))
    for name in ("token_ids", "parent", "depth", "logprob", "cum_logprob", "ancestor_mask", "rank", "draft_index"):
        assert torch.equal(getattr(among, name), getattr(plain, name)), name


def test_a_mask_that_is_not_closed_is_refused():
    tree = TokenTree.root(torch.tensor([1]))
    tree = tree.grow(torch.tensor([0]), torch.tensor([2]), torch.tensor([-0.1]))
    tree = tree.grow(torch.tensor([1]), torch.tensor([3]), torch.tensor([-0.1]))
    with pytest.raises(TreeError, match="every ancestor"):
        tree.subtree(torch.tensor([True, False, True]))
    with pytest.raises(TreeError, match="root"):
        tree.subtree(torch.tensor([False, False, False]))


class _Wide:
    """Three children everywhere, four levels, and a record of every tree that it saw."""

    @hookimpl
    def branch_factor(self, frontier: Frontier) -> int:
        return 3

    @hookimpl
    def should_expand(self, frontier: Frontier) -> bool:
        return frontier.depth < 4


def drafted(seed: int, **limits: float) -> TokenTree:
    """A tree as the draft stage grows it; the same drafter and policy for the same seed."""
    session = Session(
        tiny_model("llama"), HostileDrafter(seed), [1, 2, 3], policy=_Wide(), max_new_tokens=20, max_branch=5, **limits
    )
    with torch.inference_mode():
        return tree_of(session)


@given(st.integers(0, 1000), st.integers(0, 60))
def test_the_node_budget_holds(seed, max_nodes):
    tree = drafted(seed, tau=0.0, max_nodes=max_nodes)
    assert_is_tree(tree)
    assert tree.num_drafted <= max_nodes
    free = drafted(seed, tau=0.0, max_nodes=1000)
    if free.num_drafted <= max_nodes:
        assert tree.token_ids.tolist() == free.token_ids.tolist()


@given(st.integers(0, 1000), ours.probabilities, st.integers(0, 6))
def test_tau_and_depth_hold(seed, tau, max_depth):
    tree = drafted(seed, tau=tau, max_nodes=1000, max_depth=max_depth)
    assert_is_tree(tree)
    assert tree.max_depth <= min(max_depth, 4)
    assert (tree.cum_logprob.exp() >= tau - 1e-6).all()


class _PlainDrafter(HostileDrafter):
    """Proposals that depend only on the path, so that trees of different budgets can be compared."""

    def start(self, plan):
        state = super().start(plan)

        def propose(committed_ids, tree, k):
            import random

            from dynatree_core import Proposals

            rows = []
            for node in range(tree.last_level.start, tree.last_level.stop):
                path = tuple(tree.token_ids[tree.ancestor_mask[node]].tolist())
                source = random.Random(hash((self.seed, path)))
                tokens = source.sample(range(plan.vocab_size), k)
                logprobs = sorted((source.choice([-0.2, -0.9, -1.5, -2.5]) for _ in tokens), reverse=True)
                rows.append((tokens, logprobs))
            ids, logprobs = zip(*rows, strict=True)
            return Proposals(torch.tensor(ids), torch.tensor(logprobs))

        state.propose = propose
        return state


@given(st.integers(0, 1000), st.sampled_from([0.02, 0.05, 0.1, 0.3]))
def test_cutting_while_growing_equals_cutting_afterwards(seed, tau):
    """τ is applied while the tree grows, to save the drafter's work; the tree is the one that SPEC describes."""

    def grow(tau: float) -> TokenTree:
        session = Session(
            tiny_model("llama"), _PlainDrafter(seed), [1], policy=_Wide(), max_new_tokens=20, max_branch=5, tau=tau,
            max_nodes=1000,
        )  # fmt: skip
        with torch.inference_mode():
            return tree_of(session)

    whole = grow(0.0)
    afterwards = whole.subtree(whole.close_under_ancestors(whole.cum_logprob >= torch.tensor(tau).log()))
    assert grow(tau).token_ids.tolist() == afterwards.token_ids.tolist()
    assert grow(tau).parent.tolist() == afterwards.parent.tolist()


def test_the_budget_keeps_the_most_probable_of_a_level():
    session = Session(
        tiny_model("llama"),
        _PlainDrafter(1),
        [1],
        policy=_Wide(),
        max_new_tokens=20,
        max_branch=5,
        tau=0.0,
        max_nodes=5,
    )
    with torch.inference_mode():
        tree = tree_of(session)
    assert tree.level_sizes == (1, 3, 2)
    session.sequence.limits = type(session.limits)(max_depth=4, max_nodes=1000, tau=0.0, max_branch=5)
    with torch.inference_mode():
        whole = tree_of(session)
    best = whole.cum_logprob[4:13].topk(2).values
    torch.testing.assert_close(tree.cum_logprob[4:].sort(descending=True).values, best)


@given(ours.trees())
def test_first_chain(tree):
    """Node by node: the first child of the last one, until there is none."""
    parents = tree.parent.tolist()
    nodes = [0]
    while nodes[-1] in parents:
        nodes.append(parents.index(nodes[-1]))
    chain = tree.first_chain()
    assert chain.draft_index.tolist() == tree.draft_index[nodes].tolist()
    assert chain.token_ids.tolist() == tree.token_ids[nodes].tolist()
    assert chain.depth.tolist() == list(range(len(nodes)))


def test_rank_is_the_place_among_siblings():
    tree = TokenTree.root(torch.tensor([0]))
    assert tree.rank.tolist() == [0]
    tree = tree.grow(torch.tensor([0, 0, 0]), torch.arange(3), torch.zeros(3))
    tree = tree.grow(torch.tensor([1, 3, 3]), torch.arange(3), torch.zeros(3))
    assert tree.rank.tolist() == [0, 0, 1, 2, 0, 0, 1]
    # of those that were drafted: who was cut counts
    cut = tree.subtree(torch.tensor([True, False, True, True, False, False, True]))
    assert cut.rank.tolist() == [0, 1, 2, 1]


def test_who_writes_into_a_tree_writes_into_no_other():
    tree, text = TokenTree.root(torch.tensor([3])), torch.tensor([1, 2, 3])
    tree.logprob.fill_(-1.0)
    tree.parent.fill_(7)
    tree.ancestor_mask.fill_(False)
    other = TokenTree.root(text[-1:].clone())
    assert (other.logprob.item(), other.cum_logprob.item(), other.parent.item()) == (0.0, 0.0, -1)
    assert other.ancestor_mask.all()
    assert tree.cum_logprob.item() == 0.0
