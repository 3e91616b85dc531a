"""What a model object is at this moment: whether it is as transformers made it, and whether it was changed since.

A copy, a probe or cached rows of a model hold as long as its state is the same. Compared are its weights, the plain
attributes of its modules (numbers, names, and lists and dicts of them, such as a LoRA layer's active adapters), its
hooks, replaced functions and its configuration.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from dynatree_core.models.authorship import is_known_class, replacements
from dynatree_core.models.comparable import comparable, hooks_state, is_plain, tensor_state

__all__ = ["can_infer", "foreign_parts", "hooks_of", "is_plain", "is_untouched", "state_of", "without_gradients"]

_SMALL = 2**18  # numbers of a tensor that is looked at in any case
_WRAPPED = ("base_layer", "original_module")  # where a layer of PEFT's has the one that it is around
_NO_STATE = frozenset(vars(nn.Module())) - {"training"}  # torch's own attributes of a module, which are read otherwise


def can_infer(model: nn.Module) -> bool:
    """Whether the model's passes may run in torch's inference mode, in which some quantised tensors have no views."""
    return all(map(is_plain, _tensors(model)))


def without_gradients(*models: nn.Module) -> torch.inference_mode | torch.no_grad:
    """A context for passes of these models: inference mode where all of them can, else the slower no_grad."""
    return torch.inference_mode() if all(map(can_infer, models)) else torch.no_grad()


def is_untouched(model: nn.Module, is_fine: Callable[[object], bool] = lambda code: False) -> bool:
    """Whether a model's modules are as transformers made them, so that a copy of it does all that it does.

    A class, a hook or a forward of somebody's own, such as a LoRA layer, may keep a state that a copy would not follow.

    Args:
        model: the model.
        is_fine: whether a class or a hook of somebody's own does no harm.
    """
    return next(_foreign_code(model, is_fine), None) is None


def foreign_parts(model: nn.Module) -> Iterator[str]:
    """What of a model transformers has not made, in words: classes, hooks, replaced forwards, tensors."""
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
    """What is compared to see whether a model was changed.

    Single numbers that were changed through `.data`, which counts no changes, may be missed: of each row one is looked
    at, on a CPU; of adapters on any device.

    Args:
        model: the model.
        reads_weights: whether to look at the numbers of large tensors, which takes most of the time: 15 of 20 ms for
            135 million parameters. Without, only those of adapters are, which PEFT's `hotswap_adapter` writes through
            `.data`. Changes of others are seen only where torch counts them.
        reads_code: whether to look at what hooks and functions of somebody's own read: their objects' attributes,
            enclosed and global variables.
    """
    adapters = {id(tensor) for tensor in _adapter_tensors(model)}

    def seen(tensor: Tensor) -> Hashable:
        if id(tensor) in adapters:
            return tensor_state(tensor, waits=True)
        return tensor_state(tensor, reads_weights or _is_small(tensor))

    modules = []
    for part in model.modules():
        tensors = [tensor for tensor in (*part._parameters.values(), *part._buffers.values()) if tensor is not None]
        hooks = (part._forward_hooks, part._forward_pre_hooks)
        modules.append(
            (
                comparable(part),
                tuple(map(seen, tensors)),
                _plain_attributes(part, reads_code),
                tuple(hooks_state(kind, reads_code=reads_code) for kind in hooks),
            )
        )
    everywhere = (torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks)
    config: Any = model.config
    return (
        tuple(modules),
        tuple(hooks_state(kind, reads_code=reads_code) for kind in everywhere),
        tuple((one.place, comparable(one.function, reads_code=reads_code)) for one in replacements(model)),
        config._attn_implementation,
        config.to_json_string(use_diff=False),
    )


def hooks_of(model: nn.Module) -> dict[int, Any]:
    """All forward hooks that a model's passes call, by the number of their registration."""
    found = {**torch_module._global_forward_hooks, **torch_module._global_forward_pre_hooks}
    for part in model.modules():
        found |= {**part._forward_hooks, **part._forward_pre_hooks}
    return found


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def _adapter_tensors(model: nn.Module) -> Iterator[Tensor]:
    """What layers hold beside the one that they wrap, as PEFT's do."""
    for part in filter(_is_around_a_layer, model.modules()):
        yield from (tensor for tensor in (*part._parameters.values(), *part._buffers.values()) if tensor is not None)
        for name, held in part.named_children():
            if name not in _WRAPPED and not _is_around_a_layer(held):  # one that is has its own turn
                yield from _tensors(held)


def _is_around_a_layer(part: nn.Module) -> bool:
    return any(name in part._modules for name in _WRAPPED)


def _is_small(tensor: Tensor) -> bool:
    return is_plain(tensor) and tensor.numel() <= _SMALL


def _plain_attributes(part: nn.Module, reads_code: bool) -> Hashable:
    named = vars(part).items()
    return tuple((name, comparable(value, reads_code=reads_code)) for name, value in named if name not in _NO_STATE)
