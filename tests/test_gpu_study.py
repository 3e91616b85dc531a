"""`dynatree bench gpu` without a GPU: its plan, its refusal, and every step at tiny sizes, as processes and here."""

from __future__ import annotations

import json
import subprocess
import sys
import time
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
from dynatree_bench.run.machine import device_name, source_commit
from dynatree_bench.run.pairs import Models
from dynatree_bench.studies import gpu
from dynatree_bench.studies.on_gpu import embedded, layers, probe, recording, sampling, steps, suite, triton, waits
from dynatree_bench.studies.on_gpu.given import TREE, Given
from dynatree_bench.studies.study import Asked, read_found, run_study, write_report
from dynatree_core import InputError
from dynatree_core.drafters.model import ModelDrafter

POPEN = subprocess.Popen
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
    assert suite.faults(found, True) == []
    monkeypatch.setattr(suite, "_generated", lambda model: [0])
    found = suite.measure(given)
    assert len(found["wrong"]) == 6, "a text that is another one is named"
    assert suite.faults(found, True)[0].startswith(f"6 of 6 texts are not those of `generate`: {found['wrong'][0]}; ")


@pytest.mark.parametrize(
    ("lines", "status", "passed", "fault"),
    [
        (["def test_a(): pass"], 0, 1, None),
        (["import pytest", "@pytest.mark.skip", "def test_a(): pass"], 0, 0, "ran no test"),
        ([], 5, 0, "ran no test"),
        (["def test_a(): pass", "def test_b(): assert False"], 1, 1, "failed"),
    ],
)
def test_a_run_of_pytest_without_a_test_is_a_fault(
    lines: list[str], status: int, passed: int, fault: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "test_some.py").write_text("\n".join(lines) + "\n", encoding="utf-8")
    monkeypatch.setattr(suite, "CHECKOUT", tmp_path)
    run = suite._pytest(("-p", "no:cacheprovider", "test_some.py"))
    assert (run["exit_status"], run["num_passed"]) == (status, passed), run["last_lines"]
    found = {"pytest": [run], "num_texts": 3, "wrong": []}
    assert [line.partition(" test_some.py ")[2].partition(":")[0] for line in suite.faults(found, False)] == (
        [] if fault is None else [fault]
    )
    assert bool(suite.faults(found, True)) == (fault == "failed"), "a dry run has no GPU, so no tests for one"


def test_without_a_checkout_the_page_says_that_there_are_no_tests(
    given: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suite, "CHECKOUT", tmp_path)
    monkeypatch.setattr(suite, "STACKS", ("autoregressive",))
    found = suite.measure(given)
    assert found["pytest"] == []
    said = gpu.sentences({"provenance": {"is_dry": True}, "steps": {"tests": _result("tests", given, found)}})
    assert "no tests here: they are in a checkout of the source, and this is none" in said


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
    assert tree["waits"] == 1, "trees grow without a look at the host"
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


def test_memory_that_grows_after_the_third_generation_is_a_fault() -> None:
    def found(*sizes: int | None, runner: str = "cudagraph") -> dict[str, Any]:
        return {"generations": [{"bytes": size, "runner": runner, "num_recorded": 4} for size in sizes]}

    assert recording.faults(found(1, 5, 9, 9, 8), False) == []
    assert recording.faults(found(1, 5, 9), False) == [], "the third is the last"
    assert recording.faults(found(None, None, None, None), False) == []
    [said] = recording.faults(found(9, 9, 9, 9, 10), False)
    assert said == "memory has grown by 1 bytes between generation 3 and generation 5"
    [said] = recording.faults(found(9, 9, 9, 9, runner="eager"), False)
    assert said == "passes were to be recorded, and were computed by eager"
    document = {"steps": {"recording": _result("recording", Given("cpu", True, 0, ""), found(2**20, 0, 0, 2**21))}}
    goals = {goal: measured for goal, _, measured in gpu._iteration_goals(document)}
    assert goals["passes recorded in 4 generations, target and drafter"] == 4
    assert goals["MiB that memory grows after generation 3"] == 2


@pytest.mark.parametrize("is_right", [True, False])
def test_triton_decodes_texts_and_is_measured_alone(
    is_right: bool, given: Given, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suite, "STACKS", ("autoregressive", TREE))
    if not is_right:
        monkeypatch.setattr(suite, "_generated", lambda model: [int(model.dtype == torch.float32)])
    asked: list[tuple[str, ...]] = []

    def measured(of: Asked, *, runners: tuple[str, ...]) -> dict[str, Any]:
        asked.append(runners)
        return {"provenance": {}}

    monkeypatch.setattr(triton.roofline, "measure", measured)
    found = triton.measure(given)
    assert asked == [("eager",)], "in a dry run"
    assert (found["num_texts"], len(found["wrong"])) == (6, 0 if is_right else 6)
    assert bool(triton.faults(found, True)) == (not is_right)
    if not torch.cuda.is_available():
        with pytest.raises(
            InputError, match=r"the triton runner is for models on a CUDA GPU|needs Triton|must be one of"
        ):
            triton.measure(attrs.evolve(given, is_dry=False))


def test_sampling(given: Given, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [one["is_same"] for one in sampling.measure(given)["texts"]] == [True, True]
    monkeypatch.setattr(sampling, "_sampled", lambda model, seed: [seed])
    found = sampling.measure(given)
    assert not any(one["is_same"] for one in found["texts"])
    assert sampling.faults(found, True) == ["2 of 2 sampled texts are not those of `generate` with the same seed"]


def test_default_model(given: Given) -> None:
    found = embedded.measure(given)
    methods = {one["method"] for one in found["outputs"]}
    assert {embedded.HF, "autoregressive", "phase3"} <= methods
    assert all(one["num_tokens"] == 12 and one["is_plain"] and one["seconds"] > 0 for one in found["outputs"])
    assert [one["num_tokens"] for one in found["batches"]] == [12 * size for size in embedded.BATCHES]
    assert embedded.faults(found, True) == []
    found["outputs"][-1]["is_plain"] = False
    assert embedded.faults(found, True) == ["1 texts of phase3 are not those of plain decoding"]


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


def _result(name: str, given: Given, found: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """What `run_step` returns of a step that is done, of this source and this device."""
    said = {"commit": source_commit(), "device": device_name(torch.device("cpu"))}
    made = {"step": name, "state": steps.DONE, "limit_seconds": 1, "seconds": 0.5, "given": steps._settings(given)}
    return {**made, "provenance": said, "last_lines": [], "found": found} | changes


def test_a_result_names_the_device_of_its_step(given: Given, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dynatree_bench.run.machine.device_name", lambda device: f"a name of {device}")
    asked = attrs.evolve(given, device="cuda:1")
    assert steps._provenance("the command", asked)["device"] == "a name of cuda:1"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"given": {"device": "cpu", "is_dry": True, "seed": 1}}, "with device cpu, is_dry True, seed 1, and this run"),
        ({"given": {"device": "cuda", "is_dry": True, "seed": 0}}, "made with device cuda"),
        ({"given": {"device": "cpu", "is_dry": False, "seed": 0}}, "with device cpu, is_dry False"),
        ({"provenance": {"commit": "0123"}}, "it was made at commit 0123, and this run is at"),
        ({"provenance": {"commit": source_commit(), "device": "another GPU"}}, "it was made on another GPU, and this"),
        ({"step": "waits"}, "it is not the result of this step"),
        ({"found": None}, "it is not the result of this step"),
        (None, "it cannot be read (JSONDecodeError"),
    ],
)
def test_a_result_that_was_made_otherwise_stands_for_nothing(
    changes: dict[str, Any] | None, reason: str, given: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not done, and a run that does not repeat it leaves it out of the page and says so."""
    out = tmp_path / "out"
    kept, asked = out / "steps" / "probe.json", attrs.evolve(given, folder=str(out / "steps"))
    steps.write_step(kept, _result("probe", given, {"attention": []}))
    assert steps.is_done(kept, asked)
    if changes is None:
        kept.write_text("{half", encoding="utf-8")
    else:
        steps.write_step(kept, _result("probe", given, {"attention": []}) | changes)
    assert not steps.is_done(kept, asked)
    monkeypatch.setattr(steps, "run_step", lambda name, given, command: _result(name, given, {"profiles": []}))
    study = Asked(Models(device="cpu"), out, is_quick=True, steps=("profile",))
    found = run_study("gpu", study, command="the command")
    assert list(found.found["steps"]) == ["profile"]
    [said] = [line for line in found.sentences if line.startswith("left out: steps/probe.json: ")]
    assert reason in said


def test_a_bad_outcome_is_never_done(given: Given, tmp_path: Path) -> None:
    found = {"pytest": [], "num_texts": 3, "wrong": []}
    steps.write_step(tmp_path / "tests.json", _result("tests", given, found))
    assert steps.is_done(tmp_path / "tests.json", given)
    steps.write_step(tmp_path / "tests.json", _result("tests", given, found | {"wrong": ["llama"]}))
    assert not steps.is_done(tmp_path / "tests.json", given)


def _child(monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    """A program in place of a step's, with the same arguments."""

    def popen(command: list[Any], **options: Any) -> Any:
        _, _, _, *arguments = command
        return POPEN([sys.executable, "-c", program, *arguments], **options)

    monkeypatch.setattr(steps.subprocess, "Popen", popen)


@pytest.mark.parametrize(
    ("program", "state"),
    [
        (
            "import sys; open(sys.argv[3], 'w').write('{\"a\": 1}'); print('late words'); sys.stderr.write('more')",
            "done",
        ),
        ("print('{\"a\": 1}')", "failed"),
        ("import sys; print('so far'); open(sys.argv[3], 'w').write('{\"a\":')", "failed"),
        ("import sys; open(sys.argv[3], 'w').write('[1]')", "failed"),
        ("import sys; open(sys.argv[3], 'w').write('{}'); sys.exit(3)", "failed"),
    ],
)
def test_what_a_step_finds_is_in_a_file_whatever_it_prints(
    program: str, state: str, given: Given, monkeypatch: pytest.MonkeyPatch
) -> None:
    _child(monkeypatch, program)
    result = steps.run_step("probe", given, command="the command")
    assert (result["state"], result["found"]) == (state, {"a": 1} if state == "done" else {}), result["last_lines"]
    if state == "failed" and "exit" not in program:
        assert "what it has left cannot be read" in result["last_lines"][-1]


def test_what_a_late_step_has_started_is_ended_too(
    given: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether its own process waits for that, or has ended and left it."""
    place = str(tmp_path / "pid")
    started = (
        f"import subprocess, time; pid = subprocess.Popen(['sleep', '60']).pid; open({place!r}, 'w').write(str(pid))"
    )
    for rest, state in ("; time.sleep(60)", steps.LATE), ("", steps.FAILED):
        _child(monkeypatch, started + rest)
        begun = time.monotonic()
        result = steps.run_step("probe", given, command="the command", seconds=5)
        assert (result["state"], time.monotonic() - begun < 30) == (state, True)
        pid = (tmp_path / "pid").read_text(encoding="utf-8")
        status = Path(f"/proc/{pid}/status")
        for _ in range(100):
            if not status.exists() or "State:\tZ" in status.read_text(encoding="utf-8"):
                break
            time.sleep(0.05)
        else:
            pytest.fail(f"process {pid} goes on after a step that {state}")


def test_a_process_that_cannot_be_ended_holds_nothing_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "END_SECONDS", 0.05)
    monkeypatch.setattr(steps.os, "killpg", lambda group, sign: None)
    with subprocess.Popen(["sleep", "60"]) as process:
        try:
            steps._end(process)
            assert process.poll() is None
        finally:
            process.kill()


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
        "triton": {**steps.STEPS["roofline"].measure(given), "num_texts": 2, "wrong": []},
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
        return _result(name, given, results.get(name, {}), state=state, last_lines=["no memory"])

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
        "passes recorded in 3 generations", "shape by `triton`", "done, with faults",
    ):  # fmt: skip
        assert goal in page
    assert (out / "report" / "figures" / "gpu.svg").exists()
    names = [table.name for table in found.tables]
    assert len(set(names)) == len(names) == 12


def test_a_page_of_steps_that_all_failed_has_no_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = {"state": steps.FAILED, "limit_seconds": 1, "seconds": 0.5, "provenance": {}, "last_lines": ["it said so"]}
    monkeypatch.setattr(steps, "run_step", lambda name, given, command: {**failed, "step": name, "found": {}})
    out = tmp_path / "out"
    study = Asked(Models(device="cpu"), out, is_quick=True, steps=("probe",))
    found = run_study("gpu", study, command="the command")
    page = write_report(found, out / "report").read_text(encoding="utf-8")
    assert "it said so" in page
    assert "Figure" not in page
