"""How much more memory do trees take than autoregressive decoding?

Question: peak memory of a generation with `fixed` and `phase3`, drafted by `prompt_lookup`, beside autoregressive
decoding.

Method: a process for each method: the highest resident size during one generation of a built-in prompt, the peak
counter being reset after loading. Once as it comes, and once without the work space that a matrix library keeps for
products of several rows, for each thread: that is the greater part of what trees seem to cost a small model, and with
it switched off what DynaTree itself holds is left.

Output: a row for each method; nothing where the system does not tell a process its peak.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dynatree_bench.data.prompts import BUILT_IN
from dynatree_bench.report.tables import Table, simple
from dynatree_bench.studies.study import Asked, Study
from dynatree_core import LoadedModel, generate, load_model
from dynatree_core.text.prompt import encode_prompt, tokenizer_of

BASELINE = "autoregressive"
METHODS = (BASELINE, "fixed", "phase3")
DRAFTER = "prompt_lookup"
SETTINGS: dict[str, dict[str, str]] = {
    "as it comes": {},
    "without the matrix library's buffers": {"MKL_DISABLE_FAST_MM": "1", "OMP_NUM_THREADS": "1"},
}
PROGRAM = "import sys; from dynatree_bench.studies import memory; print(memory.peak_of(*sys.argv[1:]))"


def decode(target: LoadedModel, method: str, max_new_tokens: int) -> None:
    """Generate what is measured."""
    ids = encode_prompt(BUILT_IN["copying"][1], tokenizer_of(target))
    drafter = None if method == BASELINE else DRAFTER
    generate(target.model, drafter, ids, policy=method, max_new_tokens=max_new_tokens)


def peak_of(method: str, max_new_tokens: str, target: str | None = None) -> int:
    """What a process of its own measures."""
    loaded = load_model(target, device="cpu")
    decode(loaded, BASELINE, 4)  # first passes allocate
    return peak_memory(lambda: decode(loaded, method, int(max_new_tokens)))


def peak_memory(work: Callable[[], Any]) -> int:
    """Highest resident size of this process during some work, in bytes; 0 where the system cannot tell."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM, the peak resident size, to the present size
    except OSError:
        return 0
    work()
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024


def measure(asked: Asked) -> dict[str, Any]:
    """{"peaks": setting -> method -> bytes}"""
    max_new_tokens = asked.new_tokens(full=64, quick=8)
    command = [sys.executable, "-c", PROGRAM]
    target = [] if asked.models.target is None else [asked.models.target]
    peaks: dict[str, dict[str, int]] = {}
    for title, setting in SETTINGS.items():
        for method in METHODS:
            arguments = [*command, method, str(max_new_tokens), *target]
            done = subprocess.run(arguments, check=True, capture_output=True, text=True, env={**os.environ, **setting})
            peaks.setdefault(title, {})[method] = int(done.stdout)
    said = {"model": asked.models.target or "the embedded default model", "max_new_tokens": max_new_tokens}
    return {"provenance": said, "peaks": peaks}


def tables(found: Mapping[str, Any]) -> Sequence[Table | None]:
    rows = [
        (setting, method, peak / 2**20, 100 * (peak / of_methods[BASELINE] - 1))
        for setting, of_methods in found["peaks"].items()
        for method, peak in of_methods.items()
        if of_methods[BASELINE]
    ]
    return [simple("memory", "Peak memory", "", ("setting", "method", "MiB", f"% against {BASELINE}"), rows)]


def sentences(found: Mapping[str, Any]) -> Sequence[str]:
    is_known = all(of_methods[BASELINE] for of_methods in found["peaks"].values())
    return () if is_known else ("not measured: this system does not tell a process its peak",)


STUDY = Study(("target", "max_new_tokens"), measure, tables, sentences=sentences)
