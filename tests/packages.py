"""Installing a package of docs or templates as anyone would, but offline, and running Python with it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def install(source: Path, folder: Path) -> Path:
    """Install the package into `folder`/site, from a copy in `folder`/source: building leaves files beside the sources.

    Returns:
        The site, a folder to search for modules and entry points.
    """
    # not imported: it takes the place of distutils, which a process may have loaded already
    if int(version("setuptools").partition(".")[0]) < 77:
        pytest.skip("building a package offline needs setuptools 77 or newer here")
    shutil.copytree(source, folder / "source", ignore=shutil.ignore_patterns("build", "*.egg-info", "__pycache__"))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    offline = ["--no-deps", "--no-build-isolation", "--no-index"]
    in_subprocess([*pip, *offline, "--target", str(folder / "site"), str(folder / "source")])
    return folder / "site"


def in_subprocess(command: list[str], *search_path: Path, cwd: Path = ROOT) -> str:
    """Run a command that has to succeed; the folders are searched for modules and entry points."""
    # one thread: on matrices this small, more only wait for each other
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, search_path)), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def run_tests_of(site: Path) -> None:
    """Run the tests that lie beside an installed package's sources; all must pass, and none be left out."""
    tests = site.parent / "source" / "tests"
    pytest_here = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tests), str(tests)]
    said = in_subprocess(pytest_here, site)
    assert " passed" in said
    assert "skipped" not in said
