"""The outcome of one decode step: what the target says about a tree, and the report that policies get."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import attrs

from dynatree_core.cost_model import NOMINAL_COSTS, CostModel
from dynatree_core.report import TokenLogprob
from dynatree_core.tree.token_tree import TokenTree

__all__ = ["StepReport", "Verdict"]


@attrs.frozen
class Verdict:
    """What the target says about one tree, up to where the generation stops; already on the host."""

    path: tuple[int, ...]  # accepted drafted nodes, by depth; the root is not among them
    draft_path: tuple[int, ...]  # the same nodes, as they were numbered when drafted
    token_ids: tuple[int, ...]  # the accepted nodes' tokens, then the bonus token unless generation stops before it
    stop_reason: str | None = None  # why the generation ends with the last of them, if it does
    logprobs: tuple[TokenLogprob, ...] | None = None  # of each token; None: not asked for


@attrs.frozen(eq=False)
class StepReport:
    """The outcome of one decode step, as policies learn it."""

    iteration: int
    tree: TokenTree  # as it was verified
    verdict: Verdict
    seconds: float = 0.0  # wall-clock time of the step, up to where the policies hear of it
    _measure: Callable[[], CostModel] = attrs.field(default=lambda: NOMINAL_COSTS, repr=False)
    num_sequences: int = 1  # that shared the target's pass, this one among them
    rows_beside: int = 0  # of that pass, those of the other sequences; as many as these where none of them drafted

    def __deepcopy__(self, memo: dict[int, object]) -> StepReport:
        """Itself: it says what was. A copy of a policy that keeps it must not copy what it asks for costs."""
        return self

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
    def is_plain(self) -> bool:
        """Whether nothing was drafted, neither here nor in a sequence that shared the pass."""
        return self.tree.num_drafted == 0 and self.rows_beside < self.num_sequences

    @property
    def path_acceptance(self) -> float | None:
        """Accepted drafted tokens ÷ depth of the tree, in [0, 1]; None when nothing was drafted."""
        return self.num_accepted / self.tree.max_depth if self.tree.max_depth else None
