"""Renews constraints.txt (`make lock`): the newest release of everything that `pip install -e ".[dev]"` brings.

pip resolves in a dry run, which installs nothing and disregards what is installed. A line that ends with
`# held: REASON` keeps its version. What a build of torch for CUDA brings is left out: torch itself names its exact
versions, and a build for the CPU brings none of it.
"""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
LOCK = ROOT / "constraints.txt"
MADE_ON = "3.11 on Linux x86_64"  # other systems and versions of Python take other releases of some packages

HEADER = f"""\
# What `make demo`, `make test` and `.ci/run` install, and what the tests are run with: every package of the extra
# `dev`, by Python {MADE_ON}. Not requirements of the package: those are ranges, in pyproject.toml.
# `make lock` writes this file anew with the newest releases; a line with "held:" keeps its version.
# The default model's package has its version in dynatree_core/models/embedded.py.
"""
_LINE = re.compile(r"(?P<name>[\w.-]+)==(?P<version>\S+)(?:\s+# held: (?P<reason>.+))?")


def canonical(name: str) -> str:
    """A package's name as all spellings of it are compared."""
    return re.sub(r"[-_.]+", "-", name).lower()


def comes_with_torch(name: str) -> bool:
    """Whether a package is one of those that only a build of torch for CUDA brings."""
    return canonical(name).startswith(("nvidia-", "cuda-")) or canonical(name) == "triton"


def read(text: str) -> dict[str, str]:
    """Name -> pinned version.

    Raises:
        ValueError: a line that pins nothing.
    """
    return {canonical(found["name"]): found["version"] for found in _pins(text)}


def held(text: str) -> dict[str, str]:
    """Name -> why its version is kept."""
    return {canonical(found["name"]): found["reason"] for found in _pins(text) if found["reason"]}


def _pins(text: str) -> list[re.Match[str]]:
    found = []
    for line in text.splitlines():
        if line.strip() and not line.startswith("#"):
            pin = _LINE.fullmatch(line.strip())
            if pin is None:
                raise ValueError(f"a line of the lock must be NAME==VERSION [# held: REASON], got '{line}'")
            found.append(pin)
    return found


def render(versions: dict[str, str], reasons: dict[str, str]) -> str:
    """The whole file, from name -> version and name -> why it is kept."""
    lines = [
        f"{name}=={version}" + (f"  # held: {reasons[name]}" if name in reasons else "")
        for name, version in sorted(versions.items())
    ]
    return HEADER + "".join(f"{line}\n" for line in lines)


def resolved(report: dict[str, list[dict[str, dict[str, str]]]]) -> dict[str, str]:
    """Name -> version of what pip's report would install from an index; local parts such as +cpu are left out."""
    found = [item["metadata"] for item in report["install"] if "dir_info" not in item["download_info"]]
    return {
        canonical(package["name"]): package["version"].partition("+")[0]
        for package in found
        if not comes_with_torch(package["name"])
    }


def resolve(kept: list[str]) -> dict[str, str]:
    """Name -> newest version that pip finds for the extra `dev` beside those that are kept (NAME==VERSION)."""
    with tempfile.TemporaryDirectory() as folder:
        constraints, report = Path(folder, "kept.txt"), Path(folder, "report.json")
        constraints.write_text("\n".join(kept), encoding="utf-8")
        command = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--quiet", "--dry-run"]
        command += ["--ignore-installed", "--report", str(report), "-c", str(constraints), "-e", f"{ROOT}[dev]"]
        subprocess.run(command, check=True)
        return resolved(json.loads(report.read_text(encoding="utf-8")))


def main() -> int | str:
    """Write the file and say what has changed.

    Returns:
        The exit code, or why nothing was written.
    """
    here = f"{sys.version_info.major}.{sys.version_info.minor} on {platform.system()} {platform.machine()}"
    if here != MADE_ON:
        return (
            f"the lock must be renewed by Python {MADE_ON}, got {here}; use PYTHON= and `make clean`, or such a machine"
        )
    before = LOCK.read_text(encoding="utf-8")
    old, reasons = read(before), held(before)
    try:
        new = resolve([f"{name}=={old[name]}" for name in reasons])
    except subprocess.CalledProcessError as error:
        return f"pip must resolve the extra `dev`, but ended with {error.returncode}, for the reason that stands above"
    LOCK.write_text(render(new, reasons), encoding="utf-8")
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            print(f"{name}: {old.get(name, 'not there')} -> {new.get(name, 'not there')}")
    print(f"{LOCK.name} has {len(new)} packages; run `make test` before you commit it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
