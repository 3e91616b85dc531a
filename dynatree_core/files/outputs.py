"""Where a command may write: nothing that is somebody else's is ever replaced."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from dynatree_core.errors import InputError
from dynatree_core.files.writing import DRAFT

__all__ = ["check_out"]

NUM_NAMED = 3


def check_out(path: Path, made_by: str, is_own: Callable[[Path], bool], *, is_file: bool = False) -> None:
    """Refuse a place for results, before anything is loaded, unless it is new, empty, or made by the same program.

    Args:
        path: a folder, or with `is_file` a file.
        made_by: the program, for the message.
        is_own: whether what is there was made by it; asked only where there is something.

    Raises:
        InputError: it holds something else, is of the other kind, or cannot be written.
    """
    kind = "file" if is_file else "folder"
    try:
        if path.exists():
            if path.is_dir() == is_file:
                raise InputError(f"what {made_by} writes goes to a {kind}, got {path}, which is none; choose another")
            held = _held(path, is_file)
            if held and not is_own(path):
                raise InputError(
                    f"what {made_by} writes must go to a {kind} that is new, empty or made by it, got {path}, which "
                    f"holds {held}; choose another"
                )
        elif path.is_symlink():
            raise InputError(f"what {made_by} writes goes to a {kind}, got {path}, a link to nothing; choose another")
    except PermissionError as error:
        raise InputError(f"what {made_by} writes needs a {kind} that may be read, got {path} ({error})") from error
    _check_writable(path, made_by, kind)


def _held(path: Path, is_file: bool) -> str:
    """What is there, for a message; "" for nothing. Folders without files are nothing, and so are our drafts."""
    if is_file:
        return "something else" if not path.is_file() or path.stat().st_size else ""
    files = (file for file in path.rglob("*") if not file.is_dir() and not file.name.startswith(DRAFT))
    if next(files, None) is None:
        return ""
    names = sorted(entry.name for entry in path.iterdir())
    return ", ".join(names[:NUM_NAMED]) + (f" and {len(names) - NUM_NAMED} more" if len(names) > NUM_NAMED else "")


def _check_writable(path: Path, made_by: str, kind: str) -> None:
    place = path
    while not os.path.lexists(place) and place.parent != place:
        place = place.parent
    needed = os.W_OK if place.is_file() else os.W_OK | os.X_OK
    if (place != path and not place.is_dir()) or not os.access(place, needed):
        raise InputError(
            f"what {made_by} writes needs a {kind} that can be written, got {path}, which {place} does not allow; "
            "choose another"
        )
