"""How fast a device reads its memory, and how much of it a step of plain decoding has to read.

A step over one row multiplies every weight with one number, so it can take no less time than reading the weights. What
share of the memory's bandwidth decoding reaches says what a speedup is worth: against something slow any number is
easily had.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import psutil
import torch
from torch import Tensor, nn

from dynatree_bench.run.machine import now
from dynatree_bench.run.records import MemoryInfo

READS = 20  # of the buffer; the fastest counts, since whatever else runs can only slow one down
TIMES_CACHE = 4  # the buffer beside the caches: what the end of one read leaves there, the next one does not find
MAX_SHARE_OF_FREE = 0.5  # of the free memory, that a buffer may take up
MIN_BYTES, MIN_BYTES_CUDA = 2**28, 2**30  # of the buffer: a read takes long beside starting it
CACHES = Path("/sys/devices/system/cpu")  # where Linux lists a processor's caches


@attrs.frozen
class ReadSpeed:
    """What reading a large buffer from one end to the other has shown."""

    bytes_per_second: float
    cache_bytes: int | None  # of the device's last caches together; None where the system does not tell


@attrs.frozen
class StepReads:
    """What of a model a forward pass over one row reads."""

    num_weights: int
    num_bytes: int


def read_speed(device: torch.device, *, clock: Callable[[torch.device], float] = now) -> ReadSpeed | None:
    """Read a buffer much larger than the caches, with the threads that torch decodes with; the best of several reads.

    Args:
        device: whose memory is read.
        clock: seconds, when the device has done what it was told.

    Returns:
        None where there is no room for such a buffer.
    """
    cache = cache_bytes(device)
    num_bytes = max(MIN_BYTES_CUDA if device.type == "cuda" else MIN_BYTES, TIMES_CACHE * (cache or 0))
    if num_bytes > MAX_SHARE_OF_FREE * _free_bytes(device):
        return None
    # written, so that the system gives it memory of its own: a page that was never written is one page of zeros for all
    buffer = torch.ones(num_bytes // torch.float32.itemsize, device=device)
    seconds = []
    for _ in range(READS):
        start = clock(device)
        buffer.sum()
        seconds.append(clock(device) - start)
    return ReadSpeed(buffer.nbytes / min(seconds), cache)


def memory_info(model: Any, before: MemoryInfo | None = None) -> MemoryInfo | None:
    """What a run says of its target's memory.

    Args:
        model: the target.
        before: what was measured when the run began, of one that goes on. The faster one counts: whatever else runs can
            only slow a read down.

    Returns:
        None where it could not be measured.
    """
    found = read_speed(model.device)
    if found is None or (before is not None and before.bytes_per_second > found.bytes_per_second):
        return before
    return MemoryInfo(found.bytes_per_second, found.cache_bytes, step_reads(model).num_bytes)


def share_of_bandwidth(num_bytes: float, seconds: float, bytes_per_second: float) -> float:
    """Time that reading so many bytes takes at least ÷ time that it took, in all that was done meanwhile."""
    return num_bytes / bytes_per_second / seconds


def step_reads(model: nn.Module) -> StepReads:
    """The weights that a pass over one row reads, each once.

    A table of embeddings is not among them, of which a row reads one line, unless it is the head too. Of a mixture's
    experts those count that a token is sent to. Keys and values are not counted. A quantised weight counts as it is
    stored.
    """
    num_weights, num_bytes = 0.0, 0.0
    for weight, share in _weights(model):
        num_weights += share * weight.numel()
        num_bytes += share * _stored_bytes(weight)
    return StepReads(round(num_weights), round(num_bytes))


def _weights(model: Any) -> Iterator[tuple[Tensor, float]]:
    """Each weight that a pass reads, with the share of it that one row reads."""
    modules = dict(model.named_modules())
    seen = set()
    # of weights that are tied, one name may be that of an embedding table and another one the head's
    for name, weight in model.state_dict(keep_vars=True).items():
        owner = modules.get(name.rpartition(".")[0])
        if isinstance(owner, nn.Embedding) or id(weight) in seen:
            continue
        seen.add(id(weight))
        num_experts = getattr(owner, "num_experts", None)  # a router has as many, and reads all that it has
        is_of_experts = num_experts is not None and name.split(".")[-2] == "experts"
        yield weight, model.config.num_experts_per_tok / num_experts if is_of_experts else 1.0


def _stored_bytes(weight: Any) -> int:
    if not hasattr(weight, "__tensor_flatten__"):
        return int(weight.numel() * weight.itemsize)
    names, _ = weight.__tensor_flatten__()  # of a tensor made of others, whose own dtype is the one it stands for
    parts = (getattr(weight, name) for name in names)
    return sum(_stored_bytes(part) for part in parts if part is not None)


def cache_bytes(device: torch.device) -> int | None:
    """What the device's last caches hold together; None where the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    found: dict[tuple[int, str], int] = {}  # (level, processors that share the cache) -> bytes
    for file in CACHES.glob("cpu[0-9]*/cache/index*/size"):
        if int(file.parts[-4].removeprefix("cpu")) in os.sched_getaffinity(0):
            level, shared = ((file.parent / name).read_text().strip() for name in ("level", "shared_cpu_list"))
            found[int(level), shared] = int(file.read_text().strip().removesuffix("K")) * 2**10
    last = max((level for level, _ in found), default=None)
    return sum(size for (level, _), size in found.items() if level == last) or None


def _free_bytes(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
