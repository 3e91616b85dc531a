"""What goes wrong with one sequence of several: it drops out of the step, and the others go on."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

from dynatree_core.engine.lane import Lane

__all__ = ["Faults", "transferred"]

Given = TypeVar("Given")
Made = TypeVar("Made")


class Faults:
    """The errors of one step, by lane."""

    def __init__(self) -> None:
        self.errors: dict[Lane, Exception] = {}

    @contextmanager
    def of(self, lane: Lane) -> Iterator[None]:
        """What the block raises is this lane's error. Ctrl-C and what else is no `Exception` ends the step for all."""
        try:
            yield
        except Exception as error:  # noqa: BLE001  # whatever it is belongs to this sequence
            self.errors[lane] = error

    def each(self, stage: Callable[[Lane, Given], Made], given: Mapping[Lane, Given]) -> dict[Lane, Made]:
        """A stage for each lane by itself; without those that fail in it."""
        made: dict[Lane, Made] = {}
        for lane, value in given.items():
            with self.of(lane):
                made[lane] = stage(lane, value)
        return made


def transferred(numbers: Mapping[Lane, Tensor]) -> dict[Lane, list[int]]:
    """Integers [numbers] of each lane, by one transfer to the host for all that are on a device."""
    found: dict[Lane, list[int]] = {}
    for device in dict.fromkeys(own.device for own in numbers.values()):
        there = {lane: own for lane, own in numbers.items() if own.device == device}
        if len(there) == 1:  # a session has no operation more
            found |= {lane: own.tolist() for lane, own in there.items()}
        else:
            left = iter(torch.cat([*there.values()]).tolist())
            found |= {lane: list(itertools.islice(left, own.numel())) for lane, own in there.items()}
    return found
