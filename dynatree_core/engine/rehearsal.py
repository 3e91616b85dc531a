"""A tree grown once more with padding, to see whether the policies say the same of its nodes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import attrs
import torch
from torch import Tensor

from dynatree_core.engine.observer import Level
from dynatree_core.errors import PolicyError
from dynatree_core.policy.stack import PolicyStack
from dynatree_core.tree.frontier import Frontier, Proposals
from dynatree_core.tree.padded import PaddedGrowth
from dynatree_core.tree.token_tree import TokenTree

__all__ = ["Rehearsal"]


@attrs.define(eq=False)
class Rehearsal:
    """A tree that was grown level by level, to be grown once more with padding.

    Attributes:
        levels: of the tree, as they were grown.
    """

    growth: PaddedGrowth
    stack: PolicyStack  # a copy of the lane's, as it was before it was asked
    frontier_of: Callable[
        [TokenTree, Callable[[], Tensor], Callable[[], Proposals], Callable[[], bool], int | None], Frontier
    ]
    num_behind: int  # tokens that the drafter had not followed when the root was asked about
    levels: list[Level] = attrs.field(factory=list)

    @property
    def has_levels(self) -> bool:
        """Whether there is anything to compare."""
        return any(level.grown is not None for level in self.levels)

    def difference(self, keep: Tensor | None) -> str | None:
        """What the policies say otherwise where there is padding; None: nothing.

        Args:
            keep: bool [nodes], what they have kept of the tree; None: all.
        """
        try:
            return self._difference(keep)
        except PolicyError as error:
            return str(error)

    def _difference(self, keep: Tensor | None) -> str | None:
        tree = self.growth.root(self.levels[0].tree.token_ids[:1])
        for level in self.levels:
            if level.expand is None:  # a limit ends the tree
                break
            width = level.tree.level_sizes[-1]
            propose = partial(_with_padding, level.proposals, tree.level_sizes[-1])
            num_behind = None if level.tree.max_depth else self.num_behind
            is_free = partial(bool, level.proposals is not None and level.proposals.is_free)
            nodes_left = partial(self.growth.nodes_left, tree)
            frontier = self.frontier_of(tree, nodes_left, propose, is_free, num_behind)
            where = f"at depth {level.tree.max_depth}"
            expand, is_expanded = self.stack.should_expand(frontier).value, level.expand.value
            if not _are_alike(expand, is_expanded, width):
                return f"should_expand says {_shown(expand, width)} {where} where it says {_shown(is_expanded, width)}"
            if level.branch is None:
                break
            branch, wanted = self.stack.branch_factor(frontier), level.branch.value
            if not _are_alike(branch.value, wanted, width):
                return f"branch_factor says {_shown(branch.value, width)} {where} where it says {_shown(wanted, width)}"
            if level.grown is None:
                break
            assert not isinstance(expand, bool) or expand, "a level was grown that should_expand has refused"
            most = self.stack.max_width_of(branch.decider, level.tree.max_depth)
            if most is not None and level.grown.level_sizes[-1] > most:
                return f"more nodes are wanted {where} than max_width={most}"
            tree = self.growth.grown(frontier, expand, branch.value, most)
            if not _holds(tree, level.grown):
                return f"more than {self.growth.space.width} nodes are wanted {where}"
        kept = self.stack.keep_nodes(tree).value
        is_kept, is_kept_with_padding = (
            every.close_under_ancestors(every.is_live if votes is None else votes)
            for every, votes in ((self.levels[-1].grown or self.levels[-1].tree, keep), (tree, kept))
        )
        if not torch.equal(is_kept, is_kept_with_padding[tree.is_live]):
            return "keep_nodes keeps other nodes"
        most = self.stack.max_kept
        if most is not None and int(is_kept.sum()) > 1 + most:
            return f"keep_nodes keeps {int(is_kept.sum()) - 1} drafted nodes, more than max_kept={most}"
        return None


def _with_padding(proposals: Proposals | None, width: int) -> Proposals:
    """The proposals for a level that is so wide, where the drafter is sure of what it says about padding.

    Raises:
        PolicyError: the drafter was not asked.
    """
    if proposals is None:
        raise PolicyError("the drafter is asked about a level where it is not asked without padding")
    missing, k = width - proposals.logprobs.shape[0], proposals.logprobs.shape[1]
    logprobs = proposals.logprobs.new_full((missing, k), -20.0)
    logprobs[:, :1] = -1e-4
    ids = proposals.token_ids
    return Proposals(
        torch.cat([ids, ids.new_zeros(missing, k)]), torch.cat([proposals.logprobs, logprobs]), proposals.is_free
    )


def _are_alike(answer: Tensor | int, wanted: Tensor | int, width: int) -> bool:
    return _shown(answer, width) == _shown(wanted, width)


def _shown(answer: Tensor | int, width: int) -> list[int]:
    """A hook's answer about the first nodes of a level."""
    numbers: list[int] = answer[:width].tolist() if isinstance(answer, Tensor) else [answer] * width
    return numbers


def _holds(tree: TokenTree, grown: TokenTree) -> bool:
    """Whether the last level of a padded tree has the nodes that the last of another one has."""
    level, width = tree.last_level, grown.level_sizes[-1]
    is_live: Sequence[bool] = tree.is_live[level].tolist()
    same_number = sum(is_live) == width and all(is_live[:width])
    return same_number and torch.equal(tree.token_ids[level][:width], grown.token_ids[grown.last_level])
