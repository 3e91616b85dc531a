"""Files that this package writes: each is there whole or not at all, and the umask decides who may read it."""

from __future__ import annotations

import os
import re
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["DRAFT", "share", "unreadable", "whole_file", "write_text"]

DRAFT = ".part-"  # how the names of files begin that are being written
PROBE_BYTES = 1 << 20


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Write a file: the block fills a draft beside it, which takes its place at the end.

    The draft has the file's ending, by which some libraries choose a format. Its mode becomes that of any new file
    here, whatever the block's library gives it: safetensors keeps what it writes from all but its owner.

    Raises:
        OSError: naming the file and the system's reason, also where a library hides it in an error of its own.
    """
    path = Path(os.path.realpath(path))  # a link stays one
    draft = path.with_name(f"{DRAFT}{os.getpid()}-{threading.get_ident()}-{path.name}")
    try:
        draft.touch()
        mode = _mode(draft)
        yield draft
        _set_mode(draft, mode)
        draft.replace(path)
    except Exception as error:
        cause = _cause(error, draft, path)
        if cause is None:
            raise
        raise cause from error
    finally:
        with suppress(OSError):  # on a disk that can be written no more; the error above tells
            draft.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text in UTF-8, with its newlines as they are; whole or not at all.

    Raises:
        OSError: naming the file.
    """
    with whole_file(path) as draft, draft.open("w", encoding="utf-8", newline="") as file:
        file.write(text)


def share(folder: Path) -> None:
    """Give the files of a folder the mode of new ones; those of other users stay as they are.

    Raises:
        OSError: the folder cannot be written.
    """
    probe = folder / f"{DRAFT}{os.getpid()}-{threading.get_ident()}"
    probe.touch()
    mode = _mode(probe)
    probe.unlink()
    for file in folder.iterdir():
        if file.is_file():
            with suppress(PermissionError):  # another user's
                _set_mode(file, mode)


def unreadable(*paths: Path) -> str | None:
    """The first of some files and folders, and of the files in them, that this user may not read, with mode and owner.

    None where there is none; what does not exist is passed over.
    """
    for path in paths:
        try:
            if not path.exists():
                continue
            for file in (path, *(sorted(path.iterdir()) if os.access(path, os.R_OK) and path.is_dir() else ())):
                if not os.access(file, os.R_OK | (os.X_OK if file.is_dir() else 0)):
                    found = file.stat()
                    return f"{file} with mode {stat.filemode(found.st_mode)} of user {found.st_uid}"
        except PermissionError as error:
            return f"{error.filename or path} in a folder that this user may not search"
    return None


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def _set_mode(path: Path, mode: int) -> None:
    if _mode(path) != mode:
        path.chmod(mode)


def _cause(error: Exception, draft: Path, path: Path) -> OSError | None:
    """What the system said, where that is why the file could not be written."""
    if isinstance(error, OSError):
        is_ours = error.filename in (None, str(draft)) and error.errno is not None
        return OSError(error.errno, error.strerror, str(path)) if is_ours else None
    told = re.search(r"\(os error (\d+)\)", str(error))  # safetensors, whose errors are no OSErrors
    if told:
        return OSError(int(told[1]), os.strerror(int(told[1])), str(path))
    try:
        with draft.open("ab") as file:  # torch tells no reason: what does the system say to a little more?
            file.write(bytes(PROBE_BYTES))
    except OSError as cause:
        return OSError(cause.errno, cause.strerror, str(path))
    return None
