"""What has to hold before a release (`make release-check`): its files can be built, uploaded, installed and used.

Built are the sdist, and from it the wheel, as an index's users would. Both are checked by twine (metadata, the README
as an index shows it) and check-wheel-contents; the wheel is installed into a clean environment and its entry points
are loaded there. The version must be the same in pyproject.toml, CITATION.cff and CHANGELOG.md. Nothing is uploaded.

The tools are installed into an environment of their own, build/release-tools.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
TOOLS = ROOT / "build" / "release-tools"
REQUIRED = ("build==1.6.1", "check-wheel-contents==0.6.3", "twine==7.0.0")
NEEDED_IN_SDIST = ("pyproject.toml", "README.md", "LICENSE", "dynatree_core/__init__.py", "dynatree_core/py.typed")

USED = """
import os, sys
from importlib.metadata import distribution, entry_points
from pathlib import Path

found = distribution("dynatree")
assert found.version == sys.argv[1], found.version
for group in sorted({entry.group for entry in found.entry_points}):
    mine = [entry for entry in found.entry_points if entry.group == group]
    if group != "pytest11":  # its requirements come with the extra testing
        [entry.load() for entry in mine]
    print(group, *sorted(entry.name for entry in mine))
import dynatree_core
for name in dynatree_core.__all__:
    getattr(dynatree_core, name)
assert Path(dynatree_core.__file__).is_relative_to(sys.prefix), dynatree_core.__file__
"""


def version_of(pyproject: str) -> str:
    return str(tomllib.loads(pyproject)["project"]["version"])


def disagreements(pyproject: str, citation: str, changes: str) -> list[str]:
    """Where the texts of pyproject.toml, CITATION.cff and CHANGELOG.md name other versions."""
    version = version_of(pyproject)
    found = []
    cited = re.search(r"^version: (\S+)$", citation, re.M)
    if cited is None or cited[1] != version:
        found.append(f"CITATION.cff must say 'version: {version}', got {cited[1] if cited else 'none'}")
    if not re.search(rf"^## {re.escape(version)}\b", changes, re.M):
        found.append(f"CHANGELOG.md must have a section '## {version}'")
    return found


def missing(sdist: Path) -> list[str]:
    """What an sdist lacks of what it cannot be built or understood without."""
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    return [name for name in NEEDED_IN_SDIST if name not in names]


def run(*command: str | Path, cwd: Path = ROOT) -> None:
    subprocess.run([str(word) for word in command], check=True, cwd=cwd)


def tools() -> Path:
    """The folder with the tools' commands; made unless the same ones are there."""
    complete = TOOLS / "complete"
    if not complete.exists() or complete.read_text(encoding="utf-8") != "\n".join(REQUIRED):
        print("the tools, once", flush=True)
        venv.create(TOOLS, with_pip=True, clear=True)
        run(TOOLS / "bin" / "pip", "install", "-q", "--disable-pip-version-check", *REQUIRED)
        complete.write_text("\n".join(REQUIRED), encoding="utf-8")
    return TOOLS / "bin"


def check(scratch: Path) -> None:
    """Build, check, install and use.

    Raises:
        subprocess.CalledProcessError: a step failed, and has said why.
        ValueError: a version or a file is missing.
    """
    texts = [(ROOT / name).read_text(encoding="utf-8") for name in ("pyproject.toml", "CITATION.cff", "CHANGELOG.md")]
    wrong = disagreements(*texts)
    if wrong:
        raise ValueError("; ".join(wrong))
    bin_folder, dist = tools(), scratch / "dist"
    print("== sdist, and the wheel from it", flush=True)
    run(bin_folder / "python", "-m", "build", "--outdir", dist, ROOT, cwd=scratch)  # where no folder is called build
    [sdist], [wheel] = dist.glob("*.tar.gz"), dist.glob("*.whl")
    if missing(sdist):
        raise ValueError(f"{sdist.name} must have {', '.join(missing(sdist))}; see [tool.setuptools] in pyproject.toml")
    print("== metadata and contents", flush=True)
    run(bin_folder / "twine", "check", "--strict", sdist, wheel)
    run(bin_folder / "check-wheel-contents", wheel)
    print("== a clean environment", flush=True)
    venv.create(scratch / "clean", with_pip=True)
    clean = scratch / "clean" / "bin"
    pip = (clean / "pip", "install", "-q", "--disable-pip-version-check", "-c", ROOT / "constraints.txt")
    run(*pip, wheel, cwd=scratch)
    run(clean / "python", "-c", USED, version_of(texts[0]), cwd=scratch)
    run(clean / "dynatree", "--version", cwd=scratch)
    run(clean / "dynatree", "policies", cwd=scratch)
    (ROOT / "dist").mkdir(exist_ok=True)
    for file in (sdist, wheel):
        shutil.copy(file, ROOT / "dist")
        print(f"dist/{file.name}: {file.stat().st_size / 1e6:.1f} MB, ready to be uploaded")


def main() -> int | str:
    """Check, in a scratch folder.

    Returns:
        The exit code, or what has to be put right.
    """
    with tempfile.TemporaryDirectory() as scratch:
        try:
            check(Path(scratch))
        except ValueError as error:
            return str(error)
        except subprocess.CalledProcessError as error:
            return f"{Path(error.cmd[0]).name} ended with {error.returncode} and must succeed; it has said why above"
    return 0


if __name__ == "__main__":
    sys.exit(main())
