"""The passes of one generation: what it adds to a runner, which knows of none."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import attrs
import torch
from torch import Tensor

from dynatree_core.cache.base import KeyValueCache
from dynatree_core.clock import StageClock
from dynatree_core.errors import DynaTreeError, ForwardPassError, OutOfMemoryError
from dynatree_core.runners.base import PassOutput, Rows, Runner
from dynatree_core.tree.flatten import FlatTrees, flatten_chain

__all__ = ["PREFILL_CHUNK", "AskedPass", "Passes", "computed", "is_out_of_memory", "out_of_memory"]

# rows of one prefill pass: its mask and activations stay small beside the weights, matrix products stay efficient
PREFILL_CHUNK = 256
PREFILL = "prefill_forward"  # the clock's name of these passes, each of which has a shape of its own


class Passes:
    """A runner's passes in one generation.

    Args:
        runner: computes them.
        clock: where their time goes.
        positions: [tokens] int64 on the model's device, those of the prompt where they are not 0, 1, 2, …; later tokens
            count on from the last of them.
        on_prefill: called after each chunk of a prefill, with the rows that the cache has and those it will have.
    """

    def __init__(
        self,
        runner: Runner,
        clock: StageClock,
        *,
        positions: Tensor | None = None,
        on_prefill: Callable[[int, int], None] | None = None,
    ) -> None:
        self.runner = runner
        self.clock = clock
        self.positions = positions
        self.on_prefill = on_prefill

    def forward(
        self, flat: FlatTrees, cache: KeyValueCache, *, stage: str, last_row_only: bool = False, hidden: bool = False
    ) -> PassOutput:
        """One pass; the rows' keys and values are appended to the cache's undecided block.

        Args:
            flat: rows with positions and mask, spanning the cache's view.
            cache: the model's cache.
            stage: the clock's name for the time of this pass.
            last_row_only: only the last row's logits are wanted.
            hidden: the hidden states of all rows are wanted too.

        Raises:
            OutOfMemoryError: the device has no memory for the pass.
            ForwardPassError: the model raised anything else.
        """
        flat = self.prepared(flat, cache)
        with _named_failure(flat), self.clock.measure(stage, on_device=True):
            output = self.runner.forward(
                flat, cache, hidden=hidden, last_row_only=last_row_only, is_prompt=stage == PREFILL
            )
        return with_own_totals(self.runner, output)

    def prepared(self, flat: FlatTrees, cache: KeyValueCache) -> FlatTrees:
        """Rows as the runner takes them: with what the cache shows them, and the prompt's own positions."""
        flat = cache.prepare(flat)
        if self.positions is None:
            return flat
        return attrs.evolve(flat, model_positions=_at_places(self.positions, flat.position_ids))

    def prefill(self, token_ids: Tensor, cache: KeyValueCache, *, stage: str = PREFILL) -> None:
        """Fill the cache with committed tokens [tokens], in chunks; their logits are not wanted.

        With another stage than `PREFILL` it is no prompt, and nobody is told how far it is.
        """
        for _ in self.prefill_chunks(token_ids, cache, stage=stage):
            pass

    def prefill_chunks(self, token_ids: Tensor, cache: KeyValueCache, *, stage: str = PREFILL) -> Iterator[int]:
        """Likewise, each chunk when the next one is asked for: other passes may run between. Yields its rows."""
        num_rows = cache.length + token_ids.numel()
        while token_ids.numel() > 0:
            chunk_len = min(PREFILL_CHUNK, cache.max_places)
            chunk, token_ids = token_ids[:chunk_len], token_ids[chunk_len:]
            self.forward(flatten_chain(chunk, cache.next_place), cache, stage=stage, last_row_only=True)
            cache.commit([range(chunk.numel())])
            if self.on_prefill is not None and stage == PREFILL:
                self.on_prefill(cache.length, num_rows)
            yield chunk.numel()


@attrs.frozen(eq=False)
class AskedPass:
    """A pass that one generation wants, to be computed alone or together with those of others."""

    passes: Passes
    flat: FlatTrees
    cache: KeyValueCache
    stage: str
    last_row_only: bool = False
    can_be_shared: bool = True  # False: its shape is part of what it says

    def alone(self) -> PassOutput:
        """Compute it.

        Raises:
            OutOfMemoryError, ForwardPassError: as `Passes.forward`.
        """
        return self.passes.forward(self.flat, self.cache, stage=self.stage, last_row_only=self.last_row_only)


def computed(asked: Sequence[AskedPass]) -> list[PassOutput | Exception]:
    """What passes of several generations say: those of one runner are one pass.

    Where such a pass fails, each is computed by itself, so that an error belongs to the generation that it comes with.

    Returns:
        For each what it says, or the error that it raises alone.
    """
    outputs: dict[AskedPass, PassOutput | Exception] = {}
    alike: dict[object, list[AskedPass]] = {}
    for one in asked:
        alike.setdefault((one.passes.runner, one.last_row_only, one.stage) if one.can_be_shared else one, []).append(
            one
        )
    for group in alike.values():
        together = _together(group) if len(group) > 1 else None
        outputs |= zip(group, [_alone(one) for one in group] if together is None else together, strict=True)
    return [outputs[one] for one in asked]


def _alone(asked: AskedPass) -> PassOutput | Exception:
    try:
        return asked.alone()
    except Exception as error:  # noqa: BLE001  # an observer's or a caller's among them: all belong to this one
        return error


def _together(group: Sequence[AskedPass]) -> Sequence[PassOutput] | None:
    """One pass for all; None where it fails, and the caches are as before."""
    before = [one.cache.block_len for one in group]
    first = group[0]
    try:
        parts = [Rows(one.passes.prepared(one.flat, one.cache), one.cache) for one in group]
        with ExitStack() as clocks:
            for one in group:
                clocks.enter_context(one.passes.clock.measure(first.stage, on_device=True))
            outputs = first.passes.runner.forward_together(parts, last_row_only=first.last_row_only)
        return [with_own_totals(first.passes.runner, output) for output in outputs]
    except Exception:  # noqa: BLE001  # whatever a model raises comes again for the one that it belongs to
        for one, rows in zip(group, before, strict=True):
            one.cache.cut_block(rows)
        return None


def with_own_totals(runner: Runner, output: PassOutput) -> PassOutput:
    """A pass's output, without totals unless the runner's own class says that it gives them.

    Tokens are taken from totals. A runner that calls another one, or inherits from it, may have changed the logits that
    they are of, so it is not believed for what it has inherited.
    """
    if output.totals is None or vars(type(runner)).get("gives_totals", False):
        return output
    return attrs.evolve(output, totals=None)


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that the device has no memory left."""
    # torch.OutOfMemoryError is a CUDA allocator's; the CPU's raises a plain RuntimeError, as do numbers of bytes that
    # fit into no integer
    told = "can't allocate memory", "Storage size calculation overflowed"
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(words in str(error) for words in told)


def out_of_memory(what: str, error: Exception) -> OutOfMemoryError:
    """The error for something that has no memory left, with what to do."""
    return OutOfMemoryError(
        f"{what} needs more memory than the device has left; shorten the prompt, lower max_new_tokens or max_nodes "
        f"({error})"
    )


def _at_places(positions: Tensor, places: Tensor) -> Tensor:
    """What the model is told for places in the text [lanes, rows], of which `positions` says the first ones."""
    last = positions.numel() - 1
    return positions[places.clamp(max=last)] + (places - last).clamp(min=0)


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
