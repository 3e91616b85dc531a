"""`my_policy`: a node's children are its nucleus, as in nucleus sampling (Holtzman et al. 2020).

It decides width and says nothing about depth: compose it with a policy that does, such as `dynamic_depth`.
"""

from __future__ import annotations

import attrs
import torch
from dynatree_core import Frontier, count, fraction, hookimpl


@attrs.define
class MyPolicy:
    """As many children as hold `mass` of the drafter's probability between them, from one to `max_branch`.

    Few where the drafter is sure of one token, many where it hesitates between several.
    """

    mass: float = fraction(0.8)
    max_branch: int = count(4)

    @hookimpl
    def branch_factor(self, frontier: Frontier) -> torch.Tensor:
        probs = frontier.top_logprobs.exp()  # [width, k], best child first
        before = probs.cumsum(dim=1) - probs  # what the better children hold together
        wanted = (before < self.mass).sum(dim=1)  # [width]
        return wanted.clamp(1, min(self.max_branch, frontier.max_branch))
