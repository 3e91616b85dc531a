"""The `packed` runner: a model whose linear layers multiply with weights laid out for few rows, for CPUs.

A decode step multiplies each weight matrix with a handful of rows. The usual matrix product takes the matrix as it
lies, which costs a pass over two rows nearly twice what one row costs. oneDNN can lay a matrix out once, in blocks as
its kernels read them; then eight rows cost little more than one, which is what a tree needs. It is what
torch.compile does with frozen weights on a CPU, without the minutes of compiling.

Layers that read the same rows, such as those for queries, keys and values, are one matrix and one product.

Over a long context attention is the larger part. Under a mask transformers repeats the keys and values of grouped heads
for every query head in each layer; here the kernel is told that they are grouped, with the same result to the last bit.

The model itself is not changed. The packed one is a second set of module objects around the same parameters, with a
copy of each matrix, so it takes up as much memory again. The next generation takes it too, unless weights were changed.
"""

from __future__ import annotations

import platform
from collections.abc import Hashable, Sequence
from typing import Any, final

import psutil
import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.pytorch_utils import Conv1D

from dynatree_core.cache.base import KeyValueCache
from dynatree_core.models.architectures import attention_layout
from dynatree_core.models.state import is_plain, is_untouched
from dynatree_core.models.student import RestrictedHead
from dynatree_core.models.twin import twin_of
from dynatree_core.runners.base import Kept, PassOutput, Rows, Runner, kept_copy
from dynatree_core.runners.eager import EagerRunner
from dynatree_core.runners.together import RaggedLane, ragged_lanes
from dynatree_core.tree.flatten import FlatTrees

__all__ = ["MAX_SHARE_OF_MEMORY", "PackedRunner", "can_pack", "packed_bytes"]

# families that make their keys of what is cached, so that attention cannot see whose they are
MAKES_KEYS_LATER = ("deepseek_v3",)
ATTENTION = "dynatree_grouped"  # under which transformers knows grouped_attention

# of the memory that is free, what the copies of a model's matrices may take up where nobody asked for them
MAX_SHARE_OF_MEMORY = 0.25

# layers of one module that read the same rows, by their names in transformers. Names alone decide nothing: layers get
# their share of a product only for the very rows that it was computed for
READ_THE_SAME = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")

# rows that the layout is chosen for; measured with 1, 8 and 16, which is as good, and better than 1 for any number
ROWS_HINT = 8


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """What transformers' "sdpa" computes, without repeating the keys and values of grouped heads.

    Args:
        module: the attention layer.
        query: [lanes, heads, rows, head_dim]
        key, value: [lanes, key heads, slots, head_dim]; in a ragged pass, whose rows are in one lane, the sequences'
            own ones are asked for.
        attention_mask: [lanes, 1, rows, slots] bool; anything else is left to transformers.
        dropout, scaling: of the layer.
        others: what some families pass on besides.

    Returns:
        [lanes, rows, heads, head_dim], and no attention weights.
    """
    lanes = ragged_lanes(key)
    if lanes is not None:
        assert attention_mask is not None, "a ragged pass has a mask"
        return _by_lane(module, query, lanes, attention_mask, dropout=dropout, scaling=scaling, **others), None
    unusual = others.get("position_bias"), others.get("softcap")
    if attention_mask is None or any(other is not None for other in unusual):
        usual: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
        )
        return usual
    seen = nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling, enable_gqa=True
    )
    return seen.transpose(1, 2).contiguous(), None


def _by_lane(
    module: nn.Module, query: Tensor, lanes: Sequence[RaggedLane], attention_mask: Tensor, **others: Any
) -> Tensor:
    """Attention of each sequence's rows over its own slots: [1, all rows, heads, head_dim]."""
    seen = []
    num_rows = [lane.num_rows for lane in lanes]
    rows, masks = (torch.split_with_sizes(of, num_rows, dim=2) for of in (query, attention_mask))
    for lane, own, mask in zip(lanes, rows, masks, strict=True):
        own_mask = mask[..., : lane.keys.shape[2]]
        seen.append(grouped_attention(module, own, lane.keys, lane.values, own_mask, **others)[0])
    return torch.cat(seen, dim=1)


AttentionInterface.register(ATTENTION, grouped_attention)


class _Product:
    """The packed copy of the matrices of layers, one below the other, and their product with the last rows."""

    def __init__(self, layers: Sequence[Any]) -> None:
        matrices = [layer.weight.t() if type(layer) is Conv1D else layer.weight for layer in layers]
        self.num_outputs = [matrix.shape[0] for matrix in matrices]
        matrix = torch.cat(matrices) if len(layers) > 1 else matrices[0].contiguous()  # [outputs, inputs]
        self.packed = torch.ops.mkldnn._reorder_linear_weight(matrix, ROWS_HINT)  # opaque to everything but oneDNN
        self.bias = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers])
        # one tuple, so that threads never see the rows of one pass with the product of another
        self._last: tuple[Tensor, tuple[Tensor, ...]] | None = None

    def of(self, rows: Tensor, layer: int) -> Tensor:
        """The product of rows [..., inputs] with one layer's matrix: computed for all when the first of them asks."""
        if len(self.num_outputs) == 1:
            return self._computed(rows)
        last = self._last
        if last is None or last[0] is not rows:
            last = self._last = rows, torch.split_with_sizes(self._computed(rows), self.num_outputs, dim=-1)
        if layer == len(self.num_outputs) - 1:
            self._last = None  # all have it
        return last[1][layer]

    def _computed(self, rows: Tensor) -> Tensor:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(rows, self.packed, self.bias, "none", [], "")
        return product


class _Packed(nn.Module):
    """A linear layer whose matrix is in a packed product."""

    product: _Product
    place: int  # among the layers of the product

    def forward(self, rows: Tensor) -> Tensor:
        if rows.dtype != self.product.packed.dtype or torch.is_autocast_enabled("cpu"):
            plain: Tensor = super().forward(rows)
            return plain
        return self.product.of(rows, self.place)


class _PackedLinear(_Packed, nn.Linear):
    pass


class _PackedHead(_Packed, RestrictedHead):
    pass


class _PackedConv1D(_Packed, Conv1D):  # GPT-2's linear layer
    pass


_KINDS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: _PackedLinear,
    RestrictedHead: _PackedHead,
    Conv1D: _PackedConv1D,
}


@final
class PackedRunner(Runner):
    """Calls a packed copy of a model.

    Args:
        model: the model, which is copied: a second for each four gigabytes.

    Attributes:
        twin: the copy.

    Raises:
        ParameterError: something on the model cannot be copied.
    """

    name = "packed"

    def __init__(self, model: nn.Module) -> None:
        self.twin = _packed_copy(model)
        self._passes = EagerRunner(self.twin, attention_layout(model))
        self.num_layers = self._passes.num_layers

    @classmethod
    def reason_against(cls, model: nn.Module) -> str | None:
        if can_pack(model):
            return None
        return (
            "is for models on an x86-64 CPU in float32, or bfloat16 where it multiplies in that, got "
            f"{model.dtype} on {model.device}, {platform.machine()}"
        )

    @classmethod
    def preference(cls, model: nn.Module, kept: Kept) -> int:
        """2 for a model that is as transformers made it, if its copies leave most of the free memory free, else 0."""
        if not is_untouched(model):
            return 0
        has_room = packed_bytes(model) < MAX_SHARE_OF_MEMORY * psutil.virtual_memory().available
        return 2 if cls.name in kept or has_room else 0

    @classmethod
    def make(cls, model: nn.Module, kept: Kept) -> PackedRunner:
        """The runner of a model, with the copy of an earlier generation where it still holds (`kept_copy`)."""
        runner: PackedRunner = kept_copy(cls.name, kept, model, lambda: cls(model))
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
        return self._passes.forward(flat, cache, hidden=hidden, last_row_only=last_row_only)

    def forward_together(
        self, parts: Sequence[Rows], *, hidden: bool = False, last_row_only: bool = False
    ) -> list[PassOutput]:
        return self._passes.forward_together(
            parts, hidden=hidden, last_row_only=last_row_only, is_ragged=self.is_ragged
        )

    @property
    def is_ragged(self) -> bool:
        """Whether passes over several sequences have no padding."""
        config: Any = self.twin.config
        return config._attn_implementation == ATTENTION and config.model_type not in MAKES_KEYS_LATER


def can_pack(model: nn.Module) -> bool:
    """Whether a model has linear layers that oneDNN packs here.

    That is on an x86-64 CPU, for others have not been tried, with plain tensors in float32 or, where the CPU multiplies
    in it, bfloat16.
    """
    device: torch.device = model.device  # type: ignore[assignment]
    onednn: Any = torch.backends.mkldnn  # torch leaves it unannotated
    is_known = platform.machine().lower() in ("x86_64", "amd64")
    has_kernels = is_known and onednn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    is_here = all(_is_here(tensor) for tensor in (*model.parameters(), *model.buffers()))
    return device.type == "cpu" and has_kernels and is_here and any(map(_is_packable, model.modules()))


def _is_here(tensor: Tensor) -> bool:
    """Whether it is plain numbers in this machine's memory."""
    return is_plain(tensor) and tensor.device.type == "cpu" and tensor.layout == torch.strided


def packed_bytes(model: nn.Module) -> int:
    """What the packed copies of a model's matrices take up."""
    layers: list[Any] = [layer for layer in model.modules() if _is_packable(layer)]
    return sum(layer.weight.numel() * layer.weight.element_size() for layer in layers)


@torch.no_grad()
def _packed_copy(model: nn.Module) -> nn.Module:
    tensors = (*model.parameters(), *model.buffers())
    twin: Any = twin_of(model, tensors, "the packed runner", "use runner='eager'")
    # families that do not look attention up by its name, such as Falcon, know "sdpa" only
    if twin.config._attn_implementation == "sdpa" and twin._supports_attention_backend:
        twin.config._attn_implementation = ATTENTION
    for layers in _products(twin):
        product = _Product(layers)
        for place, layer in enumerate(layers):
            layer.__class__ = _KINDS[type(layer)]
            layer.product, layer.place = product, place
    packed: nn.Module = twin
    return packed


def _products(model: nn.Module) -> list[list[Any]]:
    """The layers that can be packed, together those that read the same rows; one of two places belongs to the first."""
    together: list[list[Any]] = []
    done: set[int] = set()
    for part in model.modules():
        for names in READ_THE_SAME:
            layers = [getattr(part, name, None) for name in names]
            own = {id(layer) for layer in layers}
            are_alike = all(map(_is_packable, layers)) and len(set(map(_kind, layers))) == 1
            if are_alike and len(own) == len(layers) and done.isdisjoint(own):
                together.append(layers)
                done |= own
    return together + [[part] for part in model.modules() if _is_packable(part) and id(part) not in done]


def _kind(layer: Any) -> Hashable:
    """What layers must have in common to be one product."""
    return type(layer), layer.weight.shape[-1], layer.weight.dtype, layer.bias is None


def _is_packable(layer: Any) -> bool:
    if type(layer) not in _KINDS:  # a class of its own may multiply in its own way
        return False
    dtype: torch.dtype = layer.weight.dtype
    has_bfloat16 = dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float32 or has_bfloat16
