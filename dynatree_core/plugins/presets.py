"""Presets: names that stand for stacks, and whether the names in a stack are installed. Without torch."""

from __future__ import annotations

import attrs

from dynatree_core.errors import (
    ParameterError,
    PluginConflictError,
    PluginLoadError,
    StackSyntaxError,
    UnknownPluginError,
    nearest_match,
)
from dynatree_core.plugins.registry import (
    POLICIES,
    PRESETS,
    check_policy_name,
    load_plugin,
    plugin_table,
    plugin_variants,
)
from dynatree_core.plugins.spec import PluginSpec, format_stack, parse_stack

__all__ = ["check_stack_names", "expand_preset"]


def check_stack_names(policy: str) -> None:
    """Refuse a stack's string that cannot be read or names what is not installed; no policy is imported.

    Raises:
        StackSyntaxError, UnknownPluginError.
    """
    for spec in parse_stack(policy):
        if spec.name not in plugin_table(PRESETS):
            check_policy_name(spec.name)


def expand_preset(spec: PluginSpec, within: tuple[str, ...] = ()) -> list[PluginSpec]:
    """The policies that a preset stands for; any other spec stands for itself.

    A preset's variant is the variant of each of its policies that has one of that name. A preset may name others;
    `within` are those that it is expanded in.
    """
    if spec.name not in plugin_table(PRESETS):
        return [spec]
    if spec.name in plugin_table(POLICIES):
        raise PluginConflictError(
            f"'{spec.name}' must be a policy or a preset, but is installed as both; uninstall one"
        )
    if spec.parameters:
        raise ParameterError(
            f"a preset takes no parameters, got '{spec}'; write out its policies: "
            f"{format_stack(expand_preset(PluginSpec(spec.name, spec.variant)))}"
        )
    if spec.name in within:
        raise PluginLoadError(f"a preset must not stand for itself, got {' -> '.join((*within, spec.name))}")
    try:
        parts = parse_stack(load_plugin(PRESETS, spec.name))
    except StackSyntaxError as error:
        raise PluginLoadError(f"the preset '{spec.name}' cannot be read: {error}; repair or uninstall it") from error
    specs = [policy for part in parts for policy in expand_preset(part, (*within, spec.name))]
    if spec.variant is None:
        return specs
    variants = {spec.name: plugin_variants(load_plugin(POLICIES, spec.name)) for spec in specs}
    known = sorted({variant for of_policy in variants.values() for variant in of_policy})
    if spec.variant not in known:
        raise UnknownPluginError(
            f"preset '{spec.name}' has no variant '{spec.variant}'{nearest_match(spec.variant, known)}; "
            f"known are: {', '.join(known) or 'none'}"
        )
    return [attrs.evolve(s, variant=spec.variant) if spec.variant in variants[s.name] else s for s in specs]
