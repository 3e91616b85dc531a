"""A lane: a sequence's place in an engine, which is what the stages of a decode step work on."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessorList

from dynatree_core.drafters.base import DraftState
from dynatree_core.engine.metrics import summarise
from dynatree_core.engine.observer import End, Fault, Watch, observers_of
from dynatree_core.engine.rehearsal import Rehearsal
from dynatree_core.engine.resources import Resources, in_blocks, slots_of
from dynatree_core.engine.sequence import Sequence
from dynatree_core.errors import DrafterError, DynaTreeError, InputError
from dynatree_core.models.stored import rounding_of
from dynatree_core.plugins.foreign import others_code
from dynatree_core.policy.stack import PolicyStack
from dynatree_core.report import GenerationReport, GenerationResult, StepStats
from dynatree_core.request.limits import Limits
from dynatree_core.request.request import Request
from dynatree_core.request.sampling import Sampler
from dynatree_core.runners.passes import is_out_of_memory
from dynatree_core.tree.frontier import Frontier, Proposals
from dynatree_core.tree.padded import PaddedGrowth
from dynatree_core.tree.token_tree import TokenTree
from dynatree_core.tree.verdict import StepReport

__all__ = ["Lane", "unstarted_result"]


class Lane:
    """A sequence's place in an engine: the caches and the passes that it has, and who watches.

    Args:
        engine: whose models compute it.
        request: what is asked.
        number: of the sequence among those of the engine, for observers.
        is_growing: whether its cache has room for the next iteration only, and is given more by `make_room`.

    Raises:
        InputError: the drafter cannot serve the request.
    """

    def __init__(self, engine: Resources, request: Request, *, number: int = 0, is_growing: bool = False) -> None:
        engine.admit(is_fixed_width=request.is_fixed_width)
        self.engine = engine
        self.sequence = Sequence(request, engine.device, engine.trees_device(request))
        self._callers_errors: list[BaseException] = []  # raised by what the caller has given, so nobody else's fault
        self._on_prefill = request.on_prefill and _noting(request.on_prefill, self._callers_errors)
        self._is_growing = is_growing
        self.clock = engine.new_clock()
        observers = observers_of(request.observer)
        self.observer = Watch(observers, self.clock, number) if observers else None  # None costs nothing
        self.target = engine.new_passes(request, self.clock, self._on_prefill)
        self.num_reused_tokens = 0  # of the prompt, whose rows came from the prefix cache
        # reports and frontiers keep it, so it must not hold the session
        self.measure_costs = functools.partial(engine.costs, request.is_fixed_width, self.clock)
        self.beside: list[tuple[int, ...]] = []  # nodes by level of those whose iteration it is too, as they had last
        self.neighbours: Callable[[], Iterable[Lane]] = lambda: ()  # who runs in the same thread's steps
        self.rows_beside = 0  # of this iteration's pass, those of the others
        self.has_asked = False  # whether policies have looked at proposals in this iteration
        self.is_likely_to_ask = False  # whether they have at the level before, or in the last iteration
        self.padded_space = engine.new_padded_space(request)  # None: trees are grown level by level
        self.num_rehearsed = 0  # iterations whose trees were grown both ways
        self.rehearse_from = 0  # the first iteration that may be the next of them
        self.growth: PaddedGrowth | None = None  # of this iteration's tree, if it may be padded
        self.rehearsal: Rehearsal | None = None  # of this iteration's tree, if it is grown both ways
        self.can_record_steps = True  # until one could not be recorded
        self._take_place()

    def _take_place(self, *, is_drafting: bool = True) -> None:
        """Take caches, and begin to draft."""
        engine, request = self.engine, self.request
        self.cache = engine.new_cache(request, self, self.num_slots_needed if self._is_growing else None)
        # of every verification pass at least, so that all passes round alike
        self.pass_shape = (
            {"min_rows": request.pass_rows, "min_slots": self.cache.capacity} if request.is_fixed_width else {}
        )
        self.prefix = engine.new_prefix(request, self.cache)
        if not is_drafting:
            return
        try:
            with self.blame_drafter(InputError):
                self.sequence.draft_state = engine.start_drafter(
                    request,
                    self.clock,
                    self.prefix,
                    self._on_prefill,
                    self.padded_space,
                    trees_device=self.tree_ids.device,
                    is_growing=self._is_growing,
                )
        except DrafterError as error:
            self.fall_back(error)

    # what the stages read of the sequence

    @property
    def request(self) -> Request:
        """What was asked."""
        return self.sequence.request

    @property
    def device(self) -> torch.device:
        return self.engine.device

    @property
    def vocab_size(self) -> int:
        return self.engine.vocab_size

    @property
    def drafter_name(self) -> str | None:
        return self.engine.drafter_name

    @property
    def prompt_ids(self) -> list[int]:
        """The prompt without its padding."""
        return list(self.request.prompt_ids)

    @property
    def num_padding(self) -> int:
        return self.request.num_padding

    @property
    def max_new_tokens(self) -> int:
        return self.request.max_new_tokens

    @property
    def stack(self) -> PolicyStack:
        return self.sequence.stack

    @property
    def draft_state(self) -> DraftState | None:
        return self.sequence.draft_state

    @property
    def limits(self) -> Limits:
        return self.sequence.limits

    @property
    def settings(self) -> dict[str, Any]:
        """What was asked besides policy, drafter and limits, and of which target: for those who keep a record of it."""
        request, target = self.request, self.engine.target
        return {
            "max_new_tokens": request.max_new_tokens,
            "eos_token_ids": sorted(request.eos_token_ids),
            "do_sample": request.do_sample,
            "seed": request.seed,
            "logits_processors": [type(one).__name__ for one in request.logits_processors],
            "stopping_criteria": len(request.stopping_criteria),
            "cache": None if request.kept is None else str(request.kept),
            "exact": "fixed_width" if request.is_fixed_width else None,
            "on_error": request.on_error,
            "target": _model_name(target),
            "model_type": str(getattr(target.config, "model_type", "")),
            "dtype": str(target.dtype).removeprefix("torch."),
            "rounded": rounding_of(target),
            "device": str(self.device),
            "vocab_size": self.vocab_size,
        }

    @property
    def logits_processors(self) -> LogitsProcessorList:
        return self.request.logits_processors

    @property
    def sampler(self) -> Sampler | None:
        """None: greedy."""
        return self.sequence.sampler

    @property
    def new_token_ids(self) -> list[int]:
        """The new tokens, a copy."""
        return self.sequence.new_token_ids

    @property
    def steps(self) -> list[StepStats]:
        return self.sequence.steps

    @property
    def last_report(self) -> StepReport | None:
        return self.sequence.last_report

    @property
    def last_tree_sizes(self) -> tuple[int, ...]:
        """Nodes by level of the last tree; a root before there was any."""
        return (1,) if self.last_report is None else self.last_report.tree.level_sizes

    @property
    def committed_ids(self) -> Tensor:
        """[committed] int64 on the device: prompt and new tokens."""
        return self.sequence.committed_ids

    @property
    def tree_ids(self) -> Tensor:
        """[committed] int64: the same where trees grow."""
        return self.sequence.tree_ids

    @property
    def num_iterations(self) -> int:
        """Decode steps done."""
        return self.sequence.num_steps

    @property
    def stop_reason(self) -> str | None:
        """ "eos", "length", "stop_string", "time", "criterion", or None while there is more to come."""
        return self.sequence.stop_reason

    @property
    def text(self) -> Tensor:
        """[1, tokens] int64 on the device: what generate() would return, a copy."""
        return self.sequence.text

    @property
    def depth_limit(self) -> int:
        """How deep the next tree may be.

        A step commits one token more than the depth, so the end clips it, and so does a point that no pass may cross
        in a cache that moves.
        """
        if self.draft_state is None:
            return 0
        return min(self.sequence.limits.max_depth, self.sequence.num_tokens_left - 1, self.cache.max_places - 1)

    @property
    def num_behind(self) -> int:
        """Tokens that the drafter has not followed yet, and will when it is asked."""
        if self.draft_state is None:
            return 0
        with self.blame_drafter():
            return self.draft_state.num_behind(self.sequence.num_committed - self.num_padding)

    def note_load(self, beside: list[tuple[int, ...]]) -> None:
        """An iteration begins. Whose it is too: nodes by level of the last tree of each."""
        self.beside = beside
        self.is_likely_to_ask, self.has_asked = self.has_asked, False

    def note_asked(self) -> None:
        """Its policies have looked at a level's proposals."""
        self.is_likely_to_ask = self.has_asked = True

    def frontier(
        self,
        tree: TokenTree,
        nodes_left: int | Callable[[], Tensor],
        propose: Callable[[], Proposals],
        is_look_free: Callable[[], bool],
        num_behind: int | None = None,
    ) -> Frontier:
        """What the policies see of a growing tree.

        Args:
            tree: the tree so far.
            nodes_left: drafted nodes that the budget allows, or what counts them.
            propose: asks the drafter about the tree's last level.
            is_look_free: whether that takes no pass of a model.
            num_behind: tokens that the drafter has not followed; None: as it is now.
        """
        return Frontier(
            tree,
            self.num_iterations,
            nodes_left,
            self.sequence.limits.max_branch,
            propose=propose,
            measure=self.measure_costs,
            num_sequences=1 + len(self.beside),
            rows_beside=sum(map(sum, self.beside)),
            width_beside=sum(sizes[tree.max_depth] for sizes in self.beside if len(sizes) > tree.max_depth + 1),
            num_behind=self.num_behind if num_behind is None else num_behind,
            num_tokens_left=self.sequence.num_tokens_left,
            is_look_free=is_look_free,
        )

    def check_proposals(self, proposals: object, tree: TokenTree) -> None:
        """Refuse what a drafter proposes for the tree's last level in another shape than the contract asks for.

        Raises:
            DrafterError: naming the drafter and the fault.
        """
        shape = (tree.level_sizes[-1], self.sequence.limits.max_branch)
        is_sound = isinstance(proposals, Proposals) and (
            proposals.token_ids.shape == proposals.logprobs.shape == shape
            and proposals.token_ids.dtype == torch.int64
            and proposals.logprobs.dtype == torch.float32
        )
        if not is_sound:
            raise DrafterError(
                f"drafter '{self.drafter_name}' must propose int64 token_ids and float32 logprobs of shape "
                f"{list(shape)}, got {proposals}"
            )

    def check_proposed(self, min_id: int, max_id: int, *, is_sound: bool, proposals: object) -> None:
        """Refuse what a drafter has proposed, by what was read of it.

        Args:
            min_id: the least token.
            max_id: the greatest token.
            is_sound: whether all log-probabilities are numbers of at most 0.
            proposals: for the message.

        Raises:
            DrafterError: naming the drafter and the fault.
        """
        fault = None
        if not is_sound:
            fault = "log-probabilities must be numbers of at most 0"
        elif not 0 <= min_id <= max_id < self.engine.num_known_ids:
            fault = f"token ids must be from 0 to {self.engine.num_known_ids - 1}"
        if fault:
            raise DrafterError(f"drafter '{self.drafter_name}' made a bad proposal: {fault}, got {proposals}")

    def reuse_prefix(self) -> None:
        """Copy what is known of the prompt into the target's cache, which is filled from the start.

        That is what the prefix cache has, or a sequence that runs beside this one, whichever has more.
        """
        if self.prefix is None:
            return
        beside = [
            rows
            for lane in self.neighbours()
            if lane is not self and lane.prefix and (rows := lane.prefix.running(lane.committed_ids)) is not None
        ]
        self.num_reused_tokens += self.prefix.fill(self.cache, self.committed_ids[:-1], beside)

    def keep_prefix(self, max_bytes: int | None = None) -> None:
        """Leave the rows of all committed tokens in the prefix cache, where there is memory for it.

        To be called at any time; `run` calls it whenever it ends. Committed rows are right however a step ended.

        Args:
            max_bytes: what all kept rows may take up; None: what the prefix cache may.
        """
        if self.prefix is None:
            return
        try:
            self.prefix.keep(self.committed_ids, max_bytes)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise

    def without_gradients(self) -> AbstractContextManager[None]:
        """A context for the lane's passes: torch's inference mode, where the models' weights can be used in it."""
        return self.engine.without_gradients()

    def rollback(self) -> None:
        """Forget an iteration that failed; the committed tokens and their cache rows stay."""
        self.cache.rollback()
        self.sequence.restore_draws()
        if self.draft_state is not None:
            with self.blame_drafter():
                self.draft_state.rollback()

    def fall_back(self, error: DynaTreeError) -> None:
        """After an error of a drafter or a policy: decode autoregressively from here on, or raise it, as asked."""
        if self.request.on_error == "raise" or self.is_observers(error):
            raise error
        warnings.warn(f"drafting is off for the rest of this generation: {error}", RuntimeWarning, stacklevel=4)
        self.cache.rollback()
        self.sequence.draft_state = None
        if self.prefix is not None:
            self.prefix.hold_only(self.cache)
        self.engine.drop_unused_caches()  # the drafter may have found no memory
        self.sequence.stack = self.stack.silenced()
        self.report_fault(error, "fallback")

    def report_fault(self, error: DynaTreeError, then: str) -> None:
        """Tell the observers of an error, and what is done about it."""
        if self.observer is not None and not self.is_observers(error):
            self.observer.tell(Fault(self.num_iterations, error, then))

    def report_end(self, stop_reason: str | None = None) -> None:
        """Tell the observers that a run has ended.

        Args:
            stop_reason: as for `result`.
        """
        if self.observer is not None:
            costs = self.engine.known_costs(self.request.is_fixed_width)
            self.observer.tell(End(self._ended_by(stop_reason), self.report(), costs))

    def is_observers(self, error: BaseException) -> bool:
        """Whether an observer has raised this error, which is nobody else's fault."""
        return self.observer is not None and self.observer.has_raised(error)

    def blame_drafter(self, *but: type[Exception]) -> AbstractContextManager[None]:
        """Turn whatever a drafter raises into a DrafterError that names it, but for these and the caller's own."""

        def blame(error: BaseException) -> BaseException:
            is_callers = any(error is one for one in self._callers_errors)
            return error if is_callers else self.engine.blamed_on_drafter(error)

        return others_code(blame, DrafterError, *but)

    @property
    def num_slots_needed(self) -> int:
        """Slots that the target's cache needs for what there is and for the next iteration."""
        return min(self.committed_ids.numel() + self._num_rows, slots_of(self.request))

    @property
    def num_bytes_needed(self) -> int:
        """What caches of target and drafter and the logits of its rows will take up in the next iteration."""
        return sum(after for _, after in self._bytes_of_caches()) + self.engine.logits_bytes(self._num_rows)

    @property
    def num_bytes_moving(self) -> int:
        """What the largest cache takes up that is to grow: its old slots stand beside the new ones for a moment."""
        return max((before for before, after in self._bytes_of_caches() if after > before), default=0)

    def _bytes_of_caches(self) -> list[tuple[int, int]]:
        """What each takes up now, and in the next iteration."""
        num_slots = self.cache.capacity
        if self.cache.can_grow:
            num_slots = max(min(in_blocks(self.num_slots_needed), slots_of(self.request)), num_slots)
        sizes = [(self.cache.num_bytes, num_slots * self.engine.row_bytes(self.engine.target, self.target.runner))]
        if self.draft_state is not None:
            with self.blame_drafter():
                sizes.append((self.draft_state.num_bytes(), self.draft_state.num_bytes(self.committed_ids.numel())))
        return sizes

    @property
    def _num_rows(self) -> int:
        """Rows of a pass of the target, at most."""
        return 1 + max(self.sequence.limits.max_nodes, self.request.pass_rows)

    def make_room(self) -> None:
        """Have the slots that the next iteration needs."""
        if self.cache.can_grow and self.cache.capacity < self.num_slots_needed:
            self.cache.grow(min(in_blocks(self.num_slots_needed), slots_of(self.request)))

    def suspend(self) -> None:
        """Give all memory back. The tokens stay; `resume` goes on from them."""
        self.sequence.restore_draws()
        self._was_drafting = self.draft_state is not None
        self.release()

    def resume(self) -> None:
        """Take caches again, to be filled with all committed tokens but the last."""
        self._take_place(is_drafting=self._was_drafting)

    def release(self) -> None:
        """Give the cache's memory back to the engine. The lane can do nothing more, but its result stays."""
        self.engine.take_back(self.cache)
        if self._is_growing:
            del self.cache  # its memory is free at once, whoever holds the lane
        self.sequence.draft_state = None
        self.prefix = None

    def result(self, stop_reason: str | None = None) -> GenerationResult:
        """What was generated so far; valid between any two steps.

        Args:
            stop_reason: why the generation ended, where its own tokens do not say so.
        """
        sequence = self.sequence
        return GenerationResult(sequence.output_ids, self._ended_by(stop_reason), self.report(), sequence.logprobs)

    def _ended_by(self, stop_reason: str | None) -> str:
        return stop_reason if stop_reason == "cancelled" else self.stop_reason or stop_reason or "interrupted"

    def report(self) -> GenerationReport:
        """The metrics of what was generated so far."""
        return summarise(
            policy=str(self.stack),
            drafter=self.drafter_name,
            runner=self.target.runner.computed_by,
            num_prompt_tokens=len(self.request.prompt_ids),
            num_reused_tokens=self.num_reused_tokens,
            token_ids=self.new_token_ids,
            steps=self.steps,
            clock=self.clock,
        )


def unstarted_result(engine: Resources, request: Request, stop_reason: str) -> GenerationResult:
    """What there is of a request that has never had a lane."""
    report = summarise(
        policy=str(request.stack),
        drafter=engine.drafter_name,
        runner=engine.runner,
        num_prompt_tokens=len(request.prompt_ids),
        num_reused_tokens=0,
        token_ids=[],
        steps=[],
        clock=engine.new_clock(),
    )
    return GenerationResult([], stop_reason, report, None if request.num_logprobs is None else [])


def _model_name(model: nn.Module) -> str:
    """A model's name; the last part of it where that is a path of this machine."""
    name = str(getattr(model.config, "_name_or_path", "") or type(model).__name__)
    return os.path.basename(name) if os.path.isabs(name) else name


def _noting(callback: Callable[[int, int], None], errors: list[BaseException]) -> Callable[[int, int], None]:
    """The callback, which leaves in the list what it raises."""

    def noted(done: int, total: int) -> None:
        try:
            callback(done, total)
        except BaseException as error:  # an exit too: it is no fault of the drafter
            errors.append(error)
            raise

    return noted
