"""Policies that are compiled classes, such as Cython makes."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

import pytest
from fake_package import package

from dynatree_core import build_stack, generate, hookimpl
from dynatree_core.errors import ParameterError, PolicyError
from dynatree_core.plugins.registry import (
    POLICIES,
    load_plugin,
    plugin_parameters,
)
from dynatree_core.policy.registration import implemented_hooks
from dynatree_core.testing.models import tiny_model

__all__ = ["package"]  # fixtures


class CompiledFunction:
    """As Cython makes functions: of a type of its own, which binds, takes attributes and has a signature."""

    def __init__(self, function: Callable[..., Any]) -> None:
        functools.update_wrapper(self, function)
        del self.__wrapped__
        self.function = function
        self.__signature__ = inspect.signature(function)

    def __get__(self, instance: object, owner: type) -> Any:
        return self if instance is None else types.MethodType(self, instance)

    def __call__(self, *args: Any, **named: Any) -> Any:
        return self.function(*args, **named)


class Secretive(type):
    """A type that tells no signature, as extension types do."""

    @property
    def __signature__(cls) -> inspect.Signature:
        raise ValueError(f"no signature found for builtin type {cls}")


def compiled(base: type = type) -> type:
    @hookimpl
    @CompiledFunction
    def branch_factor(self: Any, frontier: Any) -> int:
        return int(self.width)

    @hookimpl
    def on_iteration_end(self: Any, report: Any) -> None:
        self.num_reports += 1

    def make(self: Any, width: int = 2) -> None:
        self.width, self.num_reports = width, 0

    return base("P", (), {"__init__": make, "branch_factor": branch_factor, "on_iteration_end": on_iteration_end})


@pytest.mark.parametrize("base", [type, Secretive])
def test_a_compiled_class_works(base: type, package: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = compiled(base)
    package("compiled")
    monkeypatch.setattr(load_plugin(POLICIES, "compiled").__module__ + ".P", policy)
    assert set(implemented_hooks(policy())) == {"branch_factor", "on_iteration_end"}
    stack = build_stack("compiled(width=3)")
    target = tiny_model("llama")
    result = generate(target, target, [1, 2, 3], policy="compiled(width=3)", max_new_tokens=6)
    assert result.token_ids == generate(target, None, [1, 2, 3], policy="autoregressive", max_new_tokens=6).token_ids
    assert result.report.num_drafted_nodes > 0
    assert stack.find("compiled").width == 3
    assert plugin_parameters(policy) == ({"width": 2} if base is type else {})
    with pytest.raises(ParameterError, match="compiled"):
        build_stack("compiled(wdith=3)")


def test_a_compiled_hook_is_held_to_its_contract() -> None:
    def with_hook(function: Callable[..., Any]) -> object:
        return type("P", (), {function.__name__: hookimpl(CompiledFunction(function))})()

    def branch_factor(self: Any, frontier: Any, tree: Any) -> int:
        return 1

    with pytest.raises(PolicyError, match="tree"):
        implemented_hooks(with_hook(branch_factor))

    def keep_nodes(self: Any, tree: Any = None) -> None:
        return None

    with pytest.raises(PolicyError, match="no default values"):
        implemented_hooks(with_hook(keep_nodes))
