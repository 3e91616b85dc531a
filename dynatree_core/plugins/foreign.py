"""Others' code: plugins run in here, so that what goes wrong in one has its name and ends nothing else.

A plugin may raise anything, even `SystemExit`: a script that is imported as a module calls `exit()`. And it may print,
where the command line writes an answer or a document to standard output.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["others_code", "prints_aside", "raised"]

_are_prints_aside = False  # of the process: only the command line asks for it, which runs one thing at a time


@contextmanager
def others_code(blame: Callable[[BaseException], BaseException], *but: type[Exception]) -> Iterator[None]:
    """Turn whatever the block raises into an error that names its author.

    Args:
        blame: makes the error, or gives back one that passes as it is.
        but: what passes as it is. So do Ctrl-C and the end of a generator.
    """
    passing: tuple[type[BaseException], ...] = (KeyboardInterrupt, GeneratorExit, *but)
    shown = sys.stdout
    if _are_prints_aside:
        sys.stdout = sys.stderr
    try:
        yield
    except passing:
        raise
    except BaseException as error:  # SystemExit too, and what others derive from BaseException
        blamed = blame(error)
        if blamed is error:
            raise
        raise blamed from error
    finally:
        sys.stdout = shown


@contextmanager
def prints_aside() -> Iterator[None]:
    """Within the block, what others' code prints goes to standard error: standard output is the command line's own."""
    global _are_prints_aside
    before, _are_prints_aside = _are_prints_aside, True
    try:
        yield
    finally:
        _are_prints_aside = before


def raised(error: BaseException) -> str:
    """What was raised, for a message."""
    if isinstance(error, SystemExit):
        return f"SystemExit: it called exit({'' if error.code is None else repr(error.code)})"
    return f"{type(error).__name__}: {error}"
