"""The tests of what depends on transformers, on its oldest supported, 5.23.0 and newest release (`make test-matrix`).

Each release is installed into a folder of its own under build/matrix, which comes first on the path; the rest of the
environment is that of constraints.txt. What pip finds as the newest release is asked each time. The last lines are a
table; pytest's output is kept beside the folders. Exit codes: 0 all passed, 1 something failed, 2 could not be run.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
import tomllib
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "build" / "matrix"
BETWEEN = ("5.23.0",)  # the last release in which a model's cache was called past_key_values
PART = (
    "test_architectures",
    "test_cache",
    "test_hf",
    "test_hf_folder",
    "test_hf_folder_command",
    "test_hf_rows",
    "test_lossless",
    "test_model_state",
    "test_native",
    "test_packed",
    "test_prefix_cache",
    "test_row_probe",
    "test_settings",
    "test_sink_cache",
    "test_stored",
    "test_transformers_cache",
    "test_wrappers",
)
PIP = (sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--quiet")


@dataclass(frozen=True)
class Outcome:
    """How the tests ended on one release."""

    release: str
    exit_code: int
    summary: str  # pytest's own last line
    seconds: float


def oldest(requirements: list[str]) -> str:
    """The oldest supported release of transformers, from the package's requirements: '>=5.17' means 5.17.0.

    Raises:
        ValueError: no lower bound.
    """
    for requirement in map(Requirement, requirements):
        if requirement.name == "transformers":
            for one in requirement.specifier:
                if one.operator == ">=":
                    return ".".join([*one.version.split("."), "0", "0"][:3])
    raise ValueError(f"the requirements must have a lower bound transformers>=VERSION, got {requirements}")


def newest() -> str:
    """The newest release of transformers that pip finds now.

    Raises:
        subprocess.CalledProcessError: pip cannot tell.
    """
    report = FOLDER / "newest.json"
    options = ("--dry-run", "--ignore-installed", "--no-deps", "--report", str(report))
    subprocess.run([*PIP, *options, "transformers"], check=True)
    return str(json.loads(report.read_text(encoding="utf-8"))["install"][0]["metadata"]["version"])


def unmet(release: Path) -> list[str]:
    """What the release in that folder requires and the environment has in no fitting version."""
    [found] = metadata.distributions(name="transformers", path=[str(release)])
    lacking = []
    for requirement in map(Requirement, found.requires or []):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            is_met = requirement.specifier.contains(metadata.version(requirement.name), prereleases=True)
        except metadata.PackageNotFoundError:
            is_met = False
        if not is_met:
            lacking.append(str(requirement))
    return lacking


def install(release: str) -> Path:
    """The folder with that release of transformers and what it needs besides; made unless it is there, whole.

    Raises:
        subprocess.CalledProcessError: pip could not, or the release cannot be imported.
    """
    folder = FOLDER / release
    if not (folder / "complete").exists():
        subprocess.run(
            [*PIP, "--upgrade", "--no-deps", "--target", str(folder), f"transformers=={release}"], check=True
        )
        if lacking := unmet(folder):
            print(f"  and {', '.join(lacking)}", flush=True)
            subprocess.run([*PIP, "--upgrade", "--target", str(folder), *lacking], check=True)
        quiet = "from dynatree_core.cli.quiet import quiet_imports; quiet_imports(); import transformers"
        check = f"{quiet}; transformers.LlamaForCausalLM; assert transformers.__version__ == '{release}'"
        subprocess.run([sys.executable, "-c", check], check=True, env=first_on_the_path(folder), cwd=FOLDER)
        (folder / "complete").touch()
    return folder


def first_on_the_path(folder: Path) -> dict[str, str]:
    """The environment in which that folder is searched first."""
    path = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path)}


def run(release: str, options: list[str]) -> Outcome:
    """Run the tests on one release."""
    print(f"transformers {release}", flush=True)
    folder, start = install(release), time.monotonic()
    files = [f"tests/{name}.py" for name in PART]
    command = [sys.executable, "-m", "pytest", "-n", "2", "--dist", "worksteal", *options, *files]
    log = FOLDER / f"{release}.log"
    with log.open("w", encoding="utf-8") as output:
        code = subprocess.run(
            command, cwd=ROOT, env=first_on_the_path(folder), stdout=output, stderr=subprocess.STDOUT, check=False
        ).returncode
    said = log.read_text(encoding="utf-8")
    if code:
        print(*re.findall(r"^(?:FAILED|ERROR) .*", said, re.M)[:20], f"  all of it: {log}", sep="\n", flush=True)
    lines = said.strip().splitlines() or ["nothing"]
    return Outcome(release, code, re.sub(r" in [\d.]+s.*", "", lines[-1].strip("= ")), time.monotonic() - start)


def table(outcomes: list[Outcome]) -> str:
    """One line a release."""
    rows = [("transformers", "tests", "seconds")]
    rows += [
        (one.release, ("FAILED: " if one.exit_code else "") + one.summary, f"{one.seconds:.0f}") for one in outcomes
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    return "\n".join(f"{row[0]:<{widths[0]}}  {row[1]:<{widths[1]}}  {row[2]:>7}" for row in rows)


def releases() -> list[str]:
    """The releases to test, oldest first."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return sorted({oldest(project["dependencies"]), *BETWEEN, newest()}, key=Version)


def main() -> int:
    """Run the tests on each release and print the table."""
    parser = argparse.ArgumentParser(prog="python .ci/matrix.py", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", metavar="VERSION", help="this release instead of the three")
    parser.add_argument("options", nargs="*", help="more options of pytest, after --")
    arguments = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    try:
        chosen = [arguments.only] if arguments.only else releases()
        outcomes = [run(release, arguments.options) for release in chosen]
    except subprocess.CalledProcessError as error:
        print(f"each release must be installed and imported, but this ended with {error.returncode}: {error.cmd}")
        return 2
    print(table(outcomes))
    return int(any(one.exit_code for one in outcomes))


if __name__ == "__main__":
    sys.exit(main())
