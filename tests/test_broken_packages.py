"""Packages as they are found: one that is broken costs itself only."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from fake_package import SOUND, package, run

from dynatree_core import build_stack
from dynatree_core.errors import ParameterError, PluginLoadError
from dynatree_core.plugins import distributions
from dynatree_core.plugins.distributions import DistributionWarning, entry_points
from dynatree_core.plugins.registry import (
    POLICIES,
    plugin_table,
)

__all__ = ["package", "run"]  # fixtures

ROOT = Path(__file__).parents[1]


BROKEN: dict[str, dict[str, Any]] = {
    "no_metadata": {"metadata": None},
    "empty_metadata": {"metadata": "\n"},
    "name_in_the_description": {"metadata": "Metadata-Version: 2.1\n\nName: name_in_the_description\n"},
    "metadata_of_bytes": {"metadata": b"Metadata-Version: 2.1\nName: caf\xe9\n"},
    "entries_of_bytes": {"entries": b"[dynatree.policies]\nx = caf\xe9:P\n"},
    "entries_without_value": {"entries": "[dynatree.policies]\nx\n"},
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_distribution_that_cannot_be_read_costs_itself_only(name: str, package: Any, run: Any) -> None:
    info = package(name, **BROKEN[name])
    package("sound")
    code, out, err = run("policies", "--json")
    assert code == 0
    names = [row["name"] for row in json.loads(out)]
    assert {"sound", "phase3", "fixed"} <= set(names)
    assert name not in names
    [line] = err.splitlines()
    assert line.startswith("dynatree: warning: an installed distribution must have a METADATA file")
    assert str(info) in line
    distributions._told.clear()
    code, out, err = run("--help")
    assert code == 0
    assert "generate" in out
    assert str(info) in err


@pytest.mark.parametrize("name", ["entries_of_bytes", "entries_without_value"])
def test_torch_is_imported_beside_entry_points_that_cannot_be_read(name: str, package: Any) -> None:
    """torch fails there by itself, so a process of its own has to show it."""
    info = package(name, **BROKEN[name])
    command = [sys.executable, "-c", "from dynatree_core.cli.group import main; main()", "drafters", "--json"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(info.parent), str(ROOT)])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "prompt_lookup" in [row["name"] for row in json.loads(done.stdout)]
    assert str(info) in done.stderr


def test_entry_points_that_may_not_be_read_are_told(package: Any) -> None:
    info = package("hidden")
    (info / "entry_points.txt").unlink()
    (info / "entry_points.txt").mkdir()  # importlib passes over it as it does over a file without permission
    with pytest.warns(DistributionWarning, match=r"hidden-1\.0\.dist-info \(IsADirectoryError"):
        assert "fixed" in [entry.name for entry in entry_points(group=POLICIES)]


def test_others_troubles_are_not_told(package: Any) -> None:
    package("stranger", entries="[console_scripts]\nx\n")
    package("nameless", metadata=None, entries="[console_scripts]\nx = y:z\n")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "fixed" in [entry.name for entry in entry_points(group=POLICIES)]


def test_a_distribution_without_a_version_works(package: Any, run: Any) -> None:
    package("unversioned", metadata="Metadata-Version: 2.1\nName: unversioned\n")
    code, out, err = run("policies", "--json")
    assert (code, err) == (0, "")
    [row] = [row for row in json.loads(out) if row["name"] == "unversioned"]
    assert (row["package"], row["version"], row["error"]) == ("unversioned", "?", None)


def test_names_are_found_without_parsing_projects_pages(package: Any, monkeypatch: Any) -> None:
    """importlib parses the whole of METADATA for a name, which each start of a command would wait for."""
    package("plain")
    package("returns", metadata=b"Metadata-Version: 2.1\r\nNAME:  returns \r\nVersion: 1.0\r\n\r\nName: another\r\n")
    monkeypatch.setattr("email.message_from_string", lambda text: pytest.fail("a page was parsed"))
    assert {"plain", "returns", "fixed"} <= {entry.name for entry in entry_points(group=POLICIES)}


def test_a_distribution_that_is_found_twice_is_one(package: Any, tmp_path: Path, monkeypatch: Any) -> None:
    package("twofold")
    (tmp_path / "lib64").symlink_to(tmp_path / "twofold")
    monkeypatch.syspath_prepend(tmp_path / "lib64")
    plugin_table.cache_clear()
    assert str(build_stack("twofold")) == "twofold"


RAISING = {
    "exit_with_0": ("import sys; sys.exit(0)", r"SystemExit: it called exit\(0\)"),
    "exit_with_nothing": ("exit()", r"SystemExit: it called exit\(\)"),
    "exit_with_words": ("raise SystemExit('no GPU')", r"it called exit\('no GPU'\)"),
    "base_exception": ("class Halt(BaseException): pass\nraise Halt('here')", "Halt: here"),
    "cancelled": ("import asyncio; raise asyncio.CancelledError", "CancelledError"),
}


@pytest.mark.parametrize("name", RAISING)
def test_a_module_that_raises_anything_is_named(name: str, package: Any, run: Any) -> None:
    code, message = RAISING[name]
    package(name, SOUND + code)
    with pytest.raises(PluginLoadError, match=f"'{name}' is installed but cannot be imported .*{message}"):
        build_stack(name)
    status, out, err = run("policies", "--json")
    rows = {row["name"]: row for row in json.loads(out)}
    assert (status, err) == (0, "")
    assert "cannot be imported" in rows[name]["error"]
    assert rows["fixed"]["error"] is None
    status, out, err = run("generate", "--policy", name, "Hi")
    assert (status, out) == (1, "")
    [line] = err.splitlines()
    assert name in line


def test_a_module_that_is_interrupted_is_no_fault_of_its_own(package: Any) -> None:
    package("interrupted", SOUND + "raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        build_stack("interrupted")


def test_a_command_whose_module_exits(package: Any, run: Any) -> None:
    package("ends", "print('loading'); exit()", entries="[dynatree.commands]\nends = module_of_ends:command\n")
    code, out, err = run("--help")
    assert code == 0
    assert "broken: SystemExit: it called exit()" in out
    assert "policies" in out
    assert "loading" not in out
    assert err == "loading\n"
    assert run("ends")[0] == 1


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("def __init__(self): exit()", PluginLoadError),
        ("def __init__(self, width): self.width = width", ParameterError),
        ("def __init__(self): raise ValueError('no')", ParameterError),
    ],
)
def test_a_constructor_that_raises_anything(code: str, error: type[Exception], package: Any) -> None:
    package("unmakable", f"class P:\n    {code}\n")
    with pytest.raises(error, match="'unmakable'"):
        build_stack("unmakable")


def test_a_parameter_that_cannot_be_shown(package: Any, run: Any) -> None:
    code = "class Odd:\n    def __repr__(self): raise RuntimeError('no words')\n"
    package("wordless", code + SOUND.replace("width=2", "width=Odd()"))
    code, out, err = run("policies", "--json")
    rows = {row["name"]: row for row in json.loads(out)}
    assert (code, err) == (0, "")
    assert "no words" in rows["wordless"]["error"]
    assert run("policies")[0] == 0
