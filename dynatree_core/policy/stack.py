"""A policy stack: policies composed for one session, each asked by name and held to its contract.

Every policy is registered in a pluggy manager of its own and called through it, so that an answer or an exception
has an author, and two sessions share no state. The rules by which answers combine are in `hookspecs`.
"""

from __future__ import annotations

import copy
import functools
import inspect
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from types import FunctionType, MethodType, SimpleNamespace
from typing import Any, Generic, TypeVar

import attrs
import pluggy
import torch
from torch import Tensor

from dynatree_core.errors import (
    DrafterError,
    ForwardPassError,
    NonFiniteLogitsError,
    OutOfMemoryError,
    ParameterError,
    PolicyError,
    nearest_match,
)
from dynatree_core.plugins.foreign import others_code, raised
from dynatree_core.plugins.spec import PluginSpec, format_stack, parameter_values
from dynatree_core.policy import hookspecs
from dynatree_core.tree.frontier import Frontier
from dynatree_core.tree.token_tree import TokenTree
from dynatree_core.tree.verdict import StepReport

__all__ = ["Decision", "PolicyStack", "copied_policy", "hook_names", "implemented_hooks"]

# what the drafter or the target did wrong while a policy looked at the frontier is not the policy's fault
_NOT_THE_POLICY = (DrafterError, ForwardPassError, NonFiniteLogitsError, OutOfMemoryError)
_DECLARED = type(attrs.field())  # what attrs replaces when it makes a class
_MARK = f"{hookspecs.PROJECT_NAME}_impl"  # the attribute in which pluggy's marker leaves its options
_OF_PYTHON = (FunctionType, MethodType, classmethod, staticmethod)  # what pluggy takes for a hook


Value = TypeVar("Value", covariant=True)


@attrs.frozen(eq=False)
class Decision(Generic[Value]):
    """What a stack answers to one hook, and who voted what."""

    value: Value
    votes: Mapping[str, Tensor | int | None]  # policy -> its answer, in the order asked; who was not asked is not in it

    def __bool__(self) -> bool:
        raise TypeError("a decision is neither true nor false, got one in a condition; look at its `value`")

    @property
    def decider(self) -> str | None:
        """The last policy that had an opinion; None where nobody had."""
        return next((name for name in reversed([*self.votes]) if self.votes[name] is not None), None)


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
    return list(PolicyStack({type(policy).__name__: policy}, "").callers)


class PolicyStack:
    """Policies by name, in the order of the stack: the rightmost decides widths.

    A deep copy has policies of its own, a shallow one the same policies. Both, and what is pickled, begin as the
    policies are then.

    Args:
        policies: name -> policy. The stack takes them as they are and may see them change.
        text: the canonical spelling, for reports.

    Raises:
        PolicyError: a policy without hooks, with an unknown hook, or with arguments that a hook does not have.
    """

    def __init__(self, policies: Mapping[str, object], text: str) -> None:
        self.policies = dict(policies)
        self.text = text
        self._values = self._current_values()  # what the text says
        # hook -> [(policy, its caller)], in the order in which they are asked
        self.callers: defaultdict[str, list[tuple[str, pluggy.HookCaller]]] = defaultdict(list)
        for name, policy in self.policies.items():
            for caller in _register(name, policy):
                self.callers[caller.name].append((name, caller))
        for hook, callers in self.callers.items():
            if hook == "branch_factor":  # the rightmost decides
                callers.reverse()
            callers.sort(key=lambda named: _place(named[1]))

    def __str__(self) -> str:
        return self.text

    def __copy__(self) -> PolicyStack:
        return PolicyStack(self.policies, self._current_text())

    def __deepcopy__(self, memo: dict[int, Any]) -> PolicyStack:
        policies = {name: copied_policy(name, policy, memo) for name, policy in self.policies.items()}
        return PolicyStack(policies, self._current_text())

    def __reduce__(self) -> tuple[type[PolicyStack], tuple[dict[str, object], str]]:
        # the callers reach the very policies that they were made for, so they are made anew
        return PolicyStack, (self.policies, self._current_text())

    def _current_text(self) -> str:
        """The text; once a parameter was set, one that says the parameters as they are."""
        values = self._current_values()
        if values == self._values:
            return self.text
        return format_stack(PluginSpec(name, None, parameters) for name, parameters in values.items())

    def _current_values(self) -> dict[str, dict[str, Any]]:
        return {name: parameter_values(policy) for name, policy in self.policies.items()}

    def find(self, name: str) -> Any | None:
        """The policy of that name in this stack, or None. Its parameters may be set; they are checked."""
        return self.policies.get(name)

    def should_expand(self, frontier: Frontier) -> Decision[Tensor | bool]:
        """AND of all answers: one bool for all nodes, or bool [width]. After a plain False nobody else is asked."""
        value: Tensor | bool = True
        votes: dict[str, Tensor | int | None] = {}
        for name, call in self.callers["should_expand"]:
            with _blame(name, "should_expand"):
                answer = votes[name] = _only(call(frontier=frontier))
            if answer is False:
                return Decision(False, votes)
            if answer is None or answer is True:
                continue
            _check_tensor(answer, torch.bool, (frontier.width,), frontier.tree.device, name, "should_expand")
            value = answer if value is True else value & answer
        return Decision(value, votes)

    def branch_factor(self, frontier: Frontier) -> Decision[Tensor | int]:
        """The rightmost answer that is not None; one child where nobody has an opinion.

        The values of a tensor are not looked at here, which would cost a wait for the device: the caller
        checks them together with what else it transfers, and calls `refuse_branch_factor`.
        """
        votes: dict[str, Tensor | int | None] = {}
        for name, call in self.callers["branch_factor"]:
            with _blame(name, "branch_factor"):
                answer = votes[name] = call(frontier=frontier)
            if answer is None:
                continue
            if isinstance(answer, int) and not isinstance(answer, bool):
                if not 0 <= answer <= frontier.max_branch:
                    self.refuse_branch_factor(name, answer, frontier.max_branch)
            else:
                _check_tensor(answer, torch.int64, (frontier.width,), frontier.tree.device, name, "branch_factor")
            return Decision(answer, votes)
        return Decision(1, votes)

    def refuse_branch_factor(self, name: str | None, value: object, max_branch: int) -> None:
        """Raise the PolicyError for a branch factor out of range."""
        raise PolicyError(
            f"policy '{name}', hook branch_factor: a branch factor must be from 0 to max_branch={max_branch}, got "
            f"{value}; a larger max_branch can be given to the session"
        )

    def keep_nodes(self, tree: TokenTree) -> Decision[Tensor | None]:
        """AND of all answers, bool [nodes]; None when no policy has an opinion."""
        value: Tensor | None = None
        votes: dict[str, Tensor | int | None] = {}
        for name, call in self.callers["keep_nodes"]:
            with _blame(name, "keep_nodes"):
                answer = votes[name] = _only(call(tree=tree))
            if answer is not None:
                _check_tensor(answer, torch.bool, (tree.num_nodes,), tree.device, name, "keep_nodes")
                value = answer if value is None else value & answer
        return Decision(value, votes)

    def on_iteration_end(self, report: StepReport) -> None:
        """Tell every policy that wants to know, in the order of the stack."""
        for name, call in self.callers["on_iteration_end"]:
            with _blame(name, "on_iteration_end"):
                call(report=report, stack=self)

    def silenced(self) -> PolicyStack:
        """A stack of the same name that nobody speaks in: what a session falls back to."""
        return PolicyStack({}, self.text)


def _only(answers: list[Any]) -> Any:
    """One policy's answer, from pluggy's list, which leaves out None."""
    return answers[0] if answers else None


def copied_policy(name: str, policy: object, memo: dict[int, Any] | None = None) -> object:
    """A deep copy of a policy.

    Raises:
        ParameterError: it holds what cannot be copied.
    """
    try:
        return copy.deepcopy(policy, memo)
    except (TypeError, RuntimeError) as error:  # the latter of a tensor that autograd follows
        raise ParameterError(
            f"policy '{name}' must be copyable, since every session has its own, but {error}; leave such state out of "
            "it, or give it a __deepcopy__"
        ) from error


def _manager() -> pluggy.PluginManager:
    manager = pluggy.PluginManager(hookspecs.PROJECT_NAME)
    manager.add_hookspecs(hookspecs)
    return manager


def _register(name: str, policy: object) -> list[pluggy.HookCaller]:
    """A caller for each hook that the policy implements, reaching this policy alone."""
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


def _mark(attribute: object) -> dict[str, Any] | None:
    """What `hookimpl` has left on a function."""
    mark = getattr(attribute, _MARK, None) if callable(attribute) else None
    return mark if isinstance(mark, dict) else None


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


def _place(caller: pluggy.HookCaller) -> int:
    """-1 for a hook that is marked tryfirst, 1 for trylast, 0 for any other."""
    (impl,) = caller.get_hookimpls()
    return int(impl.trylast) - int(impl.tryfirst)


def _explain(error: Exception) -> str:
    """pluggy's own words; where a hook was misspelt, the nearest one."""
    text = " ".join(str(error).split())
    unknown = re.match("unknown hook '(.*?)'", text)
    return unknown[0] + nearest_match(unknown[1], hook_names()) if unknown else text


def _has_default(function: Callable[..., Any]) -> bool:
    parameters = inspect.signature(function).parameters.values()
    return any(parameter.default is not inspect.Parameter.empty for parameter in parameters)


def _blame(name: str, hook: str) -> AbstractContextManager[None]:
    """Turn whatever a policy raises into a PolicyError that names it."""
    return others_code(
        lambda error: PolicyError(f"policy '{name}', hook {hook}: raised {raised(error)}"), *_NOT_THE_POLICY
    )


def _check_tensor(
    answer: object, dtype: torch.dtype, shape: Sequence[int], device: torch.device, name: str, hook: str
) -> None:
    plain = {"branch_factor": "an int, ", "should_expand": "a bool, "}.get(hook, "")
    wanted = f"{plain}None or a {dtype} tensor of shape {list(shape)} on {device}"
    if not isinstance(answer, Tensor):
        got = f"{answer!r} ({type(answer).__name__})"
    elif answer.dtype != dtype or answer.shape != torch.Size(shape) or answer.device != device:
        got = f"{answer.dtype} of shape {list(answer.shape)} on {answer.device}"
    else:
        return
    raise PolicyError(f"policy '{name}', hook {hook}: must return {wanted}, got {got}")
