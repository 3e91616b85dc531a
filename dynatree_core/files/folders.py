"""Where files are: those that somebody names, and those that DynaTree makes and can make again."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

__all__ = ["cache_root", "expanded"]


def expanded(path: str | Path) -> Path:
    """A path as somebody wrote it, with the home folder for its `~`; that of an unknown user stays as it is."""
    return Path(os.path.expanduser(path))


def cache_root() -> Path:
    """The folder for what can be made again: DYNATREE_CACHE if it is set, else the user's cache folder."""
    chosen = os.environ.get("DYNATREE_CACHE")
    return expanded(chosen) if chosen else platformdirs.user_cache_path("dynatree", appauthor=False)
