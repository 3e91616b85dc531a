"""`linear`: classic speculative decoding with a chain (Leviathan et al. 2023; Chen et al. 2023)."""

from __future__ import annotations

from typing import ClassVar

import attrs

from dynatree_core import Frontier, count, fraction, hookimpl


@attrs.define
class Linear:
    """A chain of `depth` tokens (K in the papers): classic speculative decoding.

    A chain is drafted to its full length whatever the drafter thinks of it, so τ is 0 here.
    """

    depth: int = count(6)
    tau: float = fraction(0.0)

    is_capturable: ClassVar = True
    is_recordable: ClassVar = True
    max_width: ClassVar = 1  # nodes of a level

    @hookimpl
    def branch_factor(self, frontier: Frontier) -> int:
        return 1

    @hookimpl
    def should_expand(self, frontier: Frontier) -> bool:
        return frontier.depth < self.depth
