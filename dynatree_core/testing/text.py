"""Token trees as text, for failure messages and for debugging."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection

from dynatree_core.tree.token_tree import TokenTree

__all__ = ["format_tree"]


def format_tree(tree: TokenTree, accepted: Collection[int] = ()) -> str:
    """One line a node, children below their parent and indented.

    Args:
        tree: the tree.
        accepted: nodes to mark with a star, such as a verdict's `path`; the root is then marked too.

    Returns:
        A line for each node: the mark, the node's number, its token, and its draft probability given its parent.
    """
    parents, tokens, probs = tree.parent.tolist(), tree.token_ids.tolist(), tree.logprob.exp().tolist()
    children: defaultdict[int, list[int]] = defaultdict(list)
    tops = []  # the root; in a damaged tree also nodes whose parent does not come before them
    for node, parent in enumerate(parents):
        if 0 <= parent < node:
            children[parent].append(node)
        else:
            tops.append(node)
    lines, stack = [], [(node, 0) for node in reversed(tops)]
    while stack:
        node, indent = stack.pop()
        is_marked = node in accepted or (node == 0 and len(accepted) > 0)
        prob = f", p {probs[node]:.3f}" if node else " (root)"
        lines.append(f"{'*' if is_marked else ' '} {'  ' * indent}{node}: token {tokens[node]}{prob}")
        stack += [(child, indent + 1) for child in reversed(children[node])]
    return "\n".join(lines)
