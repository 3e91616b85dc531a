"""The token tree: frozen parallel tensors, breadth first, parents before children.

There is no Python object per node. A tree grows by whole levels and shrinks by a keep-mask; both give a
new tree and leave the old one alone. The number of nodes per level is known on the host, so asking for a
size never waits for the device.

A padded tree (`tree/padded.py`) has levels of one width: behind their nodes stands padding, whose log-probabilities
are -inf. So its sizes are known before the device has computed how many nodes there are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from functools import cached_property

import attrs
import torch
from torch import Tensor

from dynatree_core.errors import TreeError
from dynatree_core.tree.transfer import together_on

__all__ = ["TokenTree"]


FIRST_ROOM = 32  # nodes that a growing tree has memory for at first; twice as many each time that it is full


@attrs.define(eq=False)
class Room:
    """Memory that a tree grows into, so that a level is written once and nothing before it is copied."""

    integers: Tensor  # [2, room] int64: token ids and parents
    scores: Tensor  # [2, room] float32: log-probabilities of nodes and of their paths
    mask: Tensor  # [room, room] bool: ancestors; on the diagonal what every node sees, itself
    num_used: int = 0  # nodes of the largest tree in it
    packed: Tensor | None = None  # of a padded tree: [6, room] int64, see `packed_scores` and PaddedSpace

    @classmethod
    def of_root(cls, token_id: Tensor) -> Room:
        """A new one, with a root that has this token [1] int64; it is one block of memory, so it takes two kernels."""
        room = cls.of_block(_first_block(token_id.device).clone())
        room.integers[0, :1] = token_id
        return room

    @classmethod
    def of_block(cls, block: Tensor) -> Room:
        """The room for `FIRST_ROOM` nodes in a block of memory [bytes] uint8."""
        integers, scores, mask = torch.split(block, [16 * FIRST_ROOM, 8 * FIRST_ROOM, FIRST_ROOM**2])
        return cls(
            integers.view(torch.int64).view(2, FIRST_ROOM),
            scores.view(torch.float32).view(2, FIRST_ROOM),
            mask.view(torch.bool).view(FIRST_ROOM, FIRST_ROOM),
        )

    @classmethod
    def for_nodes(cls, num_nodes: int, device: torch.device) -> Room:
        return cls(
            torch.empty(2, num_nodes, dtype=torch.int64, device=device),
            torch.empty(2, num_nodes, dtype=torch.float32, device=device),
            torch.eye(num_nodes, dtype=torch.bool, device=device),
        )

    @classmethod
    def of_packed(cls, packed: Tensor, mask: Tensor) -> Room:
        """A padded tree's: all that is known of a node in one column, so that one kernel moves it.

        Args:
            packed: [6, room] int64: token ids, parents, both scores, ranks, depths, and levels (-1 for padding).
            mask: as above.
        """
        return cls(packed[:2], packed_scores(packed[2]).T, mask, packed=packed)

    def has_place_behind(self, tree: TokenTree, num_nodes: int) -> bool:
        """Whether nobody has grown this tree in it before, and so many nodes fit in all."""
        return (
            self.num_used == tree.num_nodes
            and num_nodes <= self.mask.shape[0]
            and self.mask.is_inference() == torch.is_inference_mode_enabled()  # else torch lets nobody write into it
        )


@functools.cache
def _first_block(device: torch.device) -> Tensor:
    """[bytes] uint8: the room of a root without a token."""
    with torch.inference_mode(False):
        block = torch.zeros(FIRST_ROOM * (24 + FIRST_ROOM), dtype=torch.uint8, device=device)
        room = Room.of_block(block)
        room.integers[1, 0] = -1
        room.mask.fill_diagonal_(True)
        return block


def packed_scores(column: Tensor) -> Tensor:
    """[places, 2] float32 in the memory of [places] int64: log-probabilities of nodes and of their paths."""
    return column.view(torch.float32).view(-1, 2)


@attrs.frozen(eq=False)
class Cut:
    """What only the tree as it was drafted knows of the nodes that pruning has left, [nodes] int64 each."""

    depth: Tensor
    rank: Tensor
    draft_index: Tensor


@attrs.frozen(eq=False)
class TokenTree:
    """A tree of drafted tokens under node 0, the root: the last committed token.

    The root is already decided, but its keys and values are not in the target's cache yet; it is
    verified together with the drafted nodes and always accepted. Children of one parent are adjacent,
    in descending draft probability.
    """

    token_ids: Tensor  # [nodes] int64
    parent: Tensor  # [nodes] int64, -1 for the root; ascending
    logprob: Tensor  # [nodes] float32, natural log of the draft probability given the parent; root 0
    cum_logprob: Tensor  # [nodes] float32, sum of logprob along the path from the root
    ancestor_mask: Tensor  # [nodes, nodes] bool, row i marks node i and its ancestors
    level_sizes: tuple[int, ...]  # nodes at depth 0, 1, ..., padding among them; the first is 1
    _cut: Cut | None = attrs.field(default=None, repr=False)  # None: nothing was pruned
    _room: Room | None = attrs.field(default=None, repr=False)  # None: that of a tree which grows from here on
    is_padded: bool = attrs.field(default=False, repr=False)  # whether nodes behind those of a level may be padding

    @classmethod
    def root(cls, token_id: Tensor) -> TokenTree:
        """A tree that holds only the last committed token, given as a [1] int64 tensor on its device."""
        device = token_id.device  # nothing is shared with other trees: who writes into one harms that one alone
        if device.type != "cpu":  # fewer kernels, with room to grow; on a CPU a root that never grows is quicker below
            return cls.in_room(Room.of_root(token_id), (1,))
        return cls(
            token_ids=token_id.clone(),
            parent=torch.full((1,), -1, device=device),
            logprob=torch.zeros(1, dtype=torch.float32, device=device),
            cum_logprob=torch.zeros(1, dtype=torch.float32, device=device),
            ancestor_mask=torch.ones(1, 1, dtype=torch.bool, device=device),
            level_sizes=(1,),
        )

    @classmethod
    def padded_root(cls, token_id: Tensor, room: Room) -> TokenTree:
        """Likewise, of a tree that grows by `grow_padded`, padding among its nodes.

        Args:
            token_id: [1] int64.
            room: of empty places, but for the root's parent and scores; the last one is padding's, and stays empty.
        """
        room.integers[0, :1] = token_id
        return cls.in_room(room, (1,), is_padded=True)

    @classmethod
    def in_room(cls, room: Room, level_sizes: tuple[int, ...], *, is_padded: bool = False) -> TokenTree:
        """The tree of the first nodes in a room."""
        num_nodes = room.num_used = sum(level_sizes)
        return cls(
            token_ids=room.integers[0, :num_nodes],
            parent=room.integers[1, :num_nodes],
            logprob=room.scores[0, :num_nodes],
            cum_logprob=room.scores[1, :num_nodes],
            ancestor_mask=room.mask[:num_nodes, :num_nodes],
            level_sizes=level_sizes,
            room=room,
            is_padded=is_padded,
        )

    def gathered(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """Some nodes of a padded tree, at places [rows] int64: what is known of each [6, rows], and their mask.

        Parents are places in the tree still. The place behind all that it has room for is that of padding, which sees
        and is seen by padding only.
        """
        room = self._room
        assert room is not None, "only a padded tree has a place for padding"
        assert room.packed is not None, "likewise"
        return room.packed.index_select(1, places), room.mask[places[:, None], places]

    @cached_property
    def is_live(self) -> Tensor:
        """[nodes] bool: which nodes are there. Those that are not are padding: the probability of their path is 0."""
        return self.cum_logprob > -torch.inf

    @cached_property
    def depth(self) -> Tensor:
        """[nodes] int64, 0 for the root."""
        if self._room is not None and self._room.packed is not None:
            return self._room.packed[4, : self.num_nodes]
        return self.ancestor_mask.sum(dim=1) - 1 if self._cut is None else self._cut.depth

    @cached_property
    def rank(self) -> Tensor:
        """[nodes] int64, place among the siblings as they were drafted, before pruning, from 0 on; root 0."""
        if self._room is not None and self._room.packed is not None:
            return self._room.packed[3, : self.num_nodes]
        if self._cut is not None:
            return self._cut.rank
        return self.draft_index - torch.searchsorted(self.parent, self.parent)  # where the siblings of each begin

    @cached_property
    def draft_index(self) -> Tensor:
        """[nodes] int64, the node's place in the tree as it was drafted, before pruning."""
        return torch.arange(self.num_nodes, device=self.device) if self._cut is None else self._cut.draft_index

    @property
    def is_cut(self) -> bool:
        """Whether pruning has taken nodes out, so that `draft_index` is no longer 0, 1, 2, …"""
        return self._cut is not None

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
        """The same tree on another device, by one copy."""
        integers = [self.token_ids, self.parent, self.depth, self.rank, self.draft_index]
        numbers = [*integers, self.logprob, self.cum_logprob, self.ancestor_mask]
        token_ids, parent, *cut, logprob, cum_logprob, mask = together_on(device, numbers)
        return TokenTree(token_ids, parent, logprob, cum_logprob, mask, self.level_sizes, Cut(*cut))

    @property
    def last_level(self) -> slice:
        """Where the deepest nodes stand: the frontier of a growing tree."""
        return slice(self.num_nodes - self.level_sizes[-1], self.num_nodes)

    def grow(self, parent: Tensor, token_ids: Tensor, logprob: Tensor) -> TokenTree:
        """The tree with one more level. One that was pruned counts as drafted as it is.

        Args:
            parent: [children] int64, nodes of the last level, ascending.
            token_ids: [children] int64.
            logprob: [children] float32, natural log of the draft probability given the parent.
        """
        logprob = logprob.float()
        cum_logprob = self.cum_logprob[parent] + logprob
        every = torch.arange(parent.numel(), device=self.device)
        new = self.num_nodes + parent.numel()
        room = self._room_for(new)
        room.integers[1, self.num_nodes : new] = parent
        return self._grown(room, every, token_ids, logprob, cum_logprob)

    def grow_among(self, chosen: Tensor, token_ids: Tensor, logprobs: Tensor, scores: Tensor) -> TokenTree:
        """The tree with one more level, of some of the children that were proposed for its last one.

        Args:
            chosen: [children] int64, their places in the flattened proposals, ascending.
            token_ids: [width, k] int64, of all that were proposed.
            logprobs: [width, k] float32, natural log of the draft probability given the parent.
            scores: [width, k] float32, log-probability of the path.
        """
        new = self.num_nodes + chosen.numel()
        room = self._room_for(new)
        parent = room.integers[1, self.num_nodes : new]
        torch.div(chosen, token_ids.shape[1], rounding_mode="floor", out=parent).add_(self.last_level.start)
        return self._grown(room, chosen, token_ids.flatten(), logprobs.flatten(), scores.flatten())

    def _grown(self, room: Room, chosen: Tensor, token_ids: Tensor, logprob: Tensor, cum_logprob: Tensor) -> TokenTree:
        """The tree with one more level, whose parents are in the room: the chosen places of what follows [proposed].

        Each of its tensors is written once, where it stays: a child sees what its parent sees, and itself.
        """
        old, new = self.num_nodes, self.num_nodes + chosen.numel()
        integers, scores, level = room.integers, room.scores, slice(old, new)
        parent = integers[1, level]
        torch.index_select(token_ids, 0, chosen, out=integers[0, level])
        torch.index_select(logprob, 0, chosen, out=scores[0, level])
        torch.index_select(cum_logprob, 0, chosen, out=scores[1, level])
        torch.index_select(room.mask[:, :old], 0, parent, out=room.mask[level, :old])
        return TokenTree.in_room(room, (*self.level_sizes, chosen.numel()))

    def grow_padded(self, width: int, write: Callable[[Room, slice], None]) -> TokenTree:
        """The padded tree with one more level, of so many places.

        Args:
            width: places, with those for padding.
            write: writes the level's columns into the room, as far as the room does not know them, and what they see.
        """
        old = self.num_nodes
        room = self._room
        assert room is not None, "a padded tree begins with `padded_root`"
        assert room.num_used == old, f"a padded tree grows once, got {room.num_used} places in use behind {old}"
        assert old + width < len(room.mask), f"there is room for {len(room.mask) - 1} places, got {old + width}"
        write(room, slice(old, old + width))
        return TokenTree.in_room(room, (*self.level_sizes, width), is_padded=True)

    def first_packed_score(self) -> Tensor:
        """[1] int64 of a padded tree: both scores of the first place of its last level, as one number."""
        assert self._room is not None, "a padded tree has a room"
        assert self._room.packed is not None, "which is packed"
        first = self.last_level.start
        return self._room.packed[2, first : first + 1]

    def _room_for(self, num_nodes: int) -> Room:
        """Where a tree of so many nodes is, of which this one's are there already."""
        if self._room is not None and self._room.has_place_behind(self, num_nodes):
            return self._room
        size = FIRST_ROOM
        while size < num_nodes:
            size *= 2
        room, old = Room.for_nodes(size, self.device), self.num_nodes
        room.integers[0, :old] = self.token_ids
        room.integers[1, :old] = self.parent
        room.scores[0, :old] = self.logprob
        room.scores[1, :old] = self.cum_logprob
        room.mask[:old, :old] = self.ancestor_mask
        return room

    def subtree(self, keep: Tensor) -> TokenTree:
        """The tree of the kept nodes, in the same order.

        Args:
            keep: [nodes] bool, closed under ancestors and with the root: `close_under_ancestors` makes it so.

        Raises:
            TreeError: the mask leaves out the root or a kept node's ancestor.

        Costs one transfer to the host, which learns the new level sizes.
        """
        num_orphans, *level_sizes = self._sizes_of(keep, (keep & ~self.close_under_ancestors(keep)).sum())
        if num_orphans or level_sizes[0] != 1:
            raise TreeError(
                "a pruned tree must keep the root and every ancestor of a kept node, got a mask that "
                f"keeps {num_orphans} nodes without all of their ancestors; close it under ancestors first"
            )
        return self._kept(keep, level_sizes)

    def pruned(self, keep: Tensor) -> TokenTree:
        """The tree of the kept nodes [nodes] bool whose ancestors are all kept, and of the root, in the same order.

        Costs one transfer to the host, which learns the new level sizes.
        """
        closed = self.close_under_ancestors(keep)
        return self._kept(closed, self._sizes_of(closed))

    def _sizes_of(self, keep: Tensor, *before: Tensor) -> list[int]:
        """Kept nodes by level, behind other numbers, by one transfer to the host."""
        sizes = torch.zeros(len(self.level_sizes), dtype=torch.int64, device=self.device)
        sizes.scatter_add_(0, self.depth, keep.long())
        numbers: list[int] = (torch.cat([torch.stack(before), sizes]) if before else sizes).tolist()
        return numbers

    def _kept(self, keep: Tensor, level_sizes: Sequence[int]) -> TokenTree:
        # how many they are is known here, so the device need not be asked
        index = torch.nonzero_static(keep, size=sum(level_sizes))[:, 0]
        parent = torch.searchsorted(index, self.parent[index])  # its place among the kept ones, to which it belongs
        parent[:1].fill_(-1)
        return TokenTree(
            token_ids=self.token_ids[index],
            parent=parent,
            logprob=self.logprob[index],
            cum_logprob=self.cum_logprob[index],
            ancestor_mask=self.ancestor_mask[index[:, None], index],
            level_sizes=tuple(size for size in level_sizes if size),
            cut=Cut(self.depth[index], self.rank[index], self.draft_index[index] if self.is_cut else index),
        )

    def first_chain(self) -> TokenTree:
        """The root, its most probable child, that one's most probable child, and so on."""
        is_first = torch.ones_like(self.parent, dtype=torch.bool)
        is_first[1:] = self.parent[1:] != self.parent[:-1]  # children of one parent are adjacent
        return self.pruned(is_first)

    def close_under_ancestors(self, keep: Tensor) -> Tensor:
        """[nodes] bool: the kept nodes all of whose ancestors are kept too. The root always is."""
        return (self.ancestor_mask[:, 1:] <= keep[1:]).all(dim=1)  # who is an ancestor is kept
