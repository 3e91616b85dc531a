"""A second set of module objects around the tensors of a model, for who computes with its weights in another way."""

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
        tensors: those that are taken as they are. Any other on a module is copied.
        who: makes the copy, for the message, such as "the packed runner".
        remedy: what to do where it cannot be made, for the message.

    Raises:
        ParameterError: somebody has put on a module what cannot be copied.
    """
    try:
        return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})  # what is in the memo is not copied
    except Exception as error:
        raise ParameterError(
            f"{who} copies the model's modules with all that is on them, and making it failed: "
            f"{type(error).__name__}: {error}; take that off, or {remedy}"
        ) from error
