"""What a benchmark ran on: libraries, source, device, weights, and who else used the processor meanwhile."""

from __future__ import annotations

import datetime
import functools
import hashlib
import platform
import subprocess
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import huggingface_hub
import psutil
import torch
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

BUSY_PERCENT = 10  # of one core, used by others: above it, speeds are not to be believed
MIN_SECONDS = 0.1  # the system counts processor time in hundredths of a second
LIBRARIES = (
    "torch", "transformers", "tokenizers", "numpy", "datasets", "flashspec", "economize", "dejavuu", "llama-cpp-python",
    "openvino-genai",
)  # fmt: skip


def busy_percent(*, seconds: float) -> float:
    """CPU time that other processes use, in percent of one core, while this one waits."""
    return float(psutil.cpu_percent(interval=seconds)) * (psutil.cpu_count() or 1)


def idle_or_busy(others: Mapping[str, float], *, what: str = "times") -> str:
    """A sentence for those who read `what`.

    Args:
        others: when -> what other processes used, in percent of one core; see LoadMeter.meanwhile.
        what: that a busy machine falsifies.
    """
    state = f"busy, so the {what} are not to be believed" if max(others.values()) > BUSY_PERCENT else "idle"
    used = ", ".join(f"{percent:.0f} % of a core {when}" for when, percent in others.items())
    return f"the machine was {state}: others used {used}"


class LoadMeter:
    """Measures how much of the processor other processes use from its making on."""

    def __init__(self) -> None:
        self._begin = _Reading()

    def share(self) -> float | None:
        """Of all cores' time, in [0, 1]; None when too little time has passed to tell."""
        now = _Reading()
        seconds = now.seconds - self._begin.seconds
        if seconds < MIN_SECONDS:
            return None
        others = (now.used - self._begin.used) - (now.own - self._begin.own)
        return float(min(max(others / (seconds * (psutil.cpu_count() or 1)), 0.0), 1.0))

    def meanwhile(self) -> dict[str, float]:
        """The same in percent of one core, as results have it and `idle_or_busy` takes it."""
        share = self.share()
        assert share is not None, f"a benchmark takes at least {MIN_SECONDS} s"
        return {"meanwhile": 100 * share * (psutil.cpu_count() or 1)}


class _Reading:
    """Processor seconds so far: of the whole system, and of this process with the children that it has waited for."""

    def __init__(self) -> None:
        system, own = psutil.cpu_times(), psutil.Process().cpu_times()
        idle = system.idle + getattr(system, "iowait", 0.0)
        guests = getattr(system, "guest", 0.0) + getattr(system, "guest_nice", 0.0)  # counted as user time already
        self.used = sum(system) - idle - guests
        self.own = own.user + own.system + own.children_user + own.children_system
        self.seconds = time.perf_counter()


def library_versions() -> dict[str, str]:
    """What is installed of the libraries that a result depends on, and Python."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


@functools.cache
def source_commit() -> str | None:
    """The commit of this source, with "-dirty" where tracked files have been changed; None outside a checkout."""
    here = Path(__file__)

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", here.parent, *arguments], capture_output=True, text=True, check=False)
        except FileNotFoundError:  # no git
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", here.name) is None:  # a repository around an installed copy is not ours
        return None
    commit = git("rev-parse", "HEAD")
    return f"{commit}-dirty" if git("status", "--porcelain", "--untracked-files=no") else commit


def device_name(device: torch.device) -> str:
    """What the device calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {psutil.cpu_count()} cores" if names else platform.processor() or platform.machine()


def now(device: torch.device) -> float:
    """Seconds, when the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def provenance(command: str, device: torch.device | None = None) -> dict[str, Any]:
    """Where numbers come from: the command and what it ran on; None: the CPU."""
    return {
        "command": command,
        "commit": source_commit(),
        "date": datetime.date.today().isoformat(),
        "versions": {"dynatree": version("dynatree"), **library_versions()},
        "device": device_name(device or torch.device("cpu")),
        "threads": torch.get_num_threads(),
    }


def weights_sha256(name_or_path: str) -> str | None:
    """SHA-256 over a model's safetensors files in the order of their names; None where there are none here."""
    folder = Path(name_or_path)
    if not folder.is_dir():
        try:
            folder = Path(huggingface_hub.snapshot_download(name_or_path, local_files_only=True))
        except (LocalEntryNotFoundError, HFValidationError):
            return None
    files = sorted(folder.glob("*.safetensors"))
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest() if files else None
