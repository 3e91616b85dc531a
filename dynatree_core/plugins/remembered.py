"""What was read of installed packages, kept so that a list of them need not import them again.

To say what a plugin does, its module has to be imported, and most import torch. What was found is written into a
JSON file of the user's cache folder, and holds as long as nothing has changed: name and version of the
distribution, the entry point, size and date of every code file of its package and of DynaTree, those of the files
of the classes that it builds on, and the version of Python.

A file that cannot be read is as good as none, and a folder that cannot be written is left alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import sys
from collections.abc import Collection, Iterator, Mapping
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

from dynatree_core.files.folders import cache_root
from dynatree_core.files.writing import write_text
from dynatree_core.plugins.distributions import package_of

__all__ = ["Memory", "folder"]

FORMAT_VERSION = 1
CODE = {".py", ".so", ".pyd", ".dylib"}  # endings of the files that decide what an import gives

Files = list[tuple[str, int, int]]  # path, bytes, date in nanoseconds


def folder() -> Path:
    """Where it is kept."""
    return cache_root() / "plugins"


class Memory:
    """Facts about entry points, as JSON objects; one file for each environment.

    Args:
        environment: what tells one environment from another that shares the cache folder.
    """

    def __init__(self, environment: str = sys.prefix) -> None:
        name = hashlib.sha256(f"{environment} {Path(__file__).parent}".encode(errors="surrogateescape"))
        self.path = folder() / f"{name.hexdigest()[:16]}.json"
        self._files: dict[str, Files | None] = {}  # of a top-level package, looked at once
        self._known = self._read()
        self._new: dict[str, Any] = {}

    def recall(self, entry: EntryPoint, *, beside: str = "") -> dict[str, Any] | None:
        """What is known of an entry point; None where that is nothing, or no longer sure.

        Args:
            beside: whatever else the facts depend on.
        """
        kept = self._known.get(_key(entry))
        if not isinstance(kept, dict) or not isinstance(kept.get("facts"), dict):
            return None
        files = kept.get("files")
        if not isinstance(files, list) or not all(isinstance(name, str) for name in files):
            return None
        if kept.get("stamp") is None or kept["stamp"] != self._stamp(entry, files, beside):
            return None
        facts: dict[str, Any] = kept["facts"]
        return facts

    def keep(
        self, entry: EntryPoint, facts: Mapping[str, Any], *, files: Collection[str] = (), beside: str = ""
    ) -> None:
        """Note what was found; it is written by `save`. What JSON does not give back as it was is not kept.

        Args:
            files: files besides those of the entry point's own package that the facts come from.
            beside: whatever else the facts depend on.
        """
        paths = sorted(files)
        stamp = self._stamp(entry, paths, beside)
        try:
            is_kept = stamp is not None and json.loads(json.dumps(facts)) == facts
        except (TypeError, ValueError, RecursionError):
            is_kept = False
        if is_kept:
            self._new[_key(entry)] = {"stamp": stamp, "files": paths, "facts": dict(facts)}

    def save(self) -> None:
        """Write what is new, whole or not at all; nothing happens where the folder cannot be written."""
        if not self._new:
            return
        text = json.dumps({"format_version": FORMAT_VERSION, "known": {**self._known, **self._new}}, indent=1)
        with contextlib.suppress(OSError):  # a folder of somebody else, a full disk: it is read anew next time
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_text(self.path, text)

    def _read(self) -> dict[str, Any]:
        try:
            document = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        if not isinstance(document, dict) or document.get("format_version") != FORMAT_VERSION:
            return {}
        known = document.get("known")
        return known if isinstance(known, dict) else {}

    def _stamp(self, entry: EntryPoint, files: Collection[str], beside: str) -> str | None:
        """A word that changes with whatever the facts depend on; None where that cannot be told."""
        packages = sorted({entry.value.partition(":")[0].partition(".")[0].strip(), "dynatree_core"})
        of_packages = [self._package_files(name) for name in packages]
        try:
            others = _dated(files)
        except OSError:
            return None
        if None in of_packages:
            return None
        seen = [FORMAT_VERSION, sys.version, package_of(entry), _key(entry), packages, of_packages, others, beside]
        return hashlib.sha256(json.dumps(seen).encode()).hexdigest()

    def _package_files(self, package: str) -> Files | None:
        """The code files of a top-level package or module, found without importing it; None where there are none."""
        if package not in self._files:
            try:
                spec = importlib.util.find_spec(package)
                places = list(spec.submodule_search_locations or []) if spec is not None else []
                single = [spec.origin] if spec is not None and spec.has_location and spec.origin else []
                self._files[package] = _dated({*single, *(path for place in places for path in _code_under(place))})
            except (ImportError, ValueError, AttributeError, OSError):  # find_spec's, and a file that is gone
                self._files[package] = None
        return self._files[package] or None


def _dated(paths: Collection[str]) -> Files:
    found = [(path, os.stat(path)) for path in sorted(paths)]
    return [(path, stat.st_size, stat.st_mtime_ns) for path, stat in found]


def _key(entry: EntryPoint) -> str:
    return f"{entry.group} {entry.name} = {entry.value}"


def _code_under(place: str) -> Iterator[str]:
    for parent, folders, files in os.walk(place):
        folders[:] = [name for name in folders if name != "__pycache__"]
        yield from (os.path.join(parent, name) for name in files if os.path.splitext(name)[1] in CODE)
