"""Building a drafter from its string."""

from __future__ import annotations

from typing import cast

from dynatree_core.drafters.base import Drafter
from dynatree_core.errors import PluginLoadError
from dynatree_core.plugins.registry import DRAFTERS, load_plugin, make_plugin
from dynatree_core.plugins.spec import parse_stack

__all__ = ["build_drafter", "build_drafters"]


def build_drafter(text: str) -> Drafter:
    """A drafter from its name, with parameters if any, such as `prompt_lookup(max_matches=8)`.

    Names joined by `+` are drafters whose proposals go into one tree.

    Raises:
        StackSyntaxError, UnknownPluginError, ParameterError.
    """
    drafters = build_drafters(text)
    return drafters[0] if len(drafters) == 1 else cast(Drafter, load_plugin(DRAFTERS, "union")(drafters))


def build_drafters(text: str) -> list[Drafter]:
    """The drafters whose names are joined by `+`."""
    drafters = [make_plugin(DRAFTERS, spec) for spec in parse_stack(text)]
    for drafter in drafters:
        if not isinstance(drafter, Drafter):
            raise PluginLoadError(f"'{text}' must make drafters, got {drafter!r}; repair the package's entry point")
    return cast("list[Drafter]", drafters)
