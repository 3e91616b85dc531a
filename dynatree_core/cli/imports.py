"""Importing torch, transformers and what computes with them: most of what a terminal waits for at a start."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["importing"]


@contextmanager
def importing() -> Iterator[None]:
    """No garbage collections while the block imports modules, and none over these modules afterwards.

    Some 330,000 objects come with torch and transformers, and they stay. Python would look through all of them four
    times meanwhile, a tenth of the whole start, and again whenever a long generation has made enough objects.
    """
    is_collecting, has_torch = gc.isenabled(), "torch" in sys.modules
    gc.disable()
    try:
        yield
    finally:
        if is_collecting:
            gc.enable()
            if not has_torch and "torch" in sys.modules:  # else it is somebody's program that calls a command
                gc.freeze()
