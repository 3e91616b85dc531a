"""How near do the fused operators' products come to what a CPU can do?

Question: milliseconds of all matrix products of a model for 1 to 32 rows, by the bits of its weights, beside the time
that reading the weights once takes, or multiplying with them, whichever is longer.

Method: random matrices of the default model's shape: queries, keys and values in one, the product behind attention,
gate and up in one, down, in 30 layers, and the head. A pass calls them in that order, from Python, and nothing else.
Kinds of weights and numbers of rows take turns, in rotating order, several times over in one process after a round
that does not count; of a round's passes the median counts, over rounds medians are shown, with quartiles. The bandwidth
is that of the fastest read of a large buffer, the peak that of the fastest large float32 product of torch, in the same
rounds. Weights in 8 and 4 bits are of the kinds q8_0 and q4_1, and once more with rows rounded to 8 bits ("/int8"), for
which reading is the only limit: the peak of products of whole numbers is not measured.

Output: a table of milliseconds and one of what was measured ÷ the limit; at most 1.25 is wanted.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dynatree_bench.report.tables import Spread, Table, simple
from dynatree_bench.run.limits import least_seconds, limit_jobs
from dynatree_bench.run.machine import device_name, now
from dynatree_bench.run.progress import in_rounds
from dynatree_bench.studies.study import Asked, Study
from dynatree_core import InputError, ops
from dynatree_core.ops import PackedMatrix

CPU = torch.device("cpu")
ROWS = (1, 2, 4, 6, 8, 16, 32)
KINDS: dict[str, Callable[[Tensor], PackedMatrix]] = {
    "float32": ops.pack,
    "bfloat16": lambda weight: ops.pack(weight.bfloat16()),
    "float16": lambda weight: ops.pack(weight.half()),
    "q8_0": lambda weight: ops.quantise(weight, 8),
    "q4_1": lambda weight: ops.quantise(weight, 4),
    "q8_0/int8": lambda weight: ops.with_activations(ops.quantise(weight, 8), "int8"),
    "q4_1/int8": lambda weight: ops.with_activations(ops.quantise(weight, 4), "int8"),
}
# outputs and inputs of a layer's matrices, the number of layers, and those of the head
SHAPES = [(960, 576), (576, 576), (3072, 576), (576, 1536)], 30, (49152, 576)
QUICK = [(24, 16), (16, 16), (40, 16), (16, 20)], 2, (50, 16)
PASSES = 5  # of a job; their median counts
WANTED = 1.25


def measure(asked: Asked) -> dict[str, Any]:
    """Milliseconds by kind and rows, and limits."""
    reason = ops.reason_unavailable()
    if reason is not None:
        raise InputError(f"the operators' library is measured, which cannot be used here: {reason}")
    layer, num_layers, head = QUICK if asked.is_quick else SHAPES
    shapes = [*layer * num_layers, head]
    random = torch.Generator().manual_seed(asked.seed)
    matrices: dict[str, list[PackedMatrix]] = {kind: [] for kind in KINDS}
    for shape in shapes:
        weight = torch.randn(shape, generator=random) * 0.02
        for kind, pack in KINDS.items():
            matrices[kind].append(pack(weight))
    inputs = {size: torch.randn(max(ROWS), size, generator=random) for size in {num for _, num in shapes}}
    seconds: dict[str, dict[str, list[float]]] = {kind: defaultdict(list) for kind in KINDS}

    def passes(kind: str, rows: int) -> Callable[[int], None]:
        def job(turn: int) -> None:
            taken = statistics.median(_pass_seconds(matrices[kind], inputs, rows) for _ in range(PASSES))
            if turn:
                seconds[kind][str(rows)].append(taken)

        return job

    jobs = [passes(kind, rows) for kind in KINDS for rows in ROWS]
    bandwidth: list[float] = []
    flops: list[float] = []
    in_rounds([*limit_jobs(CPU, torch.float32, bandwidth, flops), *jobs], asked.rounds(full=5, quick=2))
    provenance = {
        "device": device_name(CPU),
        "library": ops.native.library().target,
        "weight_bytes": {kind: sum(one.num_bytes for one in matrices[kind]) for kind in KINDS},
        "num_weights": sum(outputs * num_inputs for outputs, num_inputs in shapes),
        "bytes_per_second": max(bandwidth),
        "flops": max(flops),
    }
    return {"provenance": provenance, "seconds": {kind: dict(found) for kind, found in seconds.items()}}


def _pass_seconds(matrices: Sequence[PackedMatrix], inputs: Mapping[int, Tensor], rows: int) -> float:
    """One product with each matrix."""
    begun = now(CPU)
    for packed in matrices:
        ops.linear(inputs[packed.num_inputs][:rows], packed)
    return now(CPU) - begun


def limit(said: Mapping[str, Any], kind: str, rows: int) -> float:
    """Seconds that a pass takes at least."""
    num_bytes, bandwidth, flops = said["weight_bytes"][kind], said["bytes_per_second"], said["flops"]
    if kind.endswith("/int8"):
        return float(num_bytes / bandwidth)
    return least_seconds(num_bytes, said["num_weights"], rows, bandwidth=bandwidth, flops=flops)


def tables(found: Mapping[str, Any]) -> Sequence[Table | None]:
    """Milliseconds, and what they are of the limit."""
    said, seconds = found["provenance"], found["seconds"]
    header = ["weights", *(f"{rows} rows" if rows > 1 else "1 row" for rows in ROWS)]
    times = [[kind, *(Spread.of(seconds[kind][str(rows)], scale=1000) for rows in ROWS)] for kind in seconds]
    shares = [
        [kind, *(statistics.median(seconds[kind][str(rows)]) / limit(said, kind, rows) for rows in ROWS)]
        for kind in seconds
    ]
    speed = f"{said['bytes_per_second'] / 1e9:.1f} GB/s, {said['flops'] / 1e9:.0f} GFLOP/s"
    return [
        simple("ops-times", "All matrix products of a pass, ms", f"Library: {said['library']}.", header, times),
        simple("ops-limits", f"The same ÷ its limit; at most {WANTED} is wanted", f"Limits: {speed}.", header, shares),
    ]


STUDY = Study(options=("repeats",), measure=measure, tables=tables)
