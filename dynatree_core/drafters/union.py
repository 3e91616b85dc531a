"""The `union` drafter: several drafters' proposals in one tree, written `distilled+prompt_lookup`.

The probabilities that a drafter gives to a node's children may add up to less than 1: the rest is what it does not
know. The last drafter is asked first, and its rest is shared out by the one before it, as backing off does in language
modelling (Katz 1987): p = p_last + (1 − Σ p_last) · p_before. Where the rest is small at every node of a level, the
drafter before is not asked at all, so drafting a text that is being copied takes hardly a pass of a model.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Generator, Iterator, Sequence

import attrs
import torch
from torch import Tensor, nn

from dynatree_core.drafters.base import (
    Drafter,
    DraftPlan,
    DraftState,
    OwnWeights,
    bounds_of_rest_of,
    by_itself,
    padded_proposals,
    prefilling_of,
    proposing_of,
    takes_padding,
)
from dynatree_core.drafters.build import build_drafters
from dynatree_core.errors import ParameterError
from dynatree_core.runners.base import PassOutput
from dynatree_core.runners.passes import AskedPass, Passes
from dynatree_core.tree.frontier import Proposals
from dynatree_core.tree.token_tree import TokenTree

__all__ = ["UnionDrafter"]

# a rest below which the next drafter is not asked. One earlier occurrence of two tokens leaves a rest of 0.5, two of
# one token 0.67, whether they agree or not. With 0.7 the embedded pair drafts 2.18 tokens an iteration of `phase1`
# with 1.3 passes of its model (36 prompts of Spec-Bench, rehearsed), with 0.5 2.24 with 2.2, with 0.35 2.27 with 2.5;
# 0.7 is the fastest. Asking for the probability of the best child instead came to the same speed
LITTLE = 0.7


class UnionDrafter(Drafter):
    """Drafts with several drafters at once.

    Args:
        of: the drafters, or their names joined by `+`; the last one is heard first.
    """

    def __init__(self, of: str | Sequence[Drafter]) -> None:
        if isinstance(of, str):
            of = build_drafters(of)
        if len(of) < 2:
            raise ParameterError(f"a union needs at least two drafters, as in 'distilled+prompt_lookup', got {len(of)}")
        self.drafters = tuple(of)

    def __str__(self) -> str:
        return "+".join(str(drafter) for drafter in self.drafters)

    def models(self, target: nn.Module) -> Sequence[nn.Module]:
        return tuple(dict.fromkeys(model for part in self.drafters for model in part.models(target)))

    def context_limit(self, target: nn.Module) -> int | None:
        limits = [part.context_limit(target) for part in self.drafters]
        return min((limit for limit in limits if limit is not None), default=None)

    def runs_on(self, target: nn.Module) -> None:
        return None  # each of its drafters may have a device of its own

    def price_class(self) -> str:
        return "+".join(part.price_class() for part in self.drafters)

    def own_weights(self, device: torch.device) -> Sequence[OwnWeights]:
        return [weights for part in self.drafters for weights in part.own_weights(device)]

    def start(self, plan: DraftPlan) -> UnionState:
        states = [part.begin(plan) for part in self.drafters]
        have_models = [bool(part.models(plan.target)) for part in self.drafters]
        return UnionState(states, have_models, [str(part) for part in self.drafters])


class UnionState(DraftState):
    """The drafters' states of one generation; each sees the whole tree.

    Args:
        states: the states, in the drafters' order.
        have_models: for each, whether its proposals cost passes of a model unless they are free.
        names: the drafters' strings.
    """

    def __init__(self, states: Sequence[DraftState], have_models: Sequence[bool], names: Sequence[str]) -> None:
        self.states = states
        # a drafter whose levels may be skipped has a cost that skipping saves, even where it names no model
        self._parts = [
            (state, has_model or state.can_skip_levels, name)
            for state, has_model, name in reversed([*zip(states, have_models, names, strict=True)])
        ]  # in the order in which they are heard, each with whether it costs anything
        self._first = [state for state, _, _ in itertools.takewhile(lambda part: not part[1], self._parts)]
        others = self._parts[len(self._first) :]
        # a look is free where all that costs anything is skipped, which those decide that are heard first
        self._can_be_free = bool(self._first and others) and all(
            state.can_skip_levels or not is_dear for state, is_dear, _ in others
        )
        # of a level, before `propose` was asked: which it is, what was proposed, and the largest rest of any node
        self._heard: tuple[tuple[int, ...], list[Proposals], float] | None = None
        # what the first one that is heard has left at the root; None: nobody has read it
        self._rest_of_root: float | None = None
        self._is_of_first = False  # whether that one alone has proposed the nodes of the last level
        self._is_whole = True  # whether nobody but this union proposes nodes
        for state in states:
            if isinstance(state, UnionState):
                state._is_whole = False

    @property
    def is_capturable(self) -> bool:  # type: ignore[override]
        """Whether all of them know padded trees. Whom to ask is read once a tree, or once a level where
        no bound says enough: a pass costs more than that."""
        return all(map(takes_padding, self.states))

    def prefill(self, committed_ids: Tensor) -> None:
        for state in self.states:
            state.prefill(committed_ids)

    def prefilling(self, committed_ids: Tensor) -> Iterator[int]:
        for state in self.states:
            yield from prefilling_of(state, committed_ids)

    def propose(self, committed_ids: Tensor, tree: TokenTree, k: int) -> Proposals:
        return by_itself(self.proposing(committed_ids, tree, k))

    def proposing(self, committed_ids: Tensor, tree: TokenTree, k: int) -> Generator[AskedPass, PassOutput, Proposals]:
        known: list[Proposals] = []
        left_over = 1.0  # the largest rest of any node; read at most once for each drafter: a device is waited for
        if self._heard is not None and self._heard[0] == _place(committed_ids, tree, k):
            _, known, left_over = self._heard
        num_summed = len(known)
        heard: list[Proposals] = []  # the last drafter's first
        names: list[str] = []
        was_skipped, was_model_asked = False, False
        for number, (state, is_dear, name) in enumerate(self._parts):
            if heard and state.can_skip_levels:
                if num_summed != len(heard):
                    left_over, num_summed = self._left_over(heard, tree, k), len(heard)
                if left_over < LITTLE:
                    was_skipped = True
                    continue
            if number < len(known):
                proposals = known[number]
            else:
                proposals = yield from proposing_of(state, committed_ids, tree, k)
            heard.append(proposals)
            names.append(name)
            was_model_asked |= is_dear and not proposals.is_free
        self._is_of_first = len(heard) == 1
        is_free = was_skipped and not was_model_asked
        return attrs.evolve(_combined(heard, k), is_free=is_free, heard=tuple(zip(names, heard, strict=True)))

    def is_look_free(self, committed_ids: Tensor, tree: TokenTree, k: int) -> bool:
        """By what those say that are heard first and cost nothing. They are not asked again when `propose` is."""
        if not self._can_be_free:
            return False
        place = _place(committed_ids, tree, k)
        if self._heard is None or self._heard[0] != place:
            heard = [by_itself(proposing_of(state, committed_ids, tree, k)) for state in self._first]
            self._heard = place, heard, self._left_over(heard, tree, k)
        return self._heard[2] < LITTLE

    def _left_over(self, heard: Sequence[Proposals], tree: TokenTree, k: int) -> float:
        """The largest rest of any node of the last level, after all these drafters.

        It is read of what they propose, for which the host waits; but where the first drafter can tell on which side
        of `LITTLE` it is, a bound of it. So a text that is copied is read about once a tree, at the root.
        """
        if len(heard) == 1 and tree.max_depth > 0 and self._rest_of_root is not None:
            is_own = self._is_whole and self._is_of_first
            first = self._parts[0][0]
            least, most = bounds_of_rest_of(first, tree.max_depth, k, self._rest_of_root, is_own=is_own)
            if most < LITTLE or least >= LITTLE:
                return least if least >= LITTLE else most
        left_over = _most_left_over(heard, tree)
        if len(heard) == 1 and tree.max_depth == 0:
            self._rest_of_root = left_over
        return left_over

    def num_behind(self, num_committed: int) -> int:
        return sum(state.num_behind(num_committed) for state in self.states)

    def num_bytes(self, num_committed: int | None = None) -> int:
        return sum(state.num_bytes(num_committed) for state in self.states)

    def possible_proposals(self, committed_ids: Tensor, tree: TokenTree, k: int) -> list[Proposals]:
        """What `propose` may return, that of all drafters first: other nodes of the level decide which ones it asks."""
        ways: list[tuple[Proposals, ...]] = [()]
        for part in reversed(self.states):
            asked = part.possible_proposals(committed_ids, tree, k)
            skipped = [
                heard for heard in ways if heard and part.can_skip_levels and _most_left_over(heard, tree) < LITTLE
            ]
            ways = [*((*heard, one) for heard in ways for one in asked), *skipped]
        return [_combined(heard, k) for heard in ways]

    def runners(self) -> Sequence[Passes]:
        return [runner for state in self.states for runner in state.runners()]

    def commit(self, draft_path: tuple[int, ...]) -> None:
        self._forget_tree()
        for state in self.states:
            state.commit(draft_path)

    def rollback(self) -> None:
        self._forget_tree()
        for state in self.states:
            state.rollback()

    def _forget_tree(self) -> None:
        self._heard, self._rest_of_root = None, None


def _place(committed_ids: Tensor, tree: TokenTree, k: int) -> tuple[int, ...]:
    """Which level is asked about: each is once in an iteration."""
    return committed_ids.numel(), tree.max_depth, tree.num_nodes, k


def _combined(heard: Sequence[Proposals], k: int) -> Proposals:
    """The proposals of several drafters as one; the first of them backs off to the second, and so on."""
    *before, union = heard
    for proposals in reversed(before):
        union = backed_off(proposals, union, k)
    return union


def _most_left_over(heard: Sequence[Proposals], tree: TokenTree) -> float:
    """The largest rest of any node of the last level, after all these drafters. The host waits for the device."""
    rests = [(1 - proposals.logprobs.exp().sum(dim=1)).clamp_(min=0) for proposals in heard]
    left_over = functools.reduce(operator.mul, rests)
    if tree.is_padded and tree.max_depth > 0:  # there is no padding beside a root
        left_over *= tree.cum_logprob[tree.last_level] > -torch.inf
    return float(left_over.max())


def backed_off(first: Proposals, second: Proposals, k: int) -> Proposals:
    """The k best of two drafters' proposals [width, k] each: the rest of `first` is shared out by `second`."""
    probs = first.logprobs.exp()
    left_over = (1 - probs.sum(dim=1, keepdim=True)).clamp(min=0)
    probs = torch.cat([probs, second.logprobs.exp() * left_over], dim=1)  # [width, 2k]
    token_ids = torch.cat([first.token_ids, second.token_ids], dim=1)
    # a token that both propose: the first entry collects both shares, the other one goes
    is_same = (token_ids[:, :, None] == token_ids[:, None, :]) & (probs[:, None, :] > 0)
    total = (is_same * probs[:, None, :]).sum(dim=2)
    is_first = ~(is_same & _earlier(2 * k, probs.device)).any(dim=2) & (probs > 0)
    top = torch.where(is_first, total, 0).topk(k, dim=1)
    return padded_proposals(token_ids.gather(1, top.indices), top.values.clamp(max=1).log(), k)


@functools.cache  # torch's `tril` of a batch wakes all threads, which takes milliseconds where these are busy
def _earlier(number: int, device: torch.device) -> Tensor:
    """[number, number] bool: whether the second is before the first."""
    with torch.inference_mode(False):
        return torch.ones(number, number, dtype=torch.bool, device=device).tril(-1)
