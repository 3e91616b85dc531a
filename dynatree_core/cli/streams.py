"""Standard input, output and error of a command: they may be closed, full, or written to by others.

A process started by cron, by a daemon or by a container's runtime may lack any of the three.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

__all__ = ["abandon_output", "standard_streams"]


@contextmanager
def standard_streams() -> Iterator[None]:
    """Within the block the three streams are there, and standard output holds what this package writes alone.

    Reading or writing one that is closed is an OSError that names it; what would go to a closed standard error is
    dropped. What C code and child processes write to standard output goes to standard error, unless it is a terminal.
    """
    before = sys.stdin, sys.stdout, sys.stderr
    _occupy_descriptors()
    sys.stdin = sys.stdin or cast(Any, _Closed("standard input"))
    sys.stdout = sys.stdout or cast(Any, _Closed("standard output"))
    with contextlib.ExitStack() as stack:
        if sys.stderr is None:
            sys.stderr = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
        try:
            if isinstance(sys.stdout, io.TextIOWrapper):
                # a character that the terminal lacks is no reason to stop
                sys.stdout.reconfigure(errors="replace")
                if sys.stdout is sys.__stdout__ and sys.stdout.fileno() == 1 and not sys.stdout.isatty():
                    stack.enter_context(_output_of_our_own(sys.stdout))
            yield
        finally:
            stack.close()
            sys.stdin, sys.stdout, sys.stderr = before


def abandon_output() -> None:
    """Drop what cannot be written to standard output: Python would try again at its end, and complain."""
    try:
        sys.stdout.flush()
        return
    except (OSError, ValueError):  # the fault that the command ends with
        pass
    with contextlib.suppress(OSError, ValueError):  # of a stream without a descriptor nothing is tried again
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


def _occupy_descriptors() -> None:
    """Open the null device in place of what is closed: else the next file gets its number, and others' output."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # gets the lowest number that is free


@contextmanager
def _output_of_our_own(shared: io.TextIOWrapper) -> Iterator[None]:
    """Write to where descriptor 1 leads through another number, and lead descriptor 1 to standard error meanwhile."""
    shared.flush()
    own = os.dup(1)
    os.dup2(2, 1)
    stream = io.TextIOWrapper(
        io.BufferedWriter(_Named(own, "wb")),
        encoding=shared.encoding,
        errors=shared.errors,
        line_buffering=shared.line_buffering,
        write_through=shared.write_through,
    )
    sys.stdout = stream
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # told by the command, which has flushed it
            stream.flush()
        os.dup2(own, 1)
        with contextlib.suppress(OSError):
            stream.close()


class _Named(io.FileIO):
    """A descriptor whose errors name it."""

    def write(self, data: Any, /) -> int | None:  # type: ignore[override]  # typeshed knows it as never None
        try:
            return super().write(data)
        except OSError as error:
            raise OSError(error.errno, error.strerror, "standard output") from error


class _Closed(io.TextIOBase):
    """A stream that is not there: to use it is an error."""

    def __init__(self, name: str) -> None:
        self._name = name

    @property
    def buffer(self) -> _Closed:
        return self

    @property
    def encoding(self) -> str:  # type: ignore[override]  # typeshed knows it as an attribute
        return "utf-8"

    def writable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def write(self, text: Any, /) -> int:
        if not text:
            return 0
        raise self._missing("lead it to a file or to /dev/null")

    def read(self, size: int | None = -1, /) -> str:
        raise self._missing("give it a file, or /dev/null")

    def readline(self, size: int = -1, /) -> str:  # type: ignore[override]
        raise self._missing("give it a file, or /dev/null")

    def _missing(self, advice: str) -> OSError:
        return OSError(errno.EBADF, f"{self._name} must be open, but it is closed; {advice}")
