"""What generations share: models, runners, memory of caches, measured costs and kept prefixes."""

from __future__ import annotations

import functools
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import Tensor, nn

from dynatree_core.cache.base import KeyValueCache
from dynatree_core.cache.prefix_cache import PrefixCache, PrefixReuse
from dynatree_core.cache.sink_cache import SinkCache
from dynatree_core.clock import StageClock
from dynatree_core.cost_model import CostModel
from dynatree_core.drafters.base import Drafter, DraftPlan, DraftState, SlotBudget, device_of
from dynatree_core.drafters.build import as_drafter
from dynatree_core.engine.costs import measured_costs
from dynatree_core.engine.fused import level_writer
from dynatree_core.engine.observer import observers_of
from dynatree_core.engine.row_probe import refuse_dependent_rows
from dynatree_core.errors import DrafterError, ForwardPassError, OutOfMemoryError, ParameterError
from dynatree_core.models.architectures import num_known_ids, vocab_size
from dynatree_core.models.kept import kept_of
from dynatree_core.models.placement import computing_device, num_processes
from dynatree_core.models.state import can_infer
from dynatree_core.models.stored import StoredModel
from dynatree_core.models.wrappers import plain_model
from dynatree_core.plugins.foreign import others_code, raised
from dynatree_core.request.arguments import check_callable, check_flag, checked_count
from dynatree_core.request.request import Options, Request
from dynatree_core.runners.base import Runner
from dynatree_core.runners.choice import drafters_runner, load_runner, made_runner, runner_for
from dynatree_core.runners.passes import Passes
from dynatree_core.tree.padded import PaddedSpace, least_width

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["ENGINE_OPTIONS", "Resources", "in_blocks", "slots_of"]

ENGINE_OPTIONS = ("costs", "now", "prefix_cache", "runner", "tokenizer", "trust_model")
SLOT_BLOCK = 256  # slots are given out in such blocks, so that the memory of a cache suits the next generation too


@attrs.define(eq=False)
class _Lease:
    """The memory of a cache, and the generation that has it."""

    runner: Runner
    cache: KeyValueCache
    owner: Callable[[], object | None] = lambda: None  # None: nobody has it

    def suits(self, runner: Runner, capacity: int) -> bool:
        return self.owner() is None and self.runner is runner and self.cache.capacity >= capacity


class Resources:
    """All that generations with one target and one drafter share. An `Engine` is this and a waiting line.

    What it has made for one generation, such as the memory of a cache, is there for the next. It looks at its models
    once; tell it by `refresh` when one was changed.

    Arguments and errors are those of `Engine`.
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
        max_bytes: int | None = None,
        make_runner: Callable[[nn.Module, str], Runner] = made_runner,
        pads_trees: bool | None = None,
    ) -> None:
        if not isinstance(prefix_cache, PrefixCache | None):
            raise ParameterError(f"prefix_cache must be a PrefixCache, got {prefix_cache!r:.60}")
        if not isinstance(costs, CostModel | None):
            raise ParameterError(f"costs must be a CostModel, or None to have them measured, got {costs!r:.60}")
        check_flag("trust_model", trust_model)
        self.max_bytes = None if max_bytes is None else checked_count("max_bytes", max_bytes, 1)
        self.caller = target  # as the caller knows it, such as PEFT's wrapper
        self.target = plain_model(target, "target", is_trusted=trust_model)
        self.device = computing_device(self.target)
        self.vocab_size = vocab_size(self.target)
        self.num_known_ids = num_known_ids(self.target)
        self.runner = runner
        self.tokenizer = tokenizer
        self.prefix_cache = prefix_cache
        self.trust_model = trust_model
        self._given_drafter = drafter
        self._given_costs = costs
        check_callable("now", now)
        self._now = now
        self._make_runner = make_runner
        self.pads_trees = self.device.type != "cpu" if pads_trees is None else pads_trees
        # sessions of several threads must not get the same memory. One thread may come here twice: garbage collection
        # may close whatever ends a generation at any point
        self._lock = threading.RLock()
        self.refresh()

    @functools.cached_property
    def drafter(self) -> Drafter | None:
        """Made when a generation first needs it, since it may load a model."""
        return as_drafter(self._given_drafter)

    @property
    def drafter_name(self) -> str | None:
        return None if self.drafter is None else str(self.drafter)

    def refresh(self) -> None:
        """Look at the models anew when the next generation begins: one of them was changed."""
        self._admitted: set[bool] = set()  # with passes of one shape or not
        self._can_infer: dict[nn.Module, bool] = {}  # asked once: it looks at every weight
        self._runners: dict[tuple[nn.Module, str], Runner] = {}  # by the name that was asked for
        self._leases: list[_Lease] = []
        self._row_bytes: dict[tuple[nn.Module, Runner], int] = {}
        self._costs: dict[str, CostModel] = {}  # by the name of the runner

    def admit(self, *, is_fixed_width: bool = False) -> None:
        """See, once, that the target's rows are independent of each other.

        Args:
            is_fixed_width: whether all passes of the generation that begins have one shape.

        Raises:
            UnsupportedModelError: they are not, or passes of different shapes choose different tokens.
        """
        if is_fixed_width in self._admitted:
            return
        if not self.trust_model:
            refuse_dependent_rows(self.target, self.caller, is_fixed_width=is_fixed_width)
        self._note_models([self.target])
        self._admitted.add(is_fixed_width)

    def _note_models(self, models: Sequence[nn.Module]) -> None:
        self._can_infer |= {model: can_infer(model) for model in models if model not in self._can_infer}

    def request(self, input_ids: Tensor | Sequence[int] | Mapping[str, Tensor], **options: Any) -> Request:
        """Read and check what is asked of one generation.

        Args:
            input_ids: the prompt.
            options: those of `dynatree_core.generate` that are not the engine's own.

        Raises:
            InputError: something that cannot be used.
        """
        return Request.parse(
            self.target,
            input_ids,
            Options.named(options),
            caller=self.caller,
            tokenizer=self.tokenizer,
            trust_model=self.trust_model,
            other_options=ENGINE_OPTIONS,
        )

    def now(self) -> float:
        """Seconds on the clock of reports and handles."""
        return (self._now or time.perf_counter)()

    def without_gradients(self) -> AbstractContextManager[None]:
        """A context for passes: torch's inference mode, where the models' weights can be used in it."""
        return torch.inference_mode() if all(self._can_infer.values()) else torch.no_grad()

    # what a generation takes from it

    def new_clock(self) -> StageClock:
        return StageClock(self.device, self._now)

    def runner_of(self, model: nn.Module, name: str) -> Runner:
        """What computes a model's passes; made for the first generation that needs it."""
        if (model, name) not in self._runners:
            self._runners[model, name] = self._make_runner(model, name)
        return self._runners[model, name]

    def runner_for(self, request: Request) -> Runner:
        """What computes the target's passes of a generation.

        Raises:
            ParameterError: its cache is bounded, and the runner that was asked for takes no such cache.
        """
        name = self._runner_name(request.is_fixed_width)
        if request.kept is not None and isinstance(self.target, StoredModel):
            raise ParameterError(
                f"cache='{request.kept}' asks a model's modules for their angles, got weights that are kept without "
                "modules; load the model with weights=None, or leave out the cache"
            )
        runner = self.runner_of(self.target, name)
        if request.kept is None or runner.takes_any_cache or runner.has_own_cache:
            return runner
        if name != "auto":
            raise ParameterError(
                f"the {runner.name} runner takes no bounded cache, got cache='{request.kept}'; use runner='auto'"
            )
        return self.runner_of(self.target, runner_for(self.target, "auto", any_cache=True))

    def new_passes(self, request: Request, clock: StageClock, on_prefill: Callable[[int, int], None] | None) -> Passes:
        """The target's passes of one generation."""
        runner, positions = self.runner_for(request), request.positions
        own_positions = None if positions is None else torch.tensor(positions, device=self.device)
        return Passes(runner, clock, positions=own_positions, on_prefill=on_prefill)

    def new_cache(self, request: Request, owner: object, num_slots: int | None = None) -> KeyValueCache:
        """An empty cache for the target's rows of one generation.

        It has the memory of an earlier generation's, where that is gone.

        Args:
            request: the generation's.
            owner: whose cache it is as long as this object lives.
            num_slots: that are enough for now, of a cache that can grow; None: as many as the whole text needs.

        Raises:
            ParameterError: the runner has a cache of its own, which cannot be bounded.
        """
        runner = self.runner_for(request)
        if request.kept is not None and runner.has_own_cache:
            raise ParameterError(
                f"the {runner.name} runner has a cache of its own, got cache='{request.kept}' beside it; leave one of "
                "them out"
            )
        if request.kept is not None:
            return SinkCache(self.target, request.kept, request.limits.max_nodes)
        capacity = slots_of(request)
        if request.is_fixed_width:  # the capacity is part of its passes' shape
            return runner.new_cache(capacity, is_zeroed=True)
        if num_slots is not None:
            small = runner.new_cache(min(in_blocks(num_slots), capacity))
            return small if small.can_grow else runner.new_cache(capacity)
        return self.leased_cache(runner, capacity, owner)

    def leased_cache(self, runner: Runner, capacity: int, owner: object) -> KeyValueCache:
        """An empty cache of so many slots at least, with the memory of an earlier one that a runner wrote to.

        What was recorded over that memory is replayed. Target and drafters of a generation have one each.

        Args:
            runner: whose passes write to it.
            capacity: slots.
            owner: whose it is as long as this object lives.
        """
        with self._lock:
            lease = next((one for one in self._leases if one.suits(runner, capacity)), None)
            if lease is None:  # those that are nobody's are too small
                self._leases = [one for one in self._leases if one.runner is not runner or one.owner() is not None]
                lease = _Lease(runner, runner.new_cache(in_blocks(capacity), is_zeroed=False))
                self._leases.append(lease)
            lease.owner = weakref.ref(owner)
        lease.cache.truncate(0)
        return lease.cache

    def row_bytes(self, model: nn.Module, runner: Runner) -> int:
        """What a row of a model's cache takes up, by a pass over one token."""
        if (model, runner) not in self._row_bytes:
            cache = runner.new_cache(1)
            token = torch.zeros(1, dtype=torch.int64, device=device_of(model) or self.device)
            with torch.no_grad():
                Passes(runner, self.new_clock()).prefill(token, cache)
            self._row_bytes[model, runner] = -(-cache.num_bytes // cache.capacity)
        return self._row_bytes[model, runner]

    def logits_bytes(self, num_rows: int) -> int:
        """What the target's logits of a pass over so many rows take up."""
        dtype: torch.dtype = self.target.dtype  # type: ignore[assignment]
        return num_rows * self.vocab_size * dtype.itemsize

    def prefix_bytes(self) -> int:
        """What the prefix cache takes up."""
        return 0 if self.prefix_cache is None else self.prefix_cache.num_bytes

    def take_back(self, cache: KeyValueCache) -> None:
        """A generation needs the memory of its cache no more."""
        with self._lock:
            for lease in self._leases:
                if lease.cache is cache:
                    lease.owner = lambda: None

    def drop_unused_caches(self) -> None:
        """Give back the memory of caches that no generation has, as where memory is short."""
        with self._lock:
            self._leases = [lease for lease in self._leases if lease.owner() is not None]

    def new_prefix(self, request: Request, cache: KeyValueCache) -> PrefixReuse | None:
        """The use that one generation makes of the prefix cache; None where its rows are not those of others."""
        if self.prefix_cache is None or not (request.can_reuse_prefix and cache.has_all_rows):
            return None
        prefix = PrefixReuse(self.prefix_cache)
        prefix.add(self.target, cache)
        return prefix

    def new_padded_space(self, request: Request) -> PaddedSpace | None:
        """Where the padded trees of one generation grow; None where its trees are grown level by level.

        Chance and processors choose tokens one by one, observers look at each level, and passes of one shape and
        bounded caches lay rows out in ways of their own: all of them read from the device anyway. Processes that share
        a model must grow the same levels, and when each hears that one is empty depends on its clock.
        """
        limits = request.limits
        is_greedy = not (request.do_sample or request.logits_processors)
        is_plain = not observers_of(request.observer) and request.kept is None and not request.is_fixed_width
        if not (self.pads_trees and is_greedy and is_plain and limits.max_depth and request.stack.is_capturable):
            return None
        if self._num_processes > 1 or self.trees_device(request) != self.device:  # on the host nothing has to be padded
            return None
        width = least_width(limits.max_nodes, limits.tau, request.stack.max_width)
        if width is None:
            return None
        write = level_writer(self.device, width, limits.max_branch)
        return PaddedSpace(width, limits.max_branch, limits.max_depth, self.device, write)

    def trees_device(self, request: Request) -> torch.device:
        """Where the trees of one generation grow: on the host where policies read numbers, or no model drafts.

        Observers are shown trees on the models' device, and may put those of several generations together.
        """
        if self.drafter is None or observers_of(request.observer) or not request.stack.can_draft_on_host:
            return self.device
        has_model = bool(self.drafter.models(self.target))
        return torch.device("cpu") if request.stack.reads_on_host or not has_model else self.device

    def start_drafter(
        self,
        request: Request,
        clock: StageClock,
        prefix: PrefixReuse | None,
        on_prefill: Callable[[int, int], None] | None,
        padded_space: PaddedSpace | None,
        *,
        trees_device: torch.device,
        is_growing: bool = False,
    ) -> DraftState | None:
        """The drafter in one generation; None without one. If `is_growing`, its caches get slots as the text grows."""
        if self.drafter is None:
            return None
        state = self.drafter.begin(
            DraftPlan(
                self.num_known_ids,
                request.num_tokens,
                max(request.limits.max_nodes, 0 if padded_space is None else padded_space.num_places),
                trees_device,
                clock,
                self.target,
                request.kept,
                prefix=prefix,
                runner=drafters_runner(self._runner_name(request.is_fixed_width)),
                on_prefill=on_prefill,
                tokenizer=self.tokenizer,
                store=kept_of(self.target),
                make_runner=self.runner_of,
                new_cache=self.leased_cache,
                budget=SlotBudget(in_blocks, self.row_bytes) if is_growing else None,
            )
        )
        self._note_models(self.drafter.models(self.target))
        return state

    def costs(self, is_fixed_width: bool, clock: StageClock) -> CostModel:
        """What iterations take, measured at the first call if nobody has before on this machine.

        Args:
            is_fixed_width: whether every pass has one shape.
            clock: of the generation that asks, to which the time of measuring does not count.
        """
        if self._given_costs is not None:
            return self._given_costs
        if self._num_processes > 1:  # each would measure, and then draft, something else
            raise ParameterError(
                "costs are measured by one process, but several share the model's weights; give costs= the same "
                "numbers in each, or take a policy that asks for none, such as phase3"
            )
        runner = self._runner_name(is_fixed_width)
        if runner not in self._costs:
            blamed = others_code(self.blamed_on_drafter, DrafterError, ForwardPassError, OutOfMemoryError)
            with clock.leave_out(), blamed:
                self._costs[runner] = measured_costs(
                    self.target, self.drafter, runner=runner, tokenizer=self.tokenizer, known=kept_of(self.target)
                )
        return self._costs[runner]

    @property
    def _num_processes(self) -> int:
        """That share the weights of a model which takes part: they must draft the same, whatever their clocks say."""
        models = (self.target, *(() if self.drafter is None else self.drafter.models(self.target)))
        return max(map(num_processes, models))

    def known_costs(self, is_fixed_width: bool) -> CostModel | None:
        """What iterations take, if it was given or somebody has asked; nothing is measured."""
        return self._given_costs or self._costs.get(self._runner_name(is_fixed_width))

    def _runner_name(self, is_fixed_width: bool) -> str:
        """The runner by name. With passes of one shape "auto" is the plain one, unless its own choice has equal bits.

        The plain one's products round each row alike wherever it stands, as was measured (docs/audit.md).
        """
        if not is_fixed_width or self.runner != "auto":
            return self.runner
        chosen = runner_for(self.target, "auto", kept=kept_of(self.target))
        return chosen if load_runner(chosen).has_equal_bits else "eager"

    def blamed_on_drafter(self, error: BaseException) -> BaseException:
        """The error that names the drafter, for whatever it has raised."""
        return DrafterError(f"drafter '{self.drafter_name}' raised {raised(error)}")


def slots_of(request: Request) -> int:
    """Slots that the target's cache needs for a whole text with its last tree."""
    return request.num_tokens + max(request.limits.max_nodes, request.pass_rows)


def in_blocks(num_slots: int) -> int:
    """So many slots, in whole blocks."""
    return -(-num_slots // SLOT_BLOCK) * SLOT_BLOCK
