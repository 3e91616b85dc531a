"""Passes over the rows of several sequences, each of which has a cache of its own.

*Padded*, the plain way: a lane a sequence, as long as the longest one. Any family can be run so, and it is the oracle.

*Ragged*: the rows stand one behind the other, so that all that looks at one row at a time, such as linear layers, sees
one matrix without padding; attention looks at each sequence by itself. That takes an attention of ours in the model.

Rows and caches of a sequence are the same either way, so sequences may come and go between passes at no cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import attrs
import torch
from torch import Tensor
from transformers import Cache

from dynatree_core.errors import ForwardPassError
from dynatree_core.models.architectures import AttentionLayout
from dynatree_core.runners.base import PassOutput, Rows
from dynatree_core.tree.flatten import FlatTrees

__all__ = ["Joined", "RaggedLane", "padded", "ragged", "ragged_lanes"]

_LANES = "dynatree_lanes"  # the attribute of the keys that a ragged pass hands to attention


@attrs.frozen(eq=False)
class RaggedLane:
    """One sequence in the attention of a ragged pass."""

    num_rows: int  # which it has, behind those of the sequences before it
    keys: Tensor  # [1, key heads, slots, head_dim]
    values: Tensor  # likewise


@attrs.frozen(eq=False)
class Joined:
    """Rows of several sequences as one pass."""

    token_ids: Tensor  # [lanes, rows] int64; ragged: [1, all rows]
    position_ids: Tensor  # likewise
    masks: Any  # as the model's attention wants them
    cache: Cache
    num_rows: tuple[int, ...]  # of each sequence
    is_ragged: bool

    def check(self) -> None:
        """See, behind the pass, that attention has looked at each sequence by itself in every layer.

        Raises:
            ForwardPassError: it has not, so the pass says nothing.
        """
        num_unseen = self.cache.num_unseen if isinstance(self.cache, _RaggedCache) else 0
        if num_unseen:
            raise ForwardPassError(
                f"attention of a ragged pass must ask ragged_lanes in each layer, got {num_unseen} layers that did "
                "not; pad the rows of this model"
            )

    def split(self, output: PassOutput, *, last_row_only: bool) -> list[PassOutput]:
        """What the pass says of each sequence."""
        logits, hidden = self._split(output.logits), None if output.hidden is None else self._split(output.hidden)
        if last_row_only:
            logits = [one[:, -1:] for one in logits]
        return [PassOutput(one, None if hidden is None else hidden[lane]) for lane, one in enumerate(logits)]

    def _split(self, rows: Tensor) -> list[Tensor]:
        if self.is_ragged:
            return list(torch.split_with_sizes(rows, self.num_rows, dim=1))
        return [rows[lane : lane + 1, :num_rows] for lane, num_rows in enumerate(self.num_rows)]


def padded(parts: Sequence[Rows], layout: AttentionLayout, dtype: torch.dtype) -> Joined:
    """A lane a sequence, padded to the longest.

    A padding row sees the lane's first slot, and nothing sees it: its keys and values go nowhere.
    """
    num_rows = tuple(part.flat.num_rows for part in parts)
    num_slots = [part.flat.visible.shape[-1] for part in parts]
    rows, slots = max(num_rows), max(num_slots)
    device = parts[0].flat.token_ids.device
    token_ids = torch.zeros(len(parts), rows, dtype=torch.int64, device=device)
    position_ids = torch.zeros_like(token_ids)
    told = torch.zeros_like(token_ids)
    visible = torch.zeros(len(parts), rows, slots, dtype=torch.bool, device=device)
    slot_positions = torch.zeros(len(parts), slots, dtype=torch.int64, device=device)
    for lane, (part, own_rows, own_slots) in enumerate(zip(parts, num_rows, num_slots, strict=True)):
        token_ids[lane, :own_rows] = part.flat.token_ids[0]
        position_ids[lane, :own_rows] = part.flat.position_ids[0]
        told[lane, :own_rows] = _told(part.flat)[0]
        visible[lane, :own_rows, :own_slots] = part.flat.visible[0]
        visible[lane, own_rows:, 0] = True
        slot_positions[lane, :own_slots] = part.flat.slot_positions[0]
    # a padding row stands where the slot is that it sees, or a window would hide that from it
    is_padding = torch.arange(rows, device=device) >= torch.tensor(num_rows, device=device)[:, None]
    position_ids = torch.where(is_padding, slot_positions[:, :1], position_ids)
    flat = FlatTrees(token_ids, position_ids, visible, slot_positions, num_places=rows)
    cache = _PaddedCache([part.cache for part in parts], num_rows, slots)
    return Joined(token_ids, told, layout.masks(flat, dtype), cache, num_rows, is_ragged=False)


def ragged(parts: Sequence[Rows], layout: AttentionLayout, dtype: torch.dtype) -> Joined:
    """The rows one behind the other, for a model whose attention asks `ragged_lanes`."""
    num_rows = tuple(part.flat.num_rows for part in parts)
    masks: Any = [layout.masks(part.flat, dtype) for part in parts]
    if layout.is_mapping:
        masks = {kind: _stacked([mask[kind] for mask in masks]) for kind in masks[0]}
    else:
        masks = _stacked(masks)
    return Joined(
        torch.cat([part.flat.token_ids for part in parts], dim=1),
        torch.cat([_told(part.flat) for part in parts], dim=1),
        masks,
        _RaggedCache([part.cache for part in parts], num_rows),
        num_rows,
        is_ragged=True,
    )


def ragged_lanes(key: Tensor) -> Sequence[RaggedLane] | None:
    """The sequences of a ragged pass, in the order of their rows; None in any other pass.

    Args:
        key: as the model's layer hands it to attention.
    """
    marked = getattr(key, _LANES, None)
    if marked is None:
        return None
    cache, lanes = marked
    cache.num_unseen -= 1
    return cast("Sequence[RaggedLane]", lanes)


def _told(flat: FlatTrees) -> Tensor:
    return flat.position_ids if flat.model_positions is None else flat.model_positions


def _stacked(masks: Sequence[Tensor]) -> Tensor:
    """Masks [1, 1, rows, slots], one below the other, with as many slots as the longest."""
    slots = max(mask.shape[-1] for mask in masks)
    return torch.cat([torch.nn.functional.pad(mask, (0, slots - mask.shape[-1])) for mask in masks], dim=2)


class _JoinedCache(Cache):
    """What a model sees of several caches."""

    def __init__(self, caches: Sequence[Any], num_rows: Sequence[int]) -> None:
        super().__init__(layers=[])
        self._caches = caches
        self._num_rows = num_rows

    def get_seq_length(self, layer_idx: int = 0) -> int:
        # who is told positions and masks does not need it
        return max(int(cache.get_seq_length(layer_idx)) for cache in self._caches)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.get_seq_length(layer_idx) + query_length, 0


class _RaggedCache(_JoinedCache):
    """Attributes:
    num_unseen: layers that were cached, and whose attention has not asked `ragged_lanes` since.
    """

    num_unseen = 0

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append each sequence's rows to its own cache; attention finds what it may look at by `ragged_lanes`."""
        keys, values = (torch.split_with_sizes(of, self._num_rows, dim=2) for of in (key_states, value_states))
        lanes = [
            RaggedLane(num_rows, *cache.update(own_keys, own_values, layer_idx))
            for cache, num_rows, own_keys, own_values in zip(self._caches, self._num_rows, keys, values, strict=True)
        ]
        marked = key_states.view_as(key_states)  # an object of its own, which holds the attribute
        setattr(marked, _LANES, (self, lanes))
        self.num_unseen += 1
        return marked, value_states


class _PaddedCache(_JoinedCache):
    def __init__(self, caches: Sequence[Any], num_rows: Sequence[int], slots: int) -> None:
        super().__init__(caches, num_rows)
        self._slots = slots

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append each sequence's rows but padding to its own cache, and copy what all may look at side by side."""
        lanes = [
            cache.update(key_states[lane : lane + 1, :, :rows], value_states[lane : lane + 1, :, :rows], layer_idx)
            for lane, (cache, rows) in enumerate(zip(self._caches, self._num_rows, strict=True))
        ]
        return self._beside([keys for keys, _ in lanes]), self._beside([values for _, values in lanes])

    def _beside(self, lanes: Sequence[Tensor]) -> Tensor:
        missing = [self._slots - states.shape[2] for states in lanes]
        if min(missing) < 0:
            raise ForwardPassError(
                f"a cache must show the {self._slots} slots that the mask spans at most, got {-min(missing)} more"
            )
        return torch.cat(
            [torch.nn.functional.pad(states, (0, 0, 0, more)) for states, more in zip(lanes, missing, strict=True)]
        )
