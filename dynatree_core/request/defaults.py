"""What a generation takes where its caller names nothing."""

from __future__ import annotations

__all__ = ["DEFAULT_POLICY"]

# the stack that wins by measurement on a CPU (docs/choosing-a-policy.md)
DEFAULT_POLICY = "phase3"
