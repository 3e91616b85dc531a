"""Triton's interpreter, which computes kernels on the CPU, made quicker; for tests, in a process of its own.

Whoever imports this must have set TRITON_INTERPRET=1 before Triton was imported. The interpreter changes Triton's
language anew for each function that a kernel calls, some ten milliseconds each; here once for a module.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

from triton.runtime import interpreter

__all__ = ["quicker"]

assert os.environ.get("TRITON_INTERPRET") == "1", "TRITON_INTERPRET=1 must be set before Triton is imported"


@contextmanager
def quicker() -> Iterator[None]:
    """For the block."""
    changed: set[int] = set()

    def called(function: Any, *arguments: Any, **constants: Any) -> Any:
        """Call a function within a kernel."""
        module = id(function.fn.__globals__)
        if module not in changed:
            changed.add(module)
            undo.callback(interpreter._patch_lang(function.fn).restore)
        return function.rewrite()(*arguments, **constants)

    with ExitStack() as undo:
        undo.enter_context(mock.patch.object(interpreter.InterpretedFunction, "__call__", called))
        yield
