"""Whether a model runs code of transformers, torch and this package only, or anybody else's too.

Classes and functions are attributed by the module that defines them. Functions are looked for where speed-up packages
put theirs: in the place of a class's method, of a function that a model's module calls, of an attention function, or of
one of torch's.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from typing import Any

import attrs
import torch
from torch import nn
from transformers import PreTrainedConfig

__all__ = ["Replacement", "function_of", "is_known_class", "is_others", "own_config", "replacements"]

_PACKAGES = frozenset({"torch", "transformers", "dynatree_core", "dynatree_policies", "dynatree_bench"})
# whose decorators and helpers transformers' models use
_HELPERS = frozenset({"accelerate", "kernels"}) | sys.stdlib_module_names - {"__main__"}
_NOT_OTHERS = _PACKAGES | _HELPERS
_MODELS = "transformers.models."
# torch's layers of which each row of the output is made of the same row of the input; torch has others, such as
# GRU, TransformerEncoderLayer or InstanceNorm1d
_ROW_BY_ROW = frozenset(
    {nn.Linear, nn.Embedding, nn.LayerNorm, nn.RMSNorm, nn.Identity, nn.Dropout, nn.Module}
    | {nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict, nn.Sequential}
    | {nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Mish, nn.Tanh, nn.Sigmoid, nn.LeakyReLU, nn.Softplus, nn.ELU}
)
_FUNCTIONS = (types.FunctionType, types.MethodType, types.BuiltinFunctionType, staticmethod, classmethod)


@attrs.frozen(eq=False)
class Replacement:
    """A function of another package in the place of one that a model runs."""

    place: str  # such as "transformers.models.llama.modeling_llama.LlamaMLP.forward"
    function: Any


def own_config(part: nn.Module) -> PreTrainedConfig | None:
    """The configuration that a module holds itself, such as the layer of another model; None: it holds none."""
    held = vars(part).get("config")
    return held if isinstance(held, PreTrainedConfig) else None


def is_known_class(kind: type) -> bool:
    """Whether a module of this class is transformers' or ours, or one of torch's that keeps rows apart."""
    return kind in _ROW_BY_ROW or kind.__module__.startswith(("transformers.", "dynatree_core.", "torch._dynamo."))


def is_others(function: Any) -> bool:
    """Whether somebody else than transformers, torch and this package has written a function, or what wraps it."""
    function = function_of(function)
    names = [getattr(function, "__module__", None)]
    if isinstance(function, types.FunctionType):
        names.append(function.__globals__.get("__name__"))  # functools.wraps copies the module's name
    return any(name is None or name.partition(".")[0] not in _NOT_OTHERS for name in names)


def function_of(method: Any) -> Any:
    """The function inside of a method, staticmethod or classmethod; any other object unchanged."""
    return getattr(method, "__func__", method)


def replacements(model: nn.Module) -> Iterator[Replacement]:
    """Functions of somebody else's that the model runs as if they were transformers' or torch's."""
    kinds = dict.fromkeys(type(part) for part in model.modules())
    classes = dict.fromkeys(base for kind in kinds for base in kind.__mro__)
    for kind in classes:
        names = vars(kind) if kind.__module__.startswith(_MODELS) else ("forward", "__call__")
        if is_known_class(kind) or kind.__module__.startswith("torch."):
            yield from _in(kind, f"{kind.__module__}.{kind.__qualname__}", names)
    for name in sorted({kind.__module__ for kind in classes if kind.__module__.startswith(_MODELS)}):
        yield from _in(sys.modules[name], name, vars(sys.modules[name]))
    config: Any = model.config
    modeling: Any = sys.modules.get("transformers.modeling_utils")  # not imported: nobody has registered any attention
    attention = modeling and modeling.ALL_ATTENTION_FUNCTIONS.get(config._attn_implementation)
    if attention is not None and is_others(attention):
        yield Replacement(f"ALL_ATTENTION_FUNCTIONS['{config._attn_implementation}']", attention)
    yield from _in(nn.functional, "torch.nn.functional", vars(nn.functional))
    yield from _in(torch, "torch", ("matmul", "bmm", "softmax"))


def _in(owner: Any, where: str, names: Any) -> Iterator[Replacement]:
    for name in names:
        function = vars(owner).get(name)
        if isinstance(function, _FUNCTIONS) and is_others(function):
            yield Replacement(f"{where}.{name}", function)
