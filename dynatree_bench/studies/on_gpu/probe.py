"""What the device, its libraries and its kernels of attention are like."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity
from torch.profiler import profile as torch_profile

from dynatree_bench.run.machine import now
from dynatree_bench.studies.on_gpu.given import Given
from dynatree_core.models.architectures import grouped_bias
from dynatree_core.runners.folded import folded_attention

HEADS, KEY_HEADS = 32, 8
HEAD_SIZES, ROWS = (80, 128), (1, 2, 17, 64)
NUM_LENGTHS, FIRST_LENGTH = 20, 300  # a text that grows by a slot or more in each pass
KERNELS = 1000  # in a recording, of which each does next to nothing
_TORCH = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
WAYS = ("torch's choice", "without cuDNN", "folded")


def measure(given: Given) -> dict[str, Any]:
    """Versions, milliseconds of attention the first time at a length and later, and microseconds of an empty kernel."""
    device = torch.device(given.device)
    sizes, rows = ((8,), (1, 3)) if given.is_dry else (HEAD_SIZES, ROWS)
    lengths = [FIRST_LENGTH + 7 * step for step in range(2 if given.is_dry else NUM_LENGTHS)]
    attention = [
        {"size": size, "rows": number, "way": way, **_attention(way, size, number, lengths, given, device)}
        for size in sizes
        for number in rows
        for way in WAYS
    ]
    return {"versions": versions(device), "attention": attention, "kernel_us": empty_kernel_us(device)}


def versions(device: torch.device) -> dict[str, Any]:
    """Of what a GPU brings besides the libraries that every result names."""
    if device.type != "cuda":
        return {}
    about = torch.cuda.get_device_properties(device)
    return {
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "capability": list(torch.cuda.get_device_capability(device)),
        "gib": about.total_memory / 2**30,
        "processors": about.multi_processor_count,
    }


def _attention(
    way: str, size: int, rows: int, lengths: list[int], given: Given, device: torch.device
) -> dict[str, Any]:
    dtype = getattr(torch, given.dtype)
    query = torch.randn(1, rows, HEADS, size, dtype=dtype, device=device).transpose(1, 2)
    buffer = torch.randn(1, KEY_HEADS, max(lengths), size, dtype=dtype, device=device)
    module: Any = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = HEADS // KEY_HEADS, True
    calls = [_call(way, module, query, buffer[:, :, :length]) for length in lengths]
    first, later = [], []
    with torch.inference_mode():
        for call in calls:
            start = now(device)
            call()
            first.append(now(device) - start)
        for call in calls:
            start = now(device)
            call()
            later.append(now(device) - start)
        kernels = _kernels(calls[0], device)
    return {
        "first_ms": [1000 * seconds for seconds in first],
        "later_ms": 1000 * statistics.median(later),
        "kernels": kernels,
    }


def _call(way: str, module: Any, query: Tensor, keys: Tensor) -> Callable[[], object]:
    """An attention with a tree's mask: rows see the whole text and themselves."""
    rows, slots = query.shape[2], keys.shape[2]
    visible = torch.ones(1, rows, slots, dtype=torch.bool, device=query.device)
    visible[:, :, slots - rows :] = torch.eye(rows, dtype=torch.bool, device=query.device)
    if way == "folded":
        bias = grouped_bias(visible, query.dtype, HEADS // KEY_HEADS)
        return lambda: folded_attention(module, query, keys, keys, bias)

    def by_torch() -> object:
        repeated = keys.repeat_interleave(HEADS // KEY_HEADS, dim=1)
        return torch.nn.functional.scaled_dot_product_attention(query, repeated, repeated, visible[:, None])

    if way == "torch's choice":
        return by_torch

    def without_cudnn() -> object:
        with sdpa_kernel(list(_TORCH)):
            return by_torch()

    return without_cudnn


def _kernels(call: Callable[[], object], device: torch.device) -> list[str]:
    """The names of what runs on the device."""
    is_cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_cuda else [])]
    with torch_profile(activities=activities) as profiler:
        call()
        now(device)
    events = profiler.key_averages()
    return sorted({event.key for event in events if not is_cuda or event.self_device_time_total > 0})[:12]


def empty_kernel_us(device: torch.device) -> float | None:
    """What a kernel of a recording takes that does next to nothing; None where nothing is recorded."""
    if device.type != "cuda":
        return None
    number = torch.zeros(1, device=device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(KERNELS):
            number.add_(1)
    graph.replay()
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(10):
        graph.replay()
    torch.cuda.synchronize(device)
    return 1e6 * (time.perf_counter() - start) / (10 * KERNELS)
