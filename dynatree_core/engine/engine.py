"""The engine: a target, a drafter, what generations with them share, and the sequences that run on it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import Tensor, nn

from dynatree_core.cache.prefix_cache import PrefixCache
from dynatree_core.cost_model import CostModel
from dynatree_core.drafters.base import Drafter
from dynatree_core.engine.handle import Event, Handle
from dynatree_core.engine.resources import ENGINE_OPTIONS, Resources
from dynatree_core.engine.scheduler import Load, Scheduler
from dynatree_core.errors import ParameterError, QueueFullError
from dynatree_core.request.arguments import check_callable, checked_count
from dynatree_core.request.request import Request
from dynatree_core.runners.base import Runner
from dynatree_core.runners.choice import made_runner
from dynatree_core.tree.verdict import StepReport

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["ENGINE_OPTIONS", "Engine"]


class Engine(Resources):
    """What computes generations: models, runners, cache memory, measured costs and kept prefixes.

    One engine serves one generation after another (`Session.on`), or many at once (`submit` and `step`). What it has
    made for one, such as the memory of a cache, is there for the next. It looks at its models once; tell it by
    `refresh` when one was changed. `generate`, `stream` and `Session` make an engine for each call, and so see every
    change.

    Args:
        target: a transformers causal language model in eval mode.
        drafter: a model with the target's vocabulary, a registered drafter's name, a Drafter, or None.
        runner: how forward passes are computed, as in `dynatree_core.generate`.
        tokenizer: the target's, for stop strings and for drafters that look at text.
        prefix_cache: for prompts that begin as earlier ones did.
        trust_model: whether to take a target with code of somebody's own as it is.
        costs: what iterations take; None: it is measured where a policy asks.
        now: seconds since any moment, for the times in reports; None: the host's clock.
        max_sequences: sequences that run at once.
        max_waiting: requests that may wait for a place among them.
        max_bytes: what all that runs by `submit` may take up: caches of target and drafter, a cache that grows with its
            old slots beside the new ones, logits of the rows of a pass, and the prefix cache. Slots are given out in
            blocks as texts grow; when they are short, kept prefixes are forgotten, and then the youngest sequence waits
            again, and is computed anew later. None: a cache has room for the whole text from the start.
        make_runner: gives the runner of a model by the runner's name, for who watches or prices passes by a runner that
            is made around another.
        pads_trees: whether trees grow in levels of one width, so that nothing is read back before the target has
            answered ("Waits" in docs/architecture). It takes policies and drafters that bear it. None: where the target
            is not on a CPU, which would compute the padding without being faster for it.

    Raises:
        InputError: a model or an argument that cannot be used.
    """

    def __init__(
        self,
        target: nn.Module,
        drafter: nn.Module | Drafter | str | None = None,
        *,
        runner: str = "auto",
        tokenizer: PreTrainedTokenizerBase | None = None,
        prefix_cache: PrefixCache | None = None,
        trust_model: bool = False,
        costs: CostModel | None = None,
        now: Callable[[], float] | None = None,
        max_sequences: int = 8,
        max_waiting: int = 1024,
        max_bytes: int | None = None,
        make_runner: Callable[[nn.Module, str], Runner] = made_runner,
        pads_trees: bool | None = None,
    ) -> None:
        super().__init__(
            target,
            drafter,
            runner=runner,
            tokenizer=tokenizer,
            prefix_cache=prefix_cache,
            trust_model=trust_model,
            costs=costs,
            now=now,
            max_bytes=max_bytes,
            make_runner=make_runner,
            pads_trees=pads_trees,
        )
        self._scheduler = Scheduler(
            checked_count("max_sequences", max_sequences, 1), checked_count("max_waiting", max_waiting, 0)
        )
        self._given: weakref.WeakSet[Request] = weakref.WeakSet()  # requests that were submitted, here or elsewhere

    def submit(
        self,
        input_ids: Request | Tensor | Sequence[int] | Mapping[str, Tensor],
        *,
        on_report: Callable[[Handle, StepReport], object] | None = None,
        **options: Any,
    ) -> Handle:
        """Have one more sequence generated, beside those that run. It is computed by `step`.

        May be called from any thread.

        Args:
            input_ids: the prompt, or a request that `request` has made.
            on_report: called by `step` after each iteration of this sequence, with its handle and the report. What it
                raises ends the sequence.
            options: those of `dynatree_core.generate` that are not the engine's own. With `do_sample=True` and no seed
                the sequence gets one, drawn from torch's global generator.

        Raises:
            InputError: something that cannot be used; nothing was run.
            QueueFullError: as many as may are waiting; the same request may be submitted later.
        """
        if isinstance(input_ids, Request):
            if options:
                raise ParameterError(
                    f"a request says everything already, got {', '.join(options)} beside it; give them to "
                    "Engine.request"
                )
            request = input_ids
        else:
            request = self.request(input_ids, **options)
        (handle,) = self._submitted([request], on_report)
        return handle

    def submit_all(self, requests: Sequence[Request]) -> list[Handle]:
        """Have several sequences generated, or none where there is no room for all of them.

        May be called from any thread.

        Args:
            requests: made by `request`, each for one sequence.

        Raises:
            InputError: one of them cannot be used; nothing was run.
            QueueFullError: as for `submit`; the same requests may be submitted later.
        """
        others = [type(request).__name__ for request in requests if not isinstance(request, Request)]
        if others:
            raise ParameterError(f"requests must be made by Engine.request, got {others[0]} among them")
        return self._submitted(requests, None)

    def _submitted(
        self, requests: Sequence[Request], on_report: Callable[[Handle, StepReport], object] | None
    ) -> list[Handle]:
        check_callable("on_report", on_report)
        for request in requests:
            self.admit(is_fixed_width=request.is_fixed_width)
        with self._lock:
            if len({*requests}) < len(requests) or any(request in self._given for request in requests):
                raise ParameterError(
                    "a request is good for one sequence, since its policies and processors remember calls, got one "
                    "that was submitted before; make another by Engine.request"
                )
            self._given.update(requests)
        try:
            return self._scheduler.submit(self, [*map(_seeded, requests)], self.step, on_report)
        except QueueFullError:  # nothing of them was called, so they may come again
            with self._lock:
                self._given.difference_update(requests)
            raise

    def step(self) -> list[Event]:
        """One iteration of all sequences that run; before it, waiting ones start, and part of a prompt is filled in.

        May be called from any thread, by one after the other. What goes wrong with one sequence ends that one, and its
        handle has the error.

        Returns:
            What has happened; nothing where there is nothing to do.
        """
        return self._scheduler.step(self)

    def cancel(self, handle: Handle) -> None:
        """End a sequence and free its memory: at once where no step is being made, else at the end of that step.

        May be called from any thread, also for one that is done. `handle.result()` is what there is by then.
        """
        self._scheduler.cancel(self, handle)

    @property
    def load(self) -> Load:
        """How many sequences wait and run."""
        return self._scheduler.load


def _seeded(request: Request) -> Request:
    """The request with a seed where it draws: torch's generator cannot be everybody's at once."""
    if not request.do_sample or request.seed is not None:
        return request
    return attrs.evolve(request, seed=int(torch.randint(2**62, ()).item()))
