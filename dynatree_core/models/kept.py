"""A store for each model object, for things that take long to make: packed copies, students, measured costs.

The next generation with the same model finds them, with another engine too. They are freed with the model.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Hashable
from typing import Any

from torch import nn

__all__ = ["kept_of"]

_kept: weakref.WeakKeyDictionary[nn.Module, dict[Hashable, Any]] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def kept_of(model: nn.Module) -> dict[Hashable, Any]:
    """The store of one model, empty at first. No value may refer to the model, or neither would ever be freed."""
    with _lock:
        return _kept.setdefault(model, {})
