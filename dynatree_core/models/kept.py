"""What outlives an engine: things that are dear to make, kept for the next generation with the same model.

Packed copies of matrices, students and measured costs belong to one model object and go when it goes.
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
    """The mapping of one model, empty at first. No value may hold the model itself, or it would never go."""
    with _lock:
        return _kept.setdefault(model, {})
