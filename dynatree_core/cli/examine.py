"""What `dynatree doctor` finds out of this machine and installation, and what is wrong with them.

Each part is found out by itself, so that one that is broken costs itself only. What needs torch runs in a process of
its own (`probe`), since a library that does not fit the machine may end the process. Nothing secret is shown: of the
environment a few named variables, `~` for the home folder, addresses without passwords.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import attrs
import psutil

from dynatree_core.cli.catalogue import plugin_rows
from dynatree_core.files.folders import cache_root
from dynatree_core.models import embedded
from dynatree_core.plugins.registry import DRAFTERS, POLICIES, PRESETS, RUNNERS, plugin_table

__all__ = ["examine", "probe", "without_secrets"]

LIBRARIES = (
    "dynatree", "torch", "transformers", "tokenizers", "safetensors", "huggingface-hub", "numpy", "pluggy", "attrs",
    "click", "rich", "datasets", "matplotlib", "hypothesis", "pytest",
)  # fmt: skip
VARIABLES = (
    "CUDA_VISIBLE_DEVICES", "DYNATREE_CACHE", "DYNATREE_DEBUG", "HF_ENDPOINT", "HF_HOME", "HF_HUB_CACHE",
    "HF_HUB_OFFLINE", "HTTPS_PROXY", "MKL_NUM_THREADS", "OMP_NUM_THREADS", "PYTHONPATH", "TRANSFORMERS_OFFLINE",
)  # fmt: skip
PROBE = "import json; from dynatree_core.cli.examine import probe; print(json.dumps(probe()))"
PROBE_SECONDS = 300  # torch and transformers take a minute to import where the disk is slow
LOAD_SECONDS = 1.0  # over which the load is measured
NUM_BUSIEST = 5


def examine() -> dict[str, Any]:
    """All that is found out, by part.

    A part that cannot be found out has its reason as "error"; "problems" says what is wrong.
    """
    found: dict[str, Any] = {}
    problems: list[str] = []

    def look(part: str, find: Callable[[], Any]) -> None:
        try:
            found[part] = find()
        except Exception as error:  # noqa: BLE001  # a doctor may not fall ill of what it finds
            found[part] = {"error": f"{type(error).__name__}: {error}"}
            problems.append(f"{part}: {found[part]['error']}")

    look("versions", _versions)
    look("system", _system)
    look("load", _load)  # before anything of ours makes some
    look("environment", lambda: {name: os.environ[name] for name in VARIABLES if name in os.environ})
    look("cache", lambda: _cache(problems))
    look("default model", lambda: _default_model(problems))
    look("torch", _asked_of_torch)
    look("plugins", lambda: _plugins(problems, is_torch_here="error" not in found["torch"]))
    return dict(without_secrets({**found, "problems": problems}))


def probe() -> dict[str, Any]:
    """What torch says of this machine, and the runner that `auto` chooses for the default model."""
    import torch

    from dynatree_core.models.load import resolve_device

    device = resolve_device(None)
    return {
        "device": str(device),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "runner": _runner(device.type),
    }


def without_secrets(found: Any) -> Any:
    """The same with `~` for the home folder, and without passwords and tokens."""
    if isinstance(found, Mapping):
        return {without_secrets(key): without_secrets(value) for key, value in found.items()}
    if isinstance(found, list | tuple):
        return [without_secrets(one) for one in found]
    if isinstance(found, Path):
        return without_secrets(str(found))
    if not isinstance(found, str):
        return found
    home = os.path.expanduser("~")
    for place in {home, os.path.realpath(home)} - {os.sep, "~"}:
        found = re.sub(rf"{re.escape(place)}(?![\w.-])", "~", found)
    found = re.sub(r"(\w+://)\S*@", r"\1", found)
    return re.sub(r"\bhf_\w{8,}", "hf_...", found)


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": f"{platform.python_version()} ({platform.python_implementation()})"}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def _system() -> dict[str, Any]:
    memory = psutil.virtual_memory()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    return {
        "platform": platform.platform(),
        "python": sys.executable,
        "cores": psutil.cpu_count(logical=False),
        "logical_cores": psutil.cpu_count(),
        "usable_cores": usable,
        "memory": memory.total,
        "free_memory": memory.available,
    }


def _load() -> dict[str, Any]:
    """Who else computes, in percent of one core, by the names of the programs."""
    others = [process for process in psutil.process_iter() if process.pid != os.getpid()]
    for process in others:
        _percent(process)
    time.sleep(LOAD_SECONDS)
    used: Counter[str] = Counter()
    for process in others:
        name, percent = _percent(process)
        used[name] += round(percent)
    busiest = [{"name": name, "percent": percent} for name, percent in used.most_common(NUM_BUSIEST) if percent > 0]
    return {"others_percent": used.total(), "busiest": busiest, "load_average": list(psutil.getloadavg())}


def _percent(process: psutil.Process) -> tuple[str, float]:
    """Name of a process and what it has used since it was last asked; nothing of one that is gone or of others."""
    try:
        return process.name(), process.cpu_percent()
    except psutil.Error:
        return "?", 0.0


def _cache(problems: list[str]) -> dict[str, Any]:
    root = cache_root()
    there = next(place for place in (root, *root.absolute().parents) if place.exists())  # what would be written to
    is_writable = there.is_dir() and os.access(there, os.W_OK | os.X_OK)
    if not is_writable:
        problems.append(f"cache: {there} cannot be written; set DYNATREE_CACHE to another folder")
    return {"folder": str(root), "is_writable": is_writable, "free_disk": shutil.disk_usage(there).free}


def _default_model(problems: list[str]) -> dict[str, Any]:
    model = embedded.describe()
    if model.damage is not None:
        problems.append(
            f"default model: {model.folder}: {model.damage}; `dynatree models install` mends it or says how"
        )
    found: dict[str, Any] = {**attrs.asdict(model), "folder": str(model.folder)}
    return found


def _asked_of_torch() -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", PROBE], capture_output=True, text=True, check=False, timeout=PROBE_SECONDS
    )
    said = [line for line in done.stderr.splitlines() if line.strip()]
    if done.returncode:
        how = f"was ended by signal {-done.returncode}" if done.returncode < 0 else f"ended with {done.returncode}"
        raise RuntimeError(f"a process that imports torch and transformers {how}: {said[-1] if said else 'no message'}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _runner(device: str) -> dict[str, str]:
    """What `auto` chooses for the default model here, and why: a model of its kind and little size is asked about."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from dynatree_core.runners.choice import runner_for
    from dynatree_core.runners.packed import MAX_SHARE_OF_MEMORY, can_pack

    config = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )  # its heads have 8 dimensions
    model = LlamaForCausalLM(config).to(device)  # type: ignore[arg-type]  # a decorator of transformers hides it
    chosen = runner_for(model, "auto")
    if device != "cpu":
        return {
            "name": chosen,
            "reason": f"the model is on {device}; `packed` is for CPUs, `cudagraph` has to be named",
        }
    if chosen == "native":
        return {"name": chosen, "reason": "a CPU that the fused operators were compiled for"}
    if not can_pack(model):
        machine = platform.machine()
        return {
            "name": chosen,
            "reason": f"packing needs an x86-64 CPU and a torch with oneDNN's kernels, got {machine}",
        }
    size, free = embedded.describe().size, psutil.virtual_memory().available
    if size > MAX_SHARE_OF_MEMORY * free:
        reason = (
            f"packed copies of {size / 1e9:.1f} GB are more than a quarter of the {free / 1e9:.1f} GB of free memory"
        )
        return {"name": "eager", "reason": reason}
    return {"name": chosen, "reason": "an x86-64 CPU for which oneDNN packs weights, and room for the packed copies"}


def _plugins(problems: list[str], *, is_torch_here: bool) -> list[dict[str, Any]]:
    groups = (PRESETS, POLICIES, DRAFTERS, RUNNERS)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if is_torch_here:
            fields = ("name", "kind", "package", "version", "error")
            found = [{field: getattr(row, field) for field in fields} for row in plugin_rows(*groups)]
            problems += [f"{one['kind']} '{one['name']}': {one['error']}" for one in found if one["error"] is not None]
        else:
            reason = "not read, since torch or transformers cannot be imported"
            found = [{"name": name, "kind": group, "error": reason} for group in groups for name in plugin_table(group)]
    problems += [str(warning.message) for warning in caught]
    return found
