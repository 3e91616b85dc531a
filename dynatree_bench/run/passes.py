"""Timing single forward passes of a runner."""

from __future__ import annotations

from typing import Any

import torch

from dynatree_bench.run.machine import now
from dynatree_core.cache.base import KeyValueCache
from dynatree_core.clock import StageClock
from dynatree_core.models.architectures import vocab_size
from dynatree_core.runners.choice import made_runner
from dynatree_core.runners.passes import Passes
from dynatree_core.tree.flatten import flatten
from dynatree_core.tree.token_tree import TokenTree

ROWS = (1, 2, 4, 8, 16, 32, 64)
CONTEXT = 256
CPU = torch.device("cpu")


@torch.inference_mode()
def filled(model: torch.nn.Module, name: str, context: int = CONTEXT) -> tuple[Passes, KeyValueCache]:
    """A runner's passes with a cache that has the rows of so many tokens."""
    device: Any = model.device
    runner = made_runner(model, name)
    passes, cache = Passes(runner, StageClock(device)), runner.new_cache(context + max(ROWS))
    passes.prefill(torch.arange(context, device=device) % vocab_size(model), cache)
    return passes, cache


@torch.inference_mode()
def pass_seconds(passes: Passes, cache: KeyValueCache, rows: int, *, device: torch.device = CPU) -> float:
    """Seconds of a pass over a root and its children, with their mask; nothing is committed."""
    tree = TokenTree.root(torch.zeros(1, dtype=torch.int64, device=device))
    if rows > 1:
        parents = torch.zeros(rows - 1, dtype=torch.int64, device=device)
        tree = tree.grow(parents, torch.arange(rows - 1, device=device), torch.full((rows - 1,), -1.0, device=device))
    start = now(device)
    passes.forward(flatten([tree], [cache.next_place]), cache, stage="measured")
    seconds = now(device) - start
    cache.rollback()
    return seconds
