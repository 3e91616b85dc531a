"""Tensors from one device to another. A GPU fetches by itself what it gets from the host, so nobody waits for that."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["send", "together_on"]


def send(numbers: Tensor, to: Tensor) -> None:
    """Copy numbers into a tensor of another device."""
    if numbers.device.type != "cpu" or to.device.type != "cuda":
        to.copy_(numbers)
        return
    # torch gives this memory to others when the GPU has read it
    fetched = torch.empty(numbers.shape, dtype=numbers.dtype, device="cpu", pin_memory=True).copy_(numbers)
    to.copy_(fetched, non_blocking=True)


def together_on(device: torch.device, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same tensors on another device, by one copy. A host waits for what comes from a GPU.

    Args:
        device: another one than theirs.
        tensors: those with larger numbers first, such as int64, float32, bool.
    """
    parts = [one.contiguous().view(-1).view(torch.uint8) for one in tensors]
    here = torch.cat(parts)
    there = torch.empty(here.shape, dtype=torch.uint8, device=device)
    send(here, there)
    found = torch.split(there, [part.numel() for part in parts])
    return [part.view(one.dtype).view(one.shape) for part, one in zip(found, tensors, strict=True)]
