"""The `prompt_lookup` drafter: continuations of earlier occurrences of the current suffix, merged into one tree.

Prompt lookup (Saxena 2023; in transformers since 4.37) copies one continuation as a chain. Here all occurrences
are followed at once: a node's children are the distinct next tokens of the occurrences that agree with the
path so far, weighted by how much of the suffix each occurrence matches. So the tree branches where the text went on in
different ways, and its probabilities come from counts, which lets every policy work on it.
"""

from __future__ import annotations

import attrs
import torch
from torch import Tensor

from dynatree_core.drafters.base import Drafter, DraftPlan, DraftState
from dynatree_core.params import count
from dynatree_core.records import Proposals
from dynatree_core.tree import TokenTree

__all__ = ["PromptLookupDrafter"]

# Weight of an occurrence that matches n tokens is n², that of "none of them" 4: one occurrence alone predicts its
# next token with n² / (n² + 4): 0.2, 0.5, 0.69, 0.8 for n = 1…4; occurrences that agree add up.
UNSEEN_WEIGHT = 4.0


@attrs.frozen(slots=False)
class PromptLookupDrafter(Drafter):
    """Drafts from the prompt and the output so far; needs no model and costs no forward pass.

    Args:
        max_ngram: longest suffix that is compared, in tokens.
        max_matches: occurrences that are followed; the longest matches first, the latest among equals.
    """

    max_ngram: int = count(8)
    max_matches: int = count(16)

    def __str__(self) -> str:
        return "prompt_lookup"

    def start(self, plan: DraftPlan) -> PromptLookupState:
        return PromptLookupState(self)


class PromptLookupState(DraftState):
    """The occurrences that one iteration follows."""

    def __init__(self, drafter: PromptLookupDrafter) -> None:
        self.drafter = drafter

    def prefill(self, prompt_ids: Tensor) -> None:
        pass  # the prompt comes again with every proposal

    def propose(self, committed_ids: Tensor, tree: TokenTree, k: int) -> Proposals:
        if tree.max_depth == 0:
            self._find_matches(committed_ids)
        else:
            self._follow(tree)
        self.next_ids = self._next_tokens(committed_ids, tree.max_depth)
        return self._vote(tree.max_depth, k)

    def commit(self, draft_path: tuple[int, ...]) -> None:
        pass  # occurrences are searched anew: the suffix has changed

    def rollback(self) -> None:
        pass

    def _find_matches(self, ids: Tensor) -> None:
        """The best occurrences of the suffix: where each ends, and how many tokens of the suffix it matches."""
        earlier = ids.numel() - 1  # an occurrence ends at any token but the last
        is_matching = torch.ones(earlier, dtype=torch.bool, device=ids.device)
        lengths = torch.zeros(earlier, dtype=torch.int64, device=ids.device)
        for n in range(min(self.drafter.max_ngram, earlier)):
            is_matching[n:] &= ids[: earlier - n] == ids[earlier - n]
            is_matching[:n] = False
            lengths += is_matching
        order = lengths * earlier + torch.arange(earlier, device=ids.device)
        self.ends = order.topk(min(self.drafter.max_matches, earlier)).indices  # [matches]
        self.lengths = lengths[self.ends]  # [matches]
        self.is_followed = (self.lengths > 0)[None]  # [width, matches]: which occurrences agree with a node's path

    def _follow(self, tree: TokenTree) -> None:
        """Move from the parents to the frontier: keep the occurrences whose next token is the node's."""
        level = tree.last_level
        first_parent = level.start - tree.level_sizes[-2]
        parents = tree.parent[level] - first_parent
        self.is_followed = self.is_followed[parents] & (self.next_ids == tree.token_ids[level][:, None])

    def _next_tokens(self, ids: Tensor, depth: int) -> Tensor:
        """[matches]: what each occurrence says after `depth` tokens; past the end of the text it starts over.

        An occurrence that runs into the suffix itself is a loop of the distance between the two.
        """
        period = (ids.numel() - 1 - self.ends).clamp(min=1)
        return ids[self.ends + 1 + depth % period]

    def _vote(self, depth: int, k: int) -> Proposals:
        """Distinct next tokens by the weight of the occurrences behind them."""
        matches = self.ends.numel()
        weights = self.is_followed * (self.lengths + depth).square()  # [width, matches]
        is_same = self.next_ids[:, None] == self.next_ids  # [matches, matches]
        # the first occurrence that says a token speaks for all that say it
        is_first = ~(is_same.tril(diagonal=-1)[None] & self.is_followed[:, None, :]).any(dim=2) & self.is_followed
        votes = (weights.float() @ is_same.float()) * is_first
        probs = votes / (weights.sum(dim=1, keepdim=True) + UNSEEN_WEIGHT)
        top = probs.topk(min(k, matches), dim=1)
        padding = (0, k - top.values.shape[1])
        return Proposals(
            token_ids=torch.nn.functional.pad(self.next_ids[top.indices], padding),
            logprobs=torch.nn.functional.pad(top.values.log(), padding, value=-torch.inf),
        )
