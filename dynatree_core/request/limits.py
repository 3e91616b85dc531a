"""The limits of one generation's trees."""

from __future__ import annotations

import attrs

__all__ = ["Limits"]


@attrs.frozen
class Limits:
    """What bounds every tree of a session, whatever its policies want."""

    max_depth: int  # levels below the root
    max_nodes: int  # drafted nodes, the root not counted (N_max in SpecInfer's terms)
    tau: float  # a node whose cumulative draft probability is below it is cut, with its descendants
    max_branch: int  # children that a node can have at most
