"""The cache of StreamingLLM (Xiao et al. 2023): the first tokens, the last ones, and nothing between.

A token sees the first `sinks` tokens of the text and the last `window` tokens, itself among them. Its place, and
theirs, are those inside the cache: sinks stand at 0, 1, …, behind them the window without a gap, and the token itself
never further back than at `sinks + window - 1`. So memory and time of a pass do not grow with the text, and the text
may be longer than the model has positions.

Rotary attention knows only how far two tokens stand apart. Within the window that is the distance in the text,
which moving on does not change; only the sinks come closer. So cached rows stay as they are, and each pass gets
copies of the few sinks' keys, turned to where its rows see them: one copy for each place that the rows of a tree have.

Positions still grow as the window moves on. Whenever they have grown by `step`, all keys of the window are turned back
by that much. It happens between the same two tokens of a text whatever the trees were, since no tree crosses that
point: a pass has the angles that autoregressive decoding has there, and the same output.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from transformers import Cache

from dynatree_core.cache.base import KeyValueCache
from dynatree_core.cache.tree_cache import TreeCache
from dynatree_core.errors import CacheError, ParameterError, UnsupportedModelError
from dynatree_core.models.architectures import attention_layout, max_positions
from dynatree_core.tree.flatten import FlatTrees

__all__ = ["SinkCache", "SinkWindow", "refuse_beside"]

# families whose keys are rotated as the last thing before they are cached, halves against halves, by the cosines
# and sines of base_model.rotary_emb; each was compared with a plain computation (tests/test_sink_cache.py)
ROTARY_FAMILIES = (
    "falcon",
    "gemma",
    "gpt_neox",
    "granite",
    "llama",
    "mistral",
    "mixtral",
    "olmo",
    "olmo2",
    "olmoe",
    "phi",
    "phi3",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "stablelm",
    "starcoder2",
)
# places that the rows of one pass may have, once the window moves: each costs a copy of the sinks
MAX_PLACES = 64


@attrs.frozen
class SinkWindow:
    """What a sink cache keeps."""

    sinks: int  # first tokens of the text
    window: int  # last tokens, the one that looks among them

    def __str__(self) -> str:
        return f"sinks={self.sinks},window={self.window}"

    @classmethod
    def parse(cls, text: str | None) -> SinkWindow | None:
        """Read "sinks=4,window=1024"; None stays None.

        Raises:
            ParameterError: anything else, or numbers that are too small.
        """
        if text is None:
            return None
        pairs = [part.partition("=") for part in text.split(",")] if isinstance(text, str) else []
        found = {name.strip(): value.strip() for name, _, value in pairs}
        if found.keys() != {"sinks", "window"} or len(pairs) != 2 or not all(map(str.isdecimal, found.values())):
            raise ParameterError(f"a cache is written 'sinks=4,window=1024', two numbers, got {text!r}")
        option = cls(int(found["sinks"]), int(found["window"]))
        if option.window < 1:
            raise ParameterError("the window must be at least 1, the token itself, got 0; a usual one is 1024")
        return option

    @property
    def num_tokens(self) -> int:
        """Tokens that a token sees at most."""
        return self.sinks + self.window


def refuse_beside(option: SinkWindow, exact: str | None, positions: Sequence[int] | None) -> None:
    """Refuse what does not go with a cache that moves.

    Args:
        exact: as in `dynatree_core.generate`.
        positions: the prompt's, where they are not those that it has anyway.

    Raises:
        ParameterError: passes of one shape, or other positions.
    """
    if exact is not None or positions is not None:
        came = "position_ids" if exact is None else f"exact={exact!r}"
        raise ParameterError(
            f"with cache='{option}' tokens have places of their own, and passes the shapes that these need, got "
            f"{came} beside it; leave out one of them"
        )


class SinkCache(Cache, KeyValueCache):
    """Sinks and window of one text. It has one lane.

    Its rows are a TreeCache's, in which slot `front + place` holds the row of that place. The copies of the sinks are
    written over the rows that have just left the window, so that a pass sees one block without a gap.

    Args:
        model: whose rotary embedding turns the keys.
        option: how much is kept.
        max_nodes: drafted nodes of one tree at most.

    Raises:
        UnsupportedModelError: the model's keys cannot be turned, or it has windows of its own.
        ParameterError: the model has too few positions.
    """

    def __init__(self, model: nn.Module, option: SinkWindow, max_nodes: int) -> None:
        super().__init__(layers=[])
        _check_model(model)
        self.option = option
        self._rotary: Any = model.base_model.rotary_emb  # type: ignore[union-attr]
        self._step = _step(model, option)
        self._front = option.sinks * min(self._step, MAX_PLACES)  # slots before place 0, for copies
        self._rows = TreeCache(self._front + option.num_tokens + self._step + max_nodes)
        self.capacity = self._rows.capacity  # it does not depend on the text
        self._rows.lengths = [self._front]
        self._num_turned_back = 0  # positions by which the window's keys were turned back so far
        self._sinks: list[tuple[Tensor, Tensor]] = []  # per layer, keys and values [1, heads, sinks, head_dim]
        self._view_start = self._front  # the first slot that the next pass sees
        # cosines and sines that turn the sinks' keys into copies, [places, 1, rotary_dim]; None: no copies
        self._angles: tuple[Tensor, Tensor] | None = None

    @property
    def next_place(self) -> int:
        """Where the next token stands inside the cache; positions count on from there."""
        return self._rows.length - self._front

    @property
    def num_bytes(self) -> int:
        """What its buffers take up by now."""
        return self._rows.num_bytes

    @property
    def length(self) -> int:
        """Committed tokens of the text, whether or not they are still seen."""
        return self._num_turned_back + self.next_place

    @property
    def block_len(self) -> int:
        """Undecided rows behind the committed ones."""
        return self._rows.block_len

    @property
    def max_places(self) -> int:
        """Places that the rows of the next pass may have: up to where the window begins to move, or is turned back."""
        if not self._is_moving:
            return self.option.num_tokens - self.next_place
        left = self.option.num_tokens + self._step - self.next_place
        return min(left or self._step, MAX_PLACES)

    @property
    def _is_moving(self) -> bool:
        return self.next_place >= self.option.num_tokens

    def prepare(self, flat: FlatTrees) -> FlatTrees:
        """Get ready for a pass over these rows.

        Returns:
            The rows with the slots that they see in `update`: copies of the sinks, window, block.

        Raises:
            CacheError: the rows have more places than `max_places`.
        """
        if flat.num_places > self.max_places:
            raise CacheError(
                f"the rows of a pass may stand at {self.max_places} places here, got {flat.num_places}; cut the tree"
            )
        if not self._is_moving:
            self._view_start, self._angles = self._front, None
            return flat
        first = self.next_place - self.option.window + 1  # the first place that the root sees
        places = torch.arange(flat.num_places, device=flat.visible.device)
        # a row at next_place + i sees the sinks as if it stood at the window's end
        turns = places + (self.next_place - self.option.num_tokens + 1)
        self._angles = self._angles_of(turns)
        self._view_start = self._front + first - places.numel() * self.option.sinks
        distance = flat.position_ids[:, :, None] - flat.slot_positions[:, None, :]
        window = (flat.visible & (distance < self.option.window))[:, :, first:]
        owners = places.repeat_interleave(self.option.sinks)  # [copies]: which rows a copy is for
        copies = (flat.position_ids - self.next_place)[:, :, None] == owners
        positions = (turns[:, None] + torch.arange(self.option.sinks, device=turns.device)).flatten()
        return attrs.evolve(
            flat,
            visible=torch.cat([copies, window], dim=-1),
            slot_positions=torch.cat([positions[None], flat.slot_positions[:, first:]], dim=-1),
        )

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append rows to a layer's block, as `TreeCache.update`, and show what `prepare` has said.

        Raises:
            CacheError: the rows do not fit.
        """
        keys, values = self._rows.update(key_states, value_states, layer_idx)
        start = self._view_start
        if self._angles is not None:
            sink_keys, sink_values = self._sinks[layer_idx]
            copies = _turned(sink_keys[:, :, None], *self._angles).flatten(2, 3)  # [1, heads, copies, head_dim]
            end = start + copies.shape[2]
            keys[:, :, start:end] = copies
            values[:, :, start:end] = sink_values.repeat(1, 1, self._angles[0].shape[0], 1)
        return keys[:, :, start:], values[:, :, start:]

    @torch.inference_mode()
    def commit(self, paths: Sequence[Sequence[int]]) -> None:
        """Keep the given rows of the block, as `TreeCache.commit`."""
        self._rows.commit(paths)
        self._move_on()

    def rollback(self) -> None:
        """Forget the block."""
        self._rows.rollback()
        self._move_on()  # a commit may have been broken off before it

    def wipe(self) -> None:
        """Forget the block and clear the slots behind the committed rows, where NaN would go through any mask."""
        self._rows.wipe()
        self._move_on()

    def truncate(self, length: int, lane: int | None = None) -> None:
        """Forget the block, and all committed rows.

        Raises:
            CacheError: some are to stay, of which the window may have left the first ones.
        """
        if length > 0:
            raise CacheError(f"a cache that moves can be emptied only, got {length} rows to stay; decode without it")
        self._rows.rollback()
        self._sinks, self._num_turned_back, self._rows.lengths = [], 0, [self._front]

    def join(self) -> int:
        """Take the lane."""
        return self._rows.join()

    def free(self, lane: int) -> None:
        """Forget all rows, and give the lane back."""
        self._rows.free(lane)
        self.truncate(0)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Rows that the next pass finds before its own; asked by models that are given no positions."""
        return self._rows.get_seq_length(layer_idx) - self._front

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Length and offset of the keys of the next pass; asked by models that are given no 4-D mask."""
        return self.get_seq_length(layer_idx) + query_length, 0

    @torch.inference_mode()
    def _move_on(self) -> None:
        """What is due at this token of the text: put the sinks aside, or turn the window back."""
        if self.next_place == self.option.num_tokens and not self._sinks:
            sinks = slice(self._front, self._front + self.option.sinks)
            layers = zip(self._rows.keys, self._rows.values, strict=True)
            self._sinks = [(keys[:, :, sinks].clone(), values[:, :, sinks].clone()) for keys, values in layers]
        elif self.next_place == self.option.num_tokens + self._step:
            self._turn_back()

    def _turn_back(self) -> None:
        """Move the window's rows `step` places to the front, and turn their keys as far."""
        then = self._sinks, self._num_turned_back + self._step, [self._front + self.option.num_tokens]
        # should this be broken off, the cache is empty, and the session fills it again
        self._sinks, self._num_turned_back, self._rows.lengths = [], 0, [self._front]
        end = self._front + self.option.num_tokens + self._step
        source = slice(end - self.option.window + 1, end)
        target = slice(source.start - self._step, source.stop - self._step)
        cos, sin = self._angles_of(torch.tensor([self._step], device=self._rows.keys[0].device))
        for keys, values in zip(self._rows.keys, self._rows.values, strict=True):
            keys[:, :, target] = _turned(keys[:, :, source], cos[0], -sin[0])
            values[:, :, target] = values[:, :, source].clone()
        self._sinks, self._num_turned_back, self._rows.lengths = then

    def _angles_of(self, turns: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [turns, 1, rotary_dim] that turn a key this many positions on."""
        keys = self._rows.keys[0]
        precise = keys.new_empty(0, dtype=torch.promote_types(keys.dtype, torch.float32))
        cos, sin = self._rotary(precise, turns[None])
        scaling = self._rotary.attention_scaling  # yarn's and longrope's, which the keys have already
        return cos[0, :, None] / scaling, sin[0, :, None] / scaling


def _turned(keys: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Keys [..., head_dim], the rotated first part of which is turned on; the shapes broadcast."""
    rotary_dim = cos.shape[-1]
    turning = keys[..., :rotary_dim].to(cos.dtype)
    first, second = turning.chunk(2, dim=-1)
    turned = (turning * cos + torch.cat([-second, first], dim=-1) * sin).to(keys.dtype)
    rest = keys[..., rotary_dim:].expand(*turned.shape[:-1], -1)
    return torch.cat([turned, rest], dim=-1)


def _step(model: nn.Module, option: SinkWindow) -> int:
    """After how many tokens the window is turned back: a window's length, or what the model has positions for."""
    limit = max_positions(model)
    if limit is None:
        return option.window
    room, needed = limit - option.num_tokens, min(option.window, MAX_PLACES)
    if room < needed:
        raise ParameterError(
            f"sinks and window must leave {needed} of the target's {limit} positions free, for the window to move in, "
            f"got {option.sinks} + {option.window}; make them smaller"
        )
    return min(option.window, room)


def _check_model(model: Any) -> None:
    model_type = model.config.model_type
    reason = None
    if model_type not in ROTARY_FAMILIES:
        reason = f"its positions are not known to move with the cache; known are: {', '.join(ROTARY_FAMILIES)}"
    elif any(attention_layout(model).windows.values()):
        reason = "it has a sliding window of its own"
    if reason is not None:
        raise UnsupportedModelError(
            f"the target ({type(model).__name__}, model type '{model_type}') cannot be decoded with sinks and a "
            f"window: {reason}; leave out cache=..."
        )
