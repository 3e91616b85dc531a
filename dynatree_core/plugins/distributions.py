"""What installed distributions offer as entry points. A distribution that cannot be read costs only its own.

`importlib.metadata.entry_points` fails altogether where one distribution has lost its name or has an unreadable
`entry_points.txt`, as an interrupted pip leaves them. Here each is read by itself. Nothing heavy is imported.
"""

from __future__ import annotations

import importlib.metadata
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import Distribution, EntryPoint, EntryPoints, distributions
from typing import Any

__all__ = ["DistributionWarning", "entry_points", "entry_points_for_all", "package_of"]

ENTRY_POINTS = "entry_points.txt"
OURS = "dynatree."  # how the names of our groups begin
UNKNOWN = "?"
METADATA_FILES = ("METADATA", "PKG-INFO", "")  # as importlib looks for it; the last for an egg-info that is a file

_END_OF_HEADERS = re.compile(r"(?:^|\n)\r?\n")
_NAME = re.compile(r"^name:[ \t]*(.*\S)", re.IGNORECASE | re.MULTILINE)

_told: set[str] = set()  # each fault is told once a process


class DistributionWarning(UserWarning):
    """An installed distribution whose plugins are left out, because it cannot be read."""


def entry_points(*, group: str) -> list[EntryPoint]:
    """The entry points of a group; of two distributions of one name, the first on the search path counts.

    A `DistributionWarning` tells of each distribution that cannot be read and may offer something of ours.
    """
    return [entry for entry in _readable_entries() if entry.group == group]


@contextmanager
def entry_points_for_all() -> Iterator[None]:
    """Let others in this process pass over what cannot be read too, while the block runs.

    torch, for one, asks all distributions for device backends when it is imported, and would fail at a broken one. The
    block should be a command: within somebody's program their `importlib` is theirs.
    """
    before = importlib.metadata.entry_points

    def readable(**wanted: Any) -> EntryPoints:
        return EntryPoints(_readable_entries()).select(**wanted)

    importlib.metadata.entry_points = readable  # type: ignore[assignment]  # typeshed has several signatures
    try:
        yield
    finally:
        importlib.metadata.entry_points = before


def _readable_entries() -> list[EntryPoint]:
    found: list[EntryPoint] = []
    seen: set[str] = set()
    for distribution in distributions():
        try:
            name = _name(distribution)
            if name in seen:
                continue
            entries = list(distribution.entry_points)
        except Exception as error:  # noqa: BLE001  # whatever importlib makes of a damaged folder
            _tell(distribution, f"{type(error).__name__}: {error}")
            continue
        if name is None:
            if any(entry.group.startswith(OURS) for entry in entries):
                _tell(distribution, "METADATA is missing or has no Name")
            continue
        seen.add(name)
        if not entries and (reason := _unread(distribution)) is not None:
            _tell(distribution, reason)
        found += entries
    return found


def package_of(entry: EntryPoint) -> tuple[str, str]:
    """Name and version of the distribution that an entry point comes from, "?" for what is not known."""
    name, version = (_field(entry.dist, field) for field in ("name", "version"))
    return name or UNKNOWN, version or UNKNOWN


def _field(distribution: Distribution | None, field: str) -> str | None:
    """None where METADATA lacks it, for which importlib raises in some versions of Python."""
    try:
        return getattr(distribution, field, None)
    except (KeyError, TypeError):
        return None


def _name(distribution: Distribution) -> str | None:
    """As package indexes spell it; None where it has none.

    importlib parses all of METADATA for a name, with the project's page in it: for a hundred distributions that takes
    longer than all else about them. It is a line of the headers, which end with the first empty line.
    """
    files = (distribution.read_text(file) for file in METADATA_FILES)
    text = next((one for one in files if one), "")
    found = _NAME.search(_END_OF_HEADERS.split(text, maxsplit=1)[0])
    return re.sub("[-_.]+", "-", found[1]).lower() if found else None


def _unread(distribution: Distribution) -> str | None:
    """Why a distribution has no entry points although it has the file: importlib passes over what it may not open."""
    place = _place(distribution)
    if place is None or not _exists(place / ENTRY_POINTS):
        return None
    try:
        (place / ENTRY_POINTS).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return None  # an empty file


def _place(distribution: Distribution) -> Any:
    """The folder of its metadata, a path or one within a zip file; importlib gives it no public name."""
    return getattr(distribution, "_path", None)


def _exists(path: Any) -> bool:
    try:
        return bool(path.exists())
    except OSError:
        return True  # in a folder that may not be searched


def _may_be_ours(distribution: Distribution) -> bool:
    """Whether a file that cannot be parsed names one of our groups; a file that cannot be read might."""
    place = _place(distribution)
    if place is None:
        return True
    try:
        return not _exists(place / ENTRY_POINTS) or OURS.encode() in (place / ENTRY_POINTS).read_bytes()
    except OSError:
        return True


def _tell(distribution: Distribution, reason: str) -> None:
    if not _may_be_ours(distribution):
        return  # somebody else's trouble
    place = _place(distribution) or UNKNOWN
    if str(place) not in _told:
        _told.add(str(place))
        warnings.warn(
            f"an installed distribution must have a METADATA file and readable entry points, got {place} ({reason}); "
            "its plugins are left out; install it anew or delete that folder",
            DistributionWarning,
            stacklevel=3,
        )
