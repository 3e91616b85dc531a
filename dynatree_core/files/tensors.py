"""Tensors in files: safetensors, written whole and read with the reason where that fails."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dynatree_core.errors import ModelLoadError
from dynatree_core.files.writing import unreadable, whole_file

__all__ = ["load_tensors", "save_tensors"]


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write tensors by name.

    Raises:
        OSError: naming the file.
    """
    with whole_file(path) as draft:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, draft, metadata=metadata)


def load_tensors(path: Path, *, advice: str) -> dict[str, Tensor]:
    """What was written.

    Args:
        advice: what to do about a file that is damaged.

    Raises:
        ModelLoadError: the file is not there, may not be read, or is damaged.
    """
    if (closed := unreadable(path)) is not None:
        raise ModelLoadError(f"a file must be one that this user may read, got {closed}; let its owner `chmod a+r` it")
    try:
        return load_file(path)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        came = textwrap.shorten(str(error), 160, placeholder=" …")
        raise ModelLoadError(
            f"{path} must hold tensors as they were written, got {type(error).__name__} ({came}); {advice}"
        ) from error
