"""Packages with plugins, as tests install them into a folder of their own, and the command that meets them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import attrs
import pytest
from command import run_command

from dynatree_core.plugins import distributions
from dynatree_core.plugins.registry import (
    plugin_table,
)

SOUND = """
from dynatree_core import hookimpl

class P:
    "A sound policy."

    def __init__(self, width=2):
        self.width = width

    @hookimpl
    def branch_factor(self, frontier):
        return self.width
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Path]]:
    """Called with a name and code: a package of that name is installed. Returns the folder of its metadata."""
    modules = []

    def install(
        name: str, code: str = SOUND, *, metadata: str | bytes | None = "", entries: str | bytes | None = None
    ) -> Path:
        site = tmp_path / name
        info = site / f"{name}-1.0.dist-info"
        info.mkdir(parents=True)
        (site / f"module_of_{name}.py").write_text(code)
        modules.append(f"module_of_{name}")
        for file, text in (
            ("METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n" if metadata == "" else metadata),
            ("entry_points.txt", entries or f"[dynatree.policies]\n{name} = module_of_{name}:P\n"),
        ):
            if text is not None:
                (info / file).write_bytes(text.encode() if isinstance(text, str) else text)
        monkeypatch.syspath_prepend(site)
        plugin_table.cache_clear()
        return info

    monkeypatch.setattr(distributions, "_told", set())
    yield install
    plugin_table.cache_clear()
    for name in modules:
        sys.modules.pop(name, None)


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs the command in this process: its exit status, what it printed, and what it complained of."""

    def command(*args: str) -> tuple[int, str, str]:
        plugin_table.cache_clear()
        return attrs.astuple(run_command(capfd, *args))

    return command
