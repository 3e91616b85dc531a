"""What a model object is at this moment: whether it is as transformers made it, and whether it was changed since.

A copy, a probe or cached rows of a model hold as long as its state is the same. Compared are its weights, the plain
attributes of its modules (numbers, names, and lists and dicts of them, such as a LoRA layer's active adapters), its
hooks, replaced methods and its configuration.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

__all__ = ["can_infer", "foreign_parts", "is_plain", "is_untouched", "state_of", "without_gradients"]

# classes whose rows do not depend on each other, or whose families are compared with plain passes in the tests
_KNOWN = ("torch.nn.modules.", "transformers.", "dynatree_core.", "torch._dynamo.")
_MAX_DEPTH = 4  # of containers in attributes: deeper ones are told apart by identity
_WRAPPED = ("base_layer", "original_module")  # where a layer of PEFT's has the one that it is around
_NO_STATE = frozenset(vars(nn.Module())) - {"training"}  # torch's own attributes of a module, which are read otherwise


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor holds numbers, and is no class with a way of its own, such as a quantised one."""
    return type(tensor) in (Tensor, nn.Parameter) or type(tensor) is getattr(nn, "Buffer", None)


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
        if not kind.__module__.startswith(_KNOWN) and not is_fine(kind):
            yield f"{where} is a {kind.__module__}.{kind.__name__}"
        if any(not is_fine(hook) for hook in (*part._forward_hooks.values(), *part._forward_pre_hooks.values())):
            yield f"{where} has a forward hook"
        if "forward" in vars(part):
            yield f"{where} has a forward of its own"
    every = (*torch_module._global_forward_hooks.values(), *torch_module._global_forward_pre_hooks.values())
    if any(not is_fine(hook) for hook in every):
        yield "torch has a forward hook for all modules"


def state_of(model: nn.Module, *, reads_weights: bool = True) -> Hashable:
    """What is compared to see whether a model was changed.

    Single numbers that were changed through `.data`, which counts no changes, may be missed: of each row one is looked
    at, on a CPU; of adapters on any device. So may what an object holds that is an attribute of a module, or a variable
    that a hook reads.

    Args:
        model: the model.
        reads_weights: whether to look at the numbers of all weights, which takes most of the time: 15 of 20 ms for 135
            million parameters. Without, only those of adapters are looked at, which are few and change while the model
            is in use: PEFT's `hotswap_adapter` writes them through `.data`. Changes of others are seen only where torch
            counts them.
    """
    adapters = {id(tensor) for tensor in _adapter_tensors(model)}
    weights = [
        _tensor_state(tensor, True, waits=True) if id(tensor) in adapters else _tensor_state(tensor, reads_weights)
        for tensor in _tensors(model)
    ]
    modules = [
        (id(part), _plain_attributes(part), _hooks(part._forward_hooks), _hooks(part._forward_pre_hooks))
        for part in model.modules()
    ]
    everywhere = _hooks(torch_module._global_forward_hooks), _hooks(torch_module._global_forward_pre_hooks)
    config: Any = model.config
    return (
        tuple(weights),
        tuple(modules),
        everywhere,
        config._attn_implementation,
        config.to_json_string(use_diff=False),
    )


def _adapter_tensors(model: nn.Module) -> Iterator[Tensor]:
    """What layers hold beside the one that they wrap, as PEFT's do."""
    for part in filter(_is_around_a_layer, model.modules()):
        yield from (tensor for tensor in (*part._parameters.values(), *part._buffers.values()) if tensor is not None)
        for name, held in part.named_children():
            if name not in _WRAPPED and not _is_around_a_layer(held):  # one that is has its own turn
                yield from _tensors(held)


def _is_around_a_layer(part: nn.Module) -> bool:
    return any(name in part._modules for name in _WRAPPED)


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def _plain_attributes(part: nn.Module) -> Hashable:
    return tuple((name, _comparable(value)) for name, value in vars(part).items() if name not in _NO_STATE)


def _comparable(value: object, depth: int = 0) -> Hashable:
    """A value that is equal as long as the given one stays as it is; objects are told apart by identity."""
    if value is None or isinstance(value, int | float | str | torch.dtype | torch.device):
        return value
    if isinstance(value, Tensor):
        return _tensor_state(value)
    if depth < _MAX_DEPTH:
        if isinstance(value, Mapping):
            return tuple((_comparable(key, depth + 1), _comparable(held, depth + 1)) for key, held in value.items())
        if isinstance(value, list | tuple):
            return (type(value).__name__, *(_comparable(held, depth + 1) for held in value))
        if isinstance(value, set | frozenset):
            return frozenset(_comparable(held, depth + 1) for held in value)
    return id(value)


def _hooks(hooks: Mapping[int, Any]) -> Hashable:
    """Hooks by the number that torch gives each registration, which is never given again.

    One that is a function with plain arguments, such as PEFT's for `adapter_names`, is what these say.
    """
    return tuple(_hook(number, hook) for number, hook in hooks.items())


def _hook(number: int, hook: Any) -> Hashable:
    if not isinstance(hook, functools.partial) or not getattr(hook.func, "__qualname__", "<locals>").isidentifier():
        return number
    arguments = (*hook.args, *hook.keywords.values())
    if not all(_is_data(argument) for argument in arguments):
        return number
    return hook.func.__module__, hook.func.__qualname__, _comparable(hook.args), _comparable(hook.keywords)


def _is_data(value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_data, value))
    return value is None or isinstance(value, int | float | str)


def _tensor_state(tensor: Tensor, reads_weights: bool = True, *, waits: bool = False) -> Hashable:
    """What is compared of a tensor; its numbers on a CPU, and on another device if that may be waited for."""
    if not is_plain(tensor):
        return id(tensor), tuple(_tensor_state(inner, reads_weights, waits=waits) for inner in _inner_tensors(tensor))
    version = 0 if tensor.is_inference() else tensor._version
    is_read = reads_weights and (waits or tensor.device.type == "cpu")
    return tensor.data_ptr(), version, _sample(tensor) if is_read else None


def _inner_tensors(tensor: Any) -> list[Tensor]:
    """The tensors that a quantised one is made of."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return []
    names, _ = tensor.__tensor_flatten__()
    return [getattr(tensor, name) for name in names]


def _sample(tensor: Tensor) -> int:
    """A checksum of one number of each row, in another column each time.

    Neither changes through `.data` are counted in a tensor's version, nor those of tensors made in inference mode.
    """
    if tensor.device.type == "meta" or tensor.layout != torch.strided:
        return 0
    stride = max(tensor.shape[-1] - 1, 1) if tensor.ndim > 1 else 1
    numbers = tensor.detach().reshape(-1)[::stride].clone(memory_format=torch.contiguous_format)
    return zlib.crc32(numbers.cpu().view(torch.uint8).numpy().tobytes())
