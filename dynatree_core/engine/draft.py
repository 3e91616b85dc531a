"""Draft: grow a tree breadth first from the last committed token, one level at a time.

At every level the policies say which nodes are expanded and how many children each gets; the children are the
drafter's best, in descending probability. The threshold τ and the node budget are applied while growing: a
branch that would be cut is not worth drafting.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Mapping, Sequence

import attrs
import torch
from torch import Tensor

from dynatree_core.engine.faults import Faults, transferred
from dynatree_core.engine.lane import Lane
from dynatree_core.engine.observer import Level, Outcome
from dynatree_core.engine.padded import root
from dynatree_core.engine.proposals import SharedProposals
from dynatree_core.errors import PolicyError
from dynatree_core.policy.stack import Decision
from dynatree_core.tree.frontier import Frontier, Read
from dynatree_core.tree.token_tree import TokenTree

__all__ = ["draft"]


def draft(lanes: Sequence[Lane], faults: Faults) -> dict[Lane, TokenTree]:
    """The trees that the sequences' policies and drafter make of the committed tokens; the root alone, if nothing.

    All grow a level at a time, so that one pass of a drafting model serves them all. Who fails has no tree.
    """
    for lane in lanes:
        lane.note_load([other.last_tree_sizes for other in lanes if other is not lane])
    trees = {lane: root(lane) for lane in lanes}
    growing = trees
    while growing:
        levels = _grow_level(growing, faults)
        growing = {lane: level.grown for lane, level in levels.items() if level.grown is not None}
        trees |= growing
    return {lane: tree for lane, tree in trees.items() if lane not in faults.errors}


def _grow_level(trees: Mapping[Lane, TokenTree], faults: Faults) -> dict[Lane, Level]:
    """The trees with one more level, or what ends each here: a limit, the policies or the drafter."""
    shared = SharedProposals({lane: tree for lane, tree in trees.items() if _limit_reached(lane, tree) is None})
    asked = faults.each(lambda lane, tree: _ask(lane, tree, shared), trees)
    wanted = {lane: level for lane, level in asked.items() if isinstance(level, _Wanted)}
    known = {lane: level.known for lane, level in wanted.items() if level.known is not None}
    counts = known | transferred({lane: level.checks for lane, level in wanted.items() if lane not in known})
    levels = faults.each(lambda lane, level: level if isinstance(level, Level) else level.grown(counts[lane]), asked)
    return faults.each(_tell, levels)


def _tell(lane: Lane, level: Level) -> Level:
    if lane.observer is not None:
        lane.observer.tell(level)
    if lane.rehearsal is not None:
        lane.rehearsal.levels.append(level)
    return level


def _limit_reached(lane: Lane, tree: TokenTree) -> str | None:
    """Which limit ends a tree: "depth" or "nodes"; None where it may grow."""
    if tree.max_depth >= lane.depth_limit:
        return "depth"
    if tree.is_padded:
        return None  # who is there is known to the device, which keeps to the budget
    return "nodes" if tree.num_drafted >= lane.sequence.limits.max_nodes else None


def _ask(lane: Lane, tree: TokenTree, shared: SharedProposals) -> Level | _Wanted:
    """What the policies want of one more level, or what ends the tree here."""
    limits = lane.sequence.limits
    nodes_left = limits.max_nodes - tree.num_drafted
    level = functools.partial(Level, lane.num_iterations, tree, nodes_left)
    reached = _limit_reached(lane, tree)
    if reached is not None:
        return level(reached)
    growth = lane.growth if tree.is_padded else None
    if growth is not None and growth.is_over:
        return level("refused")
    left = nodes_left if growth is None else functools.partial(growth.nodes_left, tree)
    frontier = lane.frontier(tree, left, lambda: shared.of(lane), lambda: shared.is_look_free(lane))
    expand = lane.stack.should_expand(frontier)
    if expand.value is False:
        shared.leave(lane)
        return level("expand", expand, proposals=frontier.proposals if frontier.is_drafter_asked else None)
    branch = lane.stack.branch_factor(frontier)
    if isinstance(branch.value, int) and branch.value == 0:
        shared.leave(lane)
        return level("width", expand, branch, frontier.proposals if frontier.is_drafter_asked else None)
    if growth is not None:
        most = lane.stack.max_width_of(branch.decider, tree.max_depth)
        grown = growth.grown(frontier, expand.value, branch.value, most, branch.decider)
        return level(None, expand, branch, frontier.proposals, grown=grown)
    scores = frontier.cum_logprob[:, None] + frontier.top_logprobs  # [width, k] of each proposed child's path
    conditions = _conditions(lane, frontier, expand, branch, scores)
    read = frontier.what_was_read()
    is_told = read.widths is branch.value and [*conditions] == [Outcome.BEYOND_WIDTH]
    level = functools.partial(level, expand=expand, branch=branch, proposals=frontier.proposals, conditions=conditions)
    return _Wanted(lane, frontier, branch, scores, conditions, nodes_left, read if is_told else None, level)


@attrs.frozen(eq=False)
class _Wanted:
    """A level that policies want, before the host knows how many children it has."""

    lane: Lane
    frontier: Frontier
    branch: Decision[Tensor | int]
    scores: Tensor  # [width, k] log-probability of each child's path
    conditions: Mapping[Outcome, Tensor]  # that a child must meet
    nodes_left: int  # drafted nodes that the budget still allows
    told: Read | None  # what is known by who has decided the widths; None: nobody has said
    level: Callable[..., Level]  # makes the record, of what ends the tree or of the tree grown

    @functools.cached_property
    def is_admitted(self) -> Tensor:
        """[width, k] bool."""
        is_admitted = functools.reduce(operator.and_, self.conditions.values())
        return is_admitted if Outcome.BELOW_TAU in self.conditions else is_admitted & (self.scores > -torch.inf)

    @property
    def checks(self) -> Tensor:
        """[checks] int64 on the device: how many children there are, and what could be wrong."""
        checks = [self.is_admitted.sum(), *self.frontier.proposals.checks]
        if isinstance(self.branch.value, Tensor):
            checks += self.branch.value.aminmax()
        return torch.stack(checks)

    @property
    def known(self) -> list[int] | None:
        """What `checks` would say but for the widths, where a policy has read and said it; None: it has to be asked."""
        if self.told is None or self.told.proposed is None:
            return None
        return [self.told.num_children, *self.told.proposed]

    def grown(self, checks: Sequence[int]) -> Level:
        """The level, by what its checks say.

        Raises:
            PolicyError: a branch factor out of range, or another number of children than a policy has said.
            DrafterError: a proposal that is NaN, or a token that the target does not know.
        """
        num_children, min_id, max_id, num_sound, *widths = checks
        frontier, proposals, lane = self.frontier, self.frontier.proposals, self.lane
        if widths and not 0 <= widths[0] <= widths[1] <= frontier.max_branch:
            lane.stack.refuse_branch_factor(self.branch.decider, f"{widths[0]} to {widths[1]}", frontier.max_branch)
        is_sound = num_sound == proposals.logprobs.numel()
        lane.check_proposed(min_id, max_id, is_sound=is_sound, proposals=proposals)
        if self.told is not None and self.told.num_children != num_children:
            raise self._refused("as many as", num_children, self.told.num_children)
        if num_children == 0:
            return self.level("refused")
        chosen = self._chosen(num_children)
        grown = frontier.tree.grow_among(chosen, proposals.token_ids, proposals.logprobs, self.scores)
        return self.level(None, chosen=chosen, grown=grown)

    def _refused(self, what: str, got: object, told: object) -> PolicyError:
        return PolicyError(
            f"policy '{self.branch.decider}', hook branch_factor: the children that its widths lead to must be "
            f"{what} it says by note_children, got {got} where it says {told}"
        )

    def _chosen(self, num_children: int) -> Tensor:
        """[children] int64: places in width × k of the best that fit, breadth first."""
        nodes_left = self.nodes_left
        if num_children <= nodes_left:
            places = None if self.told is None else self.told.places
            if self.known is not None and places is not None and places.shape == (num_children,):
                # whoever is told of the level keeps them, and the policy may write into its own again
                is_kept = self.lane.observer is not None or self.lane.rehearsal is not None
                return places.clone() if is_kept else places
            # filled only where a policy has counted more than there are
            chosen = torch.nonzero_static(self.is_admitted.flatten(), size=num_children, fill_value=0)[:, 0]
            if places is not None and not torch.equal(places, chosen):
                raise self._refused("in the places that", chosen.tolist(), places.tolist())
            return chosen
        scores = torch.where(self.is_admitted, self.scores, -torch.inf)
        best = scores.flatten().sort(descending=True, stable=True).indices  # of equals the first, with padding too
        return best[:nodes_left].sort().values


def _conditions(
    lane: Lane,
    frontier: Frontier,
    expand: Decision[Tensor | bool],
    branch: Decision[Tensor | int],
    scores: Tensor,
) -> Mapping[Outcome, Tensor]:
    """What a proposed child must meet, by its outcome where it does not; bools that broadcast to [width, k]."""
    rank = _ranks(frontier.max_branch, frontier.tree.device)
    wanted = branch.value if isinstance(branch.value, int) else branch.value[:, None]
    conditions = {Outcome.BEYOND_WIDTH: rank < wanted}
    if lane.sequence.limits.tau > 0:
        conditions[Outcome.BELOW_TAU] = scores >= math.log(lane.sequence.limits.tau)
    if isinstance(expand.value, Tensor):
        conditions[Outcome.NOT_EXPANDED] = expand.value[:, None]
    return conditions


@functools.cache
def _ranks(max_branch: int, device: torch.device) -> Tensor:
    """[k] int64: the places of children among their siblings."""
    with torch.inference_mode(False):
        return torch.arange(max_branch, device=device)
