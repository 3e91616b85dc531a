"""The Triton operators and their runner: `triton_cases` in processes of their own, one interpreting, one compiling.

Triton decides when it is imported whether it interprets, so neither can share a process with other tests.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dynatree_core.ops.triton import reason_unavailable
from dynatree_core.runners.triton import TritonRunner
from dynatree_core.testing.models import tiny_model

TESTS = Path(__file__).parent
needs_triton = pytest.mark.skipif(reason_unavailable() is not None, reason=f"{reason_unavailable()}")


def run_cases(file: str, *, cache: Path, **asked: str) -> None:
    """Run test cases; TRITON_INTERPRET stands in the environment or not, whatever it is here."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), **{k: v for k, v in asked.items() if k.isupper()}}
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += [str(TESTS / "triton_cases" / file), "-k", asked["select"]]
    done = subprocess.run(command, capture_output=True, text=True, cwd=TESTS.parent, env=environment, timeout=550)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("part", ["operator", "family", "bits", "host", "runner or twin"])
def test_interpreted_kernels(part: str, tmp_path: Path) -> None:
    run_cases("test_interpreted.py", cache=tmp_path, select=part, TRITON_INTERPRET="1")


@needs_triton
@pytest.mark.slow
def test_kernels_compile_for_gpus(tmp_path: Path) -> None:
    run_cases("test_compiled.py", cache=tmp_path, select="compile")


def test_every_case_belongs_to_a_part() -> None:
    parts = ("operator", "family", "bits", "host", "runner", "twin")
    text = (TESTS / "triton_cases" / "test_interpreted.py").read_text(encoding="utf-8")
    cases = [line.partition("(")[0] for line in text.splitlines() if line.startswith("def test_")]
    assert len(cases) > 15
    assert [case for case in cases if not any(part in case for part in parts)] == []


def test_a_cpu_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    reason = TritonRunner.reason_against(tiny_model("llama"))
    assert reason is not None
    if reason_unavailable() is None:
        assert reason.startswith("is for models on a CUDA GPU, got one on cpu; ")
    else:
        assert reason.startswith("needs Triton: Triton is not installed; ")
    monkeypatch.setattr("dynatree_core.runners.triton.reason_unavailable", lambda: "it is on the moon")
    assert TritonRunner.reason_against(tiny_model("llama")) == "needs Triton: it is on the moon"
