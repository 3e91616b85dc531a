"""Values of a model that are compared to see whether it was changed: tensors, attributes, hooks and what these read.

What is compared outlives the values, so nothing goes by an address: another object may come to stand there.
"""

from __future__ import annotations

import functools
import types
import weakref
import zlib
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import GenerationConfig, PreTrainedConfig

__all__ = ["comparable", "hooks_state", "is_plain", "noting_hooks_that_keep", "tensor_state"]

_MAX_DEPTH = 4  # of containers and objects: deeper ones are told apart as a whole
# never looked into: a model's modules and configuration are compared by themselves
_WHOLE = (nn.Module, PreTrainedConfig, GenerationConfig, type, types.ModuleType)

_keeping: set[int] = set()  # the numbers of hooks that count or record


class _Same:
    """Stands for an object, which is kept alive only where it takes no weak references."""

    def __init__(self, thing: object) -> None:
        try:
            self._held: object = weakref.ref(thing)  # one for each object, as long as anybody holds it
        except TypeError:
            self._held = thing

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self._held is other._held

    def __hash__(self) -> int:
        return id(self._held)


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor holds numbers, and is no class with a way of its own, such as a quantised one."""
    return type(tensor) in (Tensor, nn.Parameter) or type(tensor) is getattr(nn, "Buffer", None)


def comparable(value: object, *, reads_code: bool = False, depth: int = 0) -> Hashable:
    """What is equal as long as a value stays as it is: plain data, tensors, and containers of them.

    Args:
        value: whatever.
        reads_code: whether to look into objects and functions too: attributes, arguments, enclosed and global
            variables. Otherwise they are told apart as a whole.
        depth: of the value in what was asked about.
    """
    if value is None or isinstance(value, int | float | complex | str | bytes | torch.dtype | torch.device):
        return type(value).__name__, value  # 1, 1.0 and True are not the same setting
    if isinstance(value, Tensor):
        return tensor_state(value)
    within = functools.partial(comparable, reads_code=reads_code, depth=depth + 1)
    if depth < _MAX_DEPTH:
        if isinstance(value, Mapping):
            return tuple((within(key), within(held)) for key, held in value.items())
        if isinstance(value, list | tuple):
            return (type(value).__name__, *map(within, value))
        if isinstance(value, set | frozenset):
            return frozenset(map(within, value))
        if reads_code and not isinstance(value, _WHOLE):
            return _Same(getattr(value, "__func__", value)), *map(within, _read_by(value))
    return _Same(getattr(value, "__func__", value))  # a method is made anew whenever it is asked for


def hooks_state(hooks: Mapping[int, Any], *, reads_code: bool) -> Hashable:
    """Hooks by the number that torch gives each registration, which is never given again.

    One that is a function with plain arguments, such as PEFT's for `adapter_names`, is what these say.

    Args:
        hooks: of one kind, of one module.
        reads_code: as for `comparable`. Not of a hook that keeps what it sees: it would be another one after each pass.
    """
    return tuple(_hook(number, hook, reads_code and number not in _keeping) for number, hook in hooks.items())


@contextmanager
def noting_hooks_that_keep(hooks: Mapping[int, Any]) -> Iterator[None]:
    """Note which of these hooks change what they read while the block runs passes and nobody else changes anything."""
    before = {number: comparable(hook, reads_code=True) for number, hook in hooks.items()}
    yield
    _keeping.update(number for number, hook in hooks.items() if comparable(hook, reads_code=True) != before[number])


def _hook(number: int, hook: Any, reads_code: bool) -> Hashable:
    if isinstance(hook, functools.partial) and getattr(hook.func, "__qualname__", "<locals>").isidentifier():
        arguments = (*hook.args, *hook.keywords.values())
        if all(_is_data(argument) for argument in arguments):
            return hook.func.__module__, hook.func.__qualname__, comparable(hook.args), comparable(hook.keywords)
    return (number, comparable(hook, reads_code=True)) if reads_code else number


def _is_data(value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_data, value))
    return value is None or isinstance(value, int | float | str)


def _read_by(code: Any) -> list[object]:
    """What a function or an object reads: attributes, arguments, enclosed and global variables."""
    if isinstance(code, functools.partial):
        return [code.func, code.args, code.keywords]
    if isinstance(code, types.MethodType):
        return [code.__self__, *_read_by(code.__func__)]
    if not isinstance(code, types.FunctionType):
        return [getattr(code, "__dict__", None)]
    held = [cell.cell_contents for cell in code.__closure__ or () if not _is_empty(cell)]
    globally = [code.__globals__[name] for name in code.__code__.co_names if name in code.__globals__]
    return [code.__defaults__, code.__kwdefaults__, *held, *globally]


def _is_empty(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018  # asking is the only way to know
    except ValueError:
        return True
    return False


def tensor_state(tensor: Tensor, reads_numbers: bool = True, *, waits: bool = False) -> Hashable:
    """A tensor's memory and how often torch has counted a change of it, and where asked for some of its numbers.

    They are looked at on a CPU, and on another device if that may be waited for.
    """
    if not is_plain(tensor):
        inner = _inner_tensors(tensor)
        return _Same(tensor), tuple(tensor_state(part, reads_numbers, waits=waits) for part in inner)
    version = 0 if tensor.is_inference() else tensor._version
    place: Hashable = tensor.data_ptr() if tensor.layout == torch.strided else _Same(tensor)
    if tensor.layout == torch.strided:  # the address alone may be that of a tensor which has gone
        place = place, tuple(tensor.shape), StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
    is_read = reads_numbers and (waits or tensor.device.type == "cpu")
    return place, version, _sample(tensor) if is_read else None


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
