"""Makes the environment that `make` runs everything in, and says what it is doing, how far it is and how long it took.

It needs nothing but the Python that runs it. `python .ci/set_up.py .venv` makes or renews that folder.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
import venv
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[1]
LOCK = ROOT / "constraints.txt"
QUIET_SECONDS = 10.0  # between two lines of progress where the output is no terminal


def progress(lines: Iterable[str], num_packages: int) -> Iterable[str]:
    """What to show after each line of pip's output that begins something, such as '7 of 80: numpy'."""
    seen: set[str] = set()
    for line in lines:
        collecting, downloading = (
            re.match(r"Collecting ([\w.-]+)", line),
            re.match(r"\s*Downloading (\S+ \(.+\))", line),
        )
        if collecting:
            seen.add(collecting[1].lower())
            yield f"{min(len(seen), num_packages)} of {num_packages}: {collecting[1]}"
        elif downloading:
            yield f"{min(len(seen), num_packages)} of {num_packages}: {Path(downloading[1]).name}"
        elif line.startswith("Installing collected packages") and num_packages > 2:
            yield "all are here: unpacking them, which takes a minute or two without a line"
        elif line.startswith("Building wheels for collected packages: dynatree"):
            yield "compiling the operators in C, which takes some 20 seconds"


def show(messages: Iterable[str]) -> None:
    """Keep the last message on one line of a terminal; elsewhere print one now and then, and the last."""
    if sys.stdout.isatty():
        for message in messages:
            print(f"\r\x1b[K  {message[:100]}", end="", flush=True)
        print("\r\x1b[K", end="", flush=True)
        return
    printed, last = time.monotonic(), ""
    for message in messages:
        last = message
        if time.monotonic() - printed > QUIET_SECONDS or message.startswith(("all are here", "compiling")):
            print(f"  {message}", flush=True)
            printed, last = time.monotonic(), ""
    if last:
        print(f"  {last}", flush=True)


def pip_install(python: Path, *arguments: str, num_packages: int) -> None:
    """Install with progress in so many packages; warnings and errors of pip come as they are.

    Raises:
        subprocess.CalledProcessError: pip could not; it has said why.
    """
    command = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "-c", str(LOCK), *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as pip:
        assert pip.stdout is not None
        show(progress(pip.stdout, num_packages))
    if pip.returncode:
        raise subprocess.CalledProcessError(pip.returncode, command)


def set_up(folder: Path) -> None:
    """Make the environment in `folder`, with the versions of constraints.txt and this package in editable mode."""
    start = time.monotonic()
    num_packages = sum("==" in line for line in LOCK.read_text(encoding="utf-8").splitlines() if line[:1] != "#")
    print(f"Setting up {folder}, once:", flush=True)
    print("1. an empty environment (some seconds)", flush=True)
    venv.create(folder, with_pip=True)
    python = folder.absolute() / "bin" / "python"
    print(f"2. {num_packages} packages, torch and transformers among them: minutes, by the connection", flush=True)
    # pinned as well, so that no others build this package: setuptools, and the compiler of its operators in C
    pip_install(python, "setuptools", "ziglang", num_packages=2)
    pip_install(python, "--no-build-isolation", "-e", ".[dev]", num_packages=num_packages)
    print(f"Set up in {time.monotonic() - start:.0f} s", flush=True)


def main(arguments: list[str]) -> int | str:
    """Set up the folder that is named.

    Returns:
        The exit code, or why it could not be done.
    """
    if len(arguments) != 1:
        return f"one folder must be named, such as .venv, got {arguments}"
    if sys.version_info < (3, 11):  # noqa: UP036  # it runs before anything has looked at the version
        return f"DynaTree needs Python 3.11 or newer, got {sys.version}; name another one: make PYTHON=python3.11"
    try:
        set_up(Path(arguments[0]))
    except subprocess.CalledProcessError as error:
        return f"the environment must be installed by pip, which ended with {error.returncode}; it has said why above"
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
