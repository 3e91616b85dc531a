"""What bounds a pass: reading the weights, and multiplying with them."""

from __future__ import annotations

import torch

from dynatree_bench.run.bandwidth import read_speed
from dynatree_bench.run.machine import now
from dynatree_bench.run.progress import Job
from dynatree_core.errors import InputError

SIZES = {"cpu": 1024, "cuda": 8192}  # rows and columns of the product, which has to keep the device busy
REPEATS = 5  # of the product; the fastest counts


def limit_jobs(device: torch.device, dtype: torch.dtype, bandwidth: list[float], flops: list[float]) -> list[Job]:
    """Reads of a buffer and a matrix product, which are made anew each time: no part of a generation's peak of memory.

    Args:
        device, dtype: where the product is computed, and of which numbers.
        bandwidth: gets bytes/s of the fastest read in each round.
        flops: gets operations/s of the fastest product in each round.
    """

    def read(turn: int) -> None:
        found = read_speed(device)
        if found is None:
            raise InputError(
                f"the bandwidth of {device} needs room for a buffer larger than its caches, and there is none; end "
                "what else takes up its memory"
            )
        if turn:
            bandwidth.append(found.bytes_per_second)

    def multiply(turn: int) -> None:
        size = SIZES[device.type]
        matrix, seconds = torch.randn(size, size, dtype=dtype, device=device), []
        for _ in range(REPEATS):
            start = now(device)
            _ = matrix @ matrix
            seconds.append(now(device) - start)
        if turn:
            flops.append(2 * size**3 / min(seconds))

    return [read, multiply]


def least_seconds(num_bytes: float, num_weights: float, rows: int, *, bandwidth: float, flops: float) -> float:
    """What a pass takes at least: to read the weights once, or to multiply each with every row."""
    return max(num_bytes / bandwidth, 2 * rows * num_weights / flops)
