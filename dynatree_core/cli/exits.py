"""How a command ends: its exit status, and one line about what went wrong (docs/exit-statuses.md)."""

from __future__ import annotations

import errno
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn, TextIO

import click

from dynatree_core.cli import console
from dynatree_core.cli.streams import abandon_output, standard_streams
from dynatree_core.errors import DynaTreeError, InputError
from dynatree_core.plugins.distributions import DistributionWarning, entry_points_for_all
from dynatree_core.plugins.foreign import prints_aside, raised

__all__ = ["DONE", "FAILED", "INTERRUPTED", "MISUSED", "STATUSES", "UNREAD", "end_process", "without_exits"]

DONE, FAILED, MISUSED, INTERRUPTED, UNREAD = 0, 1, 2, 130, 141

STATUSES = {
    DONE: "done",
    FAILED: "failed, or the verdict is bad",
    MISUSED: "cannot be used as given: found before anything runs",
    INTERRUPTED: "interrupted by Ctrl-C",
    UNREAD: "whoever read the output has left: a closed pipe, as of `head`",
}  # the table of docs/exit-statuses.md is compared with it


def end_process(command: Callable[[], int | None], *, error_code: int | None = None) -> NoReturn:
    """Run a command and end the process with its exit status. What goes wrong is told in one line.

    With DYNATREE_DEBUG=1 in the environment an error that nobody foresaw keeps its traceback.

    Args:
        command: its exit status is what it returns, 0 for None.
        error_code: for every error, where 1 and 2 are verdicts of the command; None: those of `STATUSES`.
    """
    with standard_streams(), prints_aside(), _distributions_in_one_line(), entry_points_for_all():
        exit_code = _exit_code(command, error_code or FAILED, error_code or MISUSED)
        if exit_code == INTERRUPTED:
            console.clean_terminal()
    sys.exit(exit_code)


def without_exits(command: Callable[[], int | None]) -> Callable[[], int | None]:
    """A command for which `exit()` is a fault: only code of others, a plugin or a library, calls it."""

    def checked() -> int | None:
        before = sys.stdout, sys.stderr
        try:
            return command()
        except SystemExit as error:
            if (sys.stdout, sys.stderr) != before:  # click's way to end at a closed pipe, with streams of its own
                sys.stdout, sys.stderr = before
                raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE)) from error
            raise DynaTreeError(
                f"a command must come to its end, but a plugin or library raised {raised(error)}; DYNATREE_DEBUG=1 "
                "shows where"
            ) from error

    return checked


def _exit_code(command: Callable[[], int | None], failed: int, misused: int) -> int:
    try:
        exit_code = command() or DONE
        sys.stdout.flush()  # here, where it can be told that it fails
        return exit_code
    except click.UsageError as error:
        hint = f"; see '{error.ctx.command_path} --help'" if error.ctx is not None else ""
        console.complain("error", error.format_message().rstrip(".") + hint)
        return misused
    except SystemExit as error:
        if error.code == MISUSED:  # argparse has told what is wrong
            return misused
        raise
    except DynaTreeError as error:
        if os.environ.get("DYNATREE_DEBUG") and isinstance(error.__cause__, SystemExit):
            raise
        console.complain("error", console.words_of(error))
        return misused if isinstance(error, InputError) else failed
    except click.Abort as error:  # click turns interrupts that it sees into this, and the end of a file too
        if isinstance(error.__cause__, EOFError):
            return _unforeseen(error.__cause__, failed)
        return INTERRUPTED
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        abandon_output()
        return UNREAD
    except OSError as error:  # a full disk, a file that cannot be read: it says itself what is wrong
        abandon_output()
        console.complain("error", _told(error))
        return failed
    except MemoryError as error:
        came = str(error) or type(error).__name__
        console.complain("error", f"no memory is left ({came}); take a smaller model or a shorter text")
        return failed
    except Exception as error:  # noqa: BLE001  # the last resort: whatever it is, a user gets a line
        return _unforeseen(error, failed)


def _unforeseen(error: Exception, failed: int) -> int:
    if os.environ.get("DYNATREE_DEBUG"):
        raise error
    console.complain("error", f"unexpected {type(error).__name__}: {error}; DYNATREE_DEBUG=1 shows where")
    return failed


def _told(error: OSError) -> str:
    """The system's words with the file's name, and no number."""
    if error.strerror is None:
        return str(error) or type(error).__name__
    names = [str(name) for name in (error.filename, error.filename2) if name is not None]
    return f"{error.strerror}: {' -> '.join(names)}" if names else error.strerror


@contextmanager
def _distributions_in_one_line() -> Iterator[None]:
    """Show the warning about a broken distribution as a line; others as Python does."""
    with warnings.catch_warnings():
        show = warnings.showwarning

        def show_in_one_line(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            if issubclass(category, DistributionWarning):
                console.complain("warning", str(message))
            else:
                show(message, category, filename, lineno, file, line)

        warnings.showwarning = show_in_one_line
        yield
