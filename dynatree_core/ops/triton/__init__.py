"""The operators by Triton, for GPUs; `operators` and `kernels` are there where Triton is, see `reason_unavailable`."""

from __future__ import annotations

import importlib.util

__all__ = ["reason_unavailable"]


def reason_unavailable() -> str | None:
    """Why the operators cannot be used; None where Triton is installed. Triton itself is not imported."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; it comes with a torch for CUDA, or by `pip install dynatree[triton]`"
    return None
