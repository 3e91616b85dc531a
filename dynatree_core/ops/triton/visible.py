"""What each row of a pass sees, found on the device: nothing is read by the host, and every shape is known before."""

from __future__ import annotations

import torch
from torch import Tensor

from dynatree_core.ops.signature import Visible

__all__ = ["visible_of"]


def visible_of(mask: Tensor, lanes: Tensor) -> Visible:
    """From a mask whose slots ascend with the text, as `Visible.of_mask`.

    Args:
        mask: [rows, slots] bool
        lanes: [rows] int32

    Returns:
        All of it on the mask's device; `own` has room for every slot of every row, and one more.
    """
    num_rows, num_slots = mask.shape
    places = torch.arange(num_slots, device=mask.device, dtype=torch.int32)
    sees_any = mask.any(dim=1)
    start = torch.where(sees_any, mask.int().argmax(dim=1), 0)
    is_gap = ~mask & (places >= start[:, None])
    end = torch.where(is_gap.any(dim=1), is_gap.int().argmax(dim=1), num_slots)
    end = torch.where(sees_any, end, start)
    listed = mask & (places >= end[:, None])
    own_start = torch.zeros(num_rows + 1, device=mask.device, dtype=torch.int32)
    own_start[1:] = listed.sum(dim=1).cumsum(0)
    # each listed slot goes to its place in the list, any other to the last place, which nobody reads
    target = torch.where(listed.flatten(), listed.flatten().cumsum(0) - 1, mask.numel())
    own = torch.zeros(mask.numel() + 1, device=mask.device, dtype=torch.int32)
    own.scatter_(0, target, places.expand(num_rows, num_slots).flatten())
    return Visible(lanes, start.int(), end.int(), own_start, own)
