"""Counting what an iteration asks of torch and of the host, outside the models' own passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import attrs
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

# methods of a tensor by which its values reach the host: each waits for a GPU
READS = ("tolist", "item", "numpy", "__bool__", "__int__", "__float__", "__index__", "cpu", "nonzero")


@attrs.define
class Counts:
    """What was counted."""

    operations: int = 0  # of torch, views among them
    transfers: int = 0  # of values to the host


class _Operations(TorchDispatchMode):
    def __init__(self, note: Callable[[], None]) -> None:
        super().__init__()
        self.note = note

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        self.note()
        return function(*arguments, **(options or {}))


class _Reads(TorchFunctionMode):
    def __init__(self, note: Callable[[], None]) -> None:
        super().__init__()
        self.note = note

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        if getattr(function, "__name__", "") in READS:
            self.note()
        return function(*arguments, **(options or {}))


@contextmanager
def counted(*models: nn.Module) -> Iterator[Counts]:
    """Count within the block, but not within the passes of these models."""
    counts, passes = Counts(), 0

    def enter(*_: object) -> None:
        nonlocal passes
        passes += 1

    def leave(*_: object) -> None:
        nonlocal passes
        passes -= 1

    def operation() -> None:
        counts.operations += passes == 0

    def read() -> None:
        counts.transfers += passes == 0

    handles = [model.register_forward_pre_hook(enter) for model in models]
    handles += [model.register_forward_hook(leave) for model in models]
    try:
        with _Operations(operation), _Reads(read):
            yield counts
    finally:
        for handle in handles:
            handle.remove()
