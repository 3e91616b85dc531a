"""How many passes a generation records, how long that takes, and whether memory stays over many generations."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from dynatree_bench.run.machine import now
from dynatree_bench.studies.on_gpu.given import Given
from dynatree_core import Engine
from dynatree_core.runners.cudagraph import CudaGraphRunner

SETTLED = 3  # generations after which all passes are recorded and memory is to stay
MOST_RECORDED = 6  # passes of target and drafter, all texts being within the first 1,024 slots (docs/runners.md)
NEW_TOKENS, PROMPT_TOKENS, NUM_GENERATIONS = 256, 64, 40


def measure(given: Given) -> dict[str, Any]:
    """By generation: seconds, recordings so far of target and drafter, their seconds, and bytes that are allocated."""
    pair = given.pair()
    assert pair.source is not None, "the pair is synthetic"
    model = pair.target.model
    name = given.runner(model)
    engine = Engine(model, pair.drafter, runner=name, trust_model=True)
    models = [model, *pair.drafter.models(model)]
    rows = []
    for turn in range(3 if given.is_dry else NUM_GENERATIONS):
        prompt = pair.source.text(17 * turn, PROMPT_TOKENS)
        begun = now(model.device)
        asked = {"policy": "phase3", "max_new_tokens": 24 if given.is_dry else NEW_TOKENS, "eos_token_id": []}
        report = engine.submit(prompt, inherit_settings=False, **asked).result().report
        runners = [engine.runner_of(one, name) for one in models]
        recorded = [one for one in runners if isinstance(one, CudaGraphRunner)]
        gc.collect()  # what goes only so is no growth
        rows.append(
            {
                "seconds": now(model.device) - begun,
                "runner": report.runner,
                "num_recorded": sum(one.num_recorded for one in recorded),
                "recording_seconds": sum(one.recording_seconds for one in recorded),
                "bytes": torch.cuda.memory_allocated(model.device) if model.device.type == "cuda" else None,
            }
        )
    return {"generations": rows}


def growth(generations: Sequence[Mapping[str, Any]]) -> int | None:
    """Bytes that the last generation has more than the third; None where they were not measured."""
    if len(generations) <= SETTLED or generations[-1]["bytes"] is None:
        return None
    return int(generations[-1]["bytes"] - generations[SETTLED - 1]["bytes"])


def faults(found: Mapping[str, Any], is_dry: bool) -> list[str]:
    """Memory that grows, and passes that were not recorded."""
    some, said = found["generations"], []
    grown = growth(some)
    if grown is not None and grown > 0:
        said.append(f"memory has grown by {grown} bytes between generation {SETTLED} and generation {len(some)}")
    others = sorted({one["runner"] for one in some} - {CudaGraphRunner.name})
    if others and not is_dry:
        said.append(f"passes were to be recorded, and were computed by {', '.join(others)}")
    return said
