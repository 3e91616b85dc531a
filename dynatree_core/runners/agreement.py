"""How far two ways to compute the same pass may be apart before one of them is taken to be wrong."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["TOLERANCE", "apart"]

# by the model's dtype, how far apart the numbers may be, relative to the largest: products of other shapes round
# otherwise. A pass that went wrong is as far off as two texts are
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-2, torch.float16: 0.05, torch.bfloat16: 0.15}


def apart(found: Tensor, expected: Tensor) -> Tensor:
    """[] float32: the largest difference relative to the largest number; infinities have to be the same."""
    difference = torch.where(found == expected, 0, found - expected).abs().amax()
    largest = expected.nan_to_num(posinf=0, neginf=0).abs().amax()
    return difference.float() / largest.float().clamp(min=1e-30)
