"""A policy stack: policies composed for one session, each asked by name and held to its contract.

Every policy is registered in a pluggy manager of its own and called through it, so that an answer or an exception
has an author, and two sessions share no state. The rules by which answers combine are in `hookspecs`.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
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
)
from dynatree_core.plugins.foreign import others_code, raised
from dynatree_core.plugins.spec import PluginSpec, format_stack, parameter_values
from dynatree_core.policy.registration import hook_callers
from dynatree_core.tree.frontier import Frontier
from dynatree_core.tree.token_tree import TokenTree
from dynatree_core.tree.verdict import StepReport

__all__ = ["Decision", "PolicyStack", "copied_policy"]

# what the drafter or the target did wrong while a policy looked at the frontier is not the policy's fault
_NOT_THE_POLICY = (DrafterError, ForwardPassError, NonFiniteLogitsError, OutOfMemoryError)

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
        self._values = self.parameters()  # what the text says
        # hook -> [(policy, its caller)], in the order in which they are asked
        self.callers: defaultdict[str, list[tuple[str, pluggy.HookCaller]]] = defaultdict(list)
        for name, policy in self.policies.items():
            for caller in hook_callers(name, policy):
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
        values = self.parameters()
        if values == self._values:
            return self.text
        return format_stack(PluginSpec(name, None, parameters) for name, parameters in values.items())

    def parameters(self) -> dict[str, dict[str, Any]]:
        """The policies' parameters as they are now, by policy and name."""
        return {name: parameter_values(policy) for name, policy in self.policies.items()}

    def find(self, name: str) -> Any | None:
        """The policy of that name in this stack, or None. Its parameters may be set; they are checked."""
        return self.policies.get(name)

    @property
    def is_capturable(self) -> bool:
        """Whether every policy promises what padded trees need: see "Hooks that a GPU need not wait for" in docs/hooks.

        A policy promises it by an attribute `is_capturable = True`.
        """
        return all(getattr(policy, "is_capturable", False) is True for policy in self.policies.values())

    @property
    def reads_on_host(self) -> bool:
        """Whether a policy says by an attribute `reads_on_host = True` that it reads numbers at each level."""
        return any(getattr(policy, "reads_on_host", False) is True for policy in self.policies.values())

    @property
    def can_draft_on_host(self) -> bool:
        """Whether trees may grow in the host's memory beside a GPU: see "Hooks that read numbers" in docs/hooks.

        Each policy has to be marked `reads_on_host` or `is_capturable`: both take the device from what they are shown.
        """
        marks = ("reads_on_host", "is_capturable")
        return all(any(getattr(policy, mark, False) is True for mark in marks) for policy in self.policies.values())

    @property
    def is_recordable(self) -> bool:
        """Whether every policy that has a say in a tree promises that a CUDA graph may repeat what it says.

        A policy promises it by an attribute `is_recordable = True`: its answers follow from the tree, the drafter's
        proposals and its parameters, and from nothing else that is on the host but what its `graph_key` says.
        Parameters are known of attrs classes, if they are numbers and strings.
        """
        hooks = ("should_expand", "branch_factor", "keep_nodes")
        heard = [self.policies[one] for one in {name for hook in hooks for name, _ in self.callers[hook]}]
        return self.is_capturable and all(map(_is_recordable, heard))

    @property
    def max_width(self) -> int | None:
        """Nodes of one level that any policy which may decide widths wants, by their `max_width`; None: unknown."""
        known = [_promised_width(self.policies[name]) for name, _ in self.callers["branch_factor"]]
        widths = [width for width in known if width is not None]
        if len(widths) < len(known):
            return None
        return max(widths, default=1)  # where nobody answers, each node gets one child

    def max_width_of(self, name: str | None, depth: int) -> int | None:
        """Nodes that one policy wants at most as children of a level at this depth; None: unknown."""
        return _promised_width(self.policies.get(name or ""), depth)

    @property
    def max_kept(self) -> int | None:
        """Drafted nodes that `keep_nodes` leaves at most, by the policies' `max_kept`; None: unknown."""
        known = [_promised(self.policies[name], "max_kept") for name, _ in self.callers["keep_nodes"]]
        return min((most for most in known if most is not None), default=None)

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


def _is_recordable(policy: object) -> bool:
    """Whether a policy promises it, and all parameters that its answers follow from are known."""
    kind = type(policy)
    if getattr(policy, "is_recordable", False) is not True or not attrs.has(kind):
        return False
    num_parameters: int = sum(field.init for field in attrs.fields(kind))
    return len(parameter_values(policy)) == num_parameters


def _promised(policy: object, name: str) -> int | None:
    """A number of nodes that a policy promises not to exceed; None where it says nothing."""
    return _number(getattr(policy, name, None))


def _promised_width(policy: object, depth: int | None = None) -> int | None:
    """The same of a policy's `max_width`, of the level below this depth; None: of any."""
    most = getattr(policy, "max_width", None)
    if not isinstance(most, tuple):
        return _number(most)
    widths = most if depth is None else most[depth : depth + 1]
    if not widths or not all(width == 0 or _number(width) for width in widths):
        return None
    return max(1, *map(int, widths))  # a level that leads to nothing needs no more


def _number(most: object) -> int | None:
    return most if isinstance(most, int) and not isinstance(most, bool) and most > 0 else None


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


def _place(caller: pluggy.HookCaller) -> int:
    """-1 for a hook that is marked tryfirst, 1 for trylast, 0 for any other."""
    (impl,) = caller.get_hookimpls()
    return int(impl.trylast) - int(impl.tryfirst)


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
