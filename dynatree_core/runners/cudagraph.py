"""The `cudagraph` runner: passes of a few rows, recorded once and launched as a whole, for CUDA.

A decode step of a small model is a thousand small kernels, and launching them takes longer than running them. A CUDA
graph launches all of them at once. It repeats exactly what was recorded, with the same addresses and shapes, so a pass
gets inputs that stay where they are, and its shape is rounded up to one of a few:

- Rows are padded by repeating the last one, with its token, its place, what it sees and the slot that it writes to.
  So a padding row writes what is there anyway, and no slot is used up.
- Slots of the cache are shown up to the next of a few numbers. Those behind the block are hidden by the mask.

The keys and values are those of the session's own `TreeCache`; here they are written by index and not by slice.

Whether a model can be recorded shows when it is tried. So the first replay of each shape is compared with a plain pass
over the same rows: logits, keys and values. Where anything fails the session warns and goes on with plain passes.
"""

from __future__ import annotations

import gc
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from transformers import Cache

from dynatree_core.cache.sink_cache import SinkCache
from dynatree_core.cache.tree_cache import TreeCache
from dynatree_core.models.state import can_infer, is_untouched
from dynatree_core.tree.flatten import FlatTrees

__all__ = ["CapturedPasses", "can_capture", "is_replayable", "rounded_rows", "rounded_slots"]

MAX_ROWS = 128  # of a pass that is recorded; larger ones keep the device busy without
MIN_SLOTS = 256

# by the model's dtype, how far numbers of a replay may be from those of a plain pass, relative to the largest: products
# of other shapes round otherwise. A replay that went wrong is as far off as two texts are
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-2, torch.float16: 0.05, torch.bfloat16: 0.15}

# computes a pass over rows and a cache: logits [1, rows or 1, vocab]
Call = Callable[[FlatTrees, Cache, bool], Tensor]

_recording = threading.Lock()  # a process can record one graph at a time


def can_capture(model: nn.Module) -> bool:
    """Whether a model is where CUDA graphs are."""
    device: torch.device = model.device  # type: ignore[assignment]
    return device.type == "cuda"


def is_replayable(model: nn.Module) -> bool:
    """Whether a replay does all that a pass of this model does.

    A class, a hook or a forward of somebody's own may run code of the host that a graph does not have. One that only
    tells the device what to do says so by an attribute `is_replayable = True`.
    """
    return is_untouched(model, _says_so) and can_infer(model)


def _says_so(code: object) -> bool:
    return getattr(code, "is_replayable", False) is True


def rounded_rows(rows: int) -> int:
    """The rows of the recorded pass that so many rows fit in: the next power of two."""
    return 1 << (rows - 1).bit_length()


def rounded_slots(slots: int, capacity: int) -> int:
    """The slots that a recorded pass sees: a multiple of 256, from 2,048 on of a quarter of a power of two."""
    step = max(MIN_SLOTS, 1 << max(slots.bit_length() - 3, 0))
    return min(-(-slots // step) * step, capacity)


@attrs.frozen
class Shape:
    """What passes have in common that one graph can compute."""

    rows: int
    slots: int
    last_row_only: bool


class _SlotCache(Cache):
    """A model's view of a TreeCache's buffers in a pass that writes its rows by index."""

    def __init__(self, keys: list[Tensor], values: list[Tensor], slots: int, written: Tensor) -> None:
        super().__init__(layers=[])
        self._keys, self._values = keys, values
        self._slots = slots
        self._written = written  # [rows] int64

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        keys, values = self._keys[layer_idx], self._values[layer_idx]
        keys.index_copy_(2, self._written, key_states)
        values.index_copy_(2, self._written, value_states)
        return keys[:, :, : self._slots], values[:, :, : self._slots]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        # a number would be recorded and never change; who is told positions and mask does not need it
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self._slots, 0


class _StaticPass:
    """A pass of one shape whose inputs stay where they are.

    Attributes:
        replay: launches what was recorded and returns the logits, always the same tensor; None before.
    """

    def __init__(self, shape: Shape, cache: TreeCache) -> None:
        self.shape = shape
        device = cache.keys[0].device
        self._flat = FlatTrees(
            token_ids=torch.zeros(1, shape.rows, dtype=torch.int64, device=device),
            position_ids=torch.zeros(1, shape.rows, dtype=torch.int64, device=device),
            visible=torch.zeros(1, shape.rows, shape.slots, dtype=torch.bool, device=device),
            slot_positions=torch.zeros(1, shape.slots, dtype=torch.int64, device=device),
            num_places=shape.rows,
        )
        self._order = torch.arange(shape.rows, device=device)
        self._written = self._order.clone()  # [rows] int64: the slots of the rows
        self._cache = _SlotCache(cache.keys, cache.values, shape.slots, self._written)
        self.replay: Callable[[], Tensor] | None = None

    def fill(self, flat: FlatTrees, start: int) -> None:
        """Take over the rows, which are to be written at the slots from `start` on."""
        rows, slots, own = flat.num_rows, flat.visible.shape[-1], self._flat
        for ours, theirs in ((own.token_ids, flat.token_ids), (own.position_ids, flat.position_ids)):
            ours[:, :rows] = theirs
            ours[:, rows:] = theirs[:, -1:]
        own.visible[:, :rows, :slots] = flat.visible
        own.visible[:, :, slots:] = False
        own.visible[:, rows:] = own.visible[:, rows - 1 : rows]
        own.slot_positions[:, :slots] = flat.slot_positions
        torch.clamp(self._order + start, max=start + rows - 1, out=self._written)

    def run(self, call: Call) -> Tensor:
        """Compute the pass: logits [1, rows or 1, vocab]."""
        return call(self._flat, self._cache, self.shape.last_row_only)

    def own(self, logits: Tensor, rows: int) -> Tensor:
        """A copy of the logits that are not of padding rows, for the next replay overwrites them."""
        return (logits[:, -1:] if self.shape.last_row_only else logits[:, :rows]).clone()


class CapturedPasses:
    """The recorded passes over one cache.

    A shape that comes for the first time is computed without recording, for it may be the only time.

    Attributes:
        failure: why no pass is recorded any more, or None.
    """

    def __init__(self) -> None:
        self.failure: str | None = None
        self._keys: list[Tensor] | None = None  # the cache's buffers that the passes below write to
        self._passes: dict[Shape, _StaticPass] = {}
        self._recorder = _Recorder()

    def takes(self, flat: FlatTrees, cache: TreeCache | SinkCache) -> bool:
        """Whether a pass over these rows is to be computed here."""
        return (
            self.failure is None
            and isinstance(cache, TreeCache)
            and cache.length > 0  # the first pass makes the buffers of all layers, unless it fails midway
            and flat.token_ids.shape[0] == 1
            and flat.num_rows <= MAX_ROWS
            and not torch.is_autocast_enabled(flat.token_ids.device.type)
        )

    @torch.inference_mode()
    def logits(self, call: Call, flat: FlatTrees, cache: TreeCache, last_row_only: bool) -> Tensor:
        """A pass, with what `call` computes: recorded, replayed or neither.

        Args:
            call: the model's pass, over a static input or over these rows.
            flat: the rows, for which `takes` is true.
            cache: the rows' keys and values are appended to its undecided block.
            last_row_only: only the last row's logits are wanted.

        Returns:
            Logits [1, rows, vocab], or [1, 1, vocab].

        Raises:
            CacheError: the rows do not fit.
            Exception: whatever the model raises.
        """
        start = cache.reserve(flat.num_rows)
        if self._keys is not cache.keys:
            self._forget()
            self._keys = cache.keys
        slots = rounded_slots(flat.visible.shape[-1], cache.capacity)
        shape = Shape(rounded_rows(flat.num_rows), slots, last_row_only)
        static = self._passes.get(shape)
        if static is not None and static.replay is None:
            return self._recorded(static, call, flat, cache, start)
        if static is None:
            static = _StaticPass(shape, cache)
            static.fill(flat, start)
            logits = static.run(call)
            self._passes[shape] = static
        else:
            assert static.replay is not None
            static.fill(flat, start)
            logits = static.replay()
        cache.append(flat.num_rows)
        return static.own(logits, flat.num_rows)

    def _recorded(self, static: _StaticPass, call: Call, flat: FlatTrees, cache: TreeCache, start: int) -> Tensor:
        """Record a pass and see whether a replay does the same as a plain one, whose logits are returned."""
        block = [buffer[:, :, start : start + flat.num_rows] for buffer in (*cache.keys, *cache.values)]
        found: list[Tensor] = []
        replay, failure = None, None
        try:
            static.fill(flat, start)
            replay = self._recorder.recorded(lambda: static.run(call), flat.token_ids.device)
            for rows in block:
                rows.zero_()  # what recording has written does not count
            found = [static.own(replay(), flat.num_rows), *(rows.clone() for rows in block)]
        except RuntimeError as error:  # so CUDA and torch say what cannot be recorded; the warning below repeats it
            failure = f"{type(error).__name__}: {error}"
        # last, so that its keys and values are those that stay
        expected = call(flat, cache, static.shape.last_row_only)
        expected = expected[:, -1:] if static.shape.last_row_only else expected
        if failure is None:
            off = float(torch.stack([_off(*pair) for pair in zip(found, [expected, *block], strict=True)]).amax())
            if not off <= TOLERANCE[cache.keys[0].dtype]:  # of the model; NaN is not either
                failure = f"the first replay was off by {off:.2g} of the largest number"
        if failure is None:
            static.replay = replay
        else:
            self.failure = failure
            self._forget()
            warnings.warn(
                f"a pass of {flat.num_rows} rows could not be recorded as a CUDA graph, so passes run one kernel at a "
                f"time from here on ({failure}); use runner='eager' for this model",
                RuntimeWarning,
                stacklevel=2,
            )
        return expected

    def _forget(self) -> None:
        self._keys, self._passes, self._recorder = None, {}, _Recorder()


class _Recorder:
    """Records the graphs of one cache. They share memory, since one is replayed at a time and its output copied."""

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None
        self._pool: Any = None

    def recorded(self, run: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
        """Record what a function launches.

        Returns:
            A function that launches it again and returns the same tensor each time.

        Raises:
            RuntimeError: it waits for the device, which cannot be recorded, or anything else that CUDA refuses.
        """
        with _recording, torch.cuda.device(device):
            if self._stream is None:
                self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
                self._pool = torch.cuda.graph_pool_handle()
            stream, current = self._stream, torch.cuda.current_stream()
            stream.wait_stream(current)
            # libraries make themselves at home on a stream the first time
            with torch.cuda.stream(stream), _refused_waiting():
                run()
            current.wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # the outer context is left as it was entered even if recording breaks off
            with (
                _without_gc(),
                torch.cuda.stream(current),
                torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"),
            ):
                output = run()

        def replay() -> Tensor:
            graph.replay()
            return output

        return replay


@contextmanager
def _refused_waiting() -> Iterator[None]:
    """Refuse a function that waits for the device: a recording that it breaks would leave torch's allocator unusable.

    torch's own error for it is one for all threads, so it is asked to warn.
    """
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)
    if any("synchronizing CUDA operation" in str(warning.message) for warning in caught):
        raise RuntimeError("the model waits for the device within a pass")


@contextmanager
def _without_gc() -> Iterator[None]:
    """Keep the garbage collector from freeing another graph while one is being recorded."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _off(found: Tensor, expected: Tensor) -> Tensor:
    """[] float32: the largest difference relative to the largest number; infinities have to be the same."""
    difference = torch.where(found == expected, 0, found - expected).abs().amax()
    largest = expected.nan_to_num(posinf=0, neginf=0).abs().amax()
    return difference.float() / largest.float().clamp(min=1e-30)
