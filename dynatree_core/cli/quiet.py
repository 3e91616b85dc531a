"""No log lines of the libraries that transformers imports between those of a program: they are about its own parts.

torchao names each of its kernels that this machine cannot load, and torch says what torchao should do otherwise.
transformers imports torchao wherever it is installed. Programs call this first, before they import transformers.
"""

from __future__ import annotations

import logging

__all__ = ["IMPORTED", "quiet_imports"]

IMPORTED = ("torchao", "torch.utils._pytree")  # loggers


def quiet_imports() -> None:
    """Let the libraries that transformers imports log errors only, in this process."""
    for name in IMPORTED:
        logging.getLogger(name).setLevel(logging.ERROR)
