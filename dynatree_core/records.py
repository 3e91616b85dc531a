"""The records that travel between the stages. No behaviour beyond what follows from the fields."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import attrs
import torch
from torch import Tensor

from dynatree_core.renamed import under_new_names, warn_of_old_name
from dynatree_core.tree import TokenTree

__all__ = [
    "NOMINAL_COSTS",
    "CostModel",
    "FlatTrees",
    "Frontier",
    "GenerationReport",
    "GenerationResult",
    "Limits",
    "Proposals",
    "StepFunction",
    "StepReport",
    "StepStats",
    "Verdict",
]


@attrs.frozen
class Limits:
    """What bounds every tree of a session, whatever its policies want."""

    max_depth: int  # levels below the root
    max_nodes: int  # drafted nodes, the root not counted (N_max in SpecInfer's terms)
    tau: float  # a node whose cumulative draft probability is below it is cut, with its descendants
    max_branch: int  # children that a node can have at most


@attrs.frozen
class StepFunction:
    """Seconds by a count: between measured counts those of the next larger one, beyond the last proportional to it."""

    at: tuple[int, ...]  # ascending
    seconds: tuple[float, ...]  # non-decreasing

    def __call__(self, count: int) -> float:
        """The seconds of `count` rows or nodes; 0.0 for none."""
        if count <= 0:
            return 0.0
        place = bisect.bisect_left(self.at, count)
        if place < len(self.at):
            return self.seconds[place]
        return self.seconds[-1] * count / self.at[-1]


_OLD_COSTS = {"verify": "target_pass_seconds", "draft": "drafter_level_seconds"}


@attrs.frozen
class CostModel:
    """What an iteration takes on this machine, in seconds."""

    target_pass_seconds: StepFunction  # by the rows of the pass: drafted nodes and the root
    drafter_level_seconds: StepFunction  # by the nodes of the level, whose children the drafter proposes
    rest_seconds: float  # making, laying out and committing a small tree

    if not TYPE_CHECKING:  # a type checker knows the new names only

        def __init__(self, *args: Any, **named: Any) -> None:
            self.__attrs_init__(*args, **under_new_names(named, _OLD_COSTS, "CostModel"))

    def plain_step_seconds(self) -> float:
        """A step without drafting."""
        return self.target_pass_seconds(1) + self.rest_seconds

    def iteration_seconds(self, num_drafted: int, level_widths: Sequence[int]) -> float:
        """An iteration: the drafter looks at levels of so many nodes each, the target verifies the drafted nodes."""
        drafting = sum(map(self.drafter_level_seconds, level_widths))
        return self.target_pass_seconds(1 + num_drafted) + drafting + self.rest_seconds

    @property
    def verify(self) -> StepFunction:
        """Old name of `target_pass_seconds`."""
        warn_of_old_name("CostModel.verify", "target_pass_seconds")
        return self.target_pass_seconds

    @property
    def draft(self) -> StepFunction:
        """Old name of `drafter_level_seconds`."""
        warn_of_old_name("CostModel.draft", "drafter_level_seconds")
        return self.drafter_level_seconds

    def plain_seconds(self) -> float:
        """Old name of `plain_step_seconds`."""
        warn_of_old_name("CostModel.plain_seconds", "plain_step_seconds")
        return self.plain_step_seconds()

    def tree_seconds(self, num_drafted: int, widths: Sequence[int]) -> float:
        """Old name of `iteration_seconds`."""
        warn_of_old_name("CostModel.tree_seconds", "iteration_seconds")
        return self.iteration_seconds(num_drafted, widths)


# for frontiers that no session has made: a row adds a hundredth of a pass, and a level takes a tenth
NOMINAL_COSTS = CostModel(
    StepFunction(tuple(range(1, 129)), tuple(0.99 + 0.01 * rows for rows in range(1, 129))),
    StepFunction((128,), (0.1,)),
    0.0,
)


@attrs.frozen(eq=False)
class Proposals:
    """A drafter's distribution over the children of each frontier node, best first.

    Where a drafter knows fewer than k children, the rest has a log-probability of -inf and any valid token id.
    """

    token_ids: Tensor  # [width, k] int64
    logprobs: Tensor  # [width, k] float32, natural log, descending along k
    is_free: bool = False  # made without the models that the drafter usually asks, as by a union that knew enough


@attrs.frozen(eq=False)
class Frontier:
    """The deepest level of a growing tree, as a policy sees it.

    Depth, tree and path probabilities are at hand. What the drafter says about the children
    (`top_token_ids`, `top_logprobs`, `confidence`, `entropy`) costs one drafter pass over the level, made when
    a policy first looks; a level that is turned down by its depth alone costs nothing.
    """

    tree: TokenTree
    iteration: int  # 0 for the first decode step of the session
    nodes_left: int  # drafted nodes that the budget still allows
    max_branch: int  # the largest branch factor that can be served
    _propose: Callable[[], Proposals] = attrs.field(repr=False)
    _measure: Callable[[], CostModel] = attrs.field(default=lambda: NOMINAL_COSTS, repr=False)

    @cached_property
    def costs(self) -> CostModel:
        """What passes take on this machine; the first look on a machine measures it, which takes seconds."""
        return self._measure()

    @property
    def width(self) -> int:
        """Number of frontier nodes."""
        return self.tree.level_sizes[-1]

    @property
    def depth(self) -> int:
        """Depth of the frontier nodes, the same for all: 0 when the frontier is the root."""
        return self.tree.max_depth

    @property
    def token_ids(self) -> Tensor:
        """[width] int64."""
        return self.tree.token_ids[self.tree.last_level]

    @property
    def logprob(self) -> Tensor:
        """[width] float32: log of each node's own draft probability given its parent."""
        return self.tree.logprob[self.tree.last_level]

    @property
    def cum_logprob(self) -> Tensor:
        """[width] float32: log of each node's path probability."""
        return self.tree.cum_logprob[self.tree.last_level]

    @cached_property
    def proposals(self) -> Proposals:
        """What the drafter proposes as children; the first look runs the drafter over this level."""
        return self._propose()

    @property
    def is_asked(self) -> bool:
        """Old name of `is_drafter_asked`."""
        warn_of_old_name("Frontier.is_asked", "is_drafter_asked")
        return self.is_drafter_asked

    @property
    def is_drafter_asked(self) -> bool:
        """Whether anybody has looked at the proposals, so that the drafter was asked about this level."""
        try:
            object.__getattribute__(self, "proposals")  # which does not make what is not there
        except AttributeError:
            return False
        return True

    @property
    def top_token_ids(self) -> Tensor:
        """[width, k] int64: each node's most probable children, best first."""
        return self.proposals.token_ids

    @property
    def top_logprobs(self) -> Tensor:
        """[width, k] float32: log-probabilities of the children, descending; -inf where there is none."""
        return self.proposals.logprobs

    @cached_property
    def confidence(self) -> Tensor:
        """[width] float32 in [0, 1]: the drafter's top-1 probability at each node."""
        return self.top_logprobs[:, 0].exp()

    @cached_property
    def entropy(self) -> Tensor:
        """[width] float32, nats: entropy of the top-k children with the rest of the vocabulary as one outcome.

        A lower bound of the full distribution's entropy, and defined alike for every drafter.
        """
        probs = self.top_logprobs.exp()
        rest = (1 - probs.sum(dim=1)).clamp(min=0)
        return -(torch.xlogy(probs, probs).sum(dim=1) + torch.xlogy(rest, rest))


@attrs.frozen(eq=False)
class FlatTrees:
    """Trees laid out for one forward pass; one batch row a tree, padded to the longest."""

    token_ids: Tensor  # [batch, rows] int64
    position_ids: Tensor  # [batch, rows] int64
    visible: Tensor  # [batch, rows, slots] bool: which cache slots a row attends to
    slot_positions: Tensor  # [batch, slots] int64: the position of the token that a slot holds
    num_places: int  # different positions that the rows have, from that of the first row on

    @property
    def num_rows(self) -> int:
        return self.token_ids.shape[1]


@attrs.frozen
class Verdict:
    """What the target says about one tree, up to where the generation stops; already on the host."""

    path: tuple[int, ...]  # accepted drafted nodes, by depth; the root is not among them
    draft_path: tuple[int, ...]  # the same nodes, as they were numbered when drafted
    token_ids: tuple[int, ...]  # the accepted nodes' tokens, then the bonus token unless generation stops before it
    stop_reason: str | None = None  # why the generation ends with the last of them, if it does


@attrs.frozen(eq=False)
class StepReport:
    """The outcome of one decode step, as policies learn it."""

    iteration: int
    tree: TokenTree  # as it was verified
    verdict: Verdict
    seconds: float = 0.0  # wall-clock time of the step, up to where the policies hear of it
    _measure: Callable[[], CostModel] = attrs.field(default=lambda: NOMINAL_COSTS, repr=False)

    @cached_property
    def costs(self) -> CostModel:
        """What passes take on this machine, as in `Frontier.costs`."""
        return self._measure()

    @property
    def token_ids(self) -> tuple[int, ...]:
        """What is committed in this step."""
        return self.verdict.token_ids

    @property
    def num_accepted(self) -> int:
        """Committed tokens that had been drafted."""
        return len(self.verdict.path)

    @property
    def path_acceptance(self) -> float | None:
        """Accepted drafted tokens ÷ depth of the tree, in [0, 1]; None when nothing was drafted."""
        return self.num_accepted / self.tree.max_depth if self.tree.max_depth else None


@attrs.frozen
class StepStats:
    """The numbers of one decode step that the metrics are made from."""

    num_drafted: int  # drafted nodes that were verified
    depth: int  # depth of the verified tree
    num_accepted: int  # committed tokens that had been drafted
    num_committed: int  # num_accepted, plus the bonus token unless generation stopped before it


@attrs.frozen
class GenerationReport:
    """The metrics of one generation. Times are wall-clock seconds; a ratio of nothing is None."""

    policy: str  # the stack in its canonical spelling
    drafter: str | None
    runner: str  # how the target's forward passes were computed
    num_prompt_tokens: int
    num_reused_tokens: int  # of the prompt, copied from the prefix cache instead of prefilled
    num_new_tokens: int
    num_iterations: int  # target forward passes after the prefill
    num_drafted_nodes: int
    num_accepted_tokens: int  # committed tokens that had been drafted
    tokens_per_iteration: float | None  # committed tokens ÷ iterations
    path_acceptance: float | None  # accepted ÷ depth of the tree, averaged over iterations that drafted
    node_acceptance: float | None  # accepted ÷ drafted nodes
    tokens_per_second: float | None  # new tokens ÷ decode_seconds, the prefill apart
    repetition: float | None  # share of generated 4-grams that occurred earlier in the same output
    prefill_seconds: float
    decode_seconds: float  # draft + verify + rest
    draft_seconds: float  # inside the drafter
    verify_seconds: float  # inside the target's forward passes
    rest_seconds: float  # policies, tree, masks, verification, caches
    overhead_seconds: float  # decode time outside the forward passes of both models
    steps: tuple[StepStats, ...] = attrs.field(repr=False)


@attrs.frozen
class GenerationResult:
    """What a generation returns."""

    token_ids: list[int]  # the new tokens, the prompt not among them
    stop_reason: str  # "eos", "length", "stop_string", "time", "criterion", "interrupted" or "error"
    report: GenerationReport
