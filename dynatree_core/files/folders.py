"""Where DynaTree keeps what can be made again."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

__all__ = ["cache_root"]


def cache_root() -> Path:
    """The folder for what can be made again: DYNATREE_CACHE if it is set, else the user's cache folder."""
    chosen = os.environ.get("DYNATREE_CACHE")
    return Path(chosen).expanduser() if chosen else platformdirs.user_cache_path("dynatree", appauthor=False)
