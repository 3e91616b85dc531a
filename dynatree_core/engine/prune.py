"""Prune: cut what the policies do not think worth verifying. A pruned node takes its descendants with it.

The threshold τ and the node budget were applied while the tree grew (see draft.py), with the same result: a path's
probability only falls with depth, so a node below τ has no descendant above it.
"""

from __future__ import annotations

from dynatree_core.engine.session import Session
from dynatree_core.tree.token_tree import TokenTree

__all__ = ["prune"]


def prune(session: Session, tree: TokenTree) -> TokenTree:
    """The tree without the nodes to which a policy objects; the same tree when none has an opinion.

    With exact="fixed_width" it is the first chain of what is left, whose node at depth d stands in row d.
    """
    if tree.num_drafted == 0:
        return tree
    keep = session.stack.keep_nodes(tree)
    if keep is not None:
        tree = tree.subtree(tree.close_under_ancestors(keep))
    return tree.first_chain() if session.request.is_fixed_width else tree
