"""What another thread may do at any moment of a call: done at each of them, one after the other, by the same thread."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from types import FrameType, FunctionType
from typing import Any

__all__ = ["each_moment", "traced"]


@contextlib.contextmanager
def traced(trace: Callable[[FrameType, str, Any], Any]) -> Iterator[None]:
    """Have Python call this for what the block calls, in place of what it calls otherwise."""
    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


class _Moment:
    """The place in a call before one instruction of some functions."""

    def __init__(self, number: int, functions: tuple[FunctionType, ...]) -> None:
        self._left = number  # instructions before it
        self._codes = {function.__code__ for function in functions}
        self.is_there = False  # whether the call has had so many

    @contextlib.contextmanager
    def tried(self, happens: Callable[[], object]) -> Iterator[None]:
        """Have this happen there, while the block runs."""

        def trace(frame: FrameType, event: str, _: Any) -> Any:
            if frame.f_code not in self._codes or self.is_there:
                return None
            frame.f_trace_opcodes = True
            if event == "opcode":
                self.is_there = self._left == 0
                self._left -= 1
                if self.is_there:
                    happens()
            return trace

        with traced(trace):
            yield


def each_moment(
    *functions: FunctionType,
) -> Iterator[Callable[[Callable[[], object]], contextlib.AbstractContextManager[None]]]:
    """For each instruction of these functions that a call runs, what has something happen before it.

    To be used as in `for there in each_moment(function): with there(happens): call()`, with a call that does the same
    each time until then. It ends when the call has no more instructions.
    """
    number = 0
    while True:
        moment = _Moment(number, functions)
        yield moment.tried
        if not moment.is_there:
            assert number > 0, "the call runs one of these functions"
            return
        number += 1
