"""The deepest level of a growing tree, and what a drafter proposes for it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cached_property

import attrs
import torch
from torch import Tensor

from dynatree_core.cost_model import NOMINAL_COSTS, CostModel
from dynatree_core.renamed import warn_of_old_name
from dynatree_core.tree.token_tree import TokenTree

__all__ = ["Frontier", "Proposals"]


@attrs.frozen(eq=False)
class Proposals:
    """A drafter's distribution over the children of each frontier node, best first.

    Where a drafter knows fewer than k children, the rest has a log-probability of -inf and any valid token id.
    """

    token_ids: Tensor  # [width, k] int64
    logprobs: Tensor  # [width, k] float32, natural log, descending along k
    is_free: bool = False  # made without the models that the drafter usually asks, as by a union that knew enough
    # of a union: each drafter that was asked, and what it has proposed; the first heard first
    heard: tuple[tuple[str, Proposals], ...] = attrs.field(default=(), repr=False)

    def copied(self) -> Proposals:
        """The same in memory of its own."""
        token_ids, logprobs = self.token_ids.clone(), self.logprobs.clone()
        heard = tuple(
            # where one drafter alone was asked, its proposals are the union's: two copies fewer for each level
            (name, Proposals(token_ids, logprobs, part.is_free))
            if part.token_ids is self.token_ids and part.logprobs is self.logprobs and not part.heard
            else (name, part.copied())
            for name, part in self.heard
        )
        return Proposals(token_ids, logprobs, self.is_free, heard)

    @property
    def checks(self) -> list[Tensor]:
        """[] each: the least and the greatest token, and how many log-probabilities are sound."""
        # not NaN; rounding may exceed log 1 = 0 a little
        return [*self.token_ids.aminmax(), (self.logprobs <= 1e-3).sum()]


@attrs.define(eq=False)
class Read:
    """What the host has read of a level, or was told, before it has to ask."""

    proposed: list[int] | None = None  # least and greatest token that is proposed, and how many scores are sound
    widths: Tensor | None = None  # an answer to `branch_factor`, and how many children it leads to
    num_children: int = 0
    places: Tensor | None = None  # [children] int64, where they are in the flattened proposals; None: nobody has said


@attrs.frozen(eq=False)
class Frontier:
    """The deepest level of a growing tree, as a policy sees it.

    Depth, tree and path probabilities are at hand. What the drafter says about the children
    (`top_token_ids`, `top_logprobs`, `confidence`, `entropy`) costs one drafter pass over the level, made when
    a policy first looks; a level that is turned down by its depth alone costs nothing.
    """

    tree: TokenTree
    iteration: int  # 0 for the first decode step of the session
    _nodes_left: int | Callable[[], Tensor] = attrs.field(repr=False)  # as below, or what counts them for who looks
    max_branch: int  # the largest branch factor that can be served
    _propose: Callable[[], Proposals] = attrs.field(repr=False)
    _measure: Callable[[], CostModel] = attrs.field(default=lambda: NOMINAL_COSTS, repr=False)

    num_sequences: int = 1  # that share the target's pass of this iteration, this one among them
    rows_beside: int = 0  # of that pass, those of the other sequences, by what they had last
    width_beside: int = 0  # nodes at this depth of the others' trees, by what they had last
    # tokens that a model as drafter has not followed yet, and which a look has it follow first: the whole prompt, where
    # nobody has asked before. A pass over them comes on top of the level's, once
    num_behind: int = 0
    num_tokens_left: int | None = None  # new tokens that may still be committed; None: nobody knows
    # as below, or what asks the drafter for who looks
    _is_look_free: Callable[[], bool] = attrs.field(default=lambda: False, repr=False)
    _was_read: Read = attrs.field(factory=Read, init=False, repr=False)

    @cached_property
    def nodes_left(self) -> int | Tensor:
        """Drafted nodes that the budget still allows; [] int64 of a padded tree, which only the device has counted."""
        return self._nodes_left if isinstance(self._nodes_left, int) else self._nodes_left()

    @cached_property
    def costs(self) -> CostModel:
        """What passes take on this machine; the first look on a machine measures it, which takes seconds."""
        return self._measure()

    @cached_property
    def charged_costs(self) -> CostModel:
        """What this sequence is charged at the present load (`CostModel.beside`); alone, the costs themselves."""
        return self.costs.beside(self.num_sequences, self.rows_beside, self.width_beside)

    @property
    def row_seconds(self) -> float:
        """What one row more in the target's pass is charged, beside the nodes that the tree has."""
        seconds = self.charged_costs.target_pass_seconds
        return seconds(self.tree.num_nodes + 1) - seconds(self.tree.num_nodes)

    @property
    def level_seconds(self) -> float:
        """What the drafter's look at this level is charged, with what it takes to follow the text up to here."""
        if self.is_look_free:
            return 0.0
        return self.charged_costs.drafter_level_seconds(self.width) + self.catch_up_seconds

    @property
    def catch_up_seconds(self) -> float:
        """What the drafter is charged for the tokens that it has not followed yet, if this look has it follow them."""
        is_caught_up = self.num_behind == 0 or self.is_look_free
        return 0.0 if is_caught_up else self.charged_costs.catch_up_seconds(self.num_behind)

    @cached_property
    def is_look_free(self) -> bool:
        """Whether a look takes no pass of a model and follows no text, as where a union's last drafter knows enough.

        That is known before the look, for the price of asking a drafter without a model. False where nobody can say.
        """
        return self.proposals.is_free if self.is_drafter_asked else self._is_look_free()

    def __deepcopy__(self, memo: dict[int, object]) -> Frontier:
        """Itself: it says what was at one moment. A copy of a policy that keeps it must not copy what it asks."""
        return self

    def read(self, *numbers: Tensor) -> list[list[float]]:
        """The numbers of tensors [numbers] float32 on the host, by one transfer, for which it waits.

        From a GPU comes with them what the host has to know of the proposals in any case, once somebody has looked at
        them. A policy that then says by `note_children` what it has decided saves the transfer that a level would cost
        beside its own.
        """
        parts = [*numbers]
        if self.is_drafter_asked and self.tree.device.type != "cpu":
            parts.append(torch.stack(self.proposals.checks).float())  # a vocabulary has fewer than 2^24 tokens
        left = iter(torch.cat(parts).tolist())
        of_each = [list(itertools.islice(left, part.numel())) for part in parts]
        if len(parts) > len(numbers):
            self._was_read.proposed = [int(number) for number in of_each.pop()]
        return of_each

    def note_children(self, widths: Tensor, number: int, *, places: Tensor | None = None) -> None:
        """Say how many children the widths [width] int64 lead to that `branch_factor` is about to answer, one at least.

        For a policy that has read the proposals. It counts where this very tensor decides, all nodes are expanded and
        no path is cut by τ. No child may be counted whose log-probability is -inf; a policy that is wrong is refused on
        a CPU.

        Args:
            widths: what is about to be answered.
            number: of children.
            places: [number] int64, which of the flattened proposals [width × k] they are, ascending, where the policy
                knows: nobody looks for them again then.
        """
        self._was_read.widths, self._was_read.num_children, self._was_read.places = widths, number, places

    def what_was_read(self) -> Read:
        """For the engine, when the policies have answered."""
        return self._was_read

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
