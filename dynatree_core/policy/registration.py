"""Finding a policy's hooks and holding them to their specifications: pluggy does it, once for each class.

Looking for marks on every attribute of a policy takes a millisecond, and each generation has policies of its own. So
what was found on a class is kept, and its next instances are registered by it.
"""

from __future__ import annotations

import functools
import inspect
import re
import weakref
from collections.abc import Callable, Iterator, Mapping
from types import FunctionType, MemberDescriptorType, MethodType, SimpleNamespace
from typing import Any, cast

import attrs
import pluggy

from dynatree_core.errors import PolicyError, nearest_match
from dynatree_core.policy import hookspecs

__all__ = ["hook_callers", "hook_names", "implemented_hooks"]

_DECLARED = type(attrs.field())  # what attrs replaces when it makes a class
_MARK = f"{hookspecs.PROJECT_NAME}_impl"  # the attribute in which pluggy's marker leaves its options
_OF_PYTHON = (FunctionType, MethodType, classmethod, staticmethod)  # what pluggy takes for a hook


@functools.cache  # every policy of every session is held against them
def hook_names() -> list[str]:
    """The hooks that a policy can implement."""
    specified = vars(_manager().hook)
    return [name for name in vars(hookspecs) if name in specified]  # in the order of the file


def implemented_hooks(policy: object) -> list[str]:
    """The hooks that one policy implements.

    Raises:
        PolicyError: it implements none, or one that does not exist.
    """
    return [caller.name for caller in hook_callers(type(policy).__name__, policy)]


def hook_callers(name: str, policy: object) -> list[pluggy.HookCaller]:
    """A caller for each hook that the policy implements, reaching this policy alone.

    Args:
        name: the policy's in its stack, for messages.

    Raises:
        PolicyError: a policy without hooks, with an unknown hook, or with arguments that a hook does not have.
    """
    known = _known_classes.get(type(policy))
    if known is not None and known.describes(policy):
        manager: pluggy.PluginManager = _ManagerOfKnown(known)
        manager.add_hookspecs(hookspecs)
        manager.register(policy, name=name)
        return manager.get_hookcallers(policy) or []
    callers = _checked_callers(name, policy)
    if (kept := _KnownClass.of(policy, callers)) is not None:
        _known_classes[type(policy)] = kept
    return callers


@attrs.frozen(eq=False)
class _KnownClass:
    """What pluggy has found on a class of policies all of whose hooks are functions of the class."""

    marks: Mapping[str, pluggy.HookimplOpts]  # attribute -> what `hookimpl` has left on it
    specs: Mapping[str, pluggy.HookspecOpts]  # hook that it implements -> what its specification says
    slots: tuple[str, ...]  # where an instance without a `__dict__` has its values

    @classmethod
    def of(cls, policy: object, callers: list[pluggy.HookCaller]) -> _KnownClass | None:
        """None where an instance, or a compiled class, has hooks in a way of its own."""
        kind = type(policy)
        marks = {name: mark for name in dir(kind) if (mark := _mark_of_function(kind, name)) is not None}
        specs = {caller.name: caller.spec.opts for caller in callers if caller.spec is not None}
        slots = tuple(
            name
            for part in kind.__mro__
            for name, value in vars(part).items()
            if isinstance(value, MemberDescriptorType)
        )
        known = cls(marks, specs, slots)
        return known if len(marks) == len(callers) and known.describes(policy) else None

    def describes(self, policy: object) -> bool:
        """Whether the policy's hooks are these: its class may have been changed, and an instance may have its own."""
        names = {*self.marks, *hook_names()}
        is_class_the_same = all(_mark_of_function(type(policy), name) is self.marks.get(name) for name in names)
        return is_class_the_same and not any(
            name in names or _mark(value) is not None for name, value in self._own_values(policy)
        )

    def _own_values(self, policy: object) -> Iterator[tuple[str, object]]:
        """The attributes that are not the class's, without asking the policy's own `__getattr__`."""
        for name in self.slots:
            try:
                yield name, object.__getattribute__(policy, name)
            except AttributeError:  # not set
                continue
        try:
            values = object.__getattribute__(policy, "__dict__")
        except AttributeError:  # it has slots alone
            return
        yield from values.items()


_known_classes: weakref.WeakKeyDictionary[type, _KnownClass] = weakref.WeakKeyDictionary()


class _ManagerOfKnown(pluggy.PluginManager):
    """A manager for one policy of a known class, which looks nothing up on it."""

    def __init__(self, known: _KnownClass) -> None:
        super().__init__(hookspecs.PROJECT_NAME)
        self._known = known

    def parse_hookimpl_opts(self, plugin: object, name: str) -> pluggy.HookimplOpts | None:
        return self._known.marks.get(name)

    def parse_hookspec_opts(self, module_or_class: object, name: str) -> pluggy.HookspecOpts | None:
        return self._known.specs.get(name)


def _manager() -> pluggy.PluginManager:
    manager = pluggy.PluginManager(hookspecs.PROJECT_NAME)
    manager.add_hookspecs(hookspecs)
    return manager


def _checked_callers(name: str, policy: object) -> list[pluggy.HookCaller]:
    """The callers of a policy that is looked at from end to end."""
    if isinstance(policy, type):
        raise PolicyError(
            f"policy '{name}' must be an instance, got the class {policy.__name__}; write {policy.__name__}()"
        )
    manager = _manager()
    try:
        manager.register(_shown(policy), name=name)
        manager.check_pending()
    except (pluggy.PluginValidationError, ValueError) as error:
        raise PolicyError(f"policy '{name}' cannot be used: {_explain(error)}") from error
    callers = manager.get_hookcallers(manager.get_plugin(name)) or []
    _refuse_unmade(name, policy)
    _refuse_unmarked(name, policy, {caller.name for caller in callers})
    if not callers:
        raise PolicyError(
            f"policy '{name}' ({type(policy).__name__}) must implement at least one of {', '.join(hook_names())}, "
            "got none; mark its methods with @hookimpl"
        )
    for caller in callers:
        if len(caller.get_hookimpls()) > 1:
            raise PolicyError(
                f"policy '{name}', hook {caller.name}: a policy implements a hook once, got "
                f"{len(caller.get_hookimpls())} methods for it; keep one"
            )
        for impl in caller.get_hookimpls():
            if _has_default(impl.function):
                raise PolicyError(
                    f"policy '{name}', hook {caller.name}: arguments must have no default values, because pluggy "
                    "never passes an argument that has one; remove the default"
                )
    return callers


def _shown(policy: object) -> Any:
    """What pluggy is shown: the policy itself, or its hooks as functions of Python where it is a compiled class.

    pluggy takes no other functions for hooks. Those of Cython have a signature and marks, but a type of their own.
    """
    marks = {name: _mark(inspect.getattr_static(policy, name, None)) for name in dir(type(policy))}
    hooks = {name: mark for name, mark in marks.items() if mark is not None}
    compiled = {name for name in hooks if not isinstance(inspect.getattr_static(policy, name), _OF_PYTHON)}
    if not compiled:
        return policy
    shown = SimpleNamespace(**{name: getattr(policy, name) for name in hooks})
    for name in compiled:
        function = _python_function(getattr(policy, name), hooks[name].get("specname") or name)
        setattr(function, _MARK, hooks[name])
        setattr(shown, name, function)
    return shown


def _mark(attribute: object) -> pluggy.HookimplOpts | None:
    """What `hookimpl` has left on a function."""
    mark = getattr(attribute, _MARK, None) if callable(attribute) else None
    return cast(pluggy.HookimplOpts, mark) if isinstance(mark, dict) else None


def _mark_of_function(kind: type, name: str) -> pluggy.HookimplOpts | None:
    """The mark of a class's attribute, if that is a function of Python."""
    attribute = next((vars(part)[name] for part in kind.__mro__ if name in vars(part)), None)
    return _mark(attribute) if isinstance(attribute, FunctionType) else None


def _python_function(method: Callable[..., Any], hook: str) -> Callable[..., Any]:
    """A function of Python that passes the same arguments on; the hook's own where the method does not tell any."""
    try:
        parameters = list(inspect.signature(method).parameters.values())
    except (ValueError, TypeError):
        specified = vars(hookspecs).get(hook)
        parameters = list(inspect.signature(specified).parameters.values()) if specified is not None else []
    names = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    # a default is refused later, whatever it is
    declared = [name if p.default is p.empty else f"{name}=None" for name, p in zip(names, parameters, strict=False)]
    passed = ", ".join(f"{name}={name}" for name in names)
    function: Callable[..., Any] = eval(f"lambda {', '.join(declared)}: method({passed})", {"method": method})
    return function


def _refuse_unmade(name: str, policy: object) -> None:
    """Refuse a class whose parameters were declared and never made, so that they are no values."""
    declared = [
        parameter
        for part in type(policy).__mro__
        for parameter, value in vars(part).items()
        if isinstance(value, _DECLARED)
    ]
    if declared:
        raise PolicyError(
            f"policy '{name}' ({type(policy).__name__}): {', '.join(declared)} must be parameters made by attrs, got a "
            "class that attrs did not make; put @attrs.define above the class"
        )


def _refuse_unmarked(name: str, policy: object, marked: set[str]) -> None:
    """Refuse methods with the name of a hook that nobody would ever ask."""
    for hook in hook_names():
        method = inspect.getattr_static(policy, hook, None)
        if hook not in marked and (callable(method) or isinstance(method, classmethod)):
            raise PolicyError(
                f"policy '{name}' ({type(policy).__name__}) has a method {hook} that is not marked, so it would never "
                "be asked; put @hookimpl above it, or rename it"
            )


def _explain(error: Exception) -> str:
    """pluggy's own words; where a hook was misspelt, the nearest one."""
    text = " ".join(str(error).split())
    unknown = re.match("unknown hook '(.*?)'", text)
    return unknown[0] + nearest_match(unknown[1], hook_names()) if unknown else text


def _has_default(function: Callable[..., Any]) -> bool:
    parameters = inspect.signature(function).parameters.values()
    return any(parameter.default is not inspect.Parameter.empty for parameter in parameters)
