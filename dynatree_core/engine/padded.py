"""Which sequences draft padded trees.

A padded tree (`dynatree_core.tree.padded`) is grown, pruned and verified without the host knowing how many nodes it
has, so an iteration waits for a GPU once. It takes policies and a drafter that promise to need no numbers on the host,
and to say the same of a node whatever padding stands beside it. Whether policies keep that is seen in the first
iterations of a generation, which are rehearsed (`dynatree_core.engine.rehearsal`).
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence

from torch import Tensor

from dynatree_core.drafters.base import takes_padding
from dynatree_core.engine.lane import Lane
from dynatree_core.engine.rehearsal import Rehearsal
from dynatree_core.errors import ParameterError
from dynatree_core.tree.padded import NO_TOKEN, PaddedGrowth, PaddedRows, least_width
from dynatree_core.tree.token_tree import TokenTree

__all__ = ["NUM_CHECKS", "checks_of", "growth_of", "has_rehearsed", "known_tree", "root", "settle"]

NUM_REHEARSED = 2  # iterations of a generation with a tree
NUM_CHECKS = 4  # numbers


def root(lane: Lane) -> TokenTree:
    """The tree to grow behind the last committed token: a padded one where the lane is seen to bear it."""
    token_id = lane.tree_ids[-1:]
    lane.growth, lane.rehearsal = growth_of(lane), None
    if lane.growth is not None and has_rehearsed(lane):
        return lane.growth.root(token_id)
    if lane.growth is not None and lane.num_iterations >= lane.rehearse_from:
        lane.rehearsal = _rehearsal(lane, lane.growth)
    return TokenTree.root(token_id)


def has_rehearsed(lane: Lane) -> bool:
    """Whether its policies were seen to bear padding."""
    return lane.num_rehearsed >= NUM_REHEARSED


def _rehearsal(lane: Lane, growth: PaddedGrowth) -> Rehearsal | None:
    """None, with a warning, where policies have got what cannot be copied."""
    try:
        return Rehearsal(growth, copy.deepcopy(lane.stack), lane.frontier, lane.num_behind)
    except ParameterError as error:
        _grow_by_levels(lane, f"they have to be copied to see it: {error}")
        return None


def growth_of(lane: Lane) -> PaddedGrowth | None:
    """How a lane's next tree grows with padding; None where it grows level by level."""
    space, limits = lane.padded_space, lane.sequence.limits
    if space is None or lane.draft_state is None or limits.max_depth == 0:
        return None
    if not lane.stack.is_capturable or not takes_padding(lane.draft_state):
        return None
    width = least_width(limits.max_nodes, limits.tau, lane.stack.max_width)
    if width is None or width > space.width:  # parameters of a policy were changed
        return None
    return PaddedGrowth(space, max_nodes=limits.max_nodes, tau=limits.tau, vocab_size=lane.engine.num_known_ids)


def settle(lane: Lane, keep: Tensor | None) -> None:
    """See what a rehearsal has shown. Where policies answer otherwise, the lane grows its trees level by level.

    Args:
        lane: whose tree was grown.
        keep: bool [nodes], what its policies have kept of it; None: all.
    """
    rehearsal = lane.rehearsal
    if rehearsal is None:
        return
    if not rehearsal.has_levels:  # policies are copied for nothing while they do not draft, so ever less often
        lane.rehearse_from = 2 * lane.num_iterations + 1
        return
    lane.num_rehearsed += 1
    difference = rehearsal.difference(keep)
    if difference is not None:
        _grow_by_levels(lane, f"{difference}; mask padding by `tree.is_live`, or leave is_capturable out")


def _grow_by_levels(lane: Lane, why: str) -> None:
    lane.padded_space = None
    warnings.warn(
        f"the policies '{lane.stack}' are marked is_capturable, so what they say of a node must not depend on padding, "
        f"but {why}. This generation waits for the device once a level instead",
        RuntimeWarning,
        stacklevel=3,
    )


def checks_of(lane: Lane, rows: PaddedRows) -> list[Tensor]:
    """`NUM_CHECKS` numbers [1] int64 on the device: what could be wrong with a padded tree."""
    assert lane.growth is not None, "a padded tree grows by what its lane keeps"
    return lane.growth.checks(rows.drafted)


def known_tree(lane: Lane, rows: PaddedRows, reach: Sequence[int], checks: Sequence[int]) -> TokenTree:
    """The tree without padding, by what the host has been told.

    Args:
        lane: whose tree it is.
        rows: in which it was verified.
        reach: of each row, see `PaddedRows.reach`.
        checks: what `checks_of` says.

    Raises:
        PolicyError: a branch factor out of range.
        DrafterError: a proposal that is NaN, or a token that the target does not know.
    """
    assert lane.growth is not None, "a padded tree grows by what its lane keeps"
    min_id, max_id, min_width, max_width = checks
    max_branch = lane.sequence.limits.max_branch
    if not 0 <= min_width <= max_width <= max_branch:
        decider = lane.growth.first_beyond(max_branch)
        lane.stack.refuse_branch_factor(decider, f"{min_width} to {max_width}", max_branch)
    lane.check_proposed(min_id, max_id, is_sound=min_id != NO_TOKEN, proposals=lane.growth.proposals)
    return rows.tree([reach.count(depth) for depth in range(1 + rows.max_depth)])
