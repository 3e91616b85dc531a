"""Running a model's forward pass over trees.

Runners are ways to compute the same pass: `eager` calls the model as it is and is the oracle for any other, `packed`
calls a copy that is faster on a CPU, `cudagraph` launches recorded passes at once on a GPU, and `auto` chooses.
"""

from __future__ import annotations

import platform
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import psutil
import torch
from torch import Tensor, nn
from transformers import Cache

from dynatree_core.cache.sink_cache import SinkCache
from dynatree_core.cache.tree_cache import TreeCache
from dynatree_core.clock import StageClock
from dynatree_core.errors import DynaTreeError, ForwardPassError, OutOfMemoryError, ParameterError
from dynatree_core.models.architectures import attention_layout, cache_argument, forward_parameters
from dynatree_core.models.state import is_untouched
from dynatree_core.runners.cudagraph import CapturedPasses, can_capture, is_replayable
from dynatree_core.runners.packed import can_pack, is_packed, pack, packed_bytes
from dynatree_core.tree.flatten import FlatTrees, flatten_chain

__all__ = ["RUNNERS", "ModelRunner", "drafters_runner", "is_out_of_memory", "out_of_memory", "runner_for"]

RUNNERS = ("auto", "eager", "packed", "cudagraph")
# of the memory that is free, what the copies of a model's matrices may take up where nobody asked for them
MAX_SHARE_OF_MEMORY = 0.25

# rows of one prefill pass: its mask and activations stay small beside the weights, matrix products stay efficient
PREFILL_CHUNK = 256
PREFILL = "prefill_forward"  # the clock's name of these passes, each of which has a shape of its own


def runner_for(model: nn.Module, name: str) -> str:
    """The runner that is meant for a model: the one that is named, or what "auto" chooses.

    That is `packed` for a model on a CPU that is as transformers made it, if its copies leave most of the free memory
    free, else `eager`. Where `cudagraph` is named, it is `eager` for a model that a replay could not follow.

    Raises:
        ParameterError: there is no such runner, or not for this model here.
    """
    if name not in RUNNERS:
        raise ParameterError(f"runner must be one of {', '.join(RUNNERS)}, got {name!r}")
    if name == "packed" and not can_pack(model):
        raise ParameterError(
            "the packed runner is for models on an x86-64 CPU in float32, or bfloat16 where it multiplies in that, got "
            f"{model.dtype} on {model.device}, {platform.machine()}; use runner='auto'"
        )
    if name == "cudagraph" and not can_capture(model):
        raise ParameterError(
            f"the cudagraph runner is for models on a CUDA GPU, got one on {model.device}; move it there, or use "
            "runner='auto'"
        )
    if name == "cudagraph" and not is_replayable(model):
        return "eager"
    if name != "auto":
        return name
    if not (can_pack(model) and is_untouched(model)):
        return "eager"
    has_room = is_packed(model) or packed_bytes(model) < MAX_SHARE_OF_MEMORY * psutil.virtual_memory().available
    return "packed" if has_room else "eager"


def drafters_runner(name: str, device: torch.device | None = None) -> str:
    """The runner for the drafter's model beside a target with this one.

    Args:
        name: the target's runner. `packed` becomes `auto`, since it may not support the drafter's dtype.
        device: the drafter's device, if it is not the target's. `cudagraph` becomes `auto` where that is no GPU.
    """
    is_without_gpu = device is not None and device.type != "cuda"
    return "auto" if name == "packed" or (name == "cudagraph" and is_without_gpu) else name


class ModelRunner:
    """Calls a transformers model through its public forward.

    Holds no state of a generation, so sessions and threads may share the model; each has a runner for its clock.

    Args:
        model: the model; it is not changed.
        clock: where the time of its passes goes.
        positions: the position of each token of the prompt, where they are not 0, 1, 2, …
        on_prefill: called after each chunk of a prefill, with the rows that the cache has and those it will have.
        name: of the runner.

    Raises:
        ParameterError: there is no such runner, or not for this model here.
    """

    def __init__(
        self,
        model: nn.Module,
        clock: StageClock,
        positions: Sequence[int] | None = None,
        on_prefill: Callable[[int, int], None] | None = None,
        name: str = "eager",
    ) -> None:
        chosen = runner_for(model, name)
        if name == "cudagraph" and chosen != name:
            warnings.warn(
                "a part of the model has code of its own (a class, a hook or a forward), which a CUDA graph could not "
                "repeat, so passes run one kernel at a time; use runner='eager' for this model",
                RuntimeWarning,
                stacklevel=3,
            )
        self.model = model
        if chosen == "packed":
            try:
                self.model = pack(model)
            except ParameterError as error:
                if name == "packed":
                    raise
                warnings.warn(f"passes are slower than they could be: {error}", RuntimeWarning, stacklevel=3)
                chosen = "eager"
        self._chosen = chosen
        self._captured = CapturedPasses() if chosen == "cudagraph" else None
        self.clock = clock
        self.on_prefill = on_prefill
        # [tokens] the prompt's own positions, where a caller gives any; later tokens count on from the last of them
        self.positions = None if positions is None else torch.tensor(positions, device=model.device)  # type: ignore[arg-type]
        self.layout = attention_layout(model)
        self.dtype: torch.dtype = model.dtype  # type: ignore[assignment]
        # whether the head can be told to compute the last rows only, which saves most of a prefill's memory
        parameters = forward_parameters(model)
        self._can_skip_logits = "logits_to_keep" in parameters
        self._cache_argument = cache_argument(model)
        # a mixture of experts may be configured to compute its training loss, which does not take a 4-D mask
        self._fixed_arguments = {"output_router_logits": False} if "output_router_logits" in parameters else {}

    @property
    def name(self) -> str:
        """How passes are computed; "eager" also once a pass could not be recorded."""
        return "eager" if self._captured is not None and self._captured.failure else self._chosen

    def forward(
        self, flat: FlatTrees, cache: TreeCache | SinkCache, *, stage: str, last_row_only: bool = False
    ) -> Tensor:
        """One pass; the rows' keys and values are appended to the cache's undecided block.

        Args:
            flat: rows with positions and mask, spanning the cache's view.
            cache: the model's cache.
            stage: the clock's name for the time of this pass.
            last_row_only: only the last row's logits are wanted.

        Returns:
            Logits [batch, rows, vocab], or [batch, 1, vocab].

        Raises:
            OutOfMemoryError: the device has no memory for the pass.
            ForwardPassError: the model raised anything else.
        """
        flat = cache.prepare(flat)
        is_recorded = self._captured is not None and stage != PREFILL and self._captured.takes(flat, cache)
        if self._captured is not None and is_recorded and isinstance(cache, TreeCache):
            with _named_failure(flat), self.clock.measure(stage, on_device=True):
                return self._captured.logits(self._called, flat, cache, last_row_only)
        arguments = self._arguments(flat, cache, last_row_only)
        with _named_failure(flat), self.clock.measure(stage, on_device=True):
            logits: Tensor = self.model(**arguments).logits
            if not last_row_only and logits.shape[1] != flat.num_rows:
                raise ForwardPassError(
                    f"a model must give logits for each of a pass's {flat.num_rows} rows, got {logits.shape[1]}; take "
                    "off the model what drops the others"
                )
        return logits[:, -1:] if last_row_only else logits

    def _called(self, flat: FlatTrees, cache: Cache, last_row_only: bool) -> Tensor:
        logits: Tensor = self.model(**self._arguments(flat, cache, last_row_only)).logits
        return logits

    def _arguments(self, flat: FlatTrees, cache: Cache, last_row_only: bool) -> dict[str, object]:
        """What the model is called with."""
        arguments: dict[str, object] = {
            "input_ids": flat.token_ids,
            "attention_mask": self.layout.masks(flat, self.dtype),
            "position_ids": self._model_positions(flat.position_ids),
            self._cache_argument: cache,
            "use_cache": True,
            **self._fixed_arguments,
        }
        if last_row_only and self._can_skip_logits:
            arguments["logits_to_keep"] = 1
        return arguments

    def _model_positions(self, places: Tensor) -> Tensor:
        """What the model is told for places in the text [batch, rows]: the places themselves, most of the time."""
        if self.positions is None:
            return places
        last = self.positions.numel() - 1
        return self.positions[places.clamp(max=last)] + (places - last).clamp(min=0)

    def prefill(self, token_ids: Tensor, cache: TreeCache | SinkCache, *, stage: str = PREFILL) -> None:
        """Fill the cache with committed tokens [tokens], in chunks; their logits are not wanted.

        With another stage than `PREFILL` it is no prompt, and nobody is told how far it is.
        """
        num_rows = cache.length + token_ids.numel()
        while token_ids.numel() > 0:
            chunk_len = min(PREFILL_CHUNK, cache.max_places)
            chunk, token_ids = token_ids[:chunk_len], token_ids[chunk_len:]
            self.forward(flatten_chain(chunk, cache.next_place), cache, stage=stage, last_row_only=True)
            cache.commit([range(chunk.numel())])
            if self.on_prefill is not None and stage == PREFILL:
                self.on_prefill(cache.length, num_rows)


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that the device has no memory left."""
    # torch.OutOfMemoryError is a CUDA allocator's; the CPU's raises a plain RuntimeError
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def out_of_memory(what: str, error: Exception) -> OutOfMemoryError:
    """The error for something that has no memory left, with what to do."""
    return OutOfMemoryError(
        f"{what} needs more memory than the device has left; shorten the prompt, lower max_new_tokens or max_nodes "
        f"({error})"
    )


@contextmanager
def _named_failure(flat: FlatTrees) -> Iterator[None]:
    """Turn whatever a model raises into an error of ours, so that a generation ends with what it has committed."""
    size = f"a forward pass of {flat.num_rows} rows over {flat.visible.shape[-1]} cache slots"
    try:
        yield
    except DynaTreeError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise out_of_memory(size, error) from error
        raise ForwardPassError(f"{size} failed in the model: {type(error).__name__}: {error}") from error
