"""A level of a padded tree by one kernel: which of the proposed children there is a place for, and their columns.

Plain torch takes a dozen kernels for it, `dynatree_core.tree.padded.write_plainly`, which is what this one is compared
with. Nothing is rounded otherwise: a path's log-probability is one sum of two float32 numbers in both.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dynatree_core.ops.triton.level_kernel import level_kernel
from dynatree_core.ops.triton.operators import Launch, launched

__all__ = ["write_level"]


def write_level(
    packed: Tensor,
    mask: Tensor,
    logprobs: Tensor,
    token_ids: Tensor,
    expand: Tensor,
    branch: Tensor,
    *,
    old: int,
    width: int,
    least: float,
    max_nodes: int,
    vocab_size: int,
    launch: Launch = launched,
) -> None:
    """Write a level behind the places of a tree, whose last ones are the nodes that children are proposed for.

    Args:
        packed: [6, room] int64, as `Room.of_packed` describes it.
        mask: [room, room] bool: ancestors.
        logprobs: [nodes, k] float32, of the children that are proposed for each.
        token_ids: [nodes, k] int64.
        expand: [nodes] bool: which nodes are expanded.
        branch: [nodes] int64: children that each is wanted to have.
        old: places of the tree so far.
        width: places of the new level.
        least: log-probability that a path must have, more than -inf.
        max_nodes: drafted nodes of the tree at most, with those of the new level.
        vocab_size: token ids that the target knows; others become the nearest of these.
        launch: what launches a kernel.
    """
    num_nodes, k = logprobs.shape
    logprobs, token_ids = (one if one.stride(1) == 1 else one.contiguous() for one in (logprobs, token_ids))
    proposed = 1 << (num_nodes * k - 1).bit_length()
    launch(
        level_kernel,
        (width,),
        *(packed, mask.view(torch.uint8), logprobs, token_ids),
        *(expand.contiguous().view(torch.uint8), branch.contiguous()),  # a policy may have expanded one number
        *(num_nodes, old - num_nodes, old, packed.shape[1], max_nodes, vocab_size - 1, least),
        *(logprobs.stride(0), token_ids.stride(0)),
        K=k,
        WIDTH=width,
        PROPOSED=proposed,
        BLOCK=min(proposed, 32),
    )
