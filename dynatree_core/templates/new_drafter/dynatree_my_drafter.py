"""`my_drafter`: a node's children are the tokens that followed its own token earlier in the text.

It needs no model and costs no forward pass. What it proposes decides how many passes a text takes, not what it says.
"""

from __future__ import annotations

import attrs
import torch
from dynatree_core import Drafter, DraftPlan, DraftState, Proposals, TokenTree, count


@attrs.frozen(slots=False)
class MyDrafter(Drafter):
    """Proposes what followed the same token before, by its share; needs no model.

    It is shared by all generations and never changes: what one of them needs to remember is in its state.
    """

    unseen: int = count(1)  # weight of all tokens that never followed; an occurrence has the weight 1

    def __str__(self) -> str:
        return f"my_drafter(unseen={self.unseen})"

    def start(self, plan: DraftPlan) -> DraftState:
        return MyDrafterState(plan.vocab_size, self.unseen)


class MyDrafterState(DraftState):
    """The drafter in one generation."""

    def __init__(self, vocab_size: int, unseen: int) -> None:
        self.vocab_size = vocab_size
        self.unseen = unseen

    def prefill(self, committed_ids: torch.Tensor) -> None:
        pass  # the committed tokens come again with every proposal

    def propose(self, committed_ids: torch.Tensor, tree: TokenTree, k: int) -> Proposals:
        level = tree.token_ids[tree.last_level]  # [width]
        is_same = committed_ids[:-1] == level[:, None]  # [width, committed - 1]
        counts = torch.zeros(level.numel(), self.vocab_size, device=level.device)  # [width, vocab]
        counts.index_add_(1, committed_ids[1:], is_same.float())
        top = (counts / (counts.sum(dim=1, keepdim=True) + self.unseen)).topk(k)  # best first
        return Proposals(top.indices, top.values.log())  # what never followed has probability 0, its logarithm -inf

    def commit(self, draft_path: tuple[int, ...]) -> None:
        pass  # nothing of the tree was kept

    def rollback(self) -> None:
        pass
