"""Caches of transformers, as callers of generate() give them: rows taken over from one, and rows left in one.

generate() begins with the rows of the caller's cache and leaves all rows but that of the last token in it. A session
has a cache of its own, so rows are copied in and out. That is right for caches that keep keys and values as they are;
one that rounds them, drops them or keeps them elsewhere is refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer

from dynatree_core.cache.tree_cache import TreeCache
from dynatree_core.errors import ParameterError

__all__ = ["check_kept_as_is", "leave_rows", "take_rows"]

_KINDS = (DynamicCache, StaticCache)
_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer)
_ADVICE = "give a DynamicCache or a StaticCache, or none, or decode without custom_generate"


def check_kept_as_is(cache: Any) -> None:
    """Refuse a cache that is not known to keep every row as the model made it.

    Raises:
        ParameterError: naming what it is.
    """
    kind = type(cache)
    if kind not in _KINDS:
        raise ParameterError(
            f"tree decoding takes over a cache that keeps keys and values as they are, got a {kind.__name__}, which "
            f"may not; {_ADVICE}"
        )
    if getattr(cache, "offloading", False):
        raise ParameterError(
            f"tree decoding keeps its cache on the model's device, got a {kind.__name__} that is offloaded; {_ADVICE}"
        )
    others = sorted({type(layer).__name__ for layer in cache.layers if type(layer) not in _LAYERS})
    if others:
        raise ParameterError(
            f"tree decoding takes over a cache with layers of plain keys and values, got {', '.join(others)}; {_ADVICE}"
        )


def take_rows(cache: Any, own: TreeCache, num_text: int, dtype: torch.dtype | None) -> int:
    """Begin an empty cache of a session with the rows that a caller's cache holds.

    Args:
        cache: the caller's, for which `check_kept_as_is` is true.
        own: of one batch row.
        num_text: tokens of the text that the rows are the first of.
        dtype: of the model's own rows; None under autocast, where keys and values may have different ones.

    Returns:
        How many rows there are.

    Raises:
        ParameterError: more rows than the text without its last token, rows of several sequences, rows that were
            dropped, or rows of another dtype.
    """
    num_rows = int(cache.get_seq_length())
    if num_rows == 0:
        return 0
    if num_rows >= num_text:
        raise ParameterError(
            f"a cache with rows holds the first tokens of input_ids, and not the last one, got {num_rows} rows and "
            f"{num_text} tokens; give the whole text as input_ids, or crop the cache"
        )
    layers = [layer for layer in cache.layers if layer.is_initialized]
    num_sequences = {layer.keys.shape[0] for layer in layers}
    if num_sequences != {1}:
        raise ParameterError(
            f"a cache with rows must hold those of one sequence, got {', '.join(map(str, num_sequences))}; leave it out"
        )
    kept = [min(layer.keys.shape[2], num_rows) for layer in layers]
    if not all(kept_rows == num_rows for kept_rows in kept):
        raise ParameterError(
            f"a cache with rows must hold all of them, got a sliding window that kept {min(kept)} of {num_rows}, while "
            "trees look at rows in another order; leave the cache out"
        )
    others = {str(rows.dtype) for layer in layers for rows in (layer.keys, layer.values) if rows.dtype != dtype}
    if dtype is not None and others:
        raise ParameterError(
            f"a cache with rows must hold those of this model in {dtype}, got {', '.join(sorted(others))}; make them "
            "with the model as it is now, or leave the cache out"
        )
    own.load([layer.keys for layer in layers], [layer.values for layer in layers], num_rows)
    return num_rows


@torch.no_grad()
def leave_rows(cache: Any, own: TreeCache, num_padding: int) -> None:
    """Append to a caller's cache the rows of a session's that it does not hold yet.

    Args:
        cache: the caller's; it holds the first rows, or none.
        own: the session's, of one batch row.
        num_padding: padding tokens at the prompt's left, for which a session has no rows and generate() has. They are
            zero here: whoever goes on hides them with the same mask.
    """
    num_held = int(cache.get_seq_length())
    keys, values = own.copied()
    for index, (layer_keys, layer_values) in enumerate(zip(keys, values, strict=True)):
        cache.update(*(_padded(rows, num_padding)[:, :, num_held:] for rows in (layer_keys, layer_values)), index)


def _padded(rows: Tensor, num_padding: int) -> Tensor:
    return torch.nn.functional.pad(rows, (0, 0, num_padding, 0))
