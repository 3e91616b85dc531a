"""Whether a model is as transformers makes it of its configuration, for runners that compute it by a blueprint."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Hashable
from typing import Any

import torch
from torch import nn

from dynatree_core.models.authorship import own_config

__all__ = ["altered_part"]

# attributes of modules that a pass, a mode or a way of loading sets, or that only gradients go by
_NO_SETTINGS = frozenset({"training", "max_seq_len_cached", "name_or_path", "is_gradient_checkpointing", "padding_idx"})

_structures: weakref.WeakKeyDictionary[nn.Module, tuple[Hashable, str | None]] = weakref.WeakKeyDictionary()


def altered_part(model: nn.Module) -> str | None:
    """What of a model's modules is not as its configuration says, such as an activation that was replaced.

    A blueprint is read from the configuration, so it would not follow. Compared are classes and plain attributes with
    those of a model that is made of the configuration, without weights; once, as long as both stay as they are.
    """
    config: Any = model.config
    found = _structure(model), config.to_json_string(use_diff=False)
    known = _structures.get(model)
    if known is None or known[0] != found:
        known = _structures[model] = found, _difference(model)
    return known[1]


def _difference(model: nn.Module) -> str | None:
    kind: Any = type(model)
    config: Any = model.config
    try:
        with torch.device("meta"):
            fresh = dict(_structure(kind(copy.deepcopy(config))))
    except (TypeError, ValueError, AttributeError, LookupError, AssertionError, RuntimeError) as error:
        return f"'{kind.__name__}' cannot be made of a configuration alone ({type(error).__name__}: {error})"
    modules: Any = model
    # those of a student are its target's
    shared = modules.get_input_embeddings(), modules.get_output_embeddings()
    others = {name for name, part in model.named_modules() if any(part is one for one in shared)}
    for name, part in _structure(model):
        if name not in others and fresh.pop(name, None) != part:
            return f"'{name or type(model).__name__}' is another one"
    return next((f"'{name}' is missing" for name in fresh.keys() - others), None)


def _structure(model: nn.Module) -> tuple[tuple[str, Hashable], ...]:
    """Classes, plain attributes and configurations of their own of a model's modules, by their names."""
    config: Any = model.config
    told: dict[int, str | None] = {id(config): None}  # by configuration: what it says, if that is something else

    def another_config(part: nn.Module) -> str | None:
        """What a part, such as a layer of another model, computes by in the place of the model's configuration."""
        own: Any = own_config(part)
        if own is None:
            return None
        if id(own) not in told:
            said: str = own.to_json_string(use_diff=False)
            told[id(own)] = None if said == config.to_json_string(use_diff=False) else said
        return told[id(own)]

    return tuple((name, (type(part), _settings(part), another_config(part))) for name, part in model.named_modules())


def _settings(part: nn.Module) -> Hashable:
    plain = (bool, int, float, str, type(None))
    return tuple(
        (name, value)
        for name, value in sorted(vars(part).items())
        if isinstance(value, plain) and name not in _NO_SETTINGS and not name.startswith("_")
    )
