"""PEFT's adapters: the model inside PEFT's wrapper, and a model without its adapters, which shares its weights.

PEFT turns adapters off by a flag on each of its layers, which every user of the model sees, in other threads too. So no
flag is touched here. The model without adapters is a second set of module objects around the same parameters, in which
each of PEFT's layers has given its place to the layer that it wraps.
"""

from __future__ import annotations

import importlib
import sys
import threading
import weakref
from collections.abc import Hashable, Iterator
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from dynatree_core.errors import ParameterError
from dynatree_core.models.state import state_of
from dynatree_core.models.twin import twin_of

__all__ = ["adapters_of_rows", "inside_peft_wrapper", "is_peft_wrapper", "without_adapters"]


@attrs.frozen(eq=False)
class _Entry:
    """A model without its adapters, and the state of the model that it was made of (`state_of`)."""

    twin: nn.Module
    state: Hashable


_entries: weakref.WeakKeyDictionary[nn.Module, _Entry] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def is_peft_wrapper(model: object) -> bool:
    """Whether a module is a wrapper of PEFT's: `PeftModel` or `PeftMixedModel`."""
    if "peft" not in sys.modules:  # then nobody can have made one
        return False
    peft: Any = importlib.import_module("peft")
    return isinstance(model, peft.PeftModel | peft.PeftMixedModel)


def inside_peft_wrapper(model: Any) -> nn.Module:
    """The model that PEFT's wrapper holds, with the adapters in its layers: also where all adapters were deleted."""
    tuners: Any = importlib.import_module("peft.tuners.tuners_utils")
    held = model.base_model  # a learned prompt has no layers to put anything in, so there it is the model itself
    inside: nn.Module = held.model if isinstance(held, tuners.BaseTuner) else held
    return inside


def adapters_of_rows(model: nn.Module) -> list[str] | None:
    """The adapter of each row of the batch, inside a PEFT generate() with `adapter_names`; None outside of one."""
    if "peft" not in sys.modules:
        return None
    # PEFT hands them to its layers by a hook on each, for as long as the call lasts
    hooks: Iterator[Any] = (hook for part in model.modules() for hook in part._forward_pre_hooks.values())
    names = (hook.keywords["adapter_names"] for hook in hooks if "adapter_names" in getattr(hook, "keywords", ()))
    return next(names, None)


def without_adapters(model: nn.Module) -> nn.Module:
    """A model that computes without the PEFT adapters, whether these are enabled at the moment or not.

    It shares the parameters and buffers. It is made at the first call, and made anew after the model was changed;
    sessions and threads share it.

    Raises:
        ParameterError: the model has no adapters, or they are merged into its weights, or they cannot be taken off.
    """
    model = getattr(model, "_orig_mod", model)  # inside torch.compile's wrapper
    with _lock:
        state = state_of(model, reads_weights=False)
        entry = _entries.get(model)
        if entry is None or entry.state != state:
            entry = _Entry(_twin(model), state)
            _entries[model] = entry
        return entry.twin


def _twin(model: nn.Module) -> nn.Module:
    if not any(_is_adapted(part) for part in model.modules()):
        raise ParameterError(
            f"the target must have PEFT adapters that can be taken off, got {type(model).__name__} without any (what "
            "merge_and_unload() returns has none); choose another drafter"
        )
    merged = [name for name, part in model.named_modules() if _is_adapted(part) and getattr(part, "merged", False)]
    if merged:
        raise ParameterError(
            f"the target's adapters must not be merged into its weights, got {len(merged)} layers where they are, the "
            f"first being {merged[0]}; call unmerge_adapter() first, or choose another drafter"
        )
    twin = twin_of(model, _tensors(model), "the drafter without the target's adapters", "choose another drafter")
    _take_off(twin)
    left = [name for name, part in twin.named_modules() if type(part).__module__.startswith("peft.")]
    if left:
        raise ParameterError(
            "the target's adapters must each wrap a layer of the model, got "
            f"{type(twin.get_submodule(left[0])).__name__} at {left[0]}, which does not, or is in use by another "
            "thread; choose another drafter"
        )
    return twin


def _take_off(module: nn.Module) -> None:
    """Replace each adapter layer below a module by the layer that it wraps."""
    for name, child in [*module.named_children()]:
        base = child
        while _is_adapted(base):
            wrapped: Any = base
            base = wrapped.get_base_layer() if hasattr(base, "base_layer") else wrapped.original_module
        if base is not child:
            setattr(module, name, base)
        _take_off(base)


def _is_adapted(part: nn.Module) -> bool:
    """Whether a module is a layer of PEFT's that wraps another layer."""
    if "peft" not in sys.modules:  # then nobody can have made one
        return False
    layers: Any = importlib.import_module("peft.tuners.tuners_utils")
    wrappers: Any = importlib.import_module("peft.utils.other")
    is_layer = isinstance(part, layers.BaseTunerLayer) and hasattr(part, "base_layer")
    return is_layer or isinstance(part, wrappers.AuxiliaryTrainingWrapper)


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()
    for part in model.modules():
        yield from (value for value in vars(part).values() if isinstance(value, torch.Tensor))
