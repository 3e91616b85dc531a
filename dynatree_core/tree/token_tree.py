"""The token tree: frozen parallel tensors, breadth first, parents before children.

There is no Python object per node. A tree grows by whole levels and shrinks by a keep-mask; both give a
new tree and leave the old one alone. The number of nodes per level is known on the host, so asking for a
size never waits for the device.
"""

from __future__ import annotations

import attrs
import torch
from torch import Tensor

from dynatree_core.errors import TreeError

__all__ = ["TokenTree"]


@attrs.frozen(eq=False)
class TokenTree:
    """A tree of drafted tokens under node 0, the root: the last committed token.

    The root is already decided, but its keys and values are not in the target's cache yet; it is
    verified together with the drafted nodes and always accepted. Children of one parent are adjacent,
    in descending draft probability.
    """

    token_ids: Tensor  # [nodes] int64
    parent: Tensor  # [nodes] int64, -1 for the root
    depth: Tensor  # [nodes] int64, 0 for the root
    logprob: Tensor  # [nodes] float32, natural log of the draft probability given the parent; root 0
    cum_logprob: Tensor  # [nodes] float32, sum of logprob along the path from the root
    ancestor_mask: Tensor  # [nodes, nodes] bool, row i marks node i and its ancestors
    rank: Tensor  # [nodes] int64, place among the siblings as they were drafted, before pruning, from 0 on; root 0
    draft_index: Tensor  # [nodes] int64, the node's place in the tree as it was drafted, before pruning
    level_sizes: tuple[int, ...]  # nodes at depth 0, 1, ...; the first is 1

    @classmethod
    def root(cls, token_id: Tensor) -> TokenTree:
        """A tree that holds only the last committed token, given as a [1] int64 tensor on its device."""
        device = token_id.device
        index = torch.zeros(1, dtype=torch.int64, device=device)
        score = torch.zeros(1, dtype=torch.float32, device=device)
        mask = torch.ones(1, 1, dtype=torch.bool, device=device)
        return cls(token_id, index - 1, index, score, score, mask, index, index, (1,))

    @property
    def num_nodes(self) -> int:
        """Nodes with the root."""
        return sum(self.level_sizes)

    @property
    def num_drafted(self) -> int:
        """Nodes without the root."""
        return self.num_nodes - 1

    @property
    def max_depth(self) -> int:
        """Depth of the deepest node; 0 for a tree that is only a root."""
        return len(self.level_sizes) - 1

    @property
    def device(self) -> torch.device:
        return self.token_ids.device

    def to(self, device: torch.device) -> TokenTree:
        """The same tree on another device: three copies, one for each dtype."""
        integers = torch.stack([self.token_ids, self.parent, self.depth, self.rank, self.draft_index]).to(device)
        token_ids, parent, depth, rank, draft_index = integers
        logprob, cum_logprob = torch.stack([self.logprob, self.cum_logprob]).to(device)
        mask = self.ancestor_mask.to(device)
        return TokenTree(token_ids, parent, depth, logprob, cum_logprob, mask, rank, draft_index, self.level_sizes)

    @property
    def last_level(self) -> slice:
        """Where the deepest nodes stand: the frontier of a growing tree."""
        return slice(self.num_nodes - self.level_sizes[-1], self.num_nodes)

    def grow(self, parent: Tensor, token_ids: Tensor, logprob: Tensor) -> TokenTree:
        """The tree with one more level.

        Args:
            parent: [children] int64, nodes of the last level, ascending.
            token_ids: [children] int64.
            logprob: [children] float32, natural log of the draft probability given the parent.

        The new rows of the mask are one gather: a child sees what its parent sees, and itself.
        """
        nodes, children = self.num_nodes, parent.numel()
        mask = torch.zeros(nodes + children, nodes + children, dtype=torch.bool, device=self.device)
        mask[:nodes, :nodes] = self.ancestor_mask
        mask[nodes:, :nodes] = self.ancestor_mask[parent]
        mask.diagonal().fill_(True)
        index = torch.arange(nodes + children, device=self.device)
        first_of = torch.searchsorted(parent, parent)  # [children]: where the siblings of each begin
        return TokenTree(
            token_ids=torch.cat([self.token_ids, token_ids]),
            parent=torch.cat([self.parent, parent]),
            depth=torch.cat([self.depth, torch.full_like(parent, self.max_depth + 1)]),
            logprob=torch.cat([self.logprob, logprob]),
            cum_logprob=torch.cat([self.cum_logprob, self.cum_logprob[parent] + logprob]),
            ancestor_mask=mask,
            rank=torch.cat([self.rank, index[:children] - first_of]),
            draft_index=index,
            level_sizes=(*self.level_sizes, children),
        )

    def subtree(self, keep: Tensor) -> TokenTree:
        """The tree of the kept nodes, in the same order.

        Args:
            keep: [nodes] bool, closed under ancestors and with the root: `close_under_ancestors` makes it so.

        Raises:
            TreeError: the mask leaves out the root or a kept node's ancestor.

        Costs one transfer to the host, which learns the new level sizes.
        """
        is_orphan = keep & ~self.close_under_ancestors(keep)
        sizes = torch.zeros(len(self.level_sizes) + 1, dtype=torch.int64, device=self.device)
        sizes[1:].scatter_add_(0, self.depth, keep.long())
        sizes[0] = is_orphan.sum()
        num_orphans, *level_sizes = sizes.tolist()
        if num_orphans or level_sizes[0] != 1:
            raise TreeError(
                "a pruned tree must keep the root and every ancestor of a kept node, got a mask that "
                f"keeps {num_orphans} nodes without all of their ancestors; close it under ancestors first"
            )
        # a stable sort brings the kept nodes to the front without asking the device how many they are
        index = torch.argsort((~keep).byte(), stable=True)[: sum(level_sizes)]
        new_index = torch.cumsum(keep, 0) - 1
        parent = torch.where(self.parent[index] < 0, -1, new_index[self.parent[index]])
        return TokenTree(
            token_ids=self.token_ids[index],
            parent=parent,
            depth=self.depth[index],
            logprob=self.logprob[index],
            cum_logprob=self.cum_logprob[index],
            ancestor_mask=self.ancestor_mask[index[:, None], index],
            rank=self.rank[index],
            draft_index=self.draft_index[index],
            level_sizes=tuple(size for size in level_sizes if size),
        )

    def first_chain(self) -> TokenTree:
        """The root, its most probable child, that one's most probable child, and so on."""
        is_first = torch.ones_like(self.parent, dtype=torch.bool)
        is_first[1:] = self.parent[1:] != self.parent[:-1]  # children of one parent are adjacent
        return self.subtree(self.close_under_ancestors(is_first))

    def close_under_ancestors(self, keep: Tensor) -> Tensor:
        """[nodes] bool: the kept nodes all of whose ancestors are kept too. The root always is."""
        keep = keep.clone()
        keep[0] = True
        return ~(self.ancestor_mask & ~keep).any(dim=1)
