"""The worth of drafters, on a tiny target and on paper, and the names of synthetic pairs."""

from __future__ import annotations

import argparse
import json
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.progress import Progress
from test_distill import target_folder  # noqa: F401  # a fixture

from dynatree_bench.data.prompts import chat_ids
from dynatree_bench.distill.evaluate import Agreement
from dynatree_bench.distill.teacher import Shard
from dynatree_bench.run.machine import check_writable
from dynatree_bench.run.pairs import load_synthetic
from dynatree_bench.studies import drafter_value, long_context
from dynatree_bench.studies.drafter_value import Row, evenly, tables
from dynatree_core import LoadedModel, generate, load_model
from dynatree_core.errors import InputError
from dynatree_core.testing.models import tiny_model


def shard(num_texts: int) -> Shard:
    ends = torch.arange(1, num_texts + 1)
    return Shard(ends, ends, ends > 0, ends[:, None], ends[:, None])


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.jsonl"
    records = [("qa", "what is a cat"), ("wikitext", "the cat sat " * 20), ("qa", "a b"), ("qa", "not this one")]
    file.write_text("\n".join(json.dumps({"category": name, "prompt": prompt}) for name, prompt in records))
    return file


def test_texts_are_taken_from_the_whole_range():
    one, other = shard(3), shard(2)
    assert evenly([one, other], 2) == [(one, 0), (one, 2)]
    assert evenly([one, other], 3) == [(one, 0), (one, 1), (other, 0)]
    assert evenly([one, other], 9) == [(one, 0), (one, 1), (one, 2), (other, 0), (other, 1)]


def test_plain_text_is_gone_on_with_and_all_else_answered(target_folder, prompts):  # noqa: F811
    tokenizer = load_model(str(target_folder)).tokenizer
    asked = argparse.Namespace(prompts=[prompts], per_category=2)
    found = drafter_value._prompts(asked, tokenizer)
    assert [len(ids) for ids in found["wikitext"]] == [96]
    assert tokenizer.decode(found["wikitext"][0]).replace(" ", "").startswith("thecatsat")
    assert [tokenizer.decode(ids).replace(" ", "") for ids in found["qa"]] == ["<u>whatisacat</s><a>", "<u>ab</s><a>"]


def test_answers_are_kept_for_the_same_weights_only(target_folder, tmp_path, monkeypatch):  # noqa: F811
    loaded, written, real = load_model(str(target_folder)), [], drafter_value.write
    monkeypatch.setattr(drafter_value, "write", lambda *asked, **named: written.append(1) or real(*asked, **named))
    arguments = argparse.Namespace(out=tmp_path, max_new_tokens=6)

    def answers() -> list[int]:
        found = drafter_value._answers(loaded.model, loaded.tokenizer, {"q/a": [[5, 6, 7]]}, arguments, Progress())
        return found["q/a"][0].token_ids.tolist()

    first = answers()
    assert first[:3] == [5, 6, 7]
    assert first[3:] == generate(loaded.model, None, [5, 6, 7], policy="autoregressive", max_new_tokens=6).token_ids
    assert answers() == first
    assert len(written) == 1
    monkeypatch.setattr(drafter_value, "weights_sha256", lambda path: "of other weights")
    assert answers() == first
    assert len(written) == 2
    loaded.model.generation_config.eos_token_id = [30, first[3]]
    assert answers() == first[:4] != first, "it ends where generate() would"
    assert len(written) == 3


PROGRAMS = ("drafter_value", "long_context", "never_slower", "rehearse", "roofline", "runners")


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Runs a program as `python -m` does, but in this process, which has torch: its exit code and stderr."""

    def run(program: str, *arguments: object) -> tuple[int, str]:
        monkeypatch.setenv("TERM", "dumb")
        monkeypatch.setattr(sys, "argv", [program, *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            runpy.run_path(str(Path(drafter_value.__file__).with_name(f"{program}.py")), run_name="__main__")
        said = capfd.readouterr()
        assert said.out == ""
        return exit.value.code, said.err

    return run


@pytest.mark.slow
def test_a_process_says_one_line(tmp_path):
    """What the other tests look at in their own process is all that a user sees: importing says nothing."""
    command = [sys.executable, "-m", "dynatree_bench.studies.rehearse", "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"TERM": "dumb"})
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    wanted = "dynatree: error: what `python -m dynatree_bench.studies.rehearse` writes goes to a file, got "
    assert done.stderr.startswith(wanted)


@pytest.mark.parametrize("program", PROGRAMS)
def test_what_goes_wrong_is_one_line_and_comes_before_any_measurement(program, tmp_path, ended):
    """No traceback, and no exit code that is a verdict."""
    (tmp_path / "file").write_text("")
    where = "--output" if program in ("never_slower", "rehearse") else "--out"
    prompts = ["--prompts", tmp_path / "none.jsonl"] if program == "drafter_value" else []
    code, said = ended(program, where, tmp_path / "file" / "results", *prompts)
    assert code == (3 if program == "never_slower" else 2)
    assert said.count("\n") == 1
    wanted = f"dynatree: error: what `python -m dynatree_bench.studies.{program}` writes needs a file that can be "
    wanted += "written, got "
    assert said.startswith(wanted)


def test_arguments_that_cannot_be_used_are_no_verdict(tmp_path, ended):
    code, said = ended("never_slower", "--repeats", "0")
    assert code == 3
    assert "--repeats must be at least 1" in said
    code, said = ended("never_slower", "--prompts", tmp_path / "none.jsonl")
    assert code == 3
    assert said.count("\n") == 1
    assert "must be a file that can be read" in said


def test_a_target_without_a_tokenizer_reads_no_prompts():
    with pytest.raises(InputError, match="must come with a tokenizer to read a text, got none with 'bare'"):
        chat_ids(LoadedModel(tiny_model("llama"), None, "bare"), "Why?")


def test_a_file_that_cannot_be_read_is_one_line(tmp_path, ended):
    code, said = ended("runners", "--out", tmp_path, "--from", tmp_path / "none.json")
    assert code == 1
    assert re.fullmatch(r"dynatree: error: No such file or directory: .*none\.json\n", said)


def test_results_can_be_written_or_not(tmp_path):
    check_writable(tmp_path / "new" / "results.json", "it")
    assert not list((tmp_path / "new").iterdir())
    (tmp_path / "old.json").write_text("old results of it")
    check_writable(tmp_path / "old.json", "it")
    assert (tmp_path / "old.json").read_text() == "old results of it"
    with pytest.raises(InputError, match=f"got {tmp_path}, .*choose another"):
        check_writable(tmp_path, "it")


def test_no_context_is_measured_twice():
    assert long_context._within((512, 4096, 6144, 8192), 4000) == (512, 4000)
    with pytest.raises(InputError, match=r"--max-new-tokens must leave 2 tokens .* leaves -8"):
        long_context._within((512,), -8)


def test_the_tables_of_drafters():
    found = Agreement(10, 0.5, 0.75, 0.9, (0.5,), (0.5,), (0.5,), (10,), 0.0)
    rows = [
        Row("qa", "lookup", "linear", 30, 10, 0), Row("text", "lookup", "linear", 10, 10, 0),
        Row("qa", "lookup", "fixed", 30, 20, 0), Row("text", "lookup", "fixed", 30, 10, 0),
    ]  # fmt: skip
    lines = tables({"student": {"qa": found}}, rows).splitlines()
    assert lines[:5] == [
        "Agreement of `student` with the target:",
        "",
        "| category | top-1 | top-3 | covered |",
        "| --- | --- | --- | --- |",
        "| qa | 0.500 | 0.750 | 0.900 |",
    ]
    assert lines[6:] == [
        "Tokens per iteration with `lookup`:",
        "",
        "| category | linear | fixed |",
        "| --- | --- | --- |",
        "| qa | 3.00 | 1.50 |",
        "| text | 1.00 | 3.00 |",
        "| all | 2.00 | 2.00 |",  # of all tokens and iterations together
    ]


def test_the_worth_of_drafters_on_a_tiny_target(target_folder, prompts, tmp_path, monkeypatch, capsys):  # noqa: F811
    out = tmp_path / "out"
    arguments = ["--target", target_folder, "--prompts", prompts, "--per-category", 2, "--max-new-tokens", 8]
    arguments += ["--drafter", "prompt_lookup", "--policy", "linear", "--policy", "fixed", "--out", out]
    monkeypatch.setattr(sys, "argv", ["drafter_value", *map(str, arguments)])
    assert drafter_value.main() == 0
    found = json.loads((out / "drafter_value.json").read_text())
    assert (found["target"], found["dtype"]) == (str(target_folder), "float32")
    assert set(found) >= {"command", "commit", "date", "versions", "device", "threads"}
    assert found["prompts"] == {"qa": 2, "wikitext": 1}
    rows = [Row(**row) for row in found["rows"]]
    policies, categories = ("linear", "fixed"), ("qa", "wikitext")
    assert [(row.policy, row.category) for row in rows] == [(p, c) for p in policies for c in categories]
    assert rows[0].num_tokens == rows[2].num_tokens, "every policy says what the target said"
    assert all(0 < row.num_iterations <= row.num_tokens for row in rows)
    assert any(row.num_drafted for row in rows)
    assert (out / "drafter_value.md").read_text() == tables({}, rows)
    assert "Tokens per iteration with prompt_lookup" in capsys.readouterr().out


def test_a_synthetic_pair_has_the_numbers_of_its_name():
    def numbers(spec: str) -> tuple[float, float]:
        source = load_synthetic(spec, device="cpu").source
        return source.acceptance, source.decay

    assert [numbers("tiny"), numbers("tiny:0.7"), numbers("tiny:0.7:0.5")] == [(0.65, 0.6), (0.7, 0.6), (0.7, 0.5)]


@pytest.mark.parametrize("spec", ["tiny:high", "tiny:0.7:", "tiny:0.7:0.5:0.3"])
def test_a_synthetic_pair_has_two_numbers_at_most(spec):
    with pytest.raises(InputError, match=r"SHAPE\[:ACCEPTANCE\[:DECAY\]\] with numbers, got '" + spec):
        load_synthetic(spec, device="cpu")
