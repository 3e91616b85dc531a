"""What a drafter is: something that proposes children for the nodes of a growing tree.

A `Drafter` is shared by sessions and threads and never changes; what one generation needs to remember lives
in the `DraftState` that it starts for each session.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import TYPE_CHECKING

import attrs
import torch
from torch import Tensor, nn

from dynatree_core.cache.prefix_cache import PrefixReuse
from dynatree_core.cache.sink_cache import SinkWindow
from dynatree_core.clock import StageClock
from dynatree_core.tree.frontier import Proposals
from dynatree_core.tree.token_tree import TokenTree

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["DraftPlan", "DraftState", "Drafter", "padded_proposals"]


@attrs.frozen(eq=False)
class DraftPlan:
    """What a drafter is told about a generation before it begins."""

    vocab_size: int  # token ids that the target knows; proposing any other is an error
    num_tokens: int  # prompt and new tokens, at most
    max_nodes: int  # drafted nodes of one tree, at most
    device: torch.device  # where trees and proposals live
    clock: StageClock  # measures forward passes, under the name "draft_forward"
    target: nn.Module  # the model that verifies: a drafter may share its weights, and must not change it
    kept: SinkWindow | None = None  # all that the target's cache keeps of the text, if that is bounded
    prefix: PrefixReuse | None = None  # rows of earlier generations, for a drafter that has a cache like the target's
    runner: str = "eager"  # how forward passes of a model are to be computed; "auto" is chosen for each model
    on_prefill: Callable[[int, int], None] | None = None  # who wants to know how far a long prefill is: rows done, all
    # the target's, for a drafter that looks at text; None where the caller has given none
    tokenizer: PreTrainedTokenizerBase | None = None


class Drafter(abc.ABC):
    """A source of proposals, immutable and shared. Its string is its name in reports and errors."""

    def __repr__(self) -> str:
        return type(self).__name__

    @abc.abstractmethod
    def start(self, plan: DraftPlan) -> DraftState:
        """Begin one generation.

        Raises:
            VocabularyMismatchError: the drafter does not speak the target's token ids.
            ContextLimitError: the generation is longer than the drafter can follow.
        """


class DraftState(abc.ABC):
    """A drafter in one generation."""

    # whether levels may be left out, the root's among them, so that a level is asked about whose parents were not
    can_skip_levels = False

    @abc.abstractmethod
    def prefill(self, committed_ids: Tensor) -> None:
        """Look at the committed tokens [committed] but the last one, before the first decode step.

        Called again when a session goes on after a break; what was seen before need not be seen twice.
        """

    @abc.abstractmethod
    def propose(self, committed_ids: Tensor, tree: TokenTree, k: int) -> Proposals:
        """The k best children of each node of the tree's last level.

        Called once a level at most, for level 0 (the root) first, then for each level that grows, unless
        `can_skip_levels` allows for others. It does not change the tree.

        Args:
            committed_ids: [committed] int64, prompt and new tokens; the last one is the tree's root.
            tree: the tree so far.
            k: children per node, the second dimension of the proposals.
        """

    @abc.abstractmethod
    def commit(self, draft_path: tuple[int, ...]) -> None:
        """Remember that these drafted nodes were accepted, by depth; forget the other nodes.

        The bonus token is not among them: it is the last of `committed_ids` in the next iteration. The path
        may be longer than what `propose` was asked about, since the deepest nodes are never expanded.
        """

    @abc.abstractmethod
    def rollback(self) -> None:
        """Forget all drafted nodes of an iteration that failed."""


def padded_proposals(token_ids: Tensor, logprobs: Tensor, k: int) -> Proposals:
    """Proposals of exactly k children from [width, at most k] tensors: what is missing has probability 0."""
    missing = k - logprobs.shape[1]
    if missing == 0:
        return Proposals(token_ids, logprobs)
    pad = torch.nn.functional.pad
    return Proposals(pad(token_ids, (0, missing)), pad(logprobs, (0, missing), value=-torch.inf))
