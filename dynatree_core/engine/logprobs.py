"""Log-probabilities of a step's tokens, where the caller has asked for them."""

from __future__ import annotations

import attrs
import torch
from torch import Tensor

from dynatree_core.report import TokenLogprob
from dynatree_core.tree.verdict import Verdict

__all__ = ["with_logprobs"]


def with_logprobs(verdict: Verdict, logits: Tensor, num_top: int) -> Verdict:
    """The verdict with what the target thought of each of its tokens. It costs one transfer to the host.

    Args:
        verdict: on a tree.
        logits: [nodes, vocab], the target's output at each node of it, as no processor has changed it.
        num_top: how many of the most probable tokens are listed for each place.
    """
    places = (0, *verdict.path)[: len(verdict.token_ids)]  # nodes after which the tokens were chosen
    logprobs = logits[list(places)].float().log_softmax(dim=-1)  # [tokens, vocab]
    chosen = logprobs.gather(1, torch.tensor(verdict.token_ids, device=logits.device)[:, None])  # [tokens, 1]
    top, top_ids = logprobs.topk(num_top, dim=-1)  # [tokens, num_top]
    # float64 holds a float32 number and a token id exactly, so all of them come by one transfer
    rows = torch.cat([chosen.double(), top.double(), top_ids.double()], dim=1).tolist()
    listed = [
        TokenLogprob(
            token_id,
            row[0],
            tuple((int(one), value) for value, one in zip(row[1:][:num_top], row[1 + num_top :], strict=True)),
        )
        for token_id, row in zip(verdict.token_ids, rows, strict=True)
    ]
    return attrs.evolve(verdict, logprobs=tuple(listed))
