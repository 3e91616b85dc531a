"""`dynatree hf-folder`: what it writes, what a later run replaces, and what it refuses."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command import run_command
from hf_folders import CHOSEN, PLAIN, PROMPT, modules_cache, plain, source, used, written
from students import tiny_student
from tiny_folder import save_tiny, tiny_tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
)

from dynatree_core import hf
from dynatree_core.errors import ModelLoadError
from dynatree_core.hf.export import Chosen, check_place, program, write_folder
from dynatree_core.models.load import model_folder
from dynatree_core.models.student import save_student
from dynatree_core.testing.models import tiny_model

__all__ = ["modules_cache", "plain", "source", "used", "written"]  # fixtures


def test_the_folder_loads_with_and_without_trees(written, source, plain):
    without = AutoModelForCausalLM.from_pretrained(written)
    assert "generate" not in vars(without)
    assert without.generate(PROMPT, **PLAIN).tolist() == plain.generate(PROMPT, **PLAIN).tolist()
    assert AutoTokenizer.from_pretrained(written).get_vocab() == tiny_tokenizer().get_vocab()
    for name in ("model.safetensors", "config.json"):
        assert (written / name).read_bytes() == (source / name).read_bytes()
    readme = (written / "README.md").read_text()
    assert "`fixed(depth=3)`" in readme
    assert "`tau=0.0`" in readme


def test_a_program_with_nothing_chosen_is_the_built_in_one():
    text = Path(hf.FOLDER, "custom_generate", "generate.py").read_text()
    assert program(CHOSEN) != text
    assert "DEFAULTS: dict[str, Any] = {'drafter': 'prompt_lookup', 'policy': 'fixed(depth=3)'" in program(CHOSEN)
    compile(program(Chosen('distilled(path="it\'s")', "a'b", {"cache": 'x"y'})), "generate.py", "exec")


def test_links_and_what_a_later_run_replaces(source, tmp_path):
    out, other = tmp_path / "out", save_tiny(tmp_path / "other", seed=1)
    (other / "extra.safetensors").write_bytes(b"another")
    before = (source / "model.safetensors").read_bytes()
    write_folder(out, source, "tiny", CHOSEN, is_linked=True)
    assert (out / "model.safetensors").is_symlink()
    assert not (out / "config.json").is_symlink()
    model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    assert model.generate(PROMPT, **PLAIN).shape == (1, 27)
    check_place(out, other)
    write_folder(out, other, "other", CHOSEN)
    assert (source / "model.safetensors").read_bytes() == before  # not written through the link
    assert not (out / "model.safetensors").is_symlink()
    (out / "mine.txt").write_text("a note")
    write_folder(out, source, "tiny", CHOSEN)
    assert not (out / "extra.safetensors").exists()
    assert (out / "mine.txt").read_text() == "a note"
    assert (out / "model.safetensors").read_bytes() == before


def test_a_record_that_was_changed_reaches_no_other_folder(source, tmp_path):
    write_folder(tmp_path / "out", source, "tiny", CHOSEN)
    (tmp_path / "precious").write_text("mine")
    record = tmp_path / "out" / "custom_generate" / "dynatree.json"
    names = ["../precious", str(tmp_path / "precious"), "custom_generate", 7]
    record.write_text(json.dumps({**json.loads(record.read_text()), "files": names}))
    write_folder(tmp_path / "out", source, "tiny", CHOSEN)
    assert (tmp_path / "precious").read_text() == "mine"


def test_programs_of_the_target_itself_are_left_out(tmp_path):
    """transformers would load them in the place of the model that was checked."""
    source = save_tiny(tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModelForCausalLM": "theirs.Model"}}))
    (source / "theirs.py").write_text("raise RuntimeError('run')")
    write_folder(tmp_path / "out", source, "tiny", CHOSEN)
    assert not (tmp_path / "out" / "theirs.py").exists()
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)).__name__ == (
        "LlamaForCausalLM"
    )


def dynatree(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[object, str]:
    done = run_command(capsys, *args)
    return done.code, done.out + done.err


def test_the_command(capsys, source, plain, used, tmp_path):
    out = tmp_path / "out"
    chosen = ["--policy", "fixed(depth=2)", "--option", "tau=0", "--option", "on_error=fallback"]
    code, said = dynatree(capsys, "hf-folder", out, "--target", source, "--link", *chosen)
    assert (code, "trust_remote_code=True" in said) == (0, True), said
    model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    assert model.generate(PROMPT, **PLAIN).tolist() == plain.generate(PROMPT, **PLAIN).tolist()
    [call] = used
    assert (call["drafter"], call["policy"]) == ("prompt_lookup", "fixed(depth=2)")
    assert call["options"] == {"tau": 0, "on_error": "fallback"}
    assert dynatree(capsys, "hf-folder", out, "--target", source)[0] == 0  # its own folder is replaced


@pytest.mark.parametrize("text", ["{}", "distilled(path='{}')+prompt_lookup"])
def test_a_student_is_found_from_any_folder(capsys, source, plain, used, tmp_path, monkeypatch, text):
    save_student(tiny_student(tiny_model("llama")), tmp_path / "student", torch.float64, {})
    monkeypatch.chdir(tmp_path)
    drafter = text.format("./student")
    code, said = dynatree(capsys, "hf-folder", "out", "--target", source, "--drafter", drafter)
    assert code == 0, said
    monkeypatch.chdir(source)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert model.generate(PROMPT, **PLAIN).tolist() == plain.generate(PROMPT, **PLAIN).tolist()
    assert str(tmp_path / "student") in used[0]["drafter"]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (["--policy", "fixd"], "did you mean 'fixed'"),
        (["--drafter", "promt_lookup"], "did you mean 'prompt_lookup'"),
        (["--drafter", "SOURCE"], "must be a registered one or a folder made by `dynatree distill`, got the model"),
        (["--option", "tao=1"], "must be one of .* got 'tao' .did you mean 'tau'"),
        (["--option", "tau"], "must be written NAME=VALUE, got 'tau'"),
        (["--option", "tau=high"], "tau must be"),
        (["--option", "max_nodes=-1"], "max_nodes must be"),
        (["--option", "on_error=ignore"], "on_error must be one of raise, fallback, got 'ignore'"),
        (
            ["--option", "runner=fast"],
            "runner must be one of auto, cudagraph, eager, native, packed, triton, got 'fast'",
        ),
        (["--option", "exact=yes"], "exact"),
        (["--target", "nowhere/at/all"], "cannot load"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_what_is_wrong_is_told_before_a_model_is_loaded(capsys, source, tmp_path, monkeypatch, wrong, words):
    def unexpected(*args: object, **options: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("dynatree_core.models.load.load_model", unexpected)
    given = [str(source) if word == "SOURCE" else word for word in wrong]
    code, said = dynatree(capsys, "hf-folder", tmp_path / "out", "--target", source, *given)
    assert code != 0
    assert re.search(words, " ".join(said.split())), said
    assert not (tmp_path / "out").exists()


def test_nothing_of_somebody_elses_is_replaced(capsys, source, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    code, said = dynatree(capsys, "hf-folder", tmp_path, "--target", source)
    assert code != 0
    assert "new, empty or made by it" in said
    write_folder(tmp_path / "out", source, "tiny", CHOSEN)
    code, said = dynatree(capsys, "hf-folder", tmp_path / "out", "--target", tmp_path / "out")
    assert code != 0
    assert "another folder than the target's" in said


@pytest.mark.slow
def test_without_dynatree_the_folder_says_what_is_missing(written):
    """In a process that cannot import it."""
    code = (
        "import sys; sys.modules['dynatree_core'] = None\n"
        f"import runpy; runpy.run_path({str(written / 'custom_generate' / 'generate.py')!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "needs the package dynatree in the environment" in done.stderr


def test_where_a_models_files_are(source, monkeypatch):
    monkeypatch.setattr(
        "dynatree_core.models.hub.fetched_folder", lambda name: source if name == "owner/tiny" else None
    )
    assert model_folder("owner/tiny") == model_folder(str(source)) == source
    with pytest.raises(ModelLoadError, match="must be in the hub's local cache once it is loaded, got none"):
        model_folder("owner/other")
