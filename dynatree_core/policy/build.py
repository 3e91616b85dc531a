"""Building a policy stack from a string, objects, or a list of these."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence

from dynatree_core.errors import StackSyntaxError
from dynatree_core.plugins.presets import expand_preset
from dynatree_core.plugins.registry import POLICIES, make_plugin
from dynatree_core.plugins.spec import PluginSpec, format_stack, parameter_values, parse_stack
from dynatree_core.policy.stack import PolicyStack, copied_policy

__all__ = ["build_stack"]


def build_stack(policy: str | object | Sequence[str | object]) -> PolicyStack:
    """A fresh stack for one session.

    Args:
        policy: a stack's string, a policy object, a stack that was built before, a `PluginSpec`, or a list of these.
            Strings are built anew; objects and stacks are copied as they are now, so that what one session learns is
            not seen by another.

    Raises:
        StackSyntaxError: a text that is no stack, or a policy that is named twice.
        UnknownPluginError: a name that no installed package provides.
        ParameterError: an unknown parameter, or a value outside its type or range.
        PolicyError: an object without usable hooks.
    """
    parts = list(policy) if isinstance(policy, list | tuple) else [policy]
    if not parts:
        raise StackSyntaxError("a policy stack must name at least one policy, got an empty list")
    policies: dict[str, object] = {}
    texts = []
    for part in parts:
        if isinstance(part, PolicyStack):
            mine = copy.deepcopy(part)
            if not mine.policies:
                raise StackSyntaxError(
                    f"a policy stack must have at least one policy, got the stack '{part}' from which an error has "
                    "taken them; build another one from its text"
                )
            texts.append(mine.text)
            named = list(mine.policies.items())
        elif isinstance(part, str | PluginSpec):
            specs = parse_stack(str(part))
            texts.append(format_stack(specs))
            named = [(spec.name, make_plugin(POLICIES, spec)) for given in specs for spec in expand_preset(given)]
        else:
            name = _policy_name(part)
            texts.append(str(PluginSpec(name, None, parameter_values(part))))
            named = [(name, copied_policy(name, part))]
        for name, instance in named:
            if name in policies:
                raise StackSyntaxError(f"a policy can stand in a stack once, got '{name}' twice in {policy!r}")
            policies[name] = instance
    return PolicyStack(policies, "+".join(texts))


def _policy_name(policy: object) -> str:
    """A policy object's name: its `name` if that is a string, else its class's name in snake case."""
    if isinstance(policy, type):
        return policy.__name__
    name = getattr(policy, "name", None)
    return name if isinstance(name, str) else re.sub(r"(?<!^)(?=[A-Z])", "_", type(policy).__name__).lower()
