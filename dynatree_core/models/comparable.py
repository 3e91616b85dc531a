"""Snapshots of tensors, attributes and hooks, which are equal as long as a model has not been changed.

A snapshot may outlive the objects it was made of, so no address or id is compared: a new object may have the same one.
"""

from __future__ import annotations

import array
import functools
import inspect
import logging
import types
import weakref
import zlib
from collections.abc import Hashable, Iterator, Mapping, MutableSequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import GenerationConfig, PreTrainedConfig

from dynatree_core.models.authorship import is_known_class, is_others

__all__ = [
    "Seen",
    "classes_state",
    "comparable",
    "hooks_state",
    "is_plain",
    "is_small",
    "known_parts",
    "noting_what_keeps",
    "tensor_state",
]

_MAX_DEPTH = 8  # levels of containers and objects that are compared by content; deeper ones are compared by identity
# compared by identity: a model's configuration has a snapshot of its own, and of the others code reads what it names
_WHOLE = (PreTrainedConfig, GenerationConfig, type, types.ModuleType, logging.Logger)

_SMALL = 2**18  # elements of a tensor up to which it is checksummed in any case
_WHOLE_ELEMENTS = 2**14  # up to which all of them count, such as those of norms and small adapters

_keeping: set[int] = set()  # registration numbers of hooks that change what they read, such as counters
_counting: weakref.WeakSet[type] = weakref.WeakSet()  # classes of modules that do

Seen = dict[int, tuple[object, int]]  # what has a snapshot already, by id, with its nesting there


class _Same:
    """Compares an object by identity, through a weak reference where it can have one."""

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
    """Whether a tensor is a plain one, not a subclass such as those of quantised weights."""
    return type(tensor) in (Tensor, nn.Parameter) or type(tensor) is getattr(nn, "Buffer", None)


def is_small(tensor: Tensor) -> bool:
    """Whether a tensor is checksummed in any case."""
    return is_plain(tensor) and tensor.numel() <= _SMALL


def known_parts(model: nn.Module) -> Seen:
    """A model's modules, which have snapshots of their own: whoever reaches them compares them by identity."""
    return {id(part): (part, -1) for part in model.modules()}


def comparable(value: object, *, reads_code: bool = False, depth: int = 0, seen: Seen | None = None) -> Hashable:
    """A snapshot of a value: equal to a later one as long as the value is unchanged.

    Args:
        value: plain data, a tensor, a container of these, or any object.
        reads_code: whether to look into objects and functions too: attributes, arguments, enclosed and global
            variables. Otherwise they are compared by identity.
        depth: nesting of the value in the one that was asked about.
        seen: what has a snapshot beside that of the one that was asked about, or in it. It is added to.
    """
    if value is None or isinstance(value, int | float | complex | str | bytes | torch.dtype | torch.device):
        return type(value).__name__, value  # 1, 1.0 and True are not the same setting
    if isinstance(value, Tensor):
        return tensor_state(value)
    if isinstance(value, np.ndarray):
        numbers = value.reshape(-1)[:: 1 + value.size // _SMALL]
        return _Same(value), 0 if value.dtype.hasobject else zlib.crc32(numbers.tobytes())
    if isinstance(value, bytearray | array.array):
        return _Same(value), zlib.crc32(value)
    # accelerate's maps of offloaded weights would read them from the disk, and matrices as they are stored, which
    # nobody changes, note what a pass has made of them
    if type(value).__module__.startswith(("accelerate.", "dynatree_core.")) and not isinstance(value, nn.Module):
        return _Same(value)
    seen = {} if seen is None else seen
    within = functools.partial(comparable, reads_code=reads_code, depth=depth + 1, seen=seen)
    if depth < min(_MAX_DEPTH, seen.get(id(value), (value, _MAX_DEPTH))[1]):
        seen[id(value)] = value, depth
        if isinstance(value, nn.Module):  # another model's, or one that belongs to none
            parts = [part for part in value.modules() if part is value or id(part) not in seen] if reads_code else []
            return _Same(value), *map(_of_module, parts)
        if isinstance(value, Mapping):
            return tuple((within(key), within(held)) for key, held in [*value.items()])
        if isinstance(value, tuple | MutableSequence):
            return (type(value).__name__, *map(within, value))
        if isinstance(value, set | frozenset):
            return frozenset(map(within, [*value]))
        if reads_code and not isinstance(value, _WHOLE):
            return _Same(getattr(value, "__func__", value)), *map(within, _read_by(value))
    return _Same(getattr(value, "__func__", value))  # each access makes a new method object


def _of_module(part: nn.Module) -> Hashable:
    """A snapshot of a module that some code reads: its tensors and its plain attributes."""
    tensors = [tensor for tensor in (*part._parameters.values(), *part._buffers.values()) if tensor is not None]
    plain = [(name, comparable(value)) for name, value in vars(part).items() if isinstance(value, int | float | str)]
    return tuple(tensor_state(tensor, is_small(tensor)) for tensor in tensors), tuple(plain)


def classes_state(model: nn.Module, seen: Seen) -> Hashable:
    """A snapshot of what forwards of somebody else's classes read besides the modules' own attributes.

    Args:
        model: the model. Classes that change what they read in a pass are left out.
        seen: as for `comparable`.
    """
    return tuple(_of_class(kind, seen) for kind in _others_classes(model) if kind not in _counting)


def _others_classes(model: nn.Module) -> list[type[nn.Module]]:
    """Classes of a model's modules that are not transformers' or ours, or torch's plain layers."""
    return [kind for kind in dict.fromkeys(type(part) for part in model.modules()) if not is_known_class(kind)]


def _of_class(kind: type[nn.Module], seen: Seen) -> Hashable:
    # what was compiled by TorchScript has no Python to read
    forwards = [vars(base).get("forward") for base in kind.__mro__ if not is_known_class(base)]
    functions = [forward for forward in forwards if isinstance(forward, types.FunctionType)]
    names: set[str] = set()
    for function in functions:  # and the methods that they name
        names |= _names(function) | _names(inspect.unwrap(function))
        methods = [inspect.getattr_static(kind, name, None) for name in sorted(names)]
        functions += [one for one in methods if _is_others_function(one) and one not in functions]
    return tuple(
        comparable(one, reads_code=True, seen=seen) for one in (*functions, *_named_of(kind, frozenset(names)))
    )


def _is_others_function(method: object) -> bool:
    return isinstance(method, types.FunctionType) and is_others(method)


def hooks_state(hooks: Mapping[int, Any], *, reads_code: bool, seen: Seen | None = None) -> Hashable:
    """A snapshot of hooks, by the number that torch gives each registration and never reuses.

    A partial function with plain arguments, such as PEFT's for `adapter_names`, is compared by these arguments.

    Args:
        hooks: of one kind, of one module.
        reads_code: as for `comparable`. A hook that records what it sees is compared by its number alone: otherwise it
            would differ after each pass.
        seen: as for `comparable`.
    """
    return tuple(_hook(number, hook, reads_code and number not in _keeping, seen) for number, hook in hooks.items())


@contextmanager
def noting_what_keeps(model: nn.Module, hooks: Mapping[int, Any]) -> Iterator[None]:
    """Find the hooks and classes that change their own data in a pass: their snapshots differ after the block's."""

    def now() -> tuple[dict[int, Hashable], dict[type, Hashable]]:
        parts = known_parts(model)
        of_hooks = {number: comparable(hook, reads_code=True, seen={**parts}) for number, hook in hooks.items()}
        return of_hooks, {kind: _of_class(kind, {**parts}) for kind in _others_classes(model)}

    hooks_before, kinds_before = now()
    yield
    hooks_after, kinds_after = now()
    _keeping.update(number for number, state in hooks_after.items() if state != hooks_before[number])
    _counting.update(kind for kind, state in kinds_after.items() if state != kinds_before.get(kind, state))


def _hook(number: int, hook: Any, reads_code: bool, seen: Seen | None) -> Hashable:
    if isinstance(hook, functools.partial) and getattr(hook.func, "__qualname__", "<locals>").isidentifier():
        arguments = (*hook.args, *hook.keywords.values())
        if all(_is_data(argument) for argument in arguments):
            return hook.func.__module__, hook.func.__qualname__, comparable(hook.args), comparable(hook.keywords)
    return (number, comparable(hook, reads_code=True, seen=seen)) if reads_code else number


def _is_data(value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_data, value))
    return value is None or isinstance(value, int | float | str)


def _read_by(code: Any) -> Iterator[object]:
    """The values that a function or object depends on: attributes, default arguments, enclosed and global variables.

    Of classes and packages, an object's own among them, it is what the code names of them.
    """
    if isinstance(code, functools.partial):
        yield from (code.func, code.args, code.keywords)
    elif isinstance(code, types.MethodType):
        yield code.__self__
        if is_others(code):
            yield from _named_of(code.__self__, _names(code.__func__))
        yield from _read_by(code.__func__)
    elif isinstance(code, types.FunctionType):
        yield from (code.__defaults__, code.__kwdefaults__)
        held = [cell.cell_contents for cell in code.__closure__ or () if not _is_empty(cell)]
        if not is_others(code):  # whose globals nobody changes: of transformers, torch or Python
            yield from held
            return
        names = _names(code)
        for thing in (*held, *(code.__globals__[name] for name in names if name in code.__globals__)):
            yield thing
            yield from _named_of(thing, names)
    else:
        yield getattr(code, "__dict__", None)
        for kind in type(code).__mro__:
            slots = getattr(kind, "__slots__", ())
            yield from (getattr(code, name, None) for name in ((slots,) if isinstance(slots, str) else slots))
        called = inspect.getattr_static(type(code), "__call__", None)
        if isinstance(called, types.FunctionType):
            yield from _named_of(code, _names(called))
            yield from _read_by(called)


def _names(function: Any) -> frozenset[str]:
    """The names of globals and attributes in a function and in those inside of it."""
    found: set[str] = set()
    codes = [function.__code__] if isinstance(function, types.FunctionType) else []
    for code in codes:
        found.update(code.co_names)
        codes += [part for part in code.co_consts if isinstance(part, types.CodeType)]
    return frozenset(found)


def _named_of(thing: object, names: frozenset[str]) -> Iterator[object]:
    """What a class, package or object has under these names, without calling properties or functions."""
    for name in sorted(names):
        value = inspect.getattr_static(thing, name, None)
        if not callable(value) and not inspect.isdatadescriptor(value):
            yield value


def _is_empty(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018  # asking is the only way to know
    except ValueError:
        return True
    return False


def tensor_state(tensor: Tensor, reads_numbers: bool = True, *, waits: bool = False) -> Hashable:
    """A snapshot of a tensor: its storage, torch's version counter and, if asked for, a checksum of some elements.

    The checksum is taken on a CPU, and on another device only where the caller may wait for it.
    """
    if not is_plain(tensor):
        inner = _inner_tensors(tensor)
        return _Same(tensor), tuple(tensor_state(part, reads_numbers, waits=waits) for part in inner)
    version = 0 if tensor.is_inference() else tensor._version
    place: Hashable = tensor.data_ptr() if tensor.layout == torch.strided else _Same(tensor)
    if tensor.layout == torch.strided:  # the address alone could be that of an earlier tensor that was freed
        place = place, tuple(tensor.shape), StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
    is_read = reads_numbers and (waits or tensor.device.type == "cpu")
    return place, version, _sample(tensor) if is_read else None


def _inner_tensors(tensor: Any) -> list[Tensor]:
    """The plain tensors inside of a quantised one."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return []
    names, _ = tensor.__tensor_flatten__()
    return [getattr(tensor, name) for name in names]


def _sample(tensor: Tensor) -> int:
    """A checksum of a small tensor, and of one element of each row of others; the column moves on from row to row.

    It is there for changes that torch's version counter misses: through `.data`, and of tensors made in inference mode.
    """
    if tensor.device.type == "meta" or tensor.layout != torch.strided:
        return 0
    stride = max(tensor.shape[-1] - 1, 1) if tensor.numel() > _WHOLE_ELEMENTS and tensor.ndim > 1 else 1
    numbers = tensor.detach().reshape(-1)[::stride].clone(memory_format=torch.contiguous_format)
    return zlib.crc32(numbers.cpu().view(torch.uint8).numpy().tobytes())
