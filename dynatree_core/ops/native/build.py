"""Compile the library: `python -m dynatree_core.ops.native`, or as a part of installing the package.

One C source becomes one library for each target of this machine's architecture, and the program chooses among them by
what the CPU has. The compiler is the one of the package `ziglang`, which is a build requirement and the same
everywhere; where it is not installed, the system's (`cc`). The environment's `DYNATREE_CC` names another one. Nothing
here needs more than the standard library.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

__all__ = ["TARGETS", "BuildError", "build", "compiler", "library_name", "source_digest"]

FOLDER = Path(__file__).parent
SOURCE = FOLDER / "source"
GLIBC = "2.28"  # the oldest that zig links for: of 2018
AVX2 = ("-mavx2", "-mfma", "-mf16c")
AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq")
# by architecture, as platform.machine() has it; the best comes last
TARGETS: dict[str, dict[str, tuple[str, ...]]] = {
    "x86_64": {"x86_64": (), "x86_64_v3": AVX2, "x86_64_v4": AVX2 + AVX512},
    "aarch64": {"aarch64": ()},
}
FLAGS = ("-std=gnu11", "-O3", "-s", "-fPIC", "-shared", "-pthread", "-ffp-contract=off", "-fno-math-errno")


class BuildError(Exception):
    """The library cannot be built; the message says why."""


def library_name(target: str) -> str:
    return f"dynatree_ops.{target}.so"


def source_digest() -> str:
    """Of all sources: a library knows which it was built from."""
    digest = hashlib.sha256()
    for file in sorted(SOURCE.glob("*.[ch]")):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def compiler(machine: str) -> tuple[list[str], str]:
    """The command that compiles for an architecture, and its name.

    Raises:
        BuildError: there is none.
    """
    if named := os.environ.get("DYNATREE_CC"):
        return shlex.split(named), named
    if importlib.util.find_spec("ziglang") is not None:
        command = [sys.executable, "-m", "ziglang", "cc", "-target", f"{machine}-linux-gnu.{GLIBC}"]
        return command, "zig"
    if (found := shutil.which("cc")) is not None:
        return [found], found
    raise BuildError("no C compiler is installed: neither the package ziglang nor the system's cc")


def build(folder: Path = FOLDER, *, say: Callable[[str], None] = print) -> list[Path]:
    """Compile the library for each target of this machine's architecture.

    Args:
        folder: where the files go.
        say: is told what is being done.

    Returns:
        The files.

    Raises:
        BuildError: the system is not Linux on a known architecture, there is no compiler, or it failed.
    """
    machine = platform.machine().lower().replace("amd64", "x86_64")
    if platform.system() != "Linux" or machine not in TARGETS:
        raise BuildError(
            f"it is built on Linux on {' and '.join(TARGETS)} only, this is {platform.system()} on {machine}"
        )
    command, name = compiler(machine)
    targets = TARGETS[machine]
    say(f"compiling the operators for {', '.join(targets)} with {name}, which takes some 20 seconds")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as cache, ThreadPoolExecutor() as pool:
        # of its own: a home folder need not be writable
        environment = {**os.environ, "ZIG_GLOBAL_CACHE_DIR": cache, "ZIG_LOCAL_CACHE_DIR": cache}
        sources = sorted(map(str, SOURCE.glob("*.c")))

        def compile_one(target: str) -> Path:
            made = Path(cache, library_name(target))
            arguments = [*FLAGS, *targets[target], f'-DSOURCE_DIGEST="{source_digest()}"', *sources, "-lm"]
            done = subprocess.run(
                [*command, *arguments, "-o", str(made)], capture_output=True, text=True, env=environment
            )
            if done.returncode:
                raise BuildError(f"{name} ended with {done.returncode}: {done.stderr.strip()[-2000:]}")
            final = folder / made.name
            beside = final.with_suffix(f".{os.getpid()}")  # a library that is in use is replaced, not written to
            shutil.copyfile(made, beside)
            beside.replace(final)
            return final

        return list(pool.map(compile_one, targets))
