"""Draft: grow a tree breadth first from the last committed token, one level at a time.

At every level the policies say which nodes are expanded and how many children each gets; the children are the
drafter's best, in descending probability. The threshold τ and the node budget are applied while growing: a
branch that would be cut is not worth drafting.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Mapping

import torch
from torch import Tensor

from dynatree_core.engine.lane import Lane
from dynatree_core.engine.observer import Level, Outcome
from dynatree_core.errors import DrafterError
from dynatree_core.policy.stack import Decision
from dynatree_core.tree.frontier import Frontier
from dynatree_core.tree.token_tree import TokenTree

__all__ = ["draft"]


def draft(lane: Lane) -> TokenTree:
    """The tree that the session's policies and drafter make of the committed tokens; the root alone, if nothing."""
    tree = TokenTree.root(lane.committed_ids[-1:].clone())
    while True:
        level = _grow_level(lane, tree)
        if lane.observer is not None:
            lane.observer.tell(level)
        if level.grown is None:
            return tree
        tree = level.grown


def _grow_level(lane: Lane, tree: TokenTree) -> Level:
    """The tree with one more level, or what ends it here: a limit, the policies or the drafter."""
    limits = lane.sequence.limits
    nodes_left = limits.max_nodes - tree.num_drafted
    level = functools.partial(Level, lane.num_iterations, tree, nodes_left)
    if tree.max_depth >= lane.depth_limit:
        return level("depth")
    if nodes_left <= 0:
        return level("nodes")
    frontier = Frontier(
        tree,
        lane.num_iterations,
        nodes_left,
        limits.max_branch,
        propose=lambda: lane.propose(tree),
        measure=lane.measure_costs,
    )
    expand = lane.stack.should_expand(frontier)
    if expand.value is False:
        return level("expand", expand, proposals=frontier.proposals if frontier.is_drafter_asked else None)
    branch = lane.stack.branch_factor(frontier)
    if isinstance(branch.value, int) and branch.value == 0:
        return level("width", expand, branch, frontier.proposals if frontier.is_drafter_asked else None)
    scores = frontier.cum_logprob[:, None] + frontier.top_logprobs  # [width, k] of each proposed child's path
    conditions = _conditions(lane, frontier, expand, branch, scores)
    scores = torch.where(functools.reduce(operator.and_, conditions.values()), scores, -torch.inf)
    level = functools.partial(level, expand=expand, branch=branch, proposals=frontier.proposals, conditions=conditions)
    num_children = _checked_count(lane, frontier, branch, scores)
    if num_children == 0:
        return level("refused")
    # the best of what fits, then back into breadth-first order
    chosen = scores.flatten().topk(min(num_children, nodes_left)).indices.sort().values
    parent = tree.last_level.start + chosen // limits.max_branch
    grown = tree.grow(parent, frontier.top_token_ids.flatten()[chosen], frontier.top_logprobs.flatten()[chosen])
    return level(None, chosen=chosen, grown=grown)


def _conditions(
    lane: Lane,
    frontier: Frontier,
    expand: Decision[Tensor | bool],
    branch: Decision[Tensor | int],
    scores: Tensor,
) -> Mapping[Outcome, Tensor]:
    """What a proposed child must meet, by its outcome where it does not; bools that broadcast to [width, k]."""
    rank = torch.arange(frontier.max_branch, device=frontier.tree.device)
    wanted = branch.value if isinstance(branch.value, int) else branch.value[:, None]
    conditions = {Outcome.BEYOND_WIDTH: rank < wanted}
    if lane.sequence.limits.tau > 0:
        conditions[Outcome.BELOW_TAU] = scores >= math.log(lane.sequence.limits.tau)
    if isinstance(expand.value, Tensor):
        conditions[Outcome.NOT_EXPANDED] = expand.value[:, None]
    return conditions


def _checked_count(lane: Lane, frontier: Frontier, branch: Decision[Tensor | int], scores: Tensor) -> int:
    """How many children there are, learnt in the level's one transfer together with what went wrong.

    Raises:
        PolicyError: a branch factor out of range.
        DrafterError: a proposal that is NaN, or a token that the target does not know.
    """
    proposals = frontier.proposals
    checks = [
        (scores > -torch.inf).sum(),
        *proposals.token_ids.aminmax(),
        (proposals.logprobs <= 1e-3).all(),  # False for NaN too; rounding may exceed log 1 = 0 a little
    ]
    if isinstance(branch.value, Tensor):
        checks += branch.value.aminmax()
    num_children, min_id, max_id, is_sound, *widths = torch.stack(checks).tolist()
    if widths and not 0 <= widths[0] <= widths[1] <= frontier.max_branch:
        lane.stack.refuse_branch_factor(branch.decider, f"{widths[0]} to {widths[1]}", frontier.max_branch)
    fault = None
    if not is_sound:
        fault = "log-probabilities must be numbers of at most 0"
    elif not 0 <= min_id <= max_id < lane.vocab_size:
        fault = f"token ids must be from 0 to {lane.vocab_size - 1}"
    if fault:
        raise DrafterError(f"drafter '{lane.drafter_name}' made a bad proposal: {fault}, got {proposals}")
    return int(num_children)
