"""Runs that are cut off go on, and what was found out before a run is written."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import attrs
import pytest
from bench_runs import SMALL, IdleMeter, run, tiny_pair

from dynatree_bench.run import bandwidth, measure, methods
from dynatree_bench.run.bandwidth import ReadSpeed, step_reads
from dynatree_bench.run.measure import Options
from dynatree_bench.run.pairs import Pair
from dynatree_bench.run.records import RECORDS_FILE, MemoryInfo, read_records
from dynatree_core import InputError, build_drafter


@pytest.fixture(scope="module")
def pair():
    return tiny_pair()


ROOT = Path(__file__).parents[1]


KILLED_RUN = """
import itertools, sys, time
from pathlib import Path
from dynatree_bench.run import measure
from dynatree_bench.run.measure import Options, run_experiment
from dynatree_bench.run.pairs import Pair
from dynatree_core import LoadedModel
from dynatree_core.drafters.model import ModelDrafter
from dynatree_core.testing.models import perturbed, tiny_model
import torch

decode, num_calls = measure.decode, itertools.count()

def decode_until_killed(*arguments):
    while next(num_calls) >= 30:
        time.sleep(1)
    return decode(*arguments)

measure.decode = decode_until_killed
torch.set_num_threads(1)
pair = Pair(LoadedModel(tiny_model("llama"), None, "tiny"), ModelDrafter(perturbed("llama")))
run_experiment(
    "ablation", pair, Path(sys.argv[1]), Options(quick=True, num_prompts=12, max_new_tokens=[12]), idle_check_seconds=0
)
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_and_redoes_nothing(pair, tmp_path, monkeypatch):
    out = tmp_path / "run"
    process = subprocess.Popen([sys.executable, "-c", KILLED_RUN, str(out)], cwd=ROOT)
    wait_for_records(out / RECORDS_FILE, 10, process)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    with (out / RECORDS_FILE).open("ab") as file:  # and the machine with it, in the middle of a line
        file.write(b'{"experiment":"abla')
    before = read_records(out)
    assert len(before) >= 10

    made = []
    monkeypatch.setattr(measure, "decode", counting(made))
    options = Options(quick=True, num_prompts=12, max_new_tokens=[12])
    monkeypatch.setattr(measure, "QUICK_SECONDS", 600.0)
    results = run("ablation", pair, out, options)
    assert results.records[: len(before)] == before
    assert len(results.records) == 12 * 13  # reading refuses a key that is there twice
    num_warm_ups = 5
    assert len(made) - num_warm_ups == len(results.records) - len(before)
    assert len(results.info.continued) == 1
    assert all(record.is_identical for record in results.records)

    made.clear()
    assert run("ablation", pair, out, options).records == results.records
    assert made == []  # no warm-up either


def wait_for_records(path, count, process):
    deadline = time.monotonic() + 120
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)


def counting(made):
    def decode(pair, cell, prompt_ids, eos):
        made.append(cell)
        return methods.decode(pair, cell, prompt_ids, eos)

    return decode


def test_an_interrupted_prompt_is_finished(pair, tmp_path, monkeypatch):
    out, made = tmp_path / "run", []

    def decode(pair, cell, prompt_ids, eos):
        made.append(cell)
        if len(made) == 3 + 5:  # after the warm-up of three methods: the second output of the second prompt
            raise KeyboardInterrupt
        return methods.decode(pair, cell, prompt_ids, eos)

    def autoregressive_last(task):
        return [*task.cells[1:], task.cells[0]]

    monkeypatch.setattr(measure, "decode", decode)
    monkeypatch.setattr(measure.Task, "shuffled", autoregressive_last)
    with pytest.raises(KeyboardInterrupt):
        run("scalability", pair, out)
    # the output before it waited for the greedy one, which had not come
    assert [record.method for record in read_records(out)] == ["fixed", "phase3", "autoregressive"]
    results = run("scalability", pair, out)
    assert len(results.records) == 9
    assert all(record.is_identical for record in results.records)


def test_other_settings_in_the_same_folder_are_refused(pair, tmp_path):
    out = tmp_path / "run"
    run("scalability", pair, out)
    kept = (out / "run.json").read_bytes()
    for changed, said in (
        ({"max_new_tokens": [7]}, "axes max_new_tokens: [6] there, [7] now"),
        ({"ignore_eos": True}, "ignore_eos: False there, True now"),
        ({"num_prompts": 4}, "settings prompts: 3 there, 4 now"),
        ({"policies": ["linear"]}, "methods: autoregressive, fixed, phase3 there, autoregressive, linear now"),
    ):
        with pytest.raises(InputError, match="give the same settings") as caught:
            run("scalability", pair, out, attrs.evolve(SMALL, **changed))
        assert said in str(caught.value)
    other = Pair(pair.target, build_drafter("prompt_lookup"))
    with pytest.raises(InputError, match="holds a run with other settings"):
        run("scalability", other, out)
    with pytest.raises(InputError, match="experiment: scalability there, ablation now"):
        run("ablation", pair, out)
    assert (out / "run.json").read_bytes() == kept


def test_two_runs_in_one_folder_at_once_are_refused(pair, tmp_path, monkeypatch):
    out, said = tmp_path / "run", []

    def decode(pair, cell, prompt_ids, eos):
        if not said:
            with pytest.raises(InputError, match="have one run at a time, and another one is writing to") as caught:
                run("scalability", pair, out)
            said.append(str(caught.value))
        return methods.decode(pair, cell, prompt_ids, eos)

    monkeypatch.setattr(measure, "decode", decode)
    assert len(run("scalability", pair, out).records) == 9
    assert "give another --out" in said[0]
    assert len(run("scalability", pair, out).records) == 9  # the folder is free again


def test_a_run_that_goes_on_with_another_version_says_so(pair, tmp_path, monkeypatch):
    out = tmp_path / "run"
    monkeypatch.setattr(measure, "version", lambda name: "0.0.9")
    run("scalability", pair, out, attrs.evolve(SMALL, time_limit=1e-6))
    monkeypatch.undo()
    assert f"went on with dynatree {measure.version('dynatree')}" in run("scalability", pair, out).info.notes


def test_a_length_that_is_given_twice_counts_once(pair, tmp_path):
    said = []
    options = attrs.evolve(SMALL, max_new_tokens=[6, 6], prompt_tokens=[9, 5, 9])
    results = run("scalability", pair, tmp_path / "run", options, say=said.append)
    assert results.info.axes == {"prompt_tokens": [9, 5], "max_new_tokens": [6]}
    assert results.info.settings["outputs"] == len(results.records) == 3 * 3 * 2
    assert said == []


def test_a_folder_that_is_a_file_is_refused(pair, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="goes to a folder, got"):
        run("scalability", pair, tmp_path / "file")


def test_a_folder_of_somebody_elses_is_refused(pair, tmp_path):
    (tmp_path / RECORDS_FILE).write_text("a record of mine, without an end")
    with pytest.raises(InputError, match="`dynatree bench` writes must go to a folder that is new, empty"):
        run("scalability", pair, tmp_path)
    assert (tmp_path / RECORDS_FILE).read_text() == "a record of mine, without an end"
    assert len(list(tmp_path.iterdir())) == 1


def test_the_time_limit_leaves_whole_prompts_for_later(pair, tmp_path):
    said = []
    results = run("scalability", pair, tmp_path / "run", attrs.evolve(SMALL, time_limit=1e-6), say=said.append)
    left = 9 - len(results.records)
    assert left in (6, 9)
    assert f"{left} of 9 outputs are missing; the same command goes on" in said
    said.clear()
    results = run("scalability", pair, tmp_path / "run", SMALL, say=said.append)
    assert len(results.records) == 9
    assert results.info.notes == ()
    assert not any("missing" in sentence for sentence in said)


def test_a_run_says_how_fast_the_memory_was_read_before_it_began(pair, tmp_path, monkeypatch):
    order, speeds = [], iter([2e9, 1e9])
    monkeypatch.setattr(measure, "busy_percent", lambda seconds: order.append("load") or 50.0)
    monkeypatch.setattr(bandwidth, "read_speed", lambda device: order.append("memory") or ReadSpeed(next(speeds), 4096))
    settings = {"idle_check_seconds": 0.1, "with_bandwidth": True}
    monkeypatch.setattr(measure, "decode", lambda *args: order.append("decoding") or methods.decode(*args))
    info = run("scalability", pair, tmp_path / "run", **settings).info
    assert order[:3] == ["load", "memory", "decoding"]
    assert order.count("memory") == 1
    assert info.memory == MemoryInfo(2e9, 4096, step_reads(pair.target.model).num_bytes)
    assert any("was busy before the run" in note for note in info.notes)
    order.clear()
    run("scalability", pair, tmp_path / "run", **settings)
    assert order == [], "nothing is left to do"
    (tmp_path / "run" / RECORDS_FILE).unlink()
    assert run("scalability", pair, tmp_path / "run", **settings).info.memory == info.memory, "the faster one"
    assert order.count("memory") == 1


def test_a_bandwidth_that_cannot_be_measured_is_said(pair, tmp_path, monkeypatch):
    monkeypatch.setattr(bandwidth, "read_speed", lambda device: None)
    said = []
    info = run("scalability", pair, tmp_path / "run", with_bandwidth=True, say=said.append).info
    assert info.memory is None
    note = "the memory's bandwidth was not measured: there is no room for a buffer larger than the caches"
    assert note in said
    assert note in info.notes


class BusyMeter(IdleMeter):
    def share(self):
        return 0.5


def test_a_busy_machine_is_said_of_outputs_made_before_an_interruption_too(pair, tmp_path):
    run("scalability", pair, tmp_path / "run", attrs.evolve(SMALL, time_limit=600), meter=BusyMeter)
    lines = (tmp_path / "run" / RECORDS_FILE).read_text().splitlines(keepends=True)
    (tmp_path / "run" / RECORDS_FILE).write_text("".join(lines[:4]))
    said = []
    run("scalability", pair, tmp_path / "run", SMALL, say=said.append)
    [sentence] = said
    assert sentence.startswith("the machine was busy during 4 of 9 outputs: others used more than 10 % of a core")
