"""Watching iterations: what each stage tells the observers of a session.

Without observers no record is made but `Level`, which is what growing a level gives. docs/watching.md has an example.
"""

from __future__ import annotations

import enum
import itertools
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, TypeVar, cast, final

import attrs
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dynatree_core.clock import StageClock
from dynatree_core.cost_model import CostModel
from dynatree_core.errors import DynaTreeError, ParameterError, nearest_match
from dynatree_core.policy.stack import Decision, PolicyStack
from dynatree_core.report import GenerationReport
from dynatree_core.request.limits import Limits
from dynatree_core.tree.frontier import Proposals
from dynatree_core.tree.token_tree import TokenTree
from dynatree_core.tree.verdict import StepReport, Verdict

__all__ = [
    "Commit",
    "End",
    "Fault",
    "Feedback",
    "Level",
    "Observer",
    "Outcome",
    "Prefill",
    "Pruning",
    "Verification",
    "Watch",
    "observers_of",
    "on_host",
    "outcomes_of",
]


class Outcome(enum.IntEnum):
    """What becomes of a proposed child; where several reasons refuse it, the first of them in this list."""

    ADMITTED = 0
    NO_TOKEN = 1  # its probability is 0: the drafter knows fewer children than were asked for
    NOT_EXPANDED = 2  # its parent was vetoed by should_expand
    BEYOND_WIDTH = 3  # its rank is not below its parent's branch factor
    BELOW_TAU = 4  # its path probability is below τ
    OVER_BUDGET = 5  # more probable paths of the level took the places that the node budget had left


_LAST_REASON_FIRST = sorted(Outcome, reverse=True)
_REFUSED_BY = {"expand": Outcome.NOT_EXPANDED, "width": Outcome.BEYOND_WIDTH}  # all, by why no level follows


@attrs.frozen
class Prefill:
    """The caches are filled with all committed tokens but the last. Told when it begins, and when it is done."""

    token_ids: tuple[int, ...]  # committed: the prompt, and new tokens when an interrupted session goes on
    num_prompt_tokens: int
    policy: str  # the stack in its canonical spelling
    drafter: str | None
    limits: Limits
    stack: PolicyStack  # the session's own, as it is now; to be read only
    settings: Mapping[str, Any]  # what else was asked and of which target: numbers, texts and lists of them
    num_reused_tokens: int = 0  # whose rows came from the prefix cache
    seconds: Mapping[str, float] | None = None  # by stage, as in `Commit`; None when it begins
    sequence: int = 0  # whose, by the number of its `Handle`; 0 for a session


@attrs.frozen(eq=False)
class Level:
    """How the children of a tree's last level came about, or why there are none. Each level of a tree is told."""

    iteration: int
    tree: TokenTree  # whose last level is the frontier, of `width` nodes
    nodes_left: int  # of the node budget
    # why no level follows: "depth" or "nodes" (the limit is reached, nobody was asked), "expand" (should_expand said
    # False), "width" (branch_factor said 0), "refused" (no proposed child was admitted); None: `grown` has one more
    end: str | None
    expand: Decision[Tensor | bool] | None = None  # None: nobody was asked
    branch: Decision[Tensor | int] | None = None  # None: nobody was asked
    proposals: Proposals | None = None  # None: the drafter was not asked
    _conditions: Mapping[Outcome, Tensor] = attrs.field(factory=dict, repr=False)  # bool [width, k]: False refuses
    _chosen: Tensor | None = attrs.field(default=None, repr=False)  # [children] int64, places in width × k
    grown: TokenTree | None = None  # the tree with the new level
    sequence: int = 0  # whose, by the number of its `Handle`; 0 for a session

    @cached_property
    def outcomes(self) -> Tensor | None:
        """[width, k] int64 on the host: the `Outcome` of each proposed child; None where the drafter was not asked."""
        if self.proposals is None:
            return None
        return torch.from_numpy(outcomes_of([self]).reshape(self.proposals.token_ids.shape))

    def copied(self) -> Level:
        """The same, with copies of votes and proposals: a policy or a drafter may write into its tensors again."""
        if self.proposals is None and self.expand is None:
            return self
        conditions = self._conditions
        if Outcome.NOT_EXPANDED in conditions:  # which is a policy's vote
            conditions = {**conditions, Outcome.NOT_EXPANDED: conditions[Outcome.NOT_EXPANDED].clone()}
        return Level(  # attrs.evolve takes thrice as long, for each level of each tree that is recorded
            iteration=self.iteration,
            tree=self.tree,
            nodes_left=self.nodes_left,
            end=self.end,
            expand=_copied(self.expand),
            branch=_copied(self.branch),
            proposals=None if self.proposals is None else self.proposals.copied(),
            conditions=conditions,
            chosen=self._chosen,
            grown=self.grown,
            sequence=self.sequence,
        )


_Answer = TypeVar("_Answer", bound=Decision[Any] | None)


def _copied(decision: _Answer) -> _Answer:
    if decision is None or not any(isinstance(vote, Tensor) for vote in decision.votes.values()):
        return decision
    votes = {name: vote.clone() if isinstance(vote, Tensor) else vote for name, vote in decision.votes.items()}
    return cast("_Answer", Decision(decision.value, votes))  # attrs.evolve takes thrice as long


def outcomes_of(levels: Sequence[Level]) -> npt.NDArray[np.int64]:
    """[proposals]: the `Outcome` of each child that was proposed for some levels, one level behind the other.

    Args:
        levels: whose drafter was asked, one at least.
    """
    proposed = [level.proposals.logprobs for level in levels if level.proposals is not None]
    shapes, sizes = [one.shape for one in proposed], [one.numel() for one in proposed]
    outcomes = np.repeat([int(_REFUSED_BY.get(level.end or "", Outcome.OVER_BUDGET)) for level in levels], sizes)
    starts = list(itertools.accumulate(sizes, initial=0))
    chosen = [(level._chosen, start) for level, start in zip(levels, starts, strict=False) if level._chosen is not None]
    if chosen:
        first = np.repeat([start for _, start in chosen], [len(places) for places, _ in chosen])
        outcomes[on_host([places for places, _ in chosen]) + first] = Outcome.ADMITTED
    for outcome in _LAST_REASON_FIRST:  # the first reason is written last
        conditions = [level._conditions.get(outcome) for level in levels]
        if any(is_met is not None for is_met in conditions):
            are_met = np.ones(len(outcomes), dtype=bool)
            for is_met, shape, start, size in zip(conditions, shapes, starts, sizes, strict=False):
                if is_met is not None:
                    are_met[start : start + size].reshape(shape)[:] = is_met.cpu().numpy()
            outcomes[~are_met] = outcome
    outcomes[on_host([one.float() for one in proposed]) == -np.inf] = Outcome.NO_TOKEN
    return outcomes


def on_host(tensors: Sequence[Tensor]) -> npt.NDArray[Any]:
    """The numbers of all these tensors, one behind the other, by one transfer."""
    return torch.cat([tensor.flatten() for tensor in tensors]).cpu().numpy()


@attrs.frozen(eq=False)
class Pruning:
    """What of the drafted tree is verified."""

    iteration: int
    drafted: TokenTree
    keep: Decision[Tensor | None]  # bool [nodes] of the drafted tree, as voted: not yet closed under ancestors
    kept: TokenTree  # the same tree where nothing was cut; `kept.draft_index` has the places in the drafted one
    sequence: int = 0  # whose, by the number of its `Handle`; 0 for a session

    def copied(self) -> Pruning:
        """The same, with copies of the votes' tensors."""
        return self if self.keep.value is None else attrs.evolve(self, keep=_copied(self.keep))


@attrs.frozen(eq=False)
class Verification:
    """What the target says of the tree."""

    iteration: int
    tree: TokenTree
    verdict: Verdict
    logits: Tensor | None  # [nodes, vocab] at each node; None unless the observer wants them
    totals: Tensor | None = None  # [nodes, 3], `ops.totals` of the logits, where the pass has given them
    sequence: int = 0  # whose, by the number of its `Handle`; 0 for a session


@attrs.frozen(eq=False)
class Commit:
    """The step's tokens are committed, before the drafter and the policies learn of them."""

    report: StepReport
    # seconds since the last `Commit` or `Prefill`, by stage: "draft" (inside the drafter, its passes among them),
    # "draft_forward" (its passes), "verify" (the target's pass)
    seconds: Mapping[str, float]
    sequence: int = 0  # whose, by the number of its `Handle`; 0 for a session


@attrs.frozen(eq=False)
class Feedback:
    """The policies have learnt of the step."""

    report: StepReport  # with the time that they were told
    stack: PolicyStack  # the session's own, as it is now; to be read only
    sequence: int = 0  # whose, by the number of its `Handle`; 0 for a session


@attrs.frozen(eq=False)
class End:
    """A run has ended: the generation is complete, or was broken off."""

    stop_reason: str  # as in `GenerationResult`; "interrupted" or "error" where it may go on
    report: GenerationReport  # the metrics so far
    costs: CostModel | None  # what iterations take here; None where it was neither given nor measured
    sequence: int = 0  # whose, by the number of its `Handle`; 0 for a session


@attrs.frozen(eq=False)
class Fault:
    """An error of this package."""

    iteration: int
    error: DynaTreeError
    # "ended": it ends the run; "fallback": nothing is drafted from here on; "root alone": the step is done again
    # without a draft
    then: str
    sequence: int = 0  # whose, by the number of its `Handle`; 0 for a session


class Observer:
    """Is told what happens in each iteration. A subclass overrides the methods that it needs.

    Records do not change. Their tensors belong to the session and must not be written. Logits must be copied
    (`logits.clone()`) to be kept, since the next pass may write into their memory. Methods are called between the
    stages: they delay the generation, but their time counts in no stage.

    What an observer raises comes out of `generate` as it is, unless it is a lack of memory. Tokens committed before are
    kept, and `run(session)` goes on.
    """

    wants_logits = False  # whether `Verification.logits` are wanted

    def on_prefill(self, prefill: Prefill) -> None:
        """The prompt's pass begins, or is done."""

    def on_level(self, level: Level) -> None:
        """A level of the tree was grown, or the tree ends here."""

    def on_prune(self, pruning: Pruning) -> None:
        """The tree has its final form."""

    def on_verify(self, verification: Verification) -> None:
        """The target has been asked. Told again if the step is interrupted before its tokens are committed."""

    def on_commit(self, commit: Commit) -> None:
        """The step's tokens are committed. Told once; not at all if an error breaks the step off just then."""

    def on_feedback(self, feedback: Feedback) -> None:
        """The policies have learnt of the step. Not told if the drafter or a policy fails after the commit."""

    def on_fault(self, fault: Fault) -> None:
        """A policy, the drafter or a pass has failed."""

    def on_end(self, end: End) -> None:
        """A run has ended, however. Told again when an interrupted session has gone on."""


HEARD_BY = {
    Prefill: "on_prefill",
    Level: "on_level",
    Pruning: "on_prune",
    Verification: "on_verify",
    Commit: "on_commit",
    Feedback: "on_feedback",
    Fault: "on_fault",
    End: "on_end",
}


@final
class Watch:
    """The observers of a session, told one after another."""

    def __init__(self, observers: Sequence[Observer], clock: StageClock, sequence: int = 0) -> None:
        self.observers = observers
        self.wants_logits = any(observer.wants_logits for observer in observers)
        self._clock = clock
        self._sequence = sequence
        self._errors: list[BaseException] = []  # that observers have raised

    def tell(self, record: Prefill | Level | Pruning | Verification | Commit | Feedback | Fault | End) -> None:
        """Call the method of each observer that is for such a record."""
        if self._sequence:
            record = attrs.evolve(record, sequence=self._sequence)
        with self._clock.leave_out():
            for observer in self.observers:
                try:
                    getattr(observer, HEARD_BY[type(record)])(record)
                except BaseException as error:
                    self._errors.append(error)
                    raise

    def has_raised(self, error: BaseException) -> bool:
        """Whether an error is an observer's own, so nobody's fault in the session."""
        return any(error is one for one in self._errors)


def observers_of(observer: Observer | Sequence[Observer] | None) -> Sequence[Observer]:
    """The observers of a session's argument: none, one or several.

    Raises:
        ParameterError: something is no observer, or has a method that nobody would call.
    """
    if observer is None:
        return ()
    observers = tuple(observer) if isinstance(observer, list | tuple) else (observer,)
    for one in observers:
        _check(one)
    return observers


def _check(observer: object) -> None:
    if not isinstance(observer, Observer):
        raise ParameterError(
            f"observer must be an Observer or a list of them, got {observer!r:.60}; derive from dynatree_core.Observer"
        )
    known = HEARD_BY.values()
    for name in dir(observer):
        if name.startswith("on_") and name not in known:
            raise ParameterError(
                f"an observer's methods must be among {', '.join(known)}, got {type(observer).__name__}.{name}"
                f"{nearest_match(name, known)}; rename it"
            )
