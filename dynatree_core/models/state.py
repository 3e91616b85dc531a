"""The state of a model object: whether transformers made all of it, and whether it was changed since an earlier look.

A packed copy, a probe's result or cached rows are valid as long as the state is equal. It consists of weights, plain
attributes of modules (numbers, names, and lists and dicts of them, such as a LoRA layer's active adapters), hooks,
replaced functions, the configuration, and those that parts have of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from dynatree_core.models.authorship import is_known_class, own_config, replacements
from dynatree_core.models.comparable import (
    Seen,
    classes_state,
    comparable,
    hooks_state,
    is_plain,
    is_small,
    known_parts,
    tensor_state,
)

__all__ = [
    "can_infer",
    "foreign_parts",
    "hooks_of",
    "is_plain",
    "is_replayable",
    "is_untouched",
    "says_replayable",
    "state_of",
    "without_gradients",
]

_WRAPPED = ("base_layer", "original_module")  # attributes in which layers of PEFT hold the layer that they wrap
_NO_STATE = frozenset(vars(nn.Module())) - {"training"}  # torch's own attributes of a module


def can_infer(model: nn.Module) -> bool:
    """Whether the model's passes may run in torch's inference mode, in which some quantised tensors have no views."""
    return all(map(is_plain, _tensors(model)))


def without_gradients(*models: nn.Module) -> torch.inference_mode | torch.no_grad:
    """A context for passes of these models: inference mode where all of them can, else the slower no_grad."""
    return torch.inference_mode() if all(map(can_infer, models)) else torch.no_grad()


def is_untouched(model: nn.Module, is_fine: Callable[[object], bool] = lambda code: False) -> bool:
    """Whether only code of transformers, torch and this package runs in a model, so that a copy computes the same.

    Anybody else's class, hook or forward, such as a LoRA layer, may have state that a copy would not follow.

    Args:
        model: the model.
        is_fine: given somebody else's class or hook, whether it may stay.
    """
    return next(_foreign_code(model, is_fine), None) is None


def is_replayable(model: nn.Module) -> bool:
    """Whether all that a pass of this model does is to tell the device what to do, so that a recording repeats it.

    A class, a hook or a forward of somebody's own may run code of the host that a CUDA graph does not have. One that
    only tells the device what to do says so by an attribute `is_replayable = True`.
    """
    return is_untouched(model, says_replayable) and can_infer(model)


def says_replayable(code: object) -> bool:
    """Whether somebody's class, hook or function says that all it does is to tell the device what to do."""
    return getattr(code, "is_replayable", False) is True


def foreign_parts(model: nn.Module) -> Iterator[str]:
    """Descriptions of the parts of a model that are not transformers': classes, hooks, forwards, tensors."""
    yield from _foreign_code(model, lambda code: False)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not is_plain(tensor):
            yield f"{name} is a {type(tensor).__module__}.{type(tensor).__name__}"


def _foreign_code(model: nn.Module, is_fine: Callable[[object], bool]) -> Iterator[str]:
    for name, part in model.named_modules():
        where, kind = name or "the model", type(part)
        if not is_known_class(kind) and not is_fine(kind):
            yield f"{where} is a {kind.__module__}.{kind.__name__}"
        if any(not is_fine(hook) for hook in (*part._forward_hooks.values(), *part._forward_pre_hooks.values())):
            yield f"{where} has a forward hook"
        if "forward" in vars(part):
            yield f"{where} has a forward of its own"
    every = (*torch_module._global_forward_hooks.values(), *torch_module._global_forward_pre_hooks.values())
    if any(not is_fine(hook) for hook in every):
        yield "torch has a forward hook for all modules"
    for replacement in replacements(model):
        yield f"{replacement.place} was replaced by {_name(replacement.function)}"


def _name(function: Any) -> str:
    function = getattr(function, "__func__", function)
    return f"{function.__module__}.{getattr(function, '__qualname__', type(function).__qualname__)}"


def state_of(model: nn.Module, *, reads_weights: bool = True, reads_code: bool = False) -> Hashable:
    """A snapshot of a model: equal to a later one as long as the model was not changed.

    Changes through `.data`, which torch does not count, may be missed in matrices of more than 16,384 elements: one
    element of each row of these is checksummed, on a CPU, and on any device for adapters.

    Args:
        model: the model.
        reads_weights: whether to checksum large tensors, which takes most of the time: 15 of 20 ms for 135 million
            parameters. Without it only adapters are, since PEFT's `hotswap_adapter` writes through `.data`; changes of
            other large tensors are noticed only where torch counts them.
        reads_code: whether to compare the data that others' hooks, functions and classes read: attributes, enclosed
            and global variables.
    """
    adapters = {id(tensor) for tensor in _adapter_tensors(model)}

    def of_tensor(tensor: Tensor) -> Hashable:
        if id(tensor) in adapters:
            return tensor_state(tensor, waits=True)
        return tensor_state(tensor, reads_weights or is_small(tensor))

    seen = known_parts(model)
    modules = []
    for part in model.modules():
        tensors = [tensor for tensor in (*part._parameters.values(), *part._buffers.values()) if tensor is not None]
        hooks = (part._forward_hooks, part._forward_pre_hooks)
        modules.append(
            (
                comparable(part),
                tuple(map(of_tensor, tensors)),
                _plain_attributes(part, reads_code, seen),
                tuple(hooks_state(kind, reads_code=reads_code, seen=seen) for kind in hooks),
            )
        )
    everywhere = (torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks)
    return (
        tuple(modules),
        classes_state(model, seen) if reads_code else (),
        tuple(hooks_state(kind, reads_code=reads_code, seen=seen) for kind in everywhere),
        tuple((one.place, comparable(one.function, reads_code=reads_code, seen=seen)) for one in replacements(model)),
        tuple((one._attn_implementation, one.to_json_string(use_diff=False)) for one in _configurations(model)),
    )


def hooks_of(model: nn.Module) -> dict[int, Any]:
    """All forward hooks that a pass calls, torch's global ones too, by the number of their registration."""
    found = {**torch_module._global_forward_hooks, **torch_module._global_forward_pre_hooks}
    for part in model.modules():
        found |= {**part._forward_hooks, **part._forward_pre_hooks}
    return found


def _configurations(model: Any) -> list[Any]:
    """A model's configuration, and those that parts of it, such as layers of another model, have of their own."""
    held = (model.config, *map(own_config, model.modules()))
    return list({id(one): one for one in held if one is not None}.values())


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def _adapter_tensors(model: nn.Module) -> Iterator[Tensor]:
    """The tensors of wrapping layers, such as PEFT's, without those of the layers that they wrap."""
    for part in filter(_is_around_a_layer, model.modules()):
        yield from (tensor for tensor in (*part._parameters.values(), *part._buffers.values()) if tensor is not None)
        for name, held in part.named_children():
            if name not in _WRAPPED and not _is_around_a_layer(held):  # such a one is visited by itself
                yield from _tensors(held)


def _is_around_a_layer(part: nn.Module) -> bool:
    return any(name in part._modules for name in _WRAPPED)


def _plain_attributes(part: nn.Module, reads_code: bool, seen: Seen) -> Hashable:
    named = [(name, value) for name, value in vars(part).items() if name not in _NO_STATE]
    return tuple((name, comparable(value, reads_code=reads_code, seen=seen)) for name, value in named)
