"""`confidence`: the width follows the drafter's confidence (the published DynaTree's phase 1).

Where the drafter is sure, one child is enough; where it is lost, more children are tried. It says nothing about
depth: compose it with a policy that does, such as `fixed(depth=5)+confidence`.
"""

from __future__ import annotations

from typing import ClassVar

import attrs
import torch
from torch import Tensor

from dynatree_core import Frontier, count, fraction, hookimpl


@attrs.define
class Confidence:
    """Few children where the drafter is confident, many where it is not.

    With c the drafter's top-1 probability at a node: c > `high` gives `min_branch` children, c < `low` gives
    `max_branch`, anything between, the thresholds included, `default_branch`.
    """

    high: float = fraction(0.9)
    low: float = fraction(0.4)
    min_branch: int = count(1)
    default_branch: int = count(2)
    max_branch: int = count(3)

    variants: ClassVar = {"plan": {"high": 0.8, "low": 0.3, "max_branch": 4}}
    is_capturable: ClassVar = True
    is_recordable: ClassVar = True

    @hookimpl
    def branch_factor(self, frontier: Frontier) -> Tensor:
        # numbers are arguments of these kernels, one in a tensor on the host too; `torch.where` would have each written
        # to the device first
        default = torch.tensor(self.default_branch, device="cpu")
        is_unsure = frontier.confidence < self.low
        wanted = torch.add(default, is_unsure, alpha=self.max_branch - self.default_branch)
        return wanted.masked_fill_(frontier.confidence > self.high, self.min_branch)
