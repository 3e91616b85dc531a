"""`dynatree distill`: make a drafter for a target. What takes seconds to import is imported when it runs."""

from __future__ import annotations

import click

__all__ = ["distill"]


@click.group()
def distill() -> None:
    """Make a small drafter for a target from what the target itself says."""
