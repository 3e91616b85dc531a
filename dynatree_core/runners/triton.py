"""The `triton` runner: a model put together from the operators of `dynatree_core.ops.triton`, for GPUs.

A decode step of a small model is a thousand small kernels, and recording them in a CUDA graph launches them at once but
leaves as many. Here a layer is six: norm and the product for queries, keys and values; rotary embedding and the write
into the cache; attention; the product behind it with the residual; norm, gate and the activation; the product behind
those with the residual. Families that norm what a part adds have one more for each such norm.

Weights are the module's own parameters: nothing is copied but vectors in 16 bits, which become float32, and a weight
that is changed in place is changed here too.

A pass takes what it has to know as tensors, waits for nothing and has the same shapes for as many rows and slots, so a
CUDA graph can hold it (`Twin.compute`). **No GPU has run it.** The kernels are compiled for GPUs and computed by
Triton's interpreter in tests.

What a model consists of says its blueprint, as for `native`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, final

import attrs
import torch
from torch import Tensor, nn

from dynatree_core.cache.base import KeyValueCache
from dynatree_core.errors import CacheError, ForwardPassError
from dynatree_core.models.blueprint import Blueprint, Layer, Matrix, Mlp, NoBlueprintError, Rope, blueprint_of
from dynatree_core.models.state import is_untouched
from dynatree_core.ops import Slabs
from dynatree_core.ops.triton import reason_unavailable
from dynatree_core.ops.triton.matrix import DTYPES, StackedMatrix
from dynatree_core.ops.triton.visible import visible_of
from dynatree_core.runners.altered import altered_part
from dynatree_core.runners.base import Kept, PassOutput, Rows, Runner, kept_copy
from dynatree_core.tree.flatten import FlatTrees

if TYPE_CHECKING:
    from dynatree_core.ops.triton.operators import TritonOperators

__all__ = ["PassInput", "TritonRunner", "Twin"]


@final
class TritonRunner(Runner):
    """Computes a model's passes by operators of our own on a GPU.

    Args:
        model: the model, whose parameters it shares.

    Raises:
        NoBlueprintError: the model is not known.
    """

    name = "triton"
    takes_any_cache = False

    def __init__(self, model: nn.Module) -> None:
        from dynatree_core.ops.triton.operators import TritonOperators

        self.twin = twin_of(model, TritonOperators())

    @classmethod
    def reason_against(cls, model: nn.Module) -> str | None:
        reason = reason_unavailable()
        if reason is not None:
            return f"needs Triton: {reason}"
        device: torch.device = model.device  # type: ignore[assignment]
        is_interpreted = device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
        if device.type != "cuda" and not is_interpreted:
            return (
                f"is for models on a CUDA GPU, got one on {device}; on a CPU Triton's interpreter computes it, for "
                "tests only, with TRITON_INTERPRET=1 in the environment"
            )
        if torch.is_autocast_enabled(device.type):
            return "computes in the dtypes of the weights, got a model under torch.autocast"
        if not is_untouched(model):
            return "is for models as transformers made them, got one with code of somebody else's in it"
        try:
            _blueprint_of(model)
        except NoBlueprintError as error:
            return f"knows no model whose {error}"
        altered = altered_part(model)
        if altered is not None:
            return f"is for models as transformers makes them of their configuration, got one whose {altered}"
        dtypes = {parameter.dtype for parameter in model.parameters()}
        devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
        if len(dtypes) != 1 or not dtypes <= set(DTYPES) or len(devices) != 1:
            return (
                f"is for models whose weights have one device and one dtype of {', '.join(map(str, DTYPES))}, got "
                f"{', '.join(sorted(map(str, dtypes | devices)))}"
            )
        return None

    @classmethod
    def make(cls, model: nn.Module, kept: Kept) -> TritonRunner:
        runner: TritonRunner = kept_copy(cls.name, kept, model, lambda: cls(model))
        return runner

    def forward(
        self,
        flat: FlatTrees,
        cache: KeyValueCache,
        *,
        hidden: bool = False,
        last_row_only: bool = False,
        is_prompt: bool = False,
    ) -> PassOutput:
        return self.forward_together([Rows(flat, cache)], hidden=hidden, last_row_only=last_row_only)[0]

    def forward_together(
        self, parts: Sequence[Rows], *, hidden: bool = False, last_row_only: bool = False
    ) -> list[PassOutput]:
        """One pass over the rows of several sequences, without padding rows; each sees the cache of its own."""
        if torch.is_autocast_enabled(parts[0].flat.token_ids.device.type):
            raise ForwardPassError(
                "the triton runner computes in the dtypes of the weights, got a pass under torch.autocast; leave that, "
                "or give runner='eager'"
            )
        return self.twin.forward_together(parts, hidden=hidden, last_row_only=last_row_only)


def twin_of(model: nn.Module, operators: TritonOperators) -> Twin:
    """The twin of a model.

    Raises:
        NoBlueprintError: the model is not known.
    """
    blueprint = _blueprint_of(model).mapped(_stacked)
    dtype: torch.dtype = model.dtype  # type: ignore[assignment]
    config: Any = model.config
    if config.model_type.startswith("gemma"):  # transformers rounds the factor to the embeddings' dtype
        scale = float(torch.tensor(blueprint.embedding_scale, dtype=dtype))
        blueprint = attrs.evolve(blueprint, embedding_scale=scale)
    return Twin(blueprint, dtype, operators)


def _blueprint_of(model: nn.Module) -> Blueprint:
    blueprint = blueprint_of(model)
    if not all(isinstance(layer.mlp, Mlp) for layer in blueprint.layers):
        raise NoBlueprintError("layers are mixtures of experts")
    return blueprint


def _stacked(matrix: Matrix) -> StackedMatrix:
    """A matrix without a copy of its weights."""
    bias = matrix.bias if matrix.bias is None or matrix.order is None else matrix.bias[matrix.order]
    order = None if matrix.order is None else matrix.order.to(matrix.parts[0].device, torch.int32)
    return StackedMatrix(matrix.parts, bias, order)


@attrs.frozen(eq=False)
class PassInput:
    """The rows of a pass, those of one sequence below those of the other, and where they belong."""

    token_ids: Tensor  # [rows] int64
    positions: Tensor  # [rows] int64: what the model is told
    lanes: Tensor  # [rows] int32: of all caches, those of the second counting on from those of the first
    slots: Tensor  # [rows] int32: where their keys and values go
    masks: dict[int | None, Tensor]  # by a layer's window: [rows, slots] bool
    slabs: list[Slabs]  # of each layer


class Twin:
    """A model's passes by operators.

    Args:
        blueprint: what they consist of, with every matrix a `StackedMatrix`.
        dtype: of the cache.
        operators: what computes.
    """

    def __init__(self, blueprint: Blueprint, dtype: torch.dtype, operators: TritonOperators) -> None:
        self.blueprint = blueprint
        self._operators = operators
        self._dtype = dtype
        device = blueprint.embedding.device  # type: ignore[union-attr]
        ropes = {id(layer.rope): layer.rope for layer in blueprint.layers if layer.rope is not None}
        self._ropes = {key: attrs.evolve(rope, inv_freq=rope.inv_freq.to(device)) for key, rope in ropes.items()}
        self._windows = {layer.window for layer in blueprint.layers}
        self._growths = {layer.query_growth for layer in blueprint.layers if layer.query_growth is not None}
        self._tables: tuple[Any, Tensor] | None = None  # of the last caches, and what identifies their buffers
        # what a cache is told of each layer: heads and their size
        self._like = [
            torch.empty(1, layer.num_key_heads, 0, layer.head_dim, dtype=dtype, device=device)
            for layer in blueprint.layers
        ]

    def forward_together(
        self, parts: Sequence[Rows], *, hidden: bool = False, last_row_only: bool = False
    ) -> list[PassOutput]:
        """One pass, as `Runner.forward_together`, and over several lanes of a cache.

        Raises:
            CacheError: a cache takes no rows that are written by the pass itself, or has no room.
        """
        given = self._input(parts)
        rows = self.compute(given)
        for part in parts:
            part.cache.append(part.flat.num_rows)
        shapes = [part.flat.token_ids.shape for part in parts]
        owned = torch.split_with_sizes(rows, [lanes * num_rows for lanes, num_rows in shapes])
        wanted = rows
        if last_row_only:
            pairs = zip(owned, shapes, strict=True)
            wanted = torch.cat([own.view(*shape, -1)[:, -1] for own, shape in pairs])
        sizes = [lanes * (1 if last_row_only else num_rows) for lanes, num_rows in shapes]
        logits = torch.split_with_sizes(self.logits_of(wanted), sizes)
        found = [one.view(shape[0], -1, one.shape[1]) for one, shape in zip(logits, shapes, strict=True)]
        if not hidden:
            return [PassOutput(one) for one in found]
        norm = self.blueprint.final_norm
        normed = (rows if norm is None else self._operators.norm(rows, norm)).to(self._dtype)
        split = torch.split_with_sizes(normed, [len(own) for own in owned])
        return [PassOutput(one, own.view(*shape, -1)) for one, own, shape in zip(found, split, shapes, strict=True)]

    def _input(self, parts: Sequence[Rows]) -> PassInput:
        """What the pass over these rows has to know."""
        slots, lanes, num_lanes = [], [], 0
        for part in parts:
            flat, cache = part.flat, part.cache
            if not cache.can_record:
                raise CacheError(
                    f"the triton runner writes its rows into a cache that can_record, got a {type(cache).__name__}; "
                    "use another runner beside it"
                )
            device = flat.token_ids.device
            own_lanes, num_rows = flat.token_ids.shape
            for first in cache.next_slots(num_rows):
                slots.append(torch.arange(first, first + num_rows, dtype=torch.int32, device=device))
            for lane in range(num_lanes, num_lanes + own_lanes):
                lanes.append(torch.full((num_rows,), lane, dtype=torch.int32, device=device))
            num_lanes += own_lanes
            cache.allocate(self._like, self._like)
        told = [_told(part.flat).reshape(-1) for part in parts]
        return PassInput(
            token_ids=torch.cat([part.flat.token_ids.reshape(-1) for part in parts]),
            positions=torch.cat(told),
            lanes=torch.cat(lanes),
            slots=torch.cat(slots),
            masks={window: _mask([part.flat for part in parts], window) for window in self._windows},
            slabs=self._slabs([part.cache.keys for part in parts], [part.cache.values for part in parts]),
        )

    def _slabs(self, keys: Sequence[Sequence[Tensor]], values: Sequence[Sequence[Tensor]]) -> list[Slabs]:
        """Keys and values of each layer in these caches. Their table is copied to the device where they are others."""
        from dynatree_core.ops.triton.operators import slab_table

        tensors = [one for of_cache in (*keys, *values) for one in of_cache]
        state = [(one.data_ptr(), one.shape, one.stride()) for one in tensors]
        by_layer = list(zip(*keys, strict=True)), list(zip(*values, strict=True))
        if self._tables is None or self._tables[0] != state:
            self._tables = state, slab_table(*by_layer).to(tensors[0].device)
        table = self._tables[1]
        return [
            Slabs(layer.num_key_heads, layer.head_dim, layer.head_dim, self._dtype, table[index], *of_layer)
            for index, (layer, *of_layer) in enumerate(zip(self.blueprint.layers, *by_layer, strict=True))
        ]

    def compute(self, given: PassInput) -> Tensor:
        """[rows, hidden] float32: through all layers. Nothing is read by the host."""
        operators = self._operators
        rows = self._embedded(given.token_ids, given.positions)
        visible = {window: visible_of(mask, given.lanes) for window, mask in given.masks.items()}
        angles = {key: self._angles(rope, given.positions) for key, rope in self._ropes.items()}
        growth = {pair: operators.growth(given.positions, *pair) for pair in self._growths}
        for layer, slabs in zip(self.blueprint.layers, given.slabs, strict=True):
            fused = operators.linear(rows, _of(layer.qkv), norm=layer.attention_norm)
            queries = operators.rope_write(
                fused,
                slabs,
                given.lanes,
                given.slots,
                num_heads=layer.num_heads,
                rotary=None if layer.rope is None else angles[id(layer.rope)],
                query_norm=layer.query_norm,
                key_norm=layer.key_norm,
                clip=layer.clip,
                growth=None if layer.query_growth is None else growth[layer.query_growth],
            )
            seen = operators.tree_attention(
                queries, slabs, visible[layer.window], scale=layer.scale, soft_cap=layer.softcap
            )
            mixed = operators.linear(
                seen, _of(layer.output), after=layer.attention_post_norm, residual=rows, scale=layer.residual_scale
            )
            rows = self._through_mlp(layer, rows if layer.is_parallel else mixed, mixed)
        return rows

    def _through_mlp(self, layer: Layer, rows: Tensor, residual: Tensor) -> Tensor:
        assert isinstance(layer.mlp, Mlp), "mixtures of experts are refused"
        return self._operators.mlp(
            rows,
            _of(layer.mlp.up),
            _of(layer.mlp.down),
            activation=layer.mlp.activation,
            norm=layer.mlp_norm,
            after=layer.mlp_post_norm,
            residual=residual,
            scale=layer.residual_scale,
        )

    def _embedded(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        """[rows, hidden] float32: what goes into the first layer."""
        plan = self.blueprint
        assert isinstance(plan.embedding, Tensor)
        rows = nn.functional.embedding(token_ids, plan.embedding).float()
        if plan.embedding_scale != 1.0:
            rows = rows * plan.embedding_scale
        if plan.positions is not None:
            rows = rows + nn.functional.embedding(positions + plan.position_offset, plan.positions)
        return rows.contiguous()

    def _angles(self, rope: Rope, positions: Tensor) -> Any:
        return self._operators.angles(positions, rope.inv_freq, rope.scaling, rope.is_interleaved)

    def logits_of(self, rows: Tensor) -> Tensor:
        """[rows, vocab] float32"""
        plan = self.blueprint
        return self._operators.linear(
            rows, _of(plan.head), norm=plan.final_norm, scale=plan.logit_scale, soft_cap=plan.logit_softcap
        )


def _of(matrix: Any) -> StackedMatrix:
    assert isinstance(matrix, StackedMatrix), "a twin is made from a blueprint of stacked matrices"
    return matrix


def _told(flat: FlatTrees) -> Tensor:
    return flat.position_ids if flat.model_positions is None else flat.model_positions


def _mask(flats: Sequence[FlatTrees], window: int | None) -> Tensor:
    """[rows of all, slots of the longest] bool: what each row sees within a window."""
    width = max(flat.visible.shape[-1] for flat in flats)
    masks = []
    for flat in flats:
        mask = flat.visible
        if window is not None:
            mask = mask & (flat.position_ids[:, :, None] - flat.slot_positions[:, None, :] < window)
        masks.append(nn.functional.pad(mask.flatten(0, 1), (0, width - mask.shape[-1])))
    return torch.cat(masks)
