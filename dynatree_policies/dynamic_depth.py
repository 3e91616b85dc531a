"""`dynamic_depth`: the depth follows the drafter's confidence (the published DynaTree's phase 2).

A branch is given up early where the signal is too low, and goes past `base_depth` where it is high.
"""

from __future__ import annotations

from typing import ClassVar

import attrs
from torch import Tensor

from dynatree_core import Frontier, choice, count, fraction, hookimpl


@attrs.define
class DynamicDepth:
    """Stop early where the signal is low, go past `base_depth` where it is high.

    A node is not expanded when its signal is below `stop_threshold`; from `base_depth` on it is expanded only when
    the signal is above `extend_threshold`, and never at `max_depth`. The signal is the node's top-1 probability
    ("confidence") or the probability of the path to it ("cumulative").
    """

    signal: str = choice("confidence", ("confidence", "cumulative"))
    stop_threshold: float = fraction(0.1)
    extend_threshold: float = fraction(0.95)
    base_depth: int = count(5)
    max_depth: int = count(8)

    variants: ClassVar = {"plan": {"signal": "cumulative", "extend_threshold": 0.7, "base_depth": 4}}
    is_capturable: ClassVar = True
    is_recordable: ClassVar = True

    @hookimpl
    def should_expand(self, frontier: Frontier) -> Tensor | bool:
        if frontier.depth >= self.max_depth:
            return False
        signal = frontier.confidence if self.signal == "confidence" else frontier.cum_logprob.exp()
        if frontier.depth < self.base_depth:
            return signal >= self.stop_threshold
        is_expanded = signal > self.extend_threshold
        if self.extend_threshold < self.stop_threshold:  # else the one says more than the other
            is_expanded &= signal >= self.stop_threshold
        return is_expanded
