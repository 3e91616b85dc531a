"""Tensors in files: safetensors, written whole and read with the reason where that fails."""

from __future__ import annotations

import json
import struct
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from dynatree_core.errors import ModelLoadError
from dynatree_core.files.writing import unreadable, whole_file

__all__ = ["load_tensors", "mapped_tensors", "save_aligned", "save_tensors"]

ALIGNMENT = 64  # bytes: a cache line, and what the widest instructions like best
_NAMES = {
    torch.uint8: "U8",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.int64: "I64",
}
GAP = "_gap."  # how the names of tensors begin that fill up


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


def save_aligned(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write tensors by name, in their order, so that each begins at a multiple of 64 bytes once the file is mapped.

    It is a safetensors file as any other, which do not care for alignment: what fills the gaps is tensors too.

    Raises:
        OSError: naming the file.
    """
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [end, end + size]}
        end += size
        if gap := -end % ALIGNMENT:
            header[f"{GAP}{end}"] = {"dtype": "U8", "shape": [gap], "data_offsets": [end, end + gap]}
            end += gap
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    with whole_file(path) as draft, draft.open("wb") as file:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        for tensor in tensors.values():
            numbers = tensor.contiguous().view(torch.uint8).reshape(-1)
            file.write(numbers.numpy().data)
            file.write(b"\0" * (-numbers.numel() % ALIGNMENT))


def mapped_tensors(path: Path, *, advice: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors of a safetensors file as they lie there, and its metadata: the file is mapped into memory, not read.

    Args:
        advice: as of `load_tensors`.

    Raises:
        ModelLoadError: as `load_tensors`.
    """
    if (closed := unreadable(path)) is not None:
        raise ModelLoadError(f"a file must be one that this user may read, got {closed}; let its owner `chmod a+r` it")
    try:
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if not name.startswith(GAP)]  # noqa: SIM118  # it is no dict
            return {name: file.get_tensor(name) for name in names}, dict(file.metadata() or {})
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        came = textwrap.shorten(str(error), 160, placeholder=" …")
        raise ModelLoadError(
            f"{path} must hold tensors as they were written, got {type(error).__name__} ({came}); {advice}"
        ) from error
