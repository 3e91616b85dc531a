"""What can be wrong in the arguments of a command, found before a model is loaded or a network asked.

`check_names` needs no torch: it comes first, so that a misspelt name is told at once. `check_settings` needs torch, and
makes what the settings would make, such as the stack.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dynatree_core.cli.loading import check_drafter_model, check_drafter_name, registered_drafter
from dynatree_core.errors import ParameterError
from dynatree_core.plugins.presets import check_stack_names

if TYPE_CHECKING:
    from dynatree_core.drafters.base import Drafter

__all__ = ["CHECKED", "check_names", "check_settings", "checkable"]

CHECKED = ("runner", "exact", "cache", "tau", "max_nodes", "max_depth", "max_branch")

ANY_VOCABULARY = 2**31  # the target's own is not known yet


def check_names(*, policy: str | None = None, drafter: str | None = None) -> None:
    """Refuse names that nothing installed has.

    Raises:
        StackSyntaxError, UnknownPluginError: with the nearest name.
    """
    if policy is not None:
        check_stack_names(policy)
    if drafter is not None:
        check_drafter_name(drafter)


def checkable(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Of a command's settings those that `check_settings` looks at."""
    return {name: settings[name] for name in CHECKED if name in settings}


def check_settings(
    *,
    target: str | None = None,
    drafter: str | None = None,
    policy: str | None = None,
    device: str | None = None,
    runner: str = "auto",
    exact: str | None = None,
    cache: str | None = None,
    tau: float | None = None,
    max_nodes: int | None = None,
    max_depth: int | None = None,
    max_branch: int = 16,
) -> Drafter | None:
    """Refuse what no model could make right.

    Returns:
        The registered drafter, or None where the text is a model's id or folder, which is there or can be fetched.

    Raises:
        DynaTreeError: what a session or the loading of a model would raise later.
    """
    from dynatree_core.cache.sink_cache import SinkWindow, refuse_beside
    from dynatree_core.models.load import check_model_name, resolve_device
    from dynatree_core.policy.build import build_stack
    from dynatree_core.request.arguments import fixed_width, resolved_limits

    if policy is not None:
        _, max_nodes = fixed_width(exact, max_nodes)
        resolved_limits(build_stack(policy), max_depth, max_nodes, tau, max_branch, ANY_VOCABULARY)
    kept = SinkWindow.parse(cache)
    if kept is not None:
        refuse_beside(kept, exact, None)
    where = resolve_device(device).type
    if runner == "cudagraph" and where != "cuda":
        raise ParameterError(
            f"the cudagraph runner is for models on a CUDA GPU, got one on {where}; take a --device with one, or "
            "use --runner auto"
        )
    if runner == "packed" and where != "cpu":
        raise ParameterError(
            f"the packed runner is for models on an x86-64 CPU, got one on {where}, {platform.machine()}; take "
            "--device cpu, or use --runner auto"
        )
    source = registered_drafter(drafter) if drafter is not None else None
    check_model_name(target)
    if drafter is not None and source is None:
        check_drafter_model(drafter)
    return source
