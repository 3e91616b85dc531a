"""`dynatree bench gpu` without a GPU: its plan, its refusal, and every step at tiny sizes, as processes and here."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from click.testing import CliRunner
from pretended_device import PretendedDevice, moved, pretended
from test_captured import on_the_cpu

from dynatree_bench.bench_cli import bench
from dynatree_bench.run.pairs import Models
from dynatree_bench.studies import gpu
from dynatree_bench.studies.on_gpu import embedded, layers, probe, recording, sampling, steps, suite, waits
from dynatree_bench.studies.on_gpu.given import TREE, Given
from dynatree_bench.studies.study import Asked, read_found, run_study, write_report
from dynatree_core import InputError
from dynatree_core.drafters.model import ModelDrafter

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="what is there without a CUDA device")


@pytest.fixture
def given(tmp_path: Path) -> Given:
    return Given("cpu", True, 0, str(tmp_path))


def test_the_plan_names_each_step_with_its_bound() -> None:
    done = CliRunner().invoke(bench, ["gpu", "--plan"])
    assert done.exit_code == 0, done.output
    for name, step in steps.STEPS.items():
        assert f"{name:14} at most {step.seconds / 60:4.1f} min: {step.question}" in done.output
        assert step.seconds <= 600, "the longest ten minutes"
    some = CliRunner().invoke(bench, ["gpu", "--plan", "--steps", "waits,probe"]).output
    assert [line.split()[0] for line in some.splitlines()] == ["probe", "waits", "in"]


def test_a_step_that_there_is_not_is_told_with_the_nearest() -> None:
    done = CliRunner().invoke(bench, ["gpu", "--plan", "--steps", "probes"])
    assert isinstance(done.exception, InputError)
    assert "'probes' is not a step (did you mean 'probe'?); they are: probe, tests, waits" in str(done.exception)


@without_gpu
def test_without_a_gpu_it_says_what_it_needs(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="needs a CUDA GPU with some 40 GiB of memory and a torch with CUDA, got cpu"):
        run_study("gpu", Asked(Models(device="cpu"), tmp_path), command="the command")
    assert not list(tmp_path.iterdir())


# each step


def test_probe(given: Given) -> None:
    found = probe.measure(given)
    assert {one["way"] for one in found["attention"]} == set(probe.WAYS)
    assert all(min(one["first_ms"]) > 0 and one["later_ms"] > 0 and one["kernels"] for one in found["attention"])
    assert (found["versions"], found["kernel_us"]) == ({}, None), "of a GPU"


def test_the_three_attentions_of_the_probe_are_one() -> None:
    query = torch.randn(1, 5, probe.HEADS, 8, dtype=torch.float64).transpose(1, 2)
    keys = torch.randn(1, probe.KEY_HEADS, 30, 8, dtype=torch.float64)
    module: Any = torch.nn.Module()
    outputs = [probe._call(way, module, query, keys)() for way in probe.WAYS]
    by_torch, without_cudnn, (folded, _) = outputs  # type: ignore[misc]
    torch.testing.assert_close(without_cudnn, by_torch)
    torch.testing.assert_close(folded.transpose(1, 2), by_torch)


def test_suite(given: Given, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "RUNS", (("--version",), ("--no-such-option",)))
    monkeypatch.setattr(suite, "STACKS", ("autoregressive", TREE))
    found = suite.measure(given)
    [run] = found["pytest"]
    assert (run["exit_status"], found["wrong"], found["num_texts"]) == (0, [], 6)
    monkeypatch.setattr(suite, "_generated", lambda model: [0])
    assert len(suite.measure(given)["wrong"]) == 6, "a text that is another one is named"


@without_gpu
def test_waits_are_those_that_the_pretended_device_counts(given: Given, monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes have none here, so that all are those of an iteration around them (tests/test_device_work.py)."""
    monkeypatch.setattr(Given, "runner", lambda self, model: "eager")
    with pretended() as device:
        pair = given.pair()
        pair = attrs.evolve(pair, drafter=ModelDrafter(moved(pair.drafter.model)))  # type: ignore[attr-defined]
        moved(pair.target.model)
        found = waits.measure(given, pair=pair, watch=lambda: _counted(device))
    plain, tree = found["stacks"]
    assert found["is_counted"]
    assert (plain["stack"], plain["waits"]) == ("autoregressive", 1)
    assert tree["waits"] > 1
    assert any("engine/" in line for line in tree["lines"]), tree["lines"]


@contextmanager
def _counted(device: PretendedDevice) -> Iterator[Counter[str]]:
    found: Counter[str] = Counter()
    with device.counting() as counts:
        yield found
    for (_, what), number in counts.waits.items():
        found[what] += number


def test_waits_of_a_cpu_are_not_counted(given: Given) -> None:
    if not torch.cuda.is_available():
        assert not waits.measure(given)["is_counted"]


def test_layers(given: Given) -> None:
    found = layers.measure(given)["profiles"]
    assert [(one["policy"], one["asked"]) for one in found] == [("autoregressive", "eager"), (TREE, "eager")]
    assert all(one["ms"] > 0 and one["operators"] for one in found)
    assert len(list(Path(given.folder).glob("profile-*.json.gz"))) == 2


def test_recordings_are_counted(given: Given) -> None:
    with on_the_cpu():
        first, *_, last = recording.measure(given)["generations"]
    assert 0 < first["num_recorded"] <= last["num_recorded"]
    assert 0 < first["recording_seconds"] < first["seconds"]
    assert (first["runner"], first["bytes"]) == ("cudagraph", None)


def test_sampling(given: Given, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [one["is_same"] for one in sampling.measure(given)["texts"]] == [True, True]
    monkeypatch.setattr(sampling, "_sampled", lambda model, seed: [seed])
    assert not any(one["is_same"] for one in sampling.measure(given)["texts"])


def test_default_model(given: Given) -> None:
    found = embedded.measure(given)
    methods = {one["method"] for one in found["outputs"]}
    assert {embedded.HF, "autoregressive", "phase3"} <= methods
    assert all(one["num_tokens"] == 12 and one["is_plain"] and one["seconds"] > 0 for one in found["outputs"])
    assert [one["num_tokens"] for one in found["batches"]] == [12 * size for size in embedded.BATCHES]


# the study


def test_steps_are_processes_that_are_kept_and_bounded(given: Given, tmp_path: Path) -> None:
    result = steps.run_step("probe", given, command="the command")
    assert result["state"] == "done", result["last_lines"]
    assert result["found"]["attention"]
    assert result["provenance"]["command"] == "the command (step probe)"
    steps.write_step(tmp_path / "probe.json", result)
    assert steps.is_done(tmp_path / "probe.json", given)
    assert not steps.is_done(tmp_path / "probe.json", attrs.evolve(given, is_dry=False)), "of other sizes"
    late = steps.run_step("probe", given, command="the command", seconds=0.2)
    assert (late["state"], late["found"]) == ("ran out of time", {})
    failed = steps.run_step("probe", attrs.evolve(given, device="nowhere"), command="the command")
    assert failed["state"] == "failed"
    assert "nowhere" in " ".join(failed["last_lines"])
    steps.write_step(tmp_path / "probe.json", failed)
    assert not steps.is_done(tmp_path / "probe.json", given), "what failed is done again"


def _results(given: Given) -> dict[str, dict[str, Any]]:
    """What each step finds, computed here."""
    return {
        "probe": probe.measure(given),
        "tests": {"pytest": [], "num_texts": 3, "wrong": ["llama, phase3"]},
        "waits": {
            "is_counted": True,
            "stacks": [{"stack": "fixed", "drafter": "model", "waits": 2.5, "lines": {"a": 2.5}}],
        },
        "roofline": steps.STEPS["roofline"].measure(given),
        "profile": layers.measure(given),
        "recording": recording.measure(given),
        "sampling": sampling.measure(given),
        "default-model": embedded.measure(given),
    }


def test_the_page_has_the_goals_beside_what_was_measured(
    given: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps that were done before are not done again; one that fails is told, and the command fails."""
    results = _results(given)
    assert json.loads(json.dumps(results)) == results
    assert results["roofline"]["provenance"]["is_synthetic"]
    asked: list[str] = []

    def run_step(name: str, given: Given, *, command: str) -> dict[str, Any]:
        asked.append(name)
        state = steps.DONE if name in results else steps.FAILED
        said = {"step": name, "state": state, "limit_seconds": 1, "seconds": 0.5, "given": steps._settings(given)}
        return {**said, "provenance": {}, "last_lines": ["no memory"], "found": results.get(name, {})}

    monkeypatch.setattr(steps, "run_step", run_step)
    out = tmp_path / "out"
    study = Asked(Models(device="cpu"), out, is_quick=True, steps=("probe", "waits"))
    run_study("gpu", study, command="the command")
    assert asked == ["probe", "waits"]
    found = run_study("gpu", attrs.evolve(study, steps=()), command="the command")
    assert sorted(asked) == sorted(steps.STEPS), "each once"
    assert gpu.STUDY.is_bad(found.found)
    said = "\n".join(found.sentences)
    assert "not all steps are done: llama failed" in said
    assert "1 of 3 texts are not those of `generate`" in said
    page = write_report(read_found(out), out / "report").read_text(encoding="utf-8")
    for goal in (
        "plain decoding, % of bandwidth, Pythia-2.8B shape", "× eager hf generate, 6.6 tokens", "÷ plain step, eager",
        "waits of an iteration, fixed with model", "× our own plain decoding, 3.0 tokens", "random weights",
    ):  # fmt: skip
        assert goal in page
    assert (out / "report" / "figures" / "gpu.svg").exists()
    names = [table.name for table in found.tables]
    assert len(set(names)) == len(names) == 10


def test_a_page_of_steps_that_all_failed_has_no_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = {"state": steps.FAILED, "limit_seconds": 1, "seconds": 0.5, "provenance": {}, "last_lines": ["it said so"]}
    monkeypatch.setattr(steps, "run_step", lambda name, given, command: {**failed, "step": name, "found": {}})
    out = tmp_path / "out"
    study = Asked(Models(device="cpu"), out, is_quick=True, steps=("probe",))
    found = run_study("gpu", study, command="the command")
    page = write_report(found, out / "report").read_text(encoding="utf-8")
    assert "it said so" in page
    assert "Figure" not in page
