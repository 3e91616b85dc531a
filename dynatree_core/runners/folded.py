"""Attention with grouped heads folded into rows, and a bias that is made once a pass: for CUDA.

What transformers' "sdpa" does with a tree's boolean mask costs a GPU more than the attention itself. In every layer the
mask becomes a bias (three to five kernels), and the keys and values of grouped heads are copied for each query head.
torch then chooses a kernel, and where it takes cuDNN's, a plan is built for every number of slots, which a growing text
changes in every pass.

Here the heads that share keys are more rows of one head: [lanes, heads, rows, head_dim] is the memory of
[lanes, key heads, group * rows, head_dim]. The bias is [lanes, 1, group * rows, slots], made by `AttentionLayout` once
a pass in the dtype of the queries. The kernel is named: torch's memory-efficient attention, which has no plans. No
setting of the process is changed for it.

The model is not changed: a second set of module objects around the same tensors asks for this attention by its name.
"""

from __future__ import annotations

import warnings
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from dynatree_core.errors import ForwardPassError, ParameterError
from dynatree_core.models.architectures import AttentionLayout, attention_layout
from dynatree_core.models.state import is_untouched, says_replayable
from dynatree_core.models.twin import twin_of

__all__ = ["ATTENTION", "Folded", "folded", "folded_attention", "reason_against_folding"]

ATTENTION = "dynatree_folded"  # under which transformers knows it
# elements of a row that the memory-efficient kernel reads at once, by dtype; float64 it does not know
_ALIGNED = {torch.float16: 8, torch.bfloat16: 8, torch.float32: 4}
_TERMS = ("softcap", "position_bias", "s_aux")  # that families add to scores, and that this attention leaves out


def folded_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """What transformers' "sdpa" computes, with grouped heads as rows.

    Args:
        module: the attention layer.
        query: [lanes, heads, rows, head_dim]
        key: [lanes, key heads, slots, head_dim]
        value: [lanes, key heads, slots, any size]
        attention_mask: [lanes, 1, group * rows, slots], as `AttentionLayout` makes it with a group; what is no bias is
            left to transformers.
        dropout, scaling: of the layer.
        others: what some families pass on besides.

    Returns:
        [lanes, rows, heads, size of values], and no attention weights.

    Raises:
        ForwardPassError: the layer's heads are not grouped as the bias says, or its scores have a further term.
    """
    if attention_mask is None or not attention_mask.is_floating_point():
        usual: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
        )
        return usual
    terms = [name for name in _TERMS if others.get(name) is not None]
    if terms or dropout:
        raise ForwardPassError(
            f"folded attention adds a mask to scores and nothing else, got {' and '.join(terms) or 'dropout'}; load "
            "the model with attn_implementation='eager'"
        )
    lanes, heads, rows, head_dim = query.shape
    group = heads // key.shape[1]
    if attention_mask.shape[-2] != group * rows:
        raise ForwardPassError(
            f"the bias must have a row for each of {group} heads that share keys and {rows} rows, got "
            f"{attention_mask.shape[-2]} rows; load the model with attn_implementation='eager'"
        )
    folded_rows = query.reshape(lanes, key.shape[1], group * rows, head_dim)
    seen = _attended(folded_rows, key, value, attention_mask, scaling)
    if group == 1:
        return seen.transpose(1, 2).contiguous(), None
    by_head = seen.view(lanes, key.shape[1], group, rows, seen.shape[-1])
    return by_head.permute(0, 3, 1, 2, 4).flatten(2, 3), None


def _attended(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scaling: float | None) -> Tensor:
    """[lanes, key heads, rows, size of values]"""
    aligned = _ALIGNED.get(query.dtype)
    if query.device.type != "cuda" or aligned is None or query.shape[-1] % aligned or value.shape[-1] % aligned:
        return nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scaling)
    each_head = bias.expand(*query.shape[:3], bias.shape[-1])
    seen: Tensor = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, each_head, False, scale=scaling
    )[0]
    return seen


AttentionInterface.register(ATTENTION, folded_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)  # for who calls such a model with a mask of another kind


@attrs.frozen(eq=False)
class Folded:
    """A model with this attention."""

    model: nn.Module  # second module objects around the tensors of the model that it was made of
    layout: AttentionLayout


def reason_against_folding(model: nn.Module) -> str | None:
    """Why a model keeps its own attention, such as "its attention is 'eager'"; None: it can have this one."""
    config: Any = model.config
    if config._attn_implementation != "sdpa":
        return f"its attention is '{config._attn_implementation}'"
    if not getattr(model, "_supports_attention_backend", False):
        return "its family does not look attention up by its name"
    if not is_untouched(model, says_replayable):
        return "a part of it has code of its own"
    if len(_groups(model)) > 1:
        return "its layers group heads differently"
    return None


def folded(model: nn.Module) -> Folded | None:
    """A model with this attention; None where it cannot be had, with a warning where it should be.

    Args:
        model: the model, for which there is no reason against it; it is not changed.
    """
    tensors = (*model.parameters(), *model.buffers())
    try:
        twin: Any = twin_of(model, tensors, "folded attention", "load it with attn_implementation='eager'")
    except ParameterError as error:
        warnings.warn(f"passes are slower than they could be: {error}", RuntimeWarning, stacklevel=2)
        return None
    twin.config._attn_implementation = ATTENTION
    [group] = _groups(model)
    return Folded(twin, attrs.evolve(attention_layout(model), group=group))


def _groups(model: nn.Module) -> set[int]:
    """How many heads share keys, by the layers that say so."""
    parts: list[Any] = [part for part in model.modules() if hasattr(part, "num_key_value_groups")]
    return {int(part.num_key_value_groups) for part in parts} or {1}
