"""`dynatree distill` end to end on tiny models, and what it refuses."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import click.testing
import pytest
import torch
from students import HEAD_IDS

from dynatree_bench.distill.distill_cli import distill
from dynatree_bench.distill.teacher import read_shard
from dynatree_bench.distill.train import (
    load_checkpoint,
)
from dynatree_core import build_drafter, generate, load_model
from dynatree_core.errors import InputError, ModelLoadError, PluginLoadError
from dynatree_core.files.tensors import save_tensors
from dynatree_core.models.student import new_student, save_student
from dynatree_core.testing.models import greedy, tiny_model

ROOT = Path(__file__).parents[1]


def command(*arguments: object) -> click.testing.Result:
    return click.testing.CliRunner().invoke(distill, [str(argument) for argument in arguments], catch_exceptions=False)


def options(folder: Path, text: Path, out: Path) -> list[object]:
    return [
        "--target", folder, "--text", text, "--out", out, "--read", 1600, "--continue", 30, "--ask", 30,
        "--self-prompts", 20, "--new-tokens", 12, "--outputs", 30, "--epochs", 6, "--batch-tokens", 2048,
        "--learning-rate", 3e-3, "--threads", 1, "--device", "cpu",
    ]  # fmt: skip


def test_a_drafter_is_made_and_drafts(character_target, text_file, tmp_path):
    """The command makes a drafter that agrees better than before; trees with it give the target's own output."""
    out = tmp_path / "drafter"
    ran = command(*options(character_target, text_file, out))
    assert ran.exit_code == 0, ran.output
    report = json.loads((out / "report.json").read_text())
    assert report["after"]["top1"] > report["before"]["top1"] + 0.1
    assert report["course"][-1]["loss"] < report["course"][0]["loss"]
    assert sum(report["after"]["counts"]) == report["after"]["num_positions"]
    card = (out / "README.md").read_text()
    assert f"{report['after']['top1']:.3f}" in card
    for figure in ("calibration.png", "training.png"):
        assert figure in card
        assert (out / figure).stat().st_size > 5000
    target = load_model(str(character_target)).model
    result = generate(target, f"distilled(path={str(out)!r})", [0, 1, 2], policy="fixed", max_new_tokens=40)
    assert result.token_ids == greedy(target, [0, 1, 2], 40)[: len(result.token_ids)]
    assert result.report.num_accepted_tokens > 0
    again = command(*options(character_target, text_file, out))
    assert again.exit_code == 0
    other = json.loads((out / "report.json").read_text())
    assert other["after"] == report["after"], "a finished run that is given again changes nothing"


def test_another_request_does_not_mix_with_what_is_there(character_target, text_file, tmp_path):
    """Other layers are trained from what was said already; what would be said otherwise is refused."""
    request = [*options(character_target, text_file, tmp_path / "drafter"), "--epochs", 1]
    weights = []
    for layers in ("0,1", "0,2", "2"):
        assert command(*request, "--layers", layers).exit_code == 0
        weights.append((tmp_path / "drafter" / "student.safetensors").read_bytes())
        report = json.loads((tmp_path / "drafter" / "report.json").read_text())
        assert report["layers"] == [int(layer) for layer in layers.split(",")]
    assert len(set(weights)) == 3
    command(*request, "--layers", "0,1")
    assert (tmp_path / "drafter" / "student.safetensors").read_bytes() == weights[0]
    with pytest.raises(InputError, match="another request"):
        command(*request, "--seed", 7)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_folder_of_somebody_elses_is_left_alone(character_target, text_file, tmp_path, monkeypatch):
    """The target's own folder above all: its config.json and README.md have the names of ours."""
    own, project, drafter = tmp_path / "own", tmp_path / "project", tmp_path / "drafter"
    shutil.copytree(character_target, own)
    project.mkdir()
    (project / "README.md").write_text("mine")
    # of another target, and without what a run could go on with
    save_student(new_student(tiny_model("llama"), [0], torch.arange(8)), drafter, torch.float32, {"target": "other"})
    monkeypatch.setattr("dynatree_bench.distill.run.load_model", lambda *args, **options: pytest.fail("loaded"))
    for out in (own, project, drafter):
        before = contents(out)
        with pytest.raises(InputError, match=rf"`dynatree distill` writes must go to .* got {out}, which holds"):
            command(*options(own, text_file, out))
        assert contents(out) == before


def test_damaged_work_says_what_to_delete(tmp_path):
    (tmp_path / "shard.safetensors").write_bytes(b"\0" * 64)
    with pytest.raises(ModelLoadError, match=r"shard\.safetensors must hold tensors .*; delete it, and the same"):
        read_shard(tmp_path / "shard.safetensors")
    save_tensors({"odd": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ModelLoadError, match=r"other\.safetensors must hold .*token_ids.*, got odd; delete it"):
        read_shard(tmp_path / "other.safetensors")
    (tmp_path / "checkpoint.pt").write_bytes(b"PK\3\4 cut off")
    with pytest.raises(ModelLoadError, match=r"checkpoint\.pt must hold a checkpoint .*; delete it, and the training"):
        load_checkpoint(tmp_path / "checkpoint.pt", torch.device("cpu"))


def test_without_matplotlib_it_says_what_to_install(tmp_path, monkeypatch):
    for name in ("run", "card"):
        monkeypatch.delitem(sys.modules, f"dynatree_bench.distill.{name}", raising=False)
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(PluginLoadError, match=r"needs matplotlib.*pip install 'dynatree\[bench\]'"):
        command("--out", tmp_path)


@pytest.mark.parametrize("text", [distill.help, (ROOT / "docs" / "distill.md").read_text(encoding="utf-8")])
def test_the_examples_draft_with_both_drafters(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    target = tiny_model("llama")
    save_student(new_student(target, [0], HEAD_IDS), Path("drafter"), torch.float32, {})
    [example] = re.findall(r'dynatree generate .*--drafter "(.*?)" "', text)
    drafter = build_drafter(example)
    assert [str(part) for part in drafter.drafters] == ["distilled(path='drafter')", "prompt_lookup"]
    assert generate(target, drafter, [0, 1, 2], max_new_tokens=12).token_ids == greedy(target, [0, 1, 2], 12)


def test_layers_that_are_no_numbers(tmp_path):
    assert "numbers joined by commas, got '0;1'" in command("--out", tmp_path, "--layers", "0;1").output


@pytest.mark.parametrize(
    "wrong",
    [
        ("--outputs", 0), ("--outputs", -5), ("--learning-rate", "nan"), ("--learning-rate", -1), ("--new-tokens", 0),
        ("--continue", -4), ("--ask", -1), ("--read", -1), ("--self-prompts", -1), ("--epochs", 0),
        ("--batch-tokens", 0),
    ],
    ids=lambda wrong: f"{wrong[0]}={wrong[1]}",
)  # fmt: skip
def test_numbers_out_of_range_are_refused_at_once(wrong, tmp_path, monkeypatch):
    monkeypatch.setattr("dynatree_bench.distill.run.make_drafter", lambda *asked: pytest.fail("it began"))
    ran = command("--out", tmp_path, *wrong)
    assert ran.exit_code == 2
    assert f"Invalid value for '{wrong[0]}'" in ran.output


@pytest.mark.parametrize("layers", ["0,3", "-1"])
def test_layers_that_the_target_lacks_are_refused_before_it_is_loaded(
    layers, character_target, text_file, tmp_path, monkeypatch
):
    monkeypatch.setattr("dynatree_bench.distill.run.load_model", lambda *asked, **options: pytest.fail("it was loaded"))
    with pytest.raises(InputError, match=r"--layers must be from 0 to 2 for .*, got \["):
        command(*options(character_target, text_file, tmp_path / "drafter"), "--layers", layers)
    assert not (tmp_path / "drafter").exists()


def test_files_are_read_before_a_model_is_loaded(tmp_path):
    file = tmp_path / "mine"
    file.write_text('{"prompt": "what"}\n{"prompt": 7}\n')
    with pytest.raises(InputError, match='mine, line 2: "prompt" must be a text'):
        command("--target", "no/such-model", "--out", tmp_path / "out", "--prompts", file)
    assert not (tmp_path / "out").exists()
