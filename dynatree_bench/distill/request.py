"""What `dynatree distill` is asked for."""

from __future__ import annotations

import attrs

from dynatree_bench.distill.teach import TeachingPlan
from dynatree_bench.distill.train import TrainingPlan


@attrs.frozen
class Request:
    """A whole distillation."""

    target: str | None
    device: str | None
    threads: int | None
    teaching: TeachingPlan
    num_batches: int | None  # of the teaching; None: all
    layers: tuple[int, ...]
    num_outputs: int
    training: TrainingPlan
