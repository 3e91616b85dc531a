"""`dynatree doctor`: what it finds out, that it works where parts are broken, and that it gives no secret away."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from command import run_command

from dynatree_core import ops
from dynatree_core.cli import examine
from dynatree_core.cli.catalogue import PluginRow
from dynatree_core.models import embedded

ROOT = Path(__file__).parents[1]
OF_TORCH = {
    "device": "cpu", "gpus": [], "cpu_capability": "AVX2", "threads": 3, "runner": {"name": "packed", "reason": "so"},
}  # fmt: skip


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No process of its own, and no time to measure the load."""
    monkeypatch.setattr(examine, "_asked_of_torch", lambda: dict(OF_TORCH))
    monkeypatch.setattr(examine, "LOAD_SECONDS", 0.0)


Run = Callable[..., tuple[object, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def ran(*args: str) -> tuple[object, str]:
        done = run_command(capsys, "doctor", *args)
        return done.code, done.out

    return ran


def in_a_process(site: Path, *args: str, **environment: str) -> tuple[int, dict[str, Any]]:
    """The command with a folder of modules that come first, and its document."""
    path = os.pathsep.join([str(site), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-m", "dynatree_core", "doctor", "--json", *args],
        env=os.environ | {"PYTHONPATH": path} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, json.loads(done.stdout)


@pytest.mark.usefixtures("quick")
def test_all_parts_are_found_out(run: Run) -> None:
    code, out = run("--json")
    found = json.loads(out)
    assert set(found) == {
        "versions", "system", "load", "environment", "cache", "default model", "torch", "plugins", "problems",
    }  # fmt: skip
    assert (code, found["problems"]) == (0, [])
    assert found["versions"]["torch"] == torch.__version__
    assert found["system"]["logical_cores"] == psutil.cpu_count()
    assert {one["name"] for one in found["plugins"]} >= {"phase3", "confidence", "prompt_lookup"}
    assert {one["kind"] for one in found["plugins"]} == {"preset", "policy", "drafter", "runner"}


@pytest.mark.usefixtures("quick")
def test_what_one_pastes(run: Run) -> None:
    code, out = run()
    labels = [line[:14].strip() for line in out.splitlines()]
    assert code == 0
    for label in (
        "versions",
        "system",
        "cores",
        "memory",
        "device",
        "threads",
        "runner",
        "others use",
        "cache",
        "plugins",
    ):
        assert label in labels
    assert "packed: so" in out
    assert "problems       none" in out


def test_torch_is_asked_in_a_process_of_its_own() -> None:
    found = examine._asked_of_torch()
    assert set(found) == set(OF_TORCH)
    assert found["runner"]["name"] in ("native", "packed", "eager")
    assert found["device"] == ("cuda" if torch.cuda.device_count() else "cpu")


def test_the_runner_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    model = SimpleNamespace(size=10**9)
    monkeypatch.setattr(embedded, "describe", lambda: model)
    monkeypatch.setattr("dynatree_core.runners.packed.can_pack", lambda model: True)
    if ops.reason_unavailable() is None:
        assert examine._runner("cpu")["name"] == "native"
    monkeypatch.setattr(ops, "reason_unavailable", lambda: "the test wants it so")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=5 * 10**9))
    assert examine._runner("cpu")["name"] == "packed"
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=3 * 10**9))
    assert examine._runner("cpu") == {
        "name": "eager",
        "reason": "packed copies of 1.0 GB are more than a quarter of the 3.0 GB of free memory",
    }
    monkeypatch.setattr("dynatree_core.runners.packed.can_pack", lambda model: False)
    told = examine._runner("cpu")
    assert told["name"] == "eager"
    assert "needs an x86-64 CPU" in told["reason"]


@pytest.mark.parametrize(
    ("module", "program", "words"),
    [
        ("torch", "raise ImportError('libtorch.so: no such file')", "ImportError: libtorch.so: no such file"),
        ("torch", "import os; os.abort()", "was ended by signal 6"),
        ("transformers", "raise RuntimeError('needs another torch')", "needs another torch"),
    ],
)
def test_a_library_that_is_broken_costs_itself_only(tmp_path: Path, module: str, program: str, words: str) -> None:
    site = tmp_path / "site"
    (site / module).mkdir(parents=True)
    (site / module / "__init__.py").write_text(program)
    code, found = in_a_process(site, DYNATREE_CACHE=str(tmp_path / "cache"))
    assert code == 1
    assert words in found["torch"]["error"]
    assert any(words in problem for problem in found["problems"])
    assert found["versions"]["torch"] == torch.__version__
    assert {one["name"] for one in found["plugins"]} >= {"phase3", "confidence", "prompt_lookup"}


@pytest.mark.usefixtures("quick")
def test_a_part_that_fails_is_a_problem(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise psutil.AccessDenied(msg="not here")

    monkeypatch.setattr(psutil, "process_iter", fail)
    code, out = run()
    assert code == 1
    assert "load: AccessDenied" in out
    assert "versions" in out


@pytest.mark.usefixtures("quick")
def test_a_plugin_that_is_refused_is_a_problem(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [PluginRow("good", "policy", "garden", "1"), PluginRow("weed", "policy", "garden", "1", error="no\nhooks")]
    monkeypatch.setattr(examine, "plugin_rows", lambda *groups: rows)
    code, out = run()
    assert code == 1
    assert "garden 1: good\n" in out
    assert "policy 'weed': no hooks" in out


@pytest.mark.usefixtures("quick")
def test_a_cache_that_cannot_be_written_is_a_problem(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DYNATREE_CACHE", str(tmp_path / "file" / "cache"))
    code, out = run()
    assert code == 1
    assert "cannot be written; set DYNATREE_CACHE" in out


@pytest.mark.usefixtures("quick")
def test_a_default_model_that_is_damaged_is_a_problem(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DYNATREE_CACHE", str(tmp_path))
    assert run()[0] == 0, "one that is not there is none"
    embedded.describe().folder.mkdir(parents=True)
    code, out = run()
    assert code == 1
    assert "dynatree_manifest.json is missing; `dynatree models install` mends it" in out


@pytest.mark.usefixtures("quick")
def test_nothing_secret_is_shown(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    home = tmp_path / "home" / "alice"
    home.mkdir(parents=True)
    secrets = {
        "HOME": str(home),
        "DYNATREE_CACHE": str(home / "cache"),
        "HF_ENDPOINT": "http://alice:open/sesame@127.0.0.1:9/hub",
        "HTTPS_PROXY": "http://alice:pa@ss@proxy:8080",
        "HF_TOKEN": "hf_abcdefghijklmnop",
        "PYTHONPATH": f"{home}:{home}2:/srv/hf_ABCDEFGHIJKLMNOP",
    }
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    for args in ([], ["--json"]):
        out = run(*args)[1]
        for secret in ("sesame", "pa@ss", "hf_abcdefgh", "hf_ABCDEFGH", f"{home}/", "HF_TOKEN"):
            assert secret not in out
        assert "~/cache" in out
        assert "http://127.0.0.1:9/hub" in out
        assert f"~:{home}2:" in out, "another folder keeps its name"


def test_where_there_is_no_home() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", "/")
        assert examine.without_secrets({"a": ["/srv/x", Path("/etc")], "n": 3}) == {"a": ["/srv/x", "/etc"], "n": 3}
