"""Flatten and mask: lay trees out breadth first for one forward pass.

A node sees the committed prefix, its own ancestors and itself. Its position is the number of committed
tokens before the root plus its depth, so siblings share a position whatever slot they stand in.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from functools import cached_property

import attrs
import torch
from torch import Tensor

from dynatree_core.tree.padded import PaddedRows
from dynatree_core.tree.token_tree import TokenTree

__all__ = ["FlatTrees", "flatten", "flatten_chain", "flatten_level"]


@attrs.frozen(eq=False)
class FlatTrees:
    """Trees laid out for one forward pass; a lane a tree, padded to the longest."""

    token_ids: Tensor  # [lanes, rows] int64
    position_ids: Tensor  # [lanes, rows] int64
    visible: Tensor  # [lanes, rows, slots] bool: which cache slots a row attends to
    _slot_positions: Tensor | Callable[[], Tensor]  # as below, or what makes them for who looks
    num_places: int  # different positions that the rows have, from that of the first row on
    model_positions: Tensor | None = None  # [lanes, rows] int64: what the model is told in place of position_ids
    wants_totals: bool = False  # whether `PassOutput.totals` serve; a runner that has none leaves them out

    @cached_property
    def slot_positions(self) -> Tensor:
        """[lanes, slots] int64: the position of the token that a slot holds. Only layers with a window look."""
        return self._slot_positions if isinstance(self._slot_positions, Tensor) else self._slot_positions()

    @property
    def num_rows(self) -> int:
        return self.token_ids.shape[1]


def flatten(
    trees: Sequence[TokenTree | PaddedRows],
    prefix_lens: Sequence[int],
    *,
    min_rows: int = 0,
    min_slots: int = 0,
    wants_totals: bool = False,
) -> FlatTrees:
    """Lay out whole trees, the root as row 0, for the target.

    Args:
        trees: one tree a lane, or what is verified of a padded one.
        prefix_lens: committed rows of each lane of the cache; the root is not among them.
        min_rows: rows of the pass at least.
        min_slots: cache slots that the mask spans at least; those behind the rows are seen by nobody.
        wants_totals: see `FlatTrees`.

    Returns:
        Rows and slots are padded to the longest. A padding row sees only itself (a row that sees nothing
        is NaN after softmax), and nothing else sees it.
    """
    lanes, device = len(trees), trees[0].device
    rows = max(min_rows, *(tree.num_nodes for tree in trees))
    slots = max(min_slots, max(prefix_lens) + rows)
    if lanes == 1 and rows == trees[0].num_nodes and slots == prefix_lens[0] + rows:
        return _unpadded(trees[0], prefix_lens[0], wants_totals=wants_totals)
    token_ids = torch.zeros(lanes, rows, dtype=torch.int64, device=device)
    position_ids = torch.zeros(lanes, rows, dtype=torch.int64, device=device)
    visible = torch.zeros(lanes, rows, slots, dtype=torch.bool, device=device)
    slot_positions = torch.arange(slots, device=device).repeat(lanes, 1)
    for lane, (tree, prefix_len) in enumerate(zip(trees, prefix_lens, strict=True)):
        nodes = tree.num_nodes
        token_ids[lane, :nodes] = tree.token_ids
        position_ids[lane, :nodes] = tree.depth + prefix_len
        visible[lane, :nodes, :prefix_len] = True
        visible[lane, :nodes, prefix_len : prefix_len + nodes] = tree.ancestor_mask
        if nodes < rows:
            visible[lane, nodes:, prefix_len + nodes : prefix_len + rows].diagonal().fill_(True)
        slot_positions[lane, prefix_len : prefix_len + nodes] = position_ids[lane, :nodes]
    num_places = 1 + max(tree.max_depth for tree in trees)
    return FlatTrees(token_ids, position_ids, visible, slot_positions, num_places, wants_totals=wants_totals)


def _unpadded(tree: TokenTree | PaddedRows, prefix_len: int, *, wants_totals: bool) -> FlatTrees:
    """One tree alone."""
    positions = tree.depth + prefix_len
    return FlatTrees(
        tree.token_ids[None],
        positions[None],
        _behind_prefix(tree.ancestor_mask, prefix_len)[None],
        functools.partial(_counted_up_to, prefix_len, positions),
        num_places=1 + tree.max_depth,
        wants_totals=wants_totals,
    )


def _behind_prefix(mask: Tensor, prefix_len: int) -> Tensor:
    """[rows, slots] bool: each row sees the whole prefix, and what the mask says of the slots behind it."""
    if mask.device.type == "cpu":
        return torch.nn.functional.pad(mask, (prefix_len, 0), value=True)
    # what is repeated is read where it is, so this is one kernel
    return torch.cat([_true(mask.device).expand(mask.shape[0], prefix_len), mask], dim=1)


def _positions(number: int, device: torch.device) -> Tensor:
    """[number] int64: 0, 1, 2, …, without a kernel; nobody may write into it."""
    return _many_positions(max(1024, 1 << (number - 1).bit_length()), device)[:number]


@functools.cache
def _many_positions(number: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.arange(number, device=device)


@functools.cache
def _true(device: torch.device) -> Tensor:
    """[1, 1] bool."""
    with torch.inference_mode(False):
        return torch.ones(1, 1, dtype=torch.bool, device=device)


def _counted_up_to(prefix_len: int, positions: Tensor) -> Tensor:
    """[1, slots] int64: a prefix 0, 1, 2, … and behind it rows at these positions."""
    return torch.cat([torch.arange(prefix_len, device=positions.device), positions])[None]


def flatten_chain(token_ids: Tensor, prefix_len: int) -> FlatTrees:
    """Lay out consecutive tokens [rows] behind `prefix_len` cached ones: a plain causal block."""
    rows, device = token_ids.numel(), token_ids.device
    slot_positions = torch.arange(prefix_len + rows, device=device)
    position_ids = slot_positions[prefix_len:]
    visible = slot_positions <= position_ids[:, None]
    return FlatTrees(token_ids[None], position_ids[None], visible[None], slot_positions[None], num_places=rows)


def flatten_level(tree: TokenTree, prefix_len: int, num_cached: int | None = None) -> FlatTrees:
    """Lay out a growing tree's last level for the drafter, and levels before it that it has not seen.

    The drafter's cache holds `prefix_len` committed rows, the root among them, and behind them drafted nodes in their
    order.

    Args:
        tree: the tree so far.
        prefix_len: committed rows.
        num_cached: drafted nodes in the cache, whole levels; None: all but those of the last level.
    """
    first = tree.last_level.start if num_cached is None else 1 + num_cached
    rows = tree.num_nodes - first
    num_places, places_rows = 0, 0
    while places_rows < rows:
        num_places += 1
        places_rows += tree.level_sizes[-num_places]
    if num_places == 1 and tree.device.type != "cpu":
        positions = _positions(tree.max_depth + prefix_len, tree.device)[-1:].expand(rows)
    elif num_places == 1:
        positions = torch.full((rows,), tree.max_depth + prefix_len - 1, device=tree.device)
    else:
        positions = tree.depth[first:] + (prefix_len - 1)
    return FlatTrees(
        tree.token_ids[first:][None],
        positions[None],
        _behind_prefix(tree.ancestor_mask[first:, 1:], prefix_len)[None],
        lambda: _counted_up_to(prefix_len, tree.depth[1:] + (prefix_len - 1)),
        num_places,
    )
