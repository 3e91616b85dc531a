"""The hooks that a tree policy may implement: their specifications, and what of the stack one of them is given.

A policy is any object with one or more of these as methods marked `@hookimpl`. Hooks run once per tree level
or once per iteration, never per node, and speak in tensors on the tree's device. An implementation may
leave out arguments that it does not need; it must not give them default values.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import pluggy
from torch import Tensor

if TYPE_CHECKING:
    from dynatree_core.tree.frontier import Frontier
    from dynatree_core.tree.token_tree import TokenTree
    from dynatree_core.tree.verdict import StepReport

__all__ = ["PROJECT_NAME", "hookimpl"]

PROJECT_NAME = "dynatree"
hookspec = pluggy.HookspecMarker(PROJECT_NAME)
hookimpl = pluggy.HookimplMarker(PROJECT_NAME)


class PoliciesBeside(Protocol):
    """What a policy is shown of the `PolicyStack` that it is in, which is built on these specifications."""

    def find(self, name: str) -> Any | None:
        """The policy of that name, or None. Its parameters may be set; they are checked."""


@hookspec(firstresult=True)
def branch_factor(frontier: Frontier) -> Tensor | int | None:
    """How many children each frontier node gets. Called once per level.

    Returns:
        int64 [width] in 0…frontier.max_branch, or one int for all nodes, or None for no opinion.

    Where several policies of a stack answer, the rightmost wins; where none does, every node gets one child.
    """


@hookspec
def should_expand(frontier: Frontier) -> Tensor | bool | None:
    """Which frontier nodes are expanded at all. Called once per level, before `branch_factor`.

    Returns:
        bool [width], or one bool for all nodes, or None for no opinion. A plain False ends the tree without
        a drafter pass over this level.

    A node is expanded when no policy of the stack objects.
    """


@hookspec
def keep_nodes(tree: TokenTree) -> Tensor | None:
    """Which drafted nodes are worth verifying. Called once per iteration, on the grown tree.

    Returns:
        bool [nodes], or None for no opinion. What is said of the root (node 0) is ignored.

    A node is verified when no policy objects to it or to one of its ancestors.
    """


@hookspec
def on_iteration_end(report: StepReport, stack: PoliciesBeside) -> None:
    """Learn from the outcome. Called once per iteration, after the tokens were committed.

    `stack.find(name)` gives a policy beside this one, whose parameters may be changed for the rest of the session.
    """
