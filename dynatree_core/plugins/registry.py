"""Finding and making plugins: policies, presets and drafters that installed packages provide.

Discovery is global (entry points); activity is not: every session gets instances of its own. The built-in
plugins come through the same door as anyone else's.

What is installed can be asked without torch, which is imported where a plugin is made.
"""

from __future__ import annotations

import functools
import inspect
from collections import defaultdict
from collections.abc import Mapping
from importlib.metadata import EntryPoint
from typing import Any, cast

from dynatree_core.errors import (
    DynaTreeError,
    ParameterError,
    PluginConflictError,
    PluginLoadError,
    UnknownPluginError,
    nearest_match,
)
from dynatree_core.plugins.distributions import entry_points, package_of
from dynatree_core.plugins.foreign import others_code, raised
from dynatree_core.plugins.spec import (
    NAME_RULE,
    ParameterValue,
    PluginSpec,
    canonical_name,
    is_name,
)

__all__ = [
    "DRAFTERS",
    "POLICIES",
    "PRESETS",
    "RUNNERS",
    "check_policy_name",
    "check_runner_name",
    "load_plugin",
    "make_plugin",
    "plugin_parameters",
    "plugin_table",
    "plugin_variants",
    "required_parameters",
    "runner_names",
]

POLICIES = "dynatree.policies"  # entry-point group: name -> policy class
PRESETS = "dynatree.presets"  # name -> a stack string
DRAFTERS = "dynatree.drafters"  # name -> Drafter class
RUNNERS = "dynatree.runners"  # name -> Runner class


@functools.cache
def plugin_table(group: str) -> dict[str, list[EntryPoint]]:
    """Everything that is installed under a group, by name; more than one entry for a name is a conflict.

    Names are as stack strings have them: an entry point `my-policy` is called `my_policy`. Read once per process: it
    costs milliseconds, and a package installed while a program runs is not seen by it.
    """
    table: defaultdict[str, list[EntryPoint]] = defaultdict(list)
    for entry_point in sorted(entry_points(group=group), key=lambda entry: entry.name):
        table[canonical_name(entry_point.name)].append(entry_point)
    return dict(table)


def load_plugin(group: str, name: str) -> Any:
    """The object behind a name.

    Raises:
        UnknownPluginError: nobody provides it; the message lists the known names and the nearest.
        PluginConflictError: two packages provide it.
        PluginLoadError: its package cannot be imported, or has something else there.
    """
    table, name = plugin_table(group), canonical_name(name)
    if name not in table:
        kind = group.rpartition(".")[2]
        raise UnknownPluginError(
            f"'{name}' is not among the installed {kind}{nearest_match(name, table)}; known are: {', '.join(table)}"
        )
    entry, *others = table[name]
    if others:
        sources = " and ".join(f"{package_of(one)[0]} ({one.value})" for one in table[name])
        raise PluginConflictError(f"a plugin's name must be unique, but '{name}' comes from {sources}; uninstall one")
    if not is_name(name):
        raise PluginLoadError(
            f"a plugin's name must be one that can be written in a stack, {NAME_RULE}, got '{entry.name}' of "
            f"{package_of(entry)[0]}; rename its entry point"
        )
    with others_code(
        lambda error: PluginLoadError(
            f"'{name}' is installed but cannot be imported ({entry.value}: {raised(error)}); repair or uninstall it"
        )
    ):
        plugin = entry.load()
    is_right, wanted = (isinstance(plugin, str), "a string") if group == PRESETS else (callable(plugin), "a class")
    if not is_right:
        raise PluginLoadError(
            f"'{name}' of {group} must be {wanted}, got {type(plugin).__name__} ({entry.value}); repair the "
            "entry point or uninstall it"
        )
    return plugin


def plugin_parameters(plugin: type) -> dict[str, ParameterValue]:
    """A plugin's parameters with their defaults, from its constructor's signature; None where one is required.

    {} for a compiled class that does not tell its signature: its constructor takes or refuses what is given.
    """
    return _with_defaults(_parameters(plugin) or [])


def required_parameters(plugin: type) -> list[str]:
    """The parameters that have no default."""
    return _without_default(_parameters(plugin) or [])


def _with_defaults(parameters: list[inspect.Parameter]) -> dict[str, ParameterValue]:
    return {p.name: None if p.default is p.empty else p.default for p in parameters}


def _without_default(parameters: list[inspect.Parameter]) -> list[str]:
    return [p.name for p in parameters if p.default is p.empty]


def _parameters(plugin: type) -> list[inspect.Parameter] | None:
    """Those that have a name of their own; None for a compiled class, such as one of Cython, that does not tell."""
    try:
        parameters = inspect.signature(plugin).parameters.values()
    except (ValueError, TypeError):
        return None
    return [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


def plugin_variants(plugin: type) -> Mapping[str, Mapping[str, ParameterValue]]:
    """A plugin's named parameter sets: its class attribute `variants`, if it has one.

    Raises:
        PluginLoadError: it is something else.
    """
    variants = getattr(plugin, "variants", {})
    if not isinstance(variants, Mapping) or not all(isinstance(values, Mapping) for values in variants.values()):
        raise PluginLoadError(
            f"{plugin.__name__}.variants must map names to parameters, got {type(variants).__name__}; annotate it as "
            "ClassVar or not at all, since attrs makes a field of anything else"
        )
    return variants


def check_policy_name(name: str) -> None:
    """Refuse a name that no installed policy has.

    Raises:
        UnknownPluginError.
    """
    if name not in plugin_table(POLICIES):
        known = [*plugin_table(POLICIES), *plugin_table(PRESETS)]
        raise UnknownPluginError(
            f"'{name}' is not an installed policy or preset{nearest_match(name, known)}; known are: {', '.join(known)}"
        )


def runner_names() -> list[str]:
    """What may be named as a runner: the installed ones, and "auto", which chooses among them."""
    return ["auto", *plugin_table(RUNNERS)]


def check_runner_name(name: str) -> None:
    """Refuse a name that is none of a runner.

    Raises:
        UnknownPluginError.
    """
    known = runner_names()
    if not isinstance(name, str) or canonical_name(name) not in known:
        raise UnknownPluginError(
            f"runner must be one of {', '.join(known)}, got {name!r}{nearest_match(str(name), known)}"
        )


def make_plugin(group: str, spec: PluginSpec) -> object:
    """An instance of a plugin: the class's defaults, then the variant's values, then those of the string."""
    if group == POLICIES:
        check_policy_name(spec.name)
    plugin = load_plugin(group, spec.name)
    variants = plugin_variants(plugin)
    if spec.variant is not None and spec.variant not in variants:
        raise UnknownPluginError(
            f"'{spec.name}' has no variant '{spec.variant}'{nearest_match(spec.variant, variants)}; "
            f"known are: {', '.join(variants) or 'none'}"
        )
    told = _parameters(plugin)
    known_parameters = _with_defaults(told or [])
    for name in spec.parameters:
        if told is not None and name not in known_parameters:
            raise ParameterError(
                f"'{spec.name}' has no parameter '{name}'{nearest_match(name, known_parameters)}; "
                f"known are: {', '.join(known_parameters) or 'none'}"
            )
    values = {**variants.get(spec.variant or "", {}), **spec.parameters}
    missing = [name for name in _without_default(told or []) if name not in values]
    if missing:
        raise ParameterError(
            f"'{spec.name}' needs a value for {', '.join(missing)}, as in '{spec.name}({missing[0]}=...)'"
        )
    with others_code(lambda error: _not_made(spec, error)):
        return cast(object, plugin(**values))


def _not_made(spec: PluginSpec, error: BaseException) -> DynaTreeError:
    """What a constructor's error is to those who wrote the stack: its values are wrong, or its package is."""
    if isinstance(error, DynaTreeError) and not isinstance(error, ParameterError):
        return error
    if isinstance(error, TypeError | ValueError):
        return ParameterError(f"'{spec}': {error}")
    return PluginLoadError(
        f"'{spec}' cannot be made, its constructor raised {raised(error)}; repair or uninstall its package"
    )
