"""Loading the library that fits this CPU."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
from pathlib import Path

import attrs
import torch

from dynatree_core.ops.native.build import FOLDER, TARGETS, library_name, source_digest

__all__ = ["Library", "library", "reason_missing", "reason_unavailable", "runnable_targets"]

NEEDS = {"x86_64_v3": "AVX2", "x86_64_v4": "AVX512"}  # a target, and what torch calls what it needs
RANKS = {"AVX2": 1, "AVX512": 2}
CHOICE = "DYNATREE_OPS"  # of the environment: a target, or "off"


@attrs.frozen(eq=False)
class Library:
    """The library of one target."""

    target: str
    run: ctypes._NamedFuncPointer  # (records, how many, rows, threads) -> 0, or 1 where memory is missing


def runnable_targets() -> list[str]:
    """The targets that this CPU can run, the best first. Linux's own view: by torch, which asks the CPU."""
    machine = platform.machine().lower().replace("amd64", "x86_64")
    rank = RANKS.get(torch.backends.cpu.get_cpu_capability(), 0)
    return [target for target in reversed(TARGETS.get(machine, {})) if RANKS.get(NEEDS.get(target, ""), 0) <= rank]


def load(target: str) -> Library:
    """Load the library of a target.

    Raises:
        OSError: it is not there, or was built from other sources than those beside it; the message says what to do.
    """
    file = FOLDER / library_name(target)
    if not file.exists():
        raise OSError(
            "it was not compiled when the package was installed; install ziglang or a C compiler and run "
            "`python -m dynatree_core.ops.native`"
        )
    loaded = ctypes.CDLL(str(file))
    loaded.dynatree_source.restype = ctypes.c_char_p
    if loaded.dynatree_source().decode() != source_digest():
        raise OSError("it was compiled from other sources; run `python -m dynatree_core.ops.native`")
    loaded.dynatree_use_openmp.argtypes = [ctypes.c_void_p]
    loaded.dynatree_use_openmp.restype = None
    loaded.dynatree_use_openmp(_openmp())
    run = loaded.dynatree_run
    run.argtypes = [ctypes.c_char_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64]
    run.restype = ctypes.c_int
    return Library(target, run)


def _openmp() -> int | None:
    """The address of OpenMP's function that calls another on several threads, of the OpenMP that torch uses."""
    try:
        torch_library = ctypes.CDLL(
            str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")
        )  # it is loaded already
        return ctypes.cast(torch_library.GOMP_parallel, ctypes.c_void_p).value
    except (OSError, AttributeError):  # a torch with threads of another kind
        return None


@functools.cache
def _chosen() -> Library | str:
    """The library, or why there is none."""
    choice = os.environ.get(CHOICE, "")
    if choice == "off":
        return f"the environment's {CHOICE} is off"
    targets = runnable_targets()
    if not targets:
        return f"it is for Linux on {' and '.join(TARGETS)}, this is {platform.system()} on {platform.machine()}"
    if choice and choice not in targets:
        return f"the environment's {CHOICE} must be off or one of {', '.join(targets)}, got {choice!r}"
    try:
        return load(choice or targets[0])
    except OSError as error:
        return str(error)


def library() -> Library:
    """The library that serves; asked for only where `reason_unavailable` is None."""
    chosen = _chosen()
    assert isinstance(chosen, Library), chosen
    return chosen


def reason_missing() -> str | None:
    """Why the library cannot be used though this machine could run it and nobody switched it off; None elsewhere."""
    return reason_unavailable() if os.environ.get(CHOICE) != "off" and runnable_targets() else None


def reason_unavailable() -> str | None:
    """Why the library cannot be used on this machine; None where it can."""
    chosen = _chosen()
    return chosen if isinstance(chosen, str) else None
