"""What a drafter is: something that proposes children for the nodes of a growing tree.

A `Drafter` is shared by sessions and threads and never changes; what one generation needs to remember lives
in the `DraftState` that it starts for each session.
"""

from __future__ import annotations

import abc
import itertools
from collections.abc import Callable, Generator, Hashable, Iterator, MutableMapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import attrs
import torch
from torch import Tensor, nn

from dynatree_core.cache.base import KeyValueCache
from dynatree_core.cache.prefix_cache import PrefixReuse
from dynatree_core.cache.sink_cache import SinkWindow
from dynatree_core.clock import StageClock
from dynatree_core.errors import ContextLimitError
from dynatree_core.models.architectures import max_positions
from dynatree_core.models.placement import brought_to
from dynatree_core.runners.base import PassOutput, Runner
from dynatree_core.runners.choice import drafters_runner, made_runner
from dynatree_core.runners.passes import AskedPass, Passes
from dynatree_core.tree.frontier import Proposals
from dynatree_core.tree.token_tree import TokenTree
from dynatree_core.tree.transfer import send, together_on

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "DraftPlan",
    "DraftState",
    "Drafter",
    "OwnWeights",
    "SlotBudget",
    "by_itself",
    "device_of",
    "padded_proposals",
    "prefilling_of",
    "proposing_of",
    "takes_padding",
]


@attrs.frozen
class SlotBudget:
    """How the caches of an engine with a budget of bytes get their slots: in blocks, as the text grows."""

    in_blocks: Callable[[int], int]  # so many slots, in whole blocks
    row_bytes: Callable[[nn.Module, Runner], int]  # what a row of a model's cache takes up


@attrs.frozen(eq=False)
class DraftPlan:
    """What a drafter is told about a generation before it begins."""

    vocab_size: int  # token ids that the target knows; proposing any other is an error
    num_tokens: int  # prompt and new tokens, at most
    max_nodes: int  # drafted nodes of one tree, at most
    device: torch.device  # where the drafter gets ids and trees, and where it leaves its proposals
    clock: StageClock  # measures forward passes, under the name "draft_forward"
    target: nn.Module  # the model that verifies: a drafter may share its weights, and must not change it
    kept: SinkWindow | None = None  # all that the target's cache keeps of the text, if that is bounded
    prefix: PrefixReuse | None = None  # rows of earlier generations, for a drafter that has a cache like the target's
    runner: str = "eager"  # how forward passes of a model are to be computed; "auto" is chosen for each model
    on_prefill: Callable[[int, int], None] | None = None  # who wants to know how far a long prefill is: rows done, all
    # the target's, for a drafter that looks at text; None where the caller has given none
    tokenizer: PreTrainedTokenizerBase | None = None
    # gives the runner of a model by the runner's name; an engine gives the one that earlier generations had
    make_runner: Callable[[nn.Module, str], Runner] = attrs.field(default=made_runner, repr=False)
    # gives the cache of a runner's passes with so many slots, to whom has it as long as that object lives; an engine
    # gives the memory that earlier generations had, over which passes may be recorded
    new_cache: Callable[[Runner, int, object], KeyValueCache] = attrs.field(
        default=lambda runner, capacity, owner: runner.new_cache(capacity), repr=False
    )
    budget: SlotBudget | None = None  # None: a cache has room for the whole text from the start
    # kept as long as the target: what later generations with it are to find again. A key begins with the drafter's
    # name; a value must not hold the target's module, or neither would ever be freed
    store: MutableMapping[Hashable, Any] = attrs.field(factory=dict, repr=False)

    @property
    def num_followed(self) -> int:
        """Tokens that a drafter needs positions for: all, or those that a bounded cache keeps and a tree."""
        if self.kept is None:
            return self.num_tokens
        return min(self.num_tokens, self.kept.num_tokens + self.max_nodes)


class Drafter(abc.ABC):
    """A source of proposals, immutable and shared. Its string is its name in reports and errors.

    Only `start` has to be written. The other methods say what the runtime needs to know of a drafter's models; their
    defaults are those of a drafter without one.
    """

    def __repr__(self) -> str:
        return type(self).__name__

    @abc.abstractmethod
    def start(self, plan: DraftPlan) -> DraftState:
        """Begin one generation. To be written by a drafter; callers use `begin`.

        Raises:
            VocabularyMismatchError: the drafter does not speak the target's token ids.
        """

    def models(self, target: nn.Module) -> Sequence[nn.Module]:
        """The models whose weights it computes with, and the target where it uses the target's weights.

        Their passes run without gradients, and in inference mode if all of them can. Measured costs are kept by their
        configuration, dtype and device. The defaults of `context_limit` and `runs_on` are read from them.
        """
        return ()

    def context_limit(self, target: nn.Module) -> int | None:
        """The most tokens that it can follow; None: no limit. Longer generations are refused before anything runs."""
        return min((limit for limit in map(max_positions, self.models(target)) if limit is not None), default=None)

    def runs_on(self, target: nn.Module) -> torch.device | None:
        """The device of its ids, trees and proposals; None: any, so they are where trees grow, as `plan.device` says.

        By default, that of its first model.
        """
        return next((device_of(model) for model in self.models(target)), None)

    def price_class(self) -> str:
        """The name that its measured costs are kept under, together with its models.

        Drafters with the same name and models share their costs. "model" means: a level is one pass of its only model.
        """
        return str(self)

    def own_weights(self, device: torch.device) -> Sequence[OwnWeights]:
        """The weights on disk that it computes with on this device, beside those of `models`."""
        return ()

    @final
    def begin(self, plan: DraftPlan) -> DraftState:
        """Begin one generation. A session calls this, and so does a drafter that is made of others.

        A drafter on another device gets ids and trees there, and its proposals come back to `plan.device`.

        Raises:
            ContextLimitError: the generation is longer than the drafter can follow.
            Exception: what `start` raises.
        """
        limit = self.context_limit(plan.target)
        if limit is not None and plan.num_followed > limit:
            what, advice = "prompt and output", "shorten the prompt, lower max_new_tokens"
            if plan.kept is not None:
                what, advice = "the target's cache and a tree", "make the window smaller, lower max_nodes"
            raise ContextLimitError(
                f"the drafter must have a position for each of the {plan.num_followed} tokens of {what}, but "
                f"has {limit}; {advice}, or choose another drafter"
            )
        device = self.runs_on(plan.target)
        if device is None or device == plan.device:
            return self.start(plan)
        there = attrs.evolve(plan, device=device, runner=drafters_runner(plan.runner, device))
        return _ElsewhereState(self.start(there), plan, device)


@attrs.frozen
class OwnWeights:
    """A drafter's weights on disk, as a benchmark's provenance names them."""

    drafter: str  # the drafter's string
    folder: Path
    dtype: torch.dtype  # in which it computes


class DraftState(abc.ABC):
    """A drafter in one generation."""

    # true if `propose` may be called for a level whose parent level was skipped, or for no level of a tree at all
    can_skip_levels = False
    # true if `propose` knows padded trees: for padding it says any tokens that the target knows, and what it says of
    # other nodes does not depend on it. It waits for no device, unless that saves a pass
    is_capturable = False

    @abc.abstractmethod
    def prefill(self, committed_ids: Tensor) -> None:
        """Look at the committed tokens [committed] but the last one, before the first decode step.

        Called again when a session goes on after a break; what was seen before need not be seen twice.
        """

    @abc.abstractmethod
    def propose(self, committed_ids: Tensor, tree: TokenTree, k: int) -> Proposals:
        """The k best children of each node of the tree's last level.

        Called at most once for each level, first for level 0 (the root), then for each level that grows. With
        `can_skip_levels` any of these levels may be left out. It does not change the tree.

        Args:
            committed_ids: [committed] int64, prompt and new tokens; the last one is the tree's root.
            tree: the tree so far.
            k: children per node, the second dimension of the proposals.
        """

    def proposing(self, committed_ids: Tensor, tree: TokenTree, k: int) -> Generator[AskedPass, PassOutput, Proposals]:
        """What `propose` does, leaving its passes to the caller, who may compute them together with those of others.

        It yields each pass that it wants, is sent what that says, and returns the proposals. Overridden by states whose
        `propose` is `by_itself(self.proposing(...))`; by default there is no pass to share.
        """
        return self.propose(committed_ids, tree, k)
        yield

    def prefilling(self, committed_ids: Tensor) -> Iterator[int]:
        """What `prefill` does, a part each time the next one is asked for; yields the tokens of each part."""
        self.prefill(committed_ids)
        return iter(())

    @abc.abstractmethod
    def commit(self, draft_path: tuple[int, ...]) -> None:
        """Remember that these drafted nodes were accepted, by depth; forget the other nodes.

        The bonus token is not among them: it is the last of `committed_ids` in the next iteration. The path
        may be longer than what `propose` was asked about, since the deepest nodes are never expanded.
        """

    @abc.abstractmethod
    def rollback(self) -> None:
        """Forget all drafted nodes of an iteration that failed."""

    def num_behind(self, num_committed: int) -> int:
        """Rows of its models' passes that the next `propose` computes before those of the tree; 0 without a model.

        What a state puts off until it is asked, so that it costs nothing where nobody asks. Policies know the price.

        Args:
            num_committed: committed tokens, of which the last one is the tree's root.
        """
        return 0

    def is_look_free(self, committed_ids: Tensor, tree: TokenTree, k: int) -> bool:
        """Whether `propose`, asked so, would take no pass of a model and follow no text, as its `is_free` says then.

        Policies ask before they look, about any level that `propose` may be called for, so it has to be cheap. Whether
        they look then is open. On a GPU an answer waits for the device, unless it is the same for all levels.

        Args:
            committed_ids, tree, k: as for `propose`.
        """
        return False

    def bounds_of_rest(self, depth: int, k: int, rest_of_root: float, *, is_own: bool) -> tuple[float, float]:
        """The least and the most that `propose` leaves of a probability of 1 at a node of the level it is asked about.

        A union asks its first drafter, so that it need not read what that has proposed on a GPU: a bound is enough
        where it says whether the others are to be asked. It follows from numbers that the host has.

        Args:
            depth: of the nodes, 1 at least.
            k: as for `propose`.
            rest_of_root: what `propose` has left at the root.
            is_own: whether this state alone has proposed the nodes of the level.
        """
        return 0.0, 1.0

    def num_bytes(self, num_committed: int | None = None) -> int:
        """What its caches take up: by now, or in an iteration that begins with so many committed tokens."""
        return 0

    def possible_proposals(self, committed_ids: Tensor, tree: TokenTree, k: int) -> list[Proposals]:
        """All that `propose` may answer about a root. There are several where the answer depends on other nodes."""
        return [self.propose(committed_ids, tree, k)]

    def runners(self) -> Sequence[Passes]:
        """The passes of its models, for programs that count or price them."""
        return ()


def by_itself(steps: Generator[AskedPass, PassOutput, Proposals]) -> Proposals:
    """What `DraftState.proposing` returns, with each pass computed alone."""
    try:
        asked = next(steps)
        while True:
            asked = steps.send(asked.alone())
    except StopIteration as done:
        proposals: Proposals = done.value
        return proposals


def proposing_of(
    state: DraftState, committed_ids: Tensor, tree: TokenTree, k: int
) -> Generator[AskedPass, PassOutput, Proposals]:
    """A state's `proposing`, unless its `propose` was overridden later: then that counts."""
    if _is_latest(state, "proposing", "propose"):
        return state.proposing(committed_ids, tree, k)
    return DraftState.proposing(state, committed_ids, tree, k)


def prefilling_of(state: DraftState, committed_ids: Tensor) -> Iterator[int]:
    """A state's `prefilling`, unless its `prefill` was overridden later."""
    if _is_latest(state, "prefilling", "prefill"):
        return state.prefilling(committed_ids)
    return DraftState.prefilling(state, committed_ids)


def bounds_of_rest_of(
    state: DraftState, depth: int, k: int, rest_of_root: float, *, is_own: bool
) -> tuple[float, float]:
    """A state's `bounds_of_rest`, unless its `propose` was overridden later: then nobody knows."""
    if _is_latest(state, "bounds_of_rest", "propose"):
        return state.bounds_of_rest(depth, k, rest_of_root, is_own=is_own)
    return 0.0, 1.0


def takes_padding(state: DraftState) -> bool:
    """Whether a state can be asked about padded trees. One that was derived from such a state must say so itself."""
    says_so = state.is_capturable is True
    return says_so and all(_is_latest(state, "is_capturable", method) for method in ("propose", "proposing"))


def _is_latest(state: DraftState, name: str, plain: str) -> bool:
    """Whether one method was defined by the same class as another one, or by one that is derived from it."""
    for owner in (state, *type(state).__mro__):
        if name in getattr(owner, "__dict__", ()):
            return True
        if plain in getattr(owner, "__dict__", ()):
            return False
    raise AssertionError(f"a DraftState must have {name} and {plain}, got {type(state).__name__} without")


class _ElsewhereState(DraftState):
    """A state on another device than the trees: ids and trees are copied there, and proposals back."""

    def __init__(self, state: DraftState, plan: DraftPlan, device: torch.device) -> None:
        self.state, self.trees_device, self.device = state, plan.device, device
        self.can_skip_levels = state.can_skip_levels
        self.ids = torch.zeros(plan.num_tokens, dtype=torch.int64, device=device)
        self.num_ids = 0  # of the committed tokens, those that have been copied

    def prefill(self, committed_ids: Tensor) -> None:
        self.state.prefill(self._copied(committed_ids))

    def propose(self, committed_ids: Tensor, tree: TokenTree, k: int) -> Proposals:
        return by_itself(self.proposing(committed_ids, tree, k))

    def proposing(self, committed_ids: Tensor, tree: TokenTree, k: int) -> Generator[AskedPass, PassOutput, Proposals]:
        proposals = yield from proposing_of(self.state, self._copied(committed_ids), tree.to(self.device), k)
        return self._back(proposals)

    def commit(self, draft_path: tuple[int, ...]) -> None:
        self.state.commit(draft_path)

    def rollback(self) -> None:
        self.state.rollback()

    def num_behind(self, num_committed: int) -> int:
        return self.state.num_behind(num_committed)

    def is_look_free(self, committed_ids: Tensor, tree: TokenTree, k: int) -> bool:
        if type(self.state).is_look_free is DraftState.is_look_free:  # nothing is copied to be told so
            return False
        return self.state.is_look_free(self._copied(committed_ids), tree.to(self.device), k)

    def bounds_of_rest(self, depth: int, k: int, rest_of_root: float, *, is_own: bool) -> tuple[float, float]:
        return bounds_of_rest_of(self.state, depth, k, rest_of_root, is_own=is_own)

    def num_bytes(self, num_committed: int | None = None) -> int:
        return self.state.num_bytes(num_committed)

    def possible_proposals(self, committed_ids: Tensor, tree: TokenTree, k: int) -> list[Proposals]:
        possible = self.state.possible_proposals(self._copied(committed_ids), tree.to(self.device), k)
        return [self._back(proposals) for proposals in possible]

    def runners(self) -> Sequence[Passes]:
        return self.state.runners()

    def _copied(self, committed_ids: Tensor) -> Tensor:
        """The committed tokens on the drafter's device. Only the new ones are copied."""
        end = committed_ids.numel()
        if end > self.num_ids:
            send(committed_ids[self.num_ids :], self.ids[self.num_ids : end])
            self.num_ids = end
        return self.ids[:end]

    def _back(self, proposals: Proposals) -> Proposals:
        token_ids, logprobs = together_on(self.trees_device, [proposals.token_ids, proposals.logprobs])
        return attrs.evolve(proposals, token_ids=token_ids, logprobs=logprobs)


def device_of(model: nn.Module) -> torch.device | None:
    """The device of a model's first tensor, or to which it is brought for a pass; None if it has no tensor."""
    first = next(itertools.chain(model.parameters(), model.buffers()), None)
    return None if first is None else brought_to(model, first.device)


def padded_proposals(token_ids: Tensor, logprobs: Tensor, k: int) -> Proposals:
    """Proposals of exactly k children from [..., at most k] tensors: what is missing has probability 0."""
    missing = k - logprobs.shape[-1]
    if missing == 0:
        return Proposals(token_ids, logprobs)
    pad = torch.nn.functional.pad
    return Proposals(pad(token_ids, (0, missing)), pad(logprobs, (0, missing), value=-torch.inf))
