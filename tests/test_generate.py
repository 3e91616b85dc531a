"""`dynatree generate`: the answer on stdout, the numbers on stderr, the JSON document, the comparison."""

from __future__ import annotations

import io
import json
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import attrs
import pytest
import torch
from command import ON_CPU, Dynatree, audit, dynatree, folders, generate, is_one_error_line, spawn
from transformers import LlamaForCausalLM

from dynatree_core import GenerationReport, Session
from dynatree_core.cli.generate_report import Comparison, report_table
from dynatree_core.cli.group import main
from dynatree_core.cli.loading import usual_drafter, usual_policy
from dynatree_core.models.student import new_student, save_student

__all__ = ["audit", "dynatree", "folders", "generate"]  # fixtures


def test_only_the_answer_is_on_stdout_and_the_numbers_on_stderr(generate: Dynatree) -> None:
    document = generate("--json", "--max-new-tokens", 30, "abc").document
    ran = generate("--max-new-tokens", 30, "abc")
    assert ran.code == 0
    assert ran.out == document["text"] + ("" if document["text"].endswith("\n") else "\n")
    labels = ["tokens / iteration", "path acceptance", "node acceptance", "drafted nodes", "tokens / s", "drafting"]
    labels += ["verification", "the rest", "prefill", "stop reason", "length"]
    assert all(label in ran.err for label in labels)
    assert "identical" not in ran.err


def test_the_default_target_is_the_embedded_model(
    dynatree: Dynatree, folders: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dynatree_core.models import load as models_module

    load, names = models_module.load_model, []

    def noting(name: str | None, **options: Any) -> Any:
        names.append(name)
        return load(str(folders.plain), **options)

    monkeypatch.setattr(models_module, "load_model", noting)
    document = dynatree("generate", "--json", "--drafter", "prompt_lookup", "--max-new-tokens", 2, "abc").document
    assert names == [None]
    assert document["target"] == "default"


def test_the_usual_drafter_suits_the_target(generate: Dynatree) -> None:
    assert usual_drafter(None) == usual_drafter("default") == "distilled+prompt_lookup"
    assert generate("--json", "--max-new-tokens", 2, "abc").document["drafter"] == "prompt_lookup"


def test_the_usual_policy_suits_the_target(generate: Dynatree) -> None:
    assert usual_policy(None) == usual_policy("default") == "cost_aware"
    assert generate("--json", "--max-new-tokens", 2, "abc").document["policy"] == "phase3"
    assert generate("--json", "--policy", "fixed", "--max-new-tokens", 2, "abc").document["policy"] == "fixed"


def test_a_student_or_a_union_as_drafter(generate: Dynatree, folders: SimpleNamespace, tmp_path: Path) -> None:
    target = LlamaForCausalLM.from_pretrained(folders.plain)
    student = new_student(target, [0], torch.arange(0, target.config.vocab_size, 2)).eval()
    save_student(student, tmp_path, torch.float32, {"target": "plain"})
    asked = ("--policy", "fixed(tau=0.0)", "--max-new-tokens", 8, "abcabc")
    for drafter in (tmp_path, f"distilled(path={str(tmp_path)!r})+prompt_lookup"):
        document = generate("--json", "--compare", "--drafter", drafter, *asked).document
        assert document["identical"] is True
        assert document["num_drafted_nodes"] > 0


def test_on_every_device(dynatree: Dynatree, folders: SimpleNamespace, device: torch.device) -> None:
    models_ = ("--target", folders.plain, "--drafter", folders.plain, "--policy", "linear(depth=3)")
    exact = ("--dtype", "float64", "--ignore-eos", "--max-new-tokens", 12)
    ran = dynatree("generate", "--json", "--compare", "--device", str(device), *models_, *exact, "abc")
    assert ran.code == 0
    assert ran.document["device"] == str(device)
    assert ran.document["identical"] is True
    assert ran.document["node_acceptance"] == 1


def test_stopping_at_the_end_of_the_text(
    dynatree: Dynatree, folders: SimpleNamespace, generate: Dynatree, tmp_path: Path
) -> None:
    token_ids = generate("--json", "--max-new-tokens", 20, "abc").document["token_ids"]
    folder = tmp_path / "ends"
    folder.mkdir()
    for file in folders.plain.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": token_ids[4]}))
    document = dynatree("generate", *ON_CPU, "--json", "--target", folder, "abc").document
    assert document["stop_reason"] == "eos"
    assert document["token_ids"] == token_ids[: token_ids.index(token_ids[4]) + 1]
    on = dynatree(
        "generate", *ON_CPU, "--json", "--target", folder, "--ignore-eos", "--max-new-tokens", 20, "abc"
    ).document
    assert on["stop_reason"] == "length"
    assert on["token_ids"] == token_ids


def test_no_tokens_wanted(generate: Dynatree) -> None:
    ran = generate("--max-new-tokens", 0, "--compare", "abc")
    assert (ran.code, ran.out) == (0, "")
    document = generate("--max-new-tokens", 0, "--compare", "--json", "abc").document
    assert document["text"] == ""
    assert document["token_ids"] == []
    assert document["stop_reason"] == "length"
    assert document["tokens_per_second"] is None
    assert document["identical"] is True
    assert document["speedup"] is None


def test_a_terminal_that_lacks_characters(folders: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, encoding="latin-1"))
    with pytest.raises(SystemExit) as ended:
        main(["generate", "--target", str(folders.plain), "--ignore-eos", "--max-new-tokens", "30", "abc"])
    assert ended.value.code == 0
    assert b"?" in written.getvalue()


@pytest.mark.parametrize("ending", ["", "\n", "\r\n"])
def test_a_prompt_on_standard_input(generate: Dynatree, monkeypatch: pytest.MonkeyPatch, ending: str) -> None:
    wanted = generate("--json", "--max-new-tokens", 8, "zwei\nZeilen ü").document
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(f"zwei\nZeilen ü{ending}".encode())))
    got = generate("--json", "--max-new-tokens", 8, "-").document
    assert got["token_ids"] == wanted["token_ids"]
    assert got["num_prompt_tokens"] == wanted["num_prompt_tokens"] == 14


def test_chat_template(dynatree: Dynatree, folders: SimpleNamespace) -> None:
    def num_prompt_tokens(*args: object) -> int:
        document = dynatree("generate", "--json", "--target", folders.chat, "--max-new-tokens", 1, *args).document
        return int(document["num_prompt_tokens"])

    wrapped = len("<user>abc<assistant>")
    assert num_prompt_tokens("abc") == wrapped
    assert num_prompt_tokens("--chat", "abc") == wrapped
    assert num_prompt_tokens("--raw", "abc") == 3


def test_options_reach_the_session(generate: Dynatree, folders: SimpleNamespace) -> None:
    own = ("--drafter", folders.plain, "--policy", "fixed(depth=5,branch=2,tau=0.0)", "--json", "--max-new-tokens", 9)
    free = generate(*own, "--tau", 0, "abc").document
    assert free["num_drafted_nodes"] > free["num_iterations"]
    assert generate(*own, "--max-nodes", 0, "abc").document["num_drafted_nodes"] == 0
    assert generate(*own, "--max-depth", 0, "abc").document["num_drafted_nodes"] == 0
    assert generate(*own, "--tau", 1, "abc").document["num_drafted_nodes"] == 0
    narrow = generate(*own, "--max-branch", 1, "abc")
    assert narrow.code == 1
    assert "max_branch=1" in narrow.err


def test_settings_of_generate_reach_the_session(generate: Dynatree) -> None:
    plain = generate("--json", "--max-new-tokens", "24", "x").document
    stop = next(char for char in plain["text"][1:] if char.isascii() and char.isprintable())
    stopped = generate("--json", "--max-new-tokens", "24", "--stop", stop, "--stop", "never there", "x").document
    assert stopped["stop_reason"] == "stop_string"
    assert stopped["text"] == plain["text"][: plain["text"].index(stop) + 1]
    timed = generate("--json", "--max-new-tokens", "24", "--max-time", "0", "x").document
    assert (timed["stop_reason"], timed["num_new_tokens"]) == ("time", 1)
    penalised = generate("--json", "--max-new-tokens", "24", "--repetition-penalty", "9", "x").document
    assert len(set(penalised["token_ids"])) > len(set(plain["token_ids"]))
    unique = generate("--json", "--compare", "--max-new-tokens", "24", "--no-repeat-ngram-size", "1", "x").document
    assert len(set(unique["token_ids"])) == 24
    assert unique["identical"] is True
    assert generate("--json", "--max-new-tokens", "24", "--exact", "fixed_width", "x").document["text"] == plain["text"]
    refused = generate("--compare", "--max-time", "1", "x")
    assert refused.code == 2
    assert "--compare needs outputs of one length" in refused.err


def test_a_cache_of_sinks_and_a_window(generate: Dynatree, audit: Dynatree, tmp_path: Path) -> None:
    args = ("--json", "--dtype", "float64", "--max-new-tokens", 40, "--ignore-eos")
    ran = generate(*args, "--compare", "--cache", "sinks=2,window=6", "abc")
    assert (ran.code, ran.document["identical"], ran.document["cache"]) == (0, True, "sinks=2,window=6")
    assert generate(*args, "--cache", "sinks=0,window=1", "abc").document["token_ids"] != ran.document["token_ids"]
    path = tmp_path / "answer.json"
    path.write_text(json.dumps(ran.document))
    refused = audit("--output", path)
    assert refused.code == 2
    assert is_one_error_line(refused, "a cache that keeps all tokens", "--cache sinks=2,window=6")


def test_json_holds_every_metric_and_where_it_comes_from(generate: Dynatree, folders: SimpleNamespace) -> None:
    ran = generate("--json", "--dtype", "float64", "--policy", "phase3:plan", "--max-new-tokens", 12, "abc")
    assert (ran.code, ran.err) == (0, "")
    document = ran.document
    assert {field.name for field in attrs.fields(GenerationReport)} - {"steps"} <= set(document)
    assert "steps" not in document
    assert document["target"] == str(folders.plain)
    assert document["drafter"] == "prompt_lookup"
    assert document["policy"] == "phase3:plan"
    assert document["expanded_policy"] == "confidence:plan+dynamic_depth:plan+history:plan"
    assert (document["device"], document["dtype"]) == ("cpu", "float64")
    assert document["versions"]["torch"] == torch.__version__
    assert set(document["versions"]) == {"dynatree", "torch", "transformers"}
    assert len(document["token_ids"]) == document["num_new_tokens"] == 12
    assert document["text"] == folders.tokenizer.decode(document["token_ids"])
    assert not {"identical", "speedup", "autoregressive"} & set(document)


def test_json_comparison(generate: Dynatree) -> None:
    ran = generate("--json", "--compare", "--max-new-tokens", 12, "abc")
    document, baseline = ran.document, ran.document["autoregressive"]
    assert ran.code == 0
    assert document["identical"] is True
    assert baseline["token_ids"] == document["token_ids"]
    assert baseline["policy"] == "autoregressive"
    assert baseline["drafter"] is None
    assert baseline["tokens_per_iteration"] == 1
    assert document["speedup"] == pytest.approx(document["tokens_per_second"] / baseline["tokens_per_second"])


@pytest.mark.slow
def test_json_is_all_that_a_process_prints_on_stdout(folders: SimpleNamespace) -> None:
    args = ["generate", *ON_CPU, "--json", "--compare", "--target", folders.plain, "--max-new-tokens", 4, "abc"]
    process = spawn(*args, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0
    assert json.loads(out)["identical"] is True
    assert err == b""


def test_comparison_in_the_table(generate: Dynatree) -> None:
    ran = generate("--compare", "--max-new-tokens", 12, "abc")
    assert ran.code == 0
    rows = [line.split() for line in ran.err.splitlines()]
    assert ["identical", "yes"] in rows
    assert any(row[:1] == ["speedup"] and row[1].endswith("×") for row in rows)
    assert "only an indication" in ran.err
    assert "autoregressive" in ran.err


def test_a_comparison_warms_up_without_a_trace(generate: Dynatree, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Session] = []

    class Noted(Session):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            made.append(self)

    monkeypatch.setattr("dynatree_core.engine.session.Session", Noted)
    document = generate("--compare", "--json", "--max-new-tokens", 12, "abc").document
    assert sorted(len(session.new_token_ids) for session in made) == [8, 12, 12]
    assert document["num_new_tokens"] == 12
    made.clear()
    generate("--max-new-tokens", 12, "abc")
    assert len(made) == 1


def test_tokens_that_differ_fail_the_comparison(generate: Dynatree, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(Session):
        def result(self, stop_reason: str | None = None) -> Any:
            result = super().result(stop_reason)
            if self.drafter_name is None:
                result.token_ids[5] += 1
            return result

    monkeypatch.setattr("dynatree_core.engine.session.Session", Wrong)
    ran = generate("--compare", "--max-new-tokens", 12, "abc")
    assert ran.code == 1
    assert ["identical", "no,", "from", "token", "5", "on"] in [line.split() for line in ran.err.splitlines()]
    assert generate("--compare", "--json", "--max-new-tokens", 12, "abc").code == 1


def test_an_interrupted_comparison_says_nothing(folders: SimpleNamespace) -> None:
    from dynatree_core import load_model

    session = Session(load_model(str(folders.plain)).model, None, [1, 2], policy="autoregressive", max_new_tokens=0)
    ended, cut = session.result(), attrs.evolve(session.result(), stop_reason="interrupted")
    assert Comparison(ended, ended).is_identical is True
    assert Comparison(ended, cut).is_identical is None
    assert Comparison(ended).is_identical is None
    assert "identical" not in list(report_table(Comparison(ended, cut)).columns[0].cells)


def test_comparing_in_half_precision_points_to_the_audit(generate: Dynatree, monkeypatch: pytest.MonkeyPatch) -> None:
    args = ("--compare", "--json", "--max-new-tokens", 4, "abc")
    assert generate("--dtype", "bfloat16", *args).document["identical"] is True
    original = Session.result

    def another(session: Session, *args: Any) -> Any:
        result = original(session, *args)
        return attrs.evolve(result, token_ids=[*result.token_ids, 0]) if session.drafter_name else result

    monkeypatch.setattr(Session, "result", another)
    ran = generate("--dtype", "bfloat16", *args)
    assert ran.code == 1
    assert (
        ran.err
        == "dynatree: note: half precision rounds; `dynatree audit` tells whether that explains the difference\n"
    )
    assert generate("--dtype", "float32", *args).err == ""
