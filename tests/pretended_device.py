"""A pretended CUDA device: tensors that say `cuda:0` and keep their numbers on the CPU.

It finds what needs no GPU to be found: what a GPU's host would wait for, how many kernels it would launch, and what it
would copy, stage by stage and with the line that asks for it. Branches for CUDA are taken, and devices that are mixed
are an error. Its times are made up, though in a right order, and it runs no kernel, so it takes no GPU's place.

Tensors are wrapped and each operation on them is seen in `__torch_dispatch__`. torch enters the device of a tensor by
a guard, and a build for CPUs has none for CUDA: that of the meta device, which does nothing, takes its place.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import attrs
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from dynatree_core.engine import decode, resources
from dynatree_core.engine.proposals import SharedProposals
from dynatree_core.policy.stack import PolicyStack
from dynatree_core.runners import cudagraph
from dynatree_core.runners.cudagraph import Recorder
from dynatree_core.runners.eager import EagerRunner
from dynatree_core.tree.padded import WantedLevel, write_plainly

CUDA = torch.device("cuda:0")
LAUNCH_SECONDS, KERNEL_SECONDS = 4e-6, 10e-6  # so that the host runs ahead where nothing makes it wait
PASSES = "passes"  # the stage of what a model itself does
_REGISTRY, _NUM_REGISTERED = "_ZN3c104impl26device_guard_impl_registryE", 23  # of torch's libc10
_CUDA, _META = 1, 14  # places in it, as in c10/core/DeviceType.h

# operations without a kernel: they make another view, or memory without numbers
_VIEWS = frozenset(
    {
        *("view", "_unsafe_view", "_reshape_alias", "as_strided", "slice", "select", "expand", "unsqueeze", "squeeze"),
        *("permute", "t", "transpose", "detach", "alias", "split", "split_with_sizes", "unbind", "diagonal", "unfold"),
        *("empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "lift_fresh", "item"),
    }
)
# kernels of an operation, roughly; one for any other
_KERNELS = {"sort": 2, "argsort": 2, "topk": 3, "nonzero": 4, "nonzero_static": 3, "index_put_": 2, "index_put": 3}
_KERNELS |= {"equal": 2, "logsumexp": 5, "cumsum": 2, "eye": 2}
# what is not written in place is copied first
_KERNELS |= {"masked_fill": 2, "index_fill": 2, "index_copy": 2, "scatter": 2, "constant_pad_nd": 2}
# what torch does with a mask in each layer before its attention runs (ATen/native/transformers/attention.cpp): a bias
# of a boolean one (a number on the device, a choice for each element), and rows that begin at a multiple of eight
MASK_KERNELS, PADDING_KERNELS = 2, 2
EFFICIENT_ATTENTION = "_scaled_dot_product_efficient_attention"
# operations whose result has a size that the host has to be told, or is on the host
_WAITING = frozenset(
    {
        *("_local_scalar_dense", "item", "nonzero", "masked_select", "equal", "unique", "_unique2", "unique_dim"),
        *("bincount", "repeat_interleave"),
    }
)


@attrs.define
class Counts:
    """What was counted, by stage."""

    launches: Counter[str] = attrs.field(factory=Counter)  # of kernels
    lines: Counter[tuple[str, str]] = attrs.field(factory=Counter)  # likewise: stage, and what is launched where
    waits: Counter[tuple[str, str]] = attrs.field(factory=Counter)  # of the host: stage, and what waits where
    copies: Counter[str] = attrs.field(factory=Counter)  # from the host to the device

    def num_waits(self) -> int:
        """Outside the passes."""
        return sum(number for (stage, _), number in self.waits.items() if stage != PASSES)

    def num_launches(self) -> int:
        """Outside the passes."""
        return sum(number for stage, number in self.launches.items() if stage != PASSES)

    def num_copies(self) -> int:
        """Outside the passes."""
        return sum(number for stage, number in self.copies.items() if stage != PASSES)


class OnDevice(Tensor):
    """A tensor that says it is on the device."""

    numbers: Tensor

    @staticmethod
    def __new__(cls, numbers: Tensor) -> OnDevice:
        wrapped: OnDevice = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            numbers.size(),
            strides=numbers.stride(),
            storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype,
            device=CUDA,
        )
        return wrapped

    def __init__(self, numbers: Tensor) -> None:
        self.numbers = numbers

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __repr__(self, **_: Any) -> str:
        return f"OnDevice({self.numbers!r})"

    def tolist(self) -> Any:
        PretendedDevice.current().wait("tolist")
        return self.numbers.tolist()

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        return PretendedDevice.current().run(function, arguments, options or {})


class PretendedDevice:
    """What happens on it; made by `pretended`."""

    _current: PretendedDevice | None = None

    def __init__(self) -> None:
        self.counts: Counts | None = None  # None: nothing is counted
        self._stages = ["outside"]
        self._tape: list[Callable[[], None]] | None = None  # what is being recorded, to be done again; None: nothing
        self._is_in_kernel = False  # whether what is computed is one kernel, which was counted
        self._pinned: dict[int, Tensor] = {}  # memory of the host that the device can read by itself, by its address
        self.host_seconds = 0.0  # the host's clock, which runs while it launches and while it waits
        self.done_seconds = 0.0  # on the same clock: when the device will be done with what was launched
        self.idle_seconds = 0.0  # that the device had nothing to do

    def now(self) -> float:
        """The host's clock."""
        return self.host_seconds

    def reached(self) -> float:
        """When the device will have reached what is launched next."""
        return max(self.host_seconds, self.done_seconds)

    @classmethod
    def current(cls) -> PretendedDevice:
        assert cls._current is not None, "a tensor of the pretended device must be used within `pretended`"
        return cls._current

    @contextmanager
    def counting(self) -> Iterator[Counts]:
        self.counts = counts = Counts()
        try:
            yield counts
        finally:
            self.counts = None

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self._stages.append(name)
        try:
            yield
        finally:
            self._stages.pop()

    def recorded(self, run: Callable[[], Any]) -> Callable[[], Any]:
        """In place of a CUDA graph: what is launched, with every number of the host's and at the same addresses.

        A wait is refused, as CUDA refuses it.
        """
        assert self._tape is None, "a process can record one graph at a time"
        try:
            self._tape = []
            run()  # libraries make themselves at home the first time
            self._tape = tape = []
            output = run()
        finally:
            self._tape = None

        def replay() -> Any:
            self.launch("graph")
            self.done_seconds += len(tape) * KERNEL_SECONDS
            with torch._C._DisableTorchDispatch():  # type: ignore[attr-defined]
                for again in tape:
                    again()
            return output

        return replay

    def _note(self, compute: Callable[[], Any], result: Any) -> None:
        """Record an operation that leaves its result where it was left."""
        if self._tape is None:
            return
        kept = _tensors(result)

        def again() -> None:
            for old, new in zip(kept, _tensors(compute()), strict=True):
                if old.data_ptr() != new.data_ptr():  # else it was written in place
                    old.copy_(new)

        self._tape.append(again)

    def wait(self, what: str) -> None:
        if self._tape is not None:
            raise RuntimeError(f"operation not permitted when stream is capturing: {what}: {_asking_line()}")
        self.host_seconds = self.reached()
        if self.counts is not None:
            self.counts.waits[self._stages[-1], f"{what}: {_asking_line()}"] += 1

    def write_level(self, space: Any, wanted: WantedLevel, room: Any, level: slice) -> None:
        """The kernel of `FusedLevels`, which a GPU would be given: it counts as one, and plain torch computes it."""
        self.launch("write_level")
        self._is_in_kernel = True
        try:
            write_plainly(space, wanted, room, level)
        finally:
            self._is_in_kernel = False

    def launch(self, what: str, number: int = 1) -> None:
        if self._is_in_kernel:
            return
        self.host_seconds += number * LAUNCH_SECONDS
        self.idle_seconds += max(self.host_seconds - self.done_seconds, 0.0)
        self.done_seconds = self.reached() + number * KERNEL_SECONDS
        if self.counts is not None:
            self.counts.launches[self._stages[-1]] += number
            self.counts.lines[self._stages[-1], f"{what}: {_asking_line()}"] += number

    def run(self, function: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """An operation: it is counted, and computed on the CPU."""
        name = function.overloadpacket.__name__
        if name == EFFICIENT_ATTENTION:
            return self._attend(arguments, options)
        tensors = [one for one in tree_flatten((arguments, options))[0] if isinstance(one, Tensor)]
        is_here = any(isinstance(one, OnDevice) for one in tensors)
        asked = options.get("device")
        goes_to = None if asked is None else torch.device(asked).type
        if is_here or goes_to == "cuda":
            self._check_devices(name, tensors)
            self._count(name, arguments, goes_to, is_here=is_here)
        plain = {**tree_map(_numbers, options), **({"device": torch.device("cpu")} if goes_to == "cuda" else {})}
        is_pinned = plain.pop("pin_memory", None)  # memory of the host, which no device here copies from by itself
        numbers = tree_map(_numbers, arguments)
        result = function(*numbers, **plain)
        if name not in _VIEWS and (is_here or goes_to == "cuda"):
            self._note(lambda: function(*numbers, **plain), result)
        if is_pinned:
            self._pinned[result.untyped_storage().data_ptr()] = result
        written = [
            value
            for argument, value in zip(function._schema.arguments, arguments, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write
        ] + [options[one.name] for one in function._schema.arguments if one.is_out and one.name in options]
        if written:
            return written[0] if len(written) == 1 else tuple(written)
        stays = goes_to == "cuda" or (is_here and goes_to is None)
        return tree_map(lambda one: OnDevice(one) if isinstance(one, Tensor) else one, result) if stays else result

    def _attend(self, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """The memory-efficient attention, which a CPU has not: one kernel, with what CUDA asks of its tensors."""
        query, key, value, bias = map(_numbers, arguments[:4])
        self._check_devices(EFFICIENT_ATTENTION, list(arguments[:4]))
        assert query.dtype != torch.float64, "the kernel does not know float64"
        aligned = 4 if query.dtype == torch.float32 else 8
        for tensor in (query, key, value):
            strides = [stride for stride, size in zip(tensor.stride()[:-1], tensor.shape, strict=False) if size > 1]
            assert tensor.stride(-1) == 1, tensor.stride()
            assert not any(stride % aligned for stride in (*strides, tensor.shape[-1])), (tensor.shape, tensor.stride())
        assert bias.shape == (*query.shape[:3], key.shape[2]), "the kernel takes a bias for each head"
        assert bias.dtype == query.dtype, "another dtype is silently wrong"
        rows = [stride for stride, size in zip(bias.stride()[:-1], bias.shape, strict=False) if size > 1]
        assert not any(stride % aligned for stride in rows), bias.stride()
        self.launch(EFFICIENT_ATTENTION)

        def attended() -> Tensor:
            scale = options.get("scale")
            return torch.nn.functional.scaled_dot_product_attention(query, key, value, bias, scale=scale)

        seen = attended()
        self._note(attended, seen)
        return OnDevice(seen), None, None, None

    def _check_devices(self, name: str, tensors: list[Tensor]) -> None:
        """As CUDA: numbers of the host may be copied, used as one number each, or as an index."""
        if name in ("copy_", "_to_copy", "index", "index_put", "index_put_"):
            return
        foreign = [one for one in tensors if not isinstance(one, OnDevice) and one.dim() > 0]
        if foreign:
            raise RuntimeError(f"expected all tensors on one device in {name}, got one on the CPU: {_asking_line()}")

    def _count(self, name: str, arguments: tuple[Any, ...], goes_to: str | None, *, is_here: bool) -> None:
        if name not in _VIEWS:
            self.launch(name, _kernels(name, arguments))
        if name in _WAITING:
            self.wait(name)
        if name == "_to_copy" and is_here and goes_to == "cpu":
            self.wait("to the host")
        if name == "_to_copy" and not is_here:
            self._copy_here()
        is_late = name == "copy_" and len(arguments) > 2 and bool(arguments[2])  # not blocking, to be heard of later
        if name == "copy_" and not isinstance(arguments[0], OnDevice) and not is_late:
            self.wait("to the host")
        if (
            name == "copy_"
            and not isinstance(arguments[1], OnDevice)
            and not (is_late and self._is_pinned(arguments[1]))
        ):
            self._copy_here()
        if name in ("index", "index_put", "index_put_"):
            for index in arguments[1]:
                if index is not None and index.dtype in (torch.bool, torch.uint8):
                    self.wait("index by bools")
                if index is not None and not isinstance(index, OnDevice):
                    self._copy_here()

    def _is_pinned(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._pinned

    def _copy_here(self) -> None:
        """From memory that is not pinned: the host waits until the numbers have been read."""
        if self.counts is not None:
            self.counts.copies[self._stages[-1]] += 1
        self.wait("to the device")


def _numbers(value: Any) -> Any:
    return value.numbers if isinstance(value, OnDevice) else value


def _tensors(value: Any) -> list[Tensor]:
    return [one for one in tree_flatten(value)[0] if isinstance(one, Tensor)]


def _kernels(name: str, arguments: tuple[Any, ...]) -> int:
    if name in ("cat", "stack"):
        return len(arguments[0]) if len({part.dtype for part in arguments[0]}) > 1 else 1
    return _KERNELS.get(name, 1)


def _asking_line() -> str:
    """The innermost line of ours on the stack."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if any(part.startswith("dynatree_") for part in path.parts[-4:]):
            return f"{path.parent.name}/{path.name}:{frame.f_lineno}"
        frame = frame.f_back
    return "a line outside the project"


class _Operations(TorchDispatchMode):
    """Makes tensors that are asked for on the device."""

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        return PretendedDevice.current().run(function, arguments, options or {})


class _Attention(TorchFunctionMode):
    """torch chooses the kernel of an attention by the device before it dispatches: it is one operation here."""

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        options = options or {}
        is_here = bool(arguments) and isinstance(arguments[0], OnDevice)
        if function is not torch.nn.functional.scaled_dot_product_attention or not is_here:
            return function(*arguments, **options)
        mask = options.get("attn_mask", arguments[3] if len(arguments) > 3 else None)
        is_padded = mask is not None and mask.shape[-1] % 8 != 0
        is_made = mask is not None and mask.dtype == torch.bool
        number = 1 + MASK_KERNELS * is_made + PADDING_KERNELS * is_padded
        PretendedDevice.current().launch("attention", number)
        numbers, plain = tree_map(_numbers, arguments), tree_map(_numbers, options)
        with torch._C._DisableTorchDispatch():  # type: ignore[attr-defined]
            seen = function(*numbers, **plain)
        PretendedDevice.current()._note(lambda: function(*numbers, **plain), seen)
        return OnDevice(seen)


class _Event:
    """A moment on the device: when it will be done with what was launched before."""

    def __init__(self, **_: Any) -> None:
        self.at = 0.0

    def record(self, stream: object = None) -> None:
        self.at = PretendedDevice.current().reached()

    def synchronize(self) -> None:
        """No wait where that moment is over, or where the device has something to do behind it: it does not run dry."""
        device = PretendedDevice.current()
        if device.done_seconds > self.at:
            device.host_seconds = max(self.at, device.now())
        elif not self.query():
            device.wait("synchronize")

    def query(self) -> bool:
        return PretendedDevice.current().now() >= self.at

    def elapsed_time(self, other: _Event) -> float:
        """Milliseconds, as torch says them."""
        return 1000 * (other.at - self.at)


_lock = threading.Lock()


@contextmanager
def pretended() -> Iterator[PretendedDevice]:
    """A device for the block."""
    if torch.cuda.is_available():
        raise RuntimeError("a device can be pretended where there is none; count on the real one")
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * _NUM_REGISTERED).in_dll(library, _REGISTRY)
    with _lock, ExitStack() as undo:
        device = PretendedDevice()
        before, guards[_CUDA] = guards[_CUDA], guards[_META]
        undo.callback(guards.__setitem__, _CUDA, before)
        lifts = torch._C._only_lift_cpu_tensors()  # type: ignore[attr-defined]
        torch._C._set_only_lift_cpu_tensors(True)  # type: ignore[attr-defined]
        undo.callback(torch._C._set_only_lift_cpu_tensors, lifts)  # type: ignore[attr-defined]
        undo.enter_context(mock.patch.object(PretendedDevice, "_current", device))
        # its tensors are no plain ones, so that nobody could say whether a model of them can be recorded
        undo.enter_context(mock.patch.object(cudagraph, "is_replayable", return_value=True))
        undo.enter_context(mock.patch.object(resources, "level_writer", return_value=device.write_level))
        undo.enter_context(mock.patch.object(Recorder, "recorded", lambda self, run, on: device.recorded(run)))
        for name, instead in {
            "_lazy_init": lambda: None,
            "Event": _Event,
            "current_stream": lambda device=None: None,
            "synchronize": lambda _=None: device.wait("synchronize"),
            "get_device_name": lambda device=None: "pretended",
        }.items():
            undo.enter_context(mock.patch.object(torch.cuda, name, instead))
        # wrapped tensors have no version counter, which inference mode asks some of them for
        undo.enter_context(
            mock.patch.object(torch._C, "_InferenceMode", lambda mode: torch.no_grad() if mode else nullcontext())
        )
        undo.enter_context(_Attention())
        undo.enter_context(_Operations())
        yield device


def moved(model: nn.Module) -> nn.Module:
    """The same model, whose weights are on the device from now on."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(OnDevice(parameter.data), requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = OnDevice(buffer)
    return model


@contextmanager
def by_stage(device: PretendedDevice) -> Iterator[None]:
    """Count by the stages of a decode step, and in them what policies do, what the drafter does, and what models do."""

    def named(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def staged(*arguments: Any, **options: Any) -> Any:
            with device.stage(name):
                return function(*arguments, **options)

        return staged

    places: list[tuple[Any, str, str]] = [
        *((decode, name, name) for name in ("replayed", "draft", "prune", "flatten", "verify", "commit", "feedback")),
        *((PolicyStack, hook, "policies") for hook in ("should_expand", "branch_factor")),
        (SharedProposals, "of", "proposals"),
        *((EagerRunner, name, PASSES) for name in ("forward", "forward_together")),
    ]
    with ExitStack() as undo:
        for place, name, stage in places:
            undo.enter_context(mock.patch.object(place, name, named(stage, getattr(place, name))))
        yield
