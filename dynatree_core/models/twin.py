"""A second set of module objects around a model's tensors, for code that replaces some of its layers."""

from __future__ import annotations

import copy
from collections.abc import Iterable

from torch import Tensor, nn

from dynatree_core.errors import ParameterError

__all__ = ["twin_of"]


def twin_of(model: nn.Module, tensors: Iterable[Tensor], who: str, remedy: str) -> nn.Module:
    """A deep copy of a model's modules that has the model's own tensors.

    Args:
        model: the model; it is not changed.
        tensors: those that are shared. Any other tensor on a module is copied.
        who: needs the copy, such as "the packed runner"; for the message.
        remedy: what to do where it cannot be made; for the message.

    Raises:
        ParameterError: a module has an attribute that cannot be copied.
    """
    try:
        return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})  # its memo is shared
    except Exception as error:
        raise ParameterError(
            f"{who} copies the model's modules with all that is on them, and making it failed: "
            f"{type(error).__name__}: {error}; take that off, or {remedy}"
        ) from error
