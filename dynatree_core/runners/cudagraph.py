"""The `cudagraph` runner: passes of a few rows, recorded once and launched as a whole, for CUDA.

A decode step of a small model is a thousand small kernels, and launching them takes longer than running them. A CUDA
graph launches all of them at once. It repeats exactly what was recorded, with the same addresses and shapes, so a pass
gets inputs that stay where they are, and its shape is rounded up to one of a few:

- Rows are padded by repeating the last one, with its token, its place, what it sees and the slot that it writes to.
  So a padding row writes what is there anyway, and no slot is used up.
- Slots of the cache are shown up to the next of a few numbers. Those behind the block are hidden by the mask.

Keys and values are written into the cache's own buffers, by index and not by slice. So a graph belongs to one cache and
goes with it. An engine owns the caches of target and drafter and lends them to its generations, which replay what
earlier ones have recorded.

Whether a model can be recorded shows when it is tried. So the first replay of each shape is compared with a plain pass
over the same rows: logits, keys and values. Where anything fails the runner warns and goes on with plain passes.
"""

from __future__ import annotations

import gc
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Hashable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, final

import attrs
import torch
from torch import Tensor, nn
from transformers import Cache

from dynatree_core.cache.base import KeyValueCache
from dynatree_core.models.state import is_replayable
from dynatree_core.runners.agreement import TOLERANCE, apart
from dynatree_core.runners.base import Kept, PassOutput, Rows, Runner, kept_copy
from dynatree_core.runners.eager import EagerRunner
from dynatree_core.tree.flatten import FlatTrees

__all__ = ["CudaGraphRunner", "Recorder", "SlotCache", "can_capture", "rounded_rows", "rounded_slots"]

# rows of recorded passes: a pass of a few is bound by reading the weights, so that those of padding cost little beside
# another recording; larger passes keep the device busy without
ROWS = (1, 16, 64, 128)
MAX_ROWS = ROWS[-1]
MIN_SLOTS = 1024

Run = Callable[[], PassOutput]
Output = TypeVar("Output")

_recording = threading.Lock()  # a process can record one graph at a time
_streams: dict[torch.device, torch.cuda.Stream] = {}  # on which they are recorded: libraries settle on each new one


def can_capture(model: nn.Module) -> bool:
    """Whether a model is where CUDA graphs are."""
    device: torch.device = model.device  # type: ignore[assignment]
    return device.type == "cuda"


def rounded_rows(rows: int) -> int:
    """The rows of the recorded pass that so many rows fit in: the next of `ROWS`."""
    return next(number for number in ROWS if number >= rows)


def rounded_slots(slots: int, capacity: int) -> int:
    """The slots that a recorded pass sees: a multiple of 1,024, from 8,192 on of a quarter of a power of two."""
    step = max(MIN_SLOTS, 1 << max(slots.bit_length() - 3, 0))
    return min(-(-slots // step) * step, capacity)


@attrs.frozen
class Shape:
    """What passes have in common that one graph can compute."""

    rows: int
    slots: int
    last_row_only: bool
    hidden: bool
    has_positions: bool  # whether the model is told other positions than the rows' own


class SlotCache(Cache):
    """A model's view of a cache's buffers in a pass that writes its rows by index."""

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
        replay: launches what was recorded and returns its output, always the same tensors; None before.
    """

    def __init__(self, shape: Shape, cache: KeyValueCache) -> None:
        self.shape = shape
        device = cache.keys[0].device
        positions = torch.zeros(1, shape.rows, dtype=torch.int64, device=device) if shape.has_positions else None
        self._flat = FlatTrees(
            token_ids=torch.zeros(1, shape.rows, dtype=torch.int64, device=device),
            position_ids=torch.zeros(1, shape.rows, dtype=torch.int64, device=device),
            visible=torch.zeros(1, shape.rows, shape.slots, dtype=torch.bool, device=device),
            slot_positions=torch.zeros(1, shape.slots, dtype=torch.int64, device=device),
            num_places=shape.rows,
            model_positions=positions,
        )
        self._order = torch.arange(shape.rows, device=device)
        self._written = self._order.clone()  # [rows] int64: the slots of the rows
        self._cache = SlotCache(cache.keys, cache.values, shape.slots, self._written)
        self.replay: Run | None = None

    def fill(self, flat: FlatTrees, start: int) -> None:
        """Take over the rows, which are to be written at the slots from `start` on."""
        rows, slots, own = flat.num_rows, flat.visible.shape[-1], self._flat
        inputs = [(own.token_ids, flat.token_ids), (own.position_ids, flat.position_ids)]
        if own.model_positions is not None and flat.model_positions is not None:
            inputs.append((own.model_positions, flat.model_positions))
        for ours, theirs in inputs:
            ours[:, :rows] = theirs
            ours[:, rows:] = theirs[:, -1:]
        own.visible[:, :rows, :slots] = flat.visible
        own.visible[:, :, slots:] = False
        own.visible[:, rows:] = own.visible[:, rows - 1 : rows]
        own.slot_positions[:, :slots] = flat.slot_positions
        torch.clamp(self._order + start, max=start + rows - 1, out=self._written)

    def run(self, plain: EagerRunner) -> PassOutput:
        """Compute the pass."""
        shape = self.shape
        return plain.forward(self._flat, self._cache, hidden=shape.hidden, last_row_only=shape.last_row_only)

    def own(self, output: PassOutput, rows: int) -> PassOutput:
        """A copy of what is not of padding rows, for the next replay overwrites it."""
        logits = output.logits if self.shape.last_row_only else output.logits[:, :rows]
        return PassOutput(logits.clone(), None if output.hidden is None else output.hidden[:, :rows].clone())


@final
class CudaGraphRunner(Runner):
    """Records the passes of a model.

    A shape that comes for the first time is computed without recording, for it may be the only time.

    Args:
        plain: computes passes one kernel at a time, and those that are recorded.
        graphs: where recorded passes are kept, by the cache that they write to.

    Attributes:
        plain: as given.
        failure: why no pass is recorded any more, or None.
        num_recorded: passes that this runner has recorded.
        num_steps_recorded: steps whose target it is, as two graphs each (`dynatree_core.engine.recorded`).
        recording_seconds: what both took, with the passes that recordings were compared with.
    """

    name = "cudagraph"

    def __init__(self, plain: EagerRunner, graphs: _Graphs | None = None) -> None:
        self.failure: str | None = None
        self.num_recorded, self.num_steps_recorded, self.recording_seconds = 0, 0, 0.0
        self.plain = plain
        self.num_layers = self.plain.num_layers
        self._graphs = _Graphs() if graphs is None else graphs

    @classmethod
    def reason_against(cls, model: nn.Module) -> str | None:
        return None if can_capture(model) else f"is for models on a CUDA GPU, got one on {model.device}"

    @classmethod
    def reason_for_eager(cls, model: nn.Module) -> str | None:
        if is_replayable(model):
            return None
        return (
            "a part of the model has code of its own (a class, a hook or a forward), which a CUDA graph could not "
            "repeat, so passes run one kernel at a time"
        )

    @classmethod
    def make(cls, model: nn.Module, kept: Kept) -> CudaGraphRunner:
        """The runner of a model, with the graphs of earlier generations where the model is as it was."""
        return cls(EagerRunner.make(model, kept), kept_copy(cls.name, kept, model, _Graphs))

    @property
    def computed_by(self) -> str:
        return self.name if self.failure is None else self.plain.name

    def forward(
        self,
        flat: FlatTrees,
        cache: KeyValueCache,
        *,
        hidden: bool = False,
        last_row_only: bool = False,
        is_prompt: bool = False,
    ) -> PassOutput:
        """One pass, as `Runner.forward`: recorded, replayed or neither.

        Raises:
            CacheError: the rows do not fit.
        """
        if is_prompt or not self.takes(flat, cache):
            return self.plain.forward(flat, cache, hidden=hidden, last_row_only=last_row_only)
        with torch.inference_mode():
            return self._replayed(flat, cache, hidden, last_row_only)

    def forward_together(
        self, parts: Sequence[Rows], *, hidden: bool = False, last_row_only: bool = False
    ) -> list[PassOutput]:
        """One pass, as `Runner.forward_together`, without recording: its shape follows those of all sequences."""
        return self.plain.forward_together(parts, hidden=hidden, last_row_only=last_row_only)

    def takes(self, flat: FlatTrees, cache: KeyValueCache) -> bool:
        """Whether a pass over these rows can be one that is recorded."""
        return (
            self.failure is None
            and cache.can_record
            and cache.length > 0  # the first pass makes the buffers of all layers, unless it fails midway
            and flat.token_ids.shape[0] == 1
            and flat.num_rows <= MAX_ROWS
            and not torch.is_autocast_enabled(flat.token_ids.device.type)
        )

    def recorded_over(self, cache: KeyValueCache) -> MutableMapping[Hashable, Any]:
        """What else was recorded over the buffers of a cache, by whatever names it: it goes with them.

        It must not hold the cache.
        """
        return self._graphs.of(cache).others

    def _replayed(self, flat: FlatTrees, cache: KeyValueCache, hidden: bool, last_row_only: bool) -> PassOutput:
        start = cache.reserve(flat.num_rows)
        passes = self._graphs.of(cache)
        slots = rounded_slots(flat.visible.shape[-1], cache.capacity)
        shape = Shape(rounded_rows(flat.num_rows), slots, last_row_only, hidden, flat.model_positions is not None)
        static = passes.by_shape.get(shape)
        if static is not None and static.replay is None:
            begun = time.perf_counter()
            output = self._recorded(static, passes.recorder, flat, cache, start)
            self.num_recorded += static.replay is not None
            self.recording_seconds += time.perf_counter() - begun  # comparing them has waited for the device
            return output
        if static is None:
            static = _StaticPass(shape, cache)
            static.fill(flat, start)
            output = static.run(self.plain)
            passes.by_shape[shape] = static
        else:
            assert static.replay is not None
            static.fill(flat, start)
            output = static.replay()
        cache.append(flat.num_rows)
        return static.own(output, flat.num_rows)

    def _recorded(
        self, static: _StaticPass, recorder: Recorder, flat: FlatTrees, cache: KeyValueCache, start: int
    ) -> PassOutput:
        """Record a pass and see whether a replay does the same as a plain one, whose output is returned."""
        block = [buffer[:, :, start : start + flat.num_rows] for buffer in (*cache.keys, *cache.values)]
        found: list[Tensor] = []
        replay, failure = None, None
        try:
            static.fill(flat, start)
            replay = recorder.recorded(lambda: static.run(self.plain), flat.token_ids.device)
            for rows in block:
                rows.zero_()  # what recording has written does not count
            found = [*_tensors(static.own(replay(), flat.num_rows)), *(rows.clone() for rows in block)]
        except RuntimeError as error:  # so CUDA and torch say what cannot be recorded; the warning below repeats it
            failure = f"{type(error).__name__}: {error}"
        # last, so that its keys and values are those that stay
        shape = static.shape
        expected = self.plain.forward(flat, cache, hidden=shape.hidden, last_row_only=shape.last_row_only)
        if failure is None:
            pairs = zip(found, [*_tensors(expected), *block], strict=True)
            off = float(torch.stack([apart(*pair) for pair in pairs]).amax())
            if not off <= TOLERANCE[cache.keys[0].dtype]:  # of the model; NaN is not either
                failure = f"the first replay was off by {off:.2g} of the largest number"
        if failure is None:
            static.replay = replay
        else:
            self.failure = failure
            self._graphs.forget(cache)
            warnings.warn(
                f"a pass of {flat.num_rows} rows could not be recorded as a CUDA graph, so passes run one kernel at a "
                f"time from here on ({failure}); use runner='eager' for this model",
                RuntimeWarning,
                stacklevel=2,
            )
        return expected


class _Graphs:
    """The recorded passes of one model."""

    def __init__(self) -> None:
        self._by_cache: weakref.WeakKeyDictionary[KeyValueCache, _PassesOverCache] = weakref.WeakKeyDictionary()

    def of(self, cache: KeyValueCache) -> _PassesOverCache:
        """The recorded passes over one cache; none where its buffers are others than they were."""
        found = self._by_cache.get(cache)
        if found is None or found.keys is not cache.keys:
            found = self._by_cache[cache] = _PassesOverCache(cache.keys)
        return found

    def forget(self, cache: KeyValueCache) -> None:
        del self._by_cache[cache]


class _PassesOverCache:
    """The recorded passes over one cache; it must not hold the cache, with which it goes."""

    def __init__(self, keys: list[Tensor]) -> None:
        self.keys = keys  # the buffers that the passes write to
        self.by_shape: dict[Shape, _StaticPass] = {}
        self.others: dict[Hashable, Any] = {}
        self.recorder = Recorder()


def _tensors(output: PassOutput) -> list[Tensor]:
    return [tensor for tensor in (output.logits, output.hidden) if tensor is not None]


class Recorder:
    """Records the graphs of one cache. They share memory, since one is replayed at a time and its output copied."""

    def __init__(self) -> None:
        self._pool: Any = None

    def recorded(self, run: Callable[[], Output], device: torch.device) -> Callable[[], Output]:
        """Record what a function launches.

        Returns:
            A function that launches it again and returns the same each time: what was returned when it was recorded.

        Raises:
            RuntimeError: it waits for the device, which cannot be recorded, or anything else that CUDA refuses.
        """
        with _recording, torch.cuda.device(device):
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            if device not in _streams:
                _streams[device] = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            stream, current = _streams[device], torch.cuda.current_stream()
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

        def replay() -> Output:
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
        raise RuntimeError("the host would wait for the device within it")


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
