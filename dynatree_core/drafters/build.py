"""Building a drafter from its string."""

from __future__ import annotations

from typing import cast

from torch import nn

from dynatree_core.drafters.base import Drafter
from dynatree_core.drafters.model import ModelDrafter
from dynatree_core.errors import PluginLoadError
from dynatree_core.plugins.registry import DRAFTERS, load_plugin, make_plugin
from dynatree_core.plugins.spec import parse_stack

__all__ = ["as_drafter", "build_drafter", "build_drafters"]


def as_drafter(given: nn.Module | Drafter | str | None) -> Drafter | None:
    """The drafter that a caller means by a drafter, its string, or a model that is to draft; None for none.

    Raises:
        StackSyntaxError, UnknownPluginError, ParameterError, UnsupportedModelError.
    """
    if given is None or isinstance(given, Drafter):
        return given
    return build_drafter(given) if isinstance(given, str) else ModelDrafter(given)


def build_drafter(text: str) -> Drafter:
    """A drafter from its name, with parameters if any, such as `prompt_lookup(max_matches=8)`.

    Names joined by `+` are drafters whose proposals go into one tree.

    Raises:
        StackSyntaxError: a text that does not parse.
        UnknownPluginError: a name that no installed package provides.
        ParameterError: an unknown parameter, or a value outside its type or range.
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
