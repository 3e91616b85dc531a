"""Old names of public things, which work for one version and say what the new one is."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

__all__ = ["under_new_names", "warn_of_old_name"]


def warn_of_old_name(old: str, new: str, *, stacklevel: int = 3) -> None:
    """Tell who used an old name what to write instead."""
    warnings.warn(
        f"{old} is called {new} now, and its old name goes with the next version; write {new}",
        DeprecationWarning,
        stacklevel=stacklevel,
    )


def under_new_names(arguments: Mapping[str, Any], names: Mapping[str, str], where: str) -> dict[str, Any]:
    """A call's arguments by name, old names (`names`: old -> new) exchanged for the new ones.

    Where both are there, as in a call by `attrs.evolve`, the old one is what was asked for.
    """
    told = {name: value for name, value in arguments.items() if name not in names}
    for old in names.keys() & arguments.keys():
        warn_of_old_name(f"{where}'s {old}", names[old], stacklevel=4)
        told[names[old]] = arguments[old]
    return told
