"""Prune: cut what the policies do not think worth verifying. A pruned node takes its descendants with it.

The threshold τ and the node budget were applied while the tree grew (see draft.py), with the same result: a path's
probability only falls with depth, so a node below τ has no descendant above it.
"""

from __future__ import annotations

import attrs

from dynatree_core.engine.lane import Lane
from dynatree_core.engine.observer import Pruning
from dynatree_core.engine.padded import settle
from dynatree_core.policy.stack import Decision
from dynatree_core.tree.padded import PaddedRows
from dynatree_core.tree.token_tree import TokenTree

__all__ = ["prune"]


def prune(lane: Lane, tree: TokenTree) -> TokenTree | PaddedRows:
    """The tree without the nodes to which a policy objects; the same tree when none has an opinion.

    With exact="fixed_width" it is the first chain of what is left, whose node at depth d stands in row d. Of a padded
    tree it is the rows that are left, and padding for as many as there could be.
    """
    keep = lane.stack.keep_nodes(tree) if tree.num_drafted else Decision(None, {})
    if lane.growth is not None and tree.is_padded:
        if not tree.num_drafted:
            return attrs.evolve(tree, is_padded=False)
        return PaddedRows.of(tree, keep.value, lane.growth, lane.stack.max_kept)
    settle(lane, keep.value)
    kept = tree if keep.value is None else tree.pruned(keep.value)
    if lane.request.is_fixed_width and kept.num_drafted:
        kept = kept.first_chain()
    if lane.observer is not None:
        lane.observer.tell(Pruning(lane.num_iterations, tree, keep, kept))
    return kept
