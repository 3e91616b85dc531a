"""Draft: grow a tree breadth first from the last committed token, one level at a time.

At every level the policies say which nodes are expanded and how many children each gets; the children are the
drafter's best, in descending probability. The threshold τ and the node budget are applied while growing: a
branch that would be cut is not worth drafting.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dynatree_core.engine.session import Session
from dynatree_core.errors import DrafterError
from dynatree_core.policy.stack import BranchFactor
from dynatree_core.tree.frontier import Frontier
from dynatree_core.tree.token_tree import TokenTree

__all__ = ["draft"]


def draft(session: Session) -> TokenTree:
    """The tree that the session's policies and drafter make of the committed tokens; the root alone, if nothing."""
    tree = TokenTree.root(session.committed_ids[-1:].clone())
    while tree.max_depth < session.depth_limit and tree.num_drafted < session.sequence.limits.max_nodes:
        grown = _grow_level(session, tree)
        if grown is None:
            break
        tree = grown
    return tree


def _grow_level(session: Session, tree: TokenTree) -> TokenTree | None:
    """The tree with one more level, or None when the policies or the drafter end it here."""
    limits = session.sequence.limits
    nodes_left = limits.max_nodes - tree.num_drafted
    frontier = Frontier(
        tree,
        session.num_iterations,
        nodes_left,
        limits.max_branch,
        propose=lambda: session.propose(tree),
        measure=session.measure_costs,
    )
    expand = session.stack.should_expand(frontier)
    if expand is False:
        return None
    branch = session.stack.branch_factor(frontier)
    if isinstance(branch.wanted, int) and branch.wanted == 0:
        return None
    scores = _admitted_scores(session, frontier, expand, branch)
    num_children = _checked_count(session, frontier, branch, scores)
    if num_children == 0:
        return None
    # the best of what fits, then back into breadth-first order
    chosen = scores.flatten().topk(min(num_children, nodes_left)).indices.sort().values
    parent = tree.last_level.start + chosen // limits.max_branch
    return tree.grow(parent, frontier.top_token_ids.flatten()[chosen], frontier.top_logprobs.flatten()[chosen])


def _admitted_scores(session: Session, frontier: Frontier, expand: Tensor | bool, branch: BranchFactor) -> Tensor:
    """[width, k]: cumulative log-probability of each proposed child, -inf where it is not to be."""
    rank = torch.arange(frontier.max_branch, device=frontier.tree.device)
    wanted = branch.wanted if isinstance(branch.wanted, int) else branch.wanted[:, None]
    scores = frontier.cum_logprob[:, None] + frontier.top_logprobs
    is_admitted = rank < wanted
    if session.sequence.limits.tau > 0:
        is_admitted = is_admitted & (scores >= math.log(session.sequence.limits.tau))
    if isinstance(expand, Tensor):
        is_admitted = is_admitted & expand[:, None]
    return torch.where(is_admitted, scores, -torch.inf)


def _checked_count(session: Session, frontier: Frontier, branch: BranchFactor, scores: Tensor) -> int:
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
    if isinstance(branch.wanted, Tensor):
        checks += branch.wanted.aminmax()
    num_children, min_id, max_id, is_sound, *widths = torch.stack(checks).tolist()
    if widths and not 0 <= widths[0] <= widths[1] <= frontier.max_branch:
        session.stack.refuse_branch_factor(branch.policy, f"{widths[0]} to {widths[1]}", frontier.max_branch)
    fault = None
    if not is_sound:
        fault = "log-probabilities must be numbers of at most 0"
    elif not 0 <= min_id <= max_id < session.vocab_size:
        fault = f"token ids must be from 0 to {session.vocab_size - 1}"
    if fault:
        raise DrafterError(f"drafter '{session.drafter_name}' made a bad proposal: {fault}, got {proposals}")
    return int(num_children)
