"""`fixed`: the same tree in every iteration, as in SpecInfer (Miao et al. 2024, expansion-based trees)."""

from __future__ import annotations

from typing import ClassVar

import attrs

from dynatree_core import Frontier, count, fraction, hookimpl


@attrs.define
class Fixed:
    """A tree of one depth and branch factor, cut at path probability `tau` and at `max_nodes` nodes."""

    depth: int = count(5)
    branch: int = count(2)
    tau: float = fraction(0.05)
    max_nodes: int = count(128)

    is_capturable: ClassVar = True
    is_recordable: ClassVar = True

    @property
    def max_width(self) -> int:
        """Nodes of a level at most."""
        return int(self.branch**self.depth)

    @hookimpl
    def branch_factor(self, frontier: Frontier) -> int:
        return self.branch

    @hookimpl
    def should_expand(self, frontier: Frontier) -> bool:
        return frontier.depth < self.depth
