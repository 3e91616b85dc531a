"""The tests of clients that call `generate` themselves, such as LangChain (`make test-clients`).

They are installed into an environment of their own, build/clients, which searches the packages of this one too: torch
and transformers stay those of constraints.txt, and nothing of a client comes among them. Exit codes: those of pytest,
and 2 where they could not be installed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "build" / "clients"
KEPT = ("torch", "transformers")  # whatever a client would rather have


def requirements() -> list[str]:
    """The packages of the extra `clients`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [str(text) for text in project["optional-dependencies"]["clients"]]


def kept() -> str:
    """The lines of constraints.txt for the packages that stay as they are."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return "".join(f"{line}\n" for line in lines if line.partition("==")[0] in KEPT)


def install() -> Path:
    """The interpreter with the clients; made unless the same ones are there, whole.

    Raises:
        subprocess.CalledProcessError: pip could not; it has said why.
    """
    wanted = "\n".join([*requirements(), kept()])
    complete = FOLDER / "complete"
    python = FOLDER / "bin" / "python"
    if complete.exists() and complete.read_text(encoding="utf-8") == wanted:
        return python
    print(f"Setting up {FOLDER}, once", flush=True)
    venv.create(FOLDER, with_pip=True, clear=True)
    shared = sysconfig.get_path("purelib")
    own = sysconfig.get_path("purelib", vars={"base": str(FOLDER), "platbase": str(FOLDER)})
    Path(own, "shared.pth").write_text(f"import site; site.addsitedir({shared!r})\n", encoding="utf-8")
    (FOLDER / "kept.txt").write_text(kept(), encoding="utf-8")
    pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "-c", str(FOLDER / "kept.txt"), *requirements()], check=True)
    complete.write_text(wanted, encoding="utf-8")
    return python


def main(options: list[str]) -> int:
    """Install the clients and run their tests, with more options of pytest."""
    try:
        python = install()
    except subprocess.CalledProcessError as error:
        print(f"the clients must be installed by pip, which ended with {error.returncode}; it has said why above")
        return 2
    command = [str(python), "-m", "pytest", "-rs", "tests/clients", *options]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, "HF_HUB_OFFLINE": "1"}, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
