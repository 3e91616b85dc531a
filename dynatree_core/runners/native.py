"""The `native` runner: a model put together from the fused operators of `dynatree_core.ops`, for CPUs.

A decode step of a small model is some seven hundred small operators with Python between them, and the matrices, which
are all that has to be read, are half of its time. Here all layers are one call, and a layer is five operators: norm and
the product for queries, keys and values; rotary embedding and the write into the cache; attention; the product behind
it with the residual; norm and MLP, or a mixture of experts. Each reads its weights once, in the bits that they were
published in, for any number of rows.

A row's bits depend on its text alone. Every sum has one order, whatever stands in the other rows, and a row visits the
slots that it sees in the order of its text, not of the tree (`dynatree_core.ops.signature`). So a tree's logits equal
those of plain decoding on this runner bit for bit: rounding decides nothing, and `exact` costs nothing.

What a model consists of says its blueprint (`dynatree_core.models.blueprint`). A model without one is left to others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, final

import psutil
import torch
from torch import Tensor, nn

from dynatree_core import ops
from dynatree_core.cache.base import KeyValueCache
from dynatree_core.errors import ForwardPassError
from dynatree_core.models.blueprint import Blueprint, Layer, Mixture, NoBlueprintError, blueprint_of
from dynatree_core.models.state import is_untouched
from dynatree_core.models.stored import StoredModel, pack_narrowest
from dynatree_core.ops import PackedMatrix
from dynatree_core.runners.altered import altered_part
from dynatree_core.runners.base import Kept, PassOutput, Rows, Runner, kept_copy
from dynatree_core.runners.workspace import Angles, Placed, Size, Workspace, joined
from dynatree_core.tree.flatten import FlatTrees

__all__ = ["NativeRunner", "Twin"]

# of the memory that is free, what packed copies may take up where nobody asked for them
MAX_SHARE_OF_MEMORY = 0.25


@final
class NativeRunner(Runner):
    """Computes a model's passes by operators of our own.

    Args:
        model: the model; its matrices are copied, in 16 bits each where these hold the same numbers.

    Raises:
        NoBlueprintError: the model is not known.
    """

    name = "native"
    takes_any_cache = False
    has_equal_bits = True
    gives_totals = True

    def __init__(self, model: nn.Module) -> None:
        if isinstance(model, StoredModel):
            self.twin = Twin(model.blueprint)
            return
        with torch.no_grad():
            self.twin = Twin(blueprint_of(model).packed(pack_narrowest))

    @classmethod
    def reason_against(cls, model: nn.Module) -> str | None:
        reason = ops.reason_unavailable()
        if reason is not None:
            return f"needs its library, which is not usable here: {reason}"
        if isinstance(model, StoredModel):
            return None
        device: torch.device = model.device  # type: ignore[assignment]
        if device.type != "cpu" or model.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
            autocast = " under autocast" if torch.is_autocast_enabled("cpu") else ""
            return f"is for models on a CPU that compute in float32, got {model.dtype} on {device}{autocast}"
        if not is_untouched(model):
            return "is for models as transformers made them, got one with code of somebody else's in it"
        try:
            blueprint = blueprint_of(model)
        except NoBlueprintError as error:
            return f"knows no model whose {error}"
        altered = altered_part(model)
        if altered is not None:
            return f"is for models as transformers makes them of their configuration, got one whose {altered}"
        dtypes = {tensor.dtype for tensor in (*model.parameters(), *_tensors(blueprint))}
        if dtypes != {torch.float32}:
            return f"is for models whose weights are all float32, got {', '.join(sorted(map(str, dtypes)))}"
        return None

    @classmethod
    def preference(cls, model: nn.Module, kept: Kept) -> int:
        """3 for a model that is kept packed anyway, or whose copies leave most of the free memory free, else 0."""
        if isinstance(model, StoredModel) or cls.name in kept:
            return 3
        num_bytes = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
        return 3 if num_bytes < MAX_SHARE_OF_MEMORY * psutil.virtual_memory().available else 0

    @classmethod
    def make(cls, model: nn.Module, kept: Kept) -> NativeRunner:
        """The runner of a model, with the packed matrices of an earlier generation where they hold (`kept_copy`)."""
        runner: NativeRunner = kept_copy(cls.name, kept, model, lambda: cls(model))
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
        """One pass over the rows of several sequences. Each has the bits that it has alone."""
        if torch.is_autocast_enabled("cpu"):
            raise ForwardPassError(
                "the native runner computes in float32, got a pass under torch.autocast; leave that, or give "
                "runner='eager'"
            )
        return self.twin.forward_together(parts, hidden=hidden, last_row_only=last_row_only)


class Twin:
    """A model's passes by operators.

    Args:
        blueprint: what they consist of, with every matrix packed.
    """

    def __init__(self, blueprint: Blueprint) -> None:
        self.blueprint = blueprint
        self._head = _packed(blueprint.head)
        self._dtype = self._head.dtype
        ropes = [layer.rope for layer in blueprint.layers if layer.rope is not None]
        self._angles = {id(rope): Angles(rope, self._dtype) for rope in ropes}
        # one layer of each window, and workspaces with the layers' operators that no pass uses just now
        self._seeing = list({layer.window: layer for layer in blueprint.layers}.values())
        self._spare: list[tuple[Workspace, ops.Recording]] = []
        mixtures = [layer.mlp for layer in blueprint.layers if isinstance(layer.mlp, Mixture)]
        self._experts = {id(mixture): _experts(mixture) for mixture in mixtures}
        # what a cache is told of each layer: heads and their size
        self._keys, self._values = [], []
        for layer in blueprint.layers:
            template = torch.empty(1, layer.num_key_heads, 0, layer.head_dim, dtype=self._dtype)
            self._keys.append(template)
            self._values.append(template)

    def forward(
        self, flat: FlatTrees, cache: KeyValueCache, *, hidden: bool = False, last_row_only: bool = False
    ) -> PassOutput:
        """One pass, as `Runner.forward`. The rows of all lanes are one matrix, one lane below the other.

        Raises:
            CacheError: the cache takes no rows that are written by the pass itself, or has no room.
        """
        return self.forward_together([Rows(flat, cache)], hidden=hidden, last_row_only=last_row_only)[0]

    def forward_together(
        self, parts: Sequence[Rows], *, hidden: bool = False, last_row_only: bool = False
    ) -> list[PassOutput]:
        """One pass over rows of several caches: products see all rows as one matrix, attention those of a cache."""
        placed = [Placed.of(part, self._keys, self._values) for part in parts]
        token_ids = joined([part.flat.token_ids.reshape(-1) for part in parts])
        embedded = self._embedded(token_ids, joined([part.positions for part in placed]))
        rows = self._through_layers(embedded, placed)
        for part in parts:
            part.cache.append(part.flat.num_rows)
        shapes = [part.flat.token_ids.shape for part in parts]
        owned = _split(rows, [lanes * num_rows for lanes, num_rows in shapes])
        wanted = rows
        if last_row_only:
            pairs = zip(owned, shapes, strict=True)
            wanted = joined([own.view(*shape, -1)[:, -1] for own, shape in pairs])
        sizes = [lanes * (1 if last_row_only else num_rows) for lanes, num_rows in shapes]
        # tokens are chosen in float32, so float64 logits' own totals are none that serve
        wants_totals = self._dtype == torch.float32 and any(part.flat.wants_totals for part in parts)
        totals = wanted.new_empty(len(wanted), 3) if wants_totals else None
        logits = _split(self._logits(wanted, totals), sizes)
        found = [one.view(lanes, -1, self._head.num_outputs) for one, (lanes, _) in zip(logits, shapes, strict=True)]
        nothing = [None] * len(parts)
        all_totals: Sequence[Tensor | None] = nothing
        if totals is not None:
            owned_totals = zip(_split(totals, sizes), shapes, strict=True)
            all_totals = [one.view(lanes, -1, 3) for one, (lanes, _) in owned_totals]
        all_hidden: Sequence[Tensor | None] = nothing
        if hidden:
            norm = self.blueprint.final_norm
            normed = _split(rows if norm is None else ops.norm(rows, norm), [len(own) for own in owned])
            all_hidden = [own.view(*shape, -1) for own, shape in zip(normed, shapes, strict=True)]
        return [PassOutput(*one) for one in zip(found, all_hidden, all_totals, strict=True)]

    def _embedded(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        """[rows, hidden]: what goes into the first layer."""
        plan = self.blueprint
        if isinstance(plan.embedding, PackedMatrix):
            rows = ops.lookup(plan.embedding, token_ids)
        else:
            rows = nn.functional.embedding(token_ids, plan.embedding).to(self._dtype)
        if plan.embedding_scale != 1.0:
            rows = rows * plan.embedding_scale
        if plan.positions is not None:
            rows = rows + nn.functional.embedding(positions + plan.position_offset, plan.positions)
        return rows.contiguous()

    def _through_layers(self, rows: Tensor, placed: Sequence[Placed]) -> Tensor:
        """[rows, hidden] through all layers, whose operators are written down once and then computed in one call."""
        visible = [part.visible(layer.window) for part in placed for layer in self._seeing]
        size = Size(len(rows), sum(part.num_lanes for part in placed), sum(len(seen[-1]) for seen in visible))
        if not ops.can_record(self._dtype):
            work = Workspace(self.blueprint, self._angles, self._dtype, size)
            work.load(rows, placed)
            self._add_layers(work)
            return work.rows
        with self._recorded(size) as (work, recording):
            work.load(rows, placed)
            recording.run(len(rows))
            work.release()
            return work.rows[: len(rows)].clone()

    @contextmanager
    def _recorded(self, size: Size) -> Iterator[tuple[Workspace, ops.Recording]]:
        """A workspace of at least this size that no other thread uses, and the layers' operators for it."""
        try:
            spare = self._spare.pop()
        except IndexError:  # there is none, or another thread was quicker
            spare = self._recording_for(size.rounded())
        if not spare[0].size.holds(size):
            spare = self._recording_for(size.joined(spare[0].size).rounded())
        yield spare
        self._spare.append(spare)

    def _recording_for(self, size: Size) -> tuple[Workspace, ops.Recording]:
        with torch.inference_mode(False):  # so that passes in and outside of that mode may write into it
            work = Workspace(self.blueprint, self._angles, self._dtype, size)
        with ops.recorded() as recording:
            self._add_layers(work)
        return work, recording

    def _add_layers(self, work: Workspace) -> None:
        """All layers' operators, over the rows of a workspace."""
        for index, layer in enumerate(self.blueprint.layers):
            slabs, visible = work.slabs[index], work.visible[layer.window]
            fused, queries, seen = work.fused(layer), work.queries(layer), work.seen(layer)
            ops.linear(work.rows, _packed(layer.qkv), norm=layer.attention_norm, out=fused)
            ops.rope_write(
                fused,
                slabs,
                work.lanes,
                work.slots,
                num_heads=layer.num_heads,
                rotary=None if layer.rope is None else work.rotary[id(layer.rope)],
                query_norm=layer.query_norm,
                key_norm=layer.key_norm,
                clip=layer.clip,
                growth=None if layer.query_growth is None else work.growth[layer.query_growth],
                out=queries,
            )
            ops.tree_attention(
                queries, slabs, visible, scale=layer.scale, soft_cap=layer.softcap, sinks=layer.sinks, out=seen
            )
            ops.linear(
                seen,
                _packed(layer.output),
                after=layer.attention_post_norm,
                residual=work.rows,
                scale=layer.residual_scale,
                out=work.mixed,
            )
            self._add_mlp(layer, work)

    def _add_mlp(self, layer: Layer, work: Workspace) -> None:
        """What stands behind attention, one block or a mixture of them."""
        rows, block = work.rows if layer.is_parallel else work.mixed, layer.mlp
        if isinstance(block, Mixture):
            ops.experts(rows, self._experts[id(block)], norm=layer.mlp_norm, residual=work.mixed, out=work.rows)
            return
        ops.mlp(
            rows,
            _packed(block.up),
            _packed(block.down),
            activation=block.activation,
            norm=layer.mlp_norm,
            after=layer.mlp_post_norm,
            residual=work.mixed,
            scale=layer.residual_scale,
            out=work.rows,
        )

    def _logits(self, rows: Tensor, totals: Tensor | None) -> Tensor:
        """[rows, vocab]; their totals are written into what is given for them."""
        plan = self.blueprint
        return ops.linear(
            rows,
            self._head,
            norm=plan.final_norm,
            scale=plan.logit_scale,
            soft_cap=plan.logit_softcap,
            totals=totals,
        )


def _split(rows: Tensor, sizes: Sequence[int]) -> Sequence[Tensor]:
    return [rows] if len(sizes) == 1 else torch.split_with_sizes(rows, list(sizes))


def _packed(matrix: Any) -> PackedMatrix:
    assert isinstance(matrix, PackedMatrix), "a twin is made from a packed blueprint"
    return matrix


def _experts(mixture: Mixture) -> ops.Experts:
    return ops.Experts(
        _packed(mixture.router),
        tuple(_packed(expert.up) for expert in mixture.experts),
        tuple(_packed(expert.down) for expert in mixture.experts),
        mixture.experts[0].activation,
        num_chosen=mixture.num_chosen,
        adds_up=mixture.adds_up,
        has_shared=mixture.has_shared,
    )


def _tensors(blueprint: Blueprint) -> list[Tensor]:
    """The tensors of a blueprint that are no parameters: embeddings and head of a student."""
    head: Any = blueprint.head
    return [tensor for tensor in (blueprint.embedding, *head.parts) if isinstance(tensor, Tensor)]
