"""The operators in C."""

from __future__ import annotations

__all__ = ["reason_unavailable"]


def reason_unavailable() -> str | None:
    """Why the library cannot be used on this machine; None where it can."""
    return "it is not part of this version yet"
