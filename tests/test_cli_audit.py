"""`dynatree audit`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from command import ON_CPU, Dynatree, audit, dynatree, folders, generate, is_one_error_line

__all__ = ["audit", "dynatree", "folders", "generate"]  # fixtures


def test_audit_of_a_generation(audit: Dynatree, generate: Dynatree) -> None:
    ran = audit("abc")
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.startswith("identical to autoregressive decoding (20 tokens)\n")
    for label in ("bound", "float32", "within the bound", "as verified", "tokens / iteration"):
        assert label in ran.out
    document = audit("--json", "--exact", "fixed_width", "--dtype", "bfloat16", "abc").document
    assert document["verdict"] in ("identical", "tie")
    assert (document["num_outputs"], document["num_rows"], document["dtype"]) == (1, 16, "bfloat16")
    rounding = document["rounding"]
    assert document["bound"] == max(rounding["deviation"], 10 * rounding["spread"], 2 * rounding["spacing"])
    assert len(document["audits"][0]["token_ids"]) == document["num_positions"] == 20
    whole = generate("--json", "--exact", "fixed_width", "--dtype", "bfloat16", "--max-new-tokens", 20, "abc").document
    assert whole["exact"] == "fixed_width"
    assert document["audits"][0]["token_ids"] == whole["token_ids"]
    assert document["audits"][0]["prompt_ids"] == whole["prompt_ids"]


def test_audit_of_prompts(audit: Dynatree, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("abc", "def", "ghi")))
    document = audit("--json", "--prompts", path, "--limit", 2).document
    assert (document["num_outputs"], document["num_identical"], document["num_differing"]) == (2, 2, 0)
    assert document["rounding"]["num_positions"] == document["num_positions"] == 40
    assert document["smallest_gap"] is None
    ran = audit("--prompts", path)
    assert ran.code == 0
    assert ran.out.splitlines()[0].split() == ["outputs", "3"]
    path.write_text('{"prompt": "abc"}\n{"text": "abc"}\n')
    ran = audit("--prompts", path)
    assert ran.code == 2
    assert is_one_error_line(ran, "line 2", 'must have a "prompt"')
    path.write_text("")
    assert is_one_error_line(audit("--prompts", path), "at least one prompt", "got none")
    path.write_text('{"prompt": "a\u2028b"}\n\n{"prompt": "abc"}\n \n', encoding="utf-8")  # no line ends at U+2028
    assert audit("--json", "--prompts", path, "--num-prompts", "all").document["num_outputs"] == 2
    for wrong_prompt in (None, 7, ""):
        path.write_text(json.dumps({"prompt": wrong_prompt}))
        assert is_one_error_line(audit("--prompts", path), "line 1", '"prompt" must')
    path.write_bytes(b"caf\xe9")
    for wrong in (path, tmp_path, tmp_path / "nowhere"):
        ran = audit("--prompts", wrong)
        assert ran.code == 2
        assert is_one_error_line(ran)


def test_audit_of_an_output(audit: Dynatree, generate: Dynatree, tmp_path: Path) -> None:
    path = tmp_path / "answer.json"
    document = generate("--json", "--dtype", "float64", "--max-new-tokens", 12, "abc").document
    path.write_text(json.dumps(document))
    ran = audit("--output", path, "--json")
    assert ran.code == 0
    assert ran.document["verdict"] == "identical"
    assert ran.document["dtype"] == "float64", "the output's own, where none is asked for"
    assert ran.document["num_positions"] == 12
    assert ran.document["tokens_per_iteration"] is None
    wrong = [*document["token_ids"][:7], (document["token_ids"][7] + 1) % 200, *document["token_ids"][8:]]
    path.write_text(json.dumps(document | {"token_ids": wrong}))
    ran = audit("--output", path)
    assert ran.code == 1
    assert ran.out.startswith("first difference at token 7 of 12: bug\n")
    assert f"expected {document['token_ids'][7]} " in ran.out
    assert "beyond the bound" in ran.out
    ran = audit("--output", path, "--json", "--dtype", "float32", "--reference-dtype", "float64")
    assert ran.code == 1
    first = ran.document["audits"][0]["differences"][0]
    assert (first["position"], first["token_id"], first["verdict"]) == (7, wrong[7], "bug")
    assert "transformers, all rows, float64" in first["logits"]


def test_audit_of_an_output_knows_how_it_was_made(
    dynatree: Dynatree, generate: Dynatree, folders: SimpleNamespace, tmp_path: Path
) -> None:
    """Its target, end tokens and width of passes come from the file; another target is refused."""
    path, width = tmp_path / "answer.json", ("--exact", "fixed_width", "--max-nodes", 7)
    [end] = generate("--json", "--max-new-tokens", 1, "abc").document["token_ids"]
    target = shutil.copytree(folders.plain, tmp_path / "target")
    (target / "generation_config.json").write_text(json.dumps({"eos_token_id": [end]}))
    made = dynatree(
        "generate", *ON_CPU, "--json", "--target", target, "--ignore-eos", "--max-new-tokens", 8, *width, "abc"
    )
    path.write_text(made.out)
    ran = dynatree("audit", *ON_CPU, "--json", "--output", path)
    assert (ran.code, ran.document["target"], ran.document["num_rows"]) == (0, str(target), 8)
    path.write_text(json.dumps(made.document | {"ignore_eos": False}))
    assert "goes on after token 0" in dynatree("audit", *ON_CPU, "--output", path).out
    same = target / ".." / "target"
    assert dynatree("audit", *ON_CPU, "--ignore-eos", "--target", same, "--output", path).code == 0
    ran = dynatree("audit", *ON_CPU, "--target", folders.plain, "--output", path)
    assert ran.code == 2
    assert is_one_error_line(ran, f"made by, '{target}', got --target '{folders.plain}'", "leave --target out")


@pytest.mark.parametrize("way", ["option", "generation config"])
def test_audit_of_changed_logits_is_refused(
    dynatree: Dynatree, folders: SimpleNamespace, tmp_path: Path, way: str
) -> None:
    path, target = tmp_path / "answer.json", folders.plain
    options: list[object] = ["--no-repeat-ngram-size", 1]
    if way == "generation config":
        target, options = shutil.copytree(target, tmp_path / "target"), []
        (target / "generation_config.json").write_text(json.dumps({"repetition_penalty": 1.5}))
    made = dynatree("generate", *ON_CPU, "--json", "--target", target, *options, "--max-new-tokens", 4, "abc")
    path.write_text(made.out)
    [name] = made.document["logits_processors"]
    ran = dynatree("audit", *ON_CPU, "--output", path)
    assert ran.code == 2
    assert is_one_error_line(ran, f"changed by {name} (--repetition-penalty", "generate --compare")


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ({"token_ids": ["a"]}, 'a list of whole numbers as "token_ids"'),
        ({"token_ids": 7}, 'a list of whole numbers as "token_ids"'),
        ({"token_ids": None}, '"token_ids", or at least "text"'),
        ({"prompt_ids": "abc"}, 'a list of whole numbers as "prompt_ids"'),
        ({"dtype": 7}, 'a dtype as "dtype"'),
        ({"target": 7}, 'a model as "target"'),
        ({"exact": "yes"}, '"fixed_width" or null as "exact"'),
        ({"max_nodes": -1}, 'a whole number as "max_nodes"'),
        ({"ignore_eos": 1}, 'true or false as "ignore_eos"'),
        ({"logits_processors": 7}, 'a list of names as "logits_processors"'),
    ],
    ids=str,
)
def test_an_output_with_something_wrong_in_it(
    audit: Dynatree, tmp_path: Path, wrong: dict[str, object], expected: str
) -> None:
    path = tmp_path / "answer.json"
    path.write_text(json.dumps({"prompt_ids": [1, 2], "token_ids": [5, 6]} | wrong))
    ran = audit("--output", path)
    assert ran.code == 2
    assert is_one_error_line(ran, f"{path} must ", expected)


def test_an_output_that_is_not_there(audit: Dynatree, tmp_path: Path) -> None:
    ran = audit("--output", tmp_path / "nowhere.json")
    assert is_one_error_line(ran, "must be a file that can be read", "check the path")
    assert "JSON" not in ran.err


def test_audit_of_a_text(audit: Dynatree, generate: Dynatree, folders: SimpleNamespace, tmp_path: Path) -> None:
    """Of an output by another program, without token ids."""
    path = tmp_path / "answer.json"
    token_ids = folders.tokenizer("some words").input_ids
    path.write_text(json.dumps({"text": "some words"}))
    ran = audit("--output", path, "--json", "abc")
    assert "its text is cut into tokens again" in ran.err
    assert ran.document["audits"][0]["token_ids"] == token_ids
    assert ran.document["audits"][0]["prompt_ids"] == folders.tokenizer("abc").input_ids
    assert ran.code == 1, "a random model does not say this"
    assert is_one_error_line(audit("--output", path), "needs its PROMPT on the command line")
    for wrong in ("{", "[1, 2]", '{"tokens": []}'):
        path.write_text(wrong)
        ran = audit("--output", path)
        assert ran.code == 2
        assert is_one_error_line(ran, "`dynatree generate --json`")


def test_audit_wants_one_source(audit: Dynatree, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "abc"}\n')
    for args in ([], ["--prompts", path, "abc"], ["--prompts", path, "--output", path]):
        ran = audit(*args)
        assert ran.code == 2
        assert is_one_error_line(ran, "give either PROMPT, --prompts or --output")


def test_an_interrupted_audit_tells_what_it_has(
    audit: Dynatree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dynatree_core.cli import audit_report as audit_cli_module

    real, done = audit_cli_module.audit_generation, []

    def interrupted(*args: Any, **options: Any) -> Any:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(real(*args, **options))
        return done[-1]

    monkeypatch.setattr(audit_cli_module, "audit_generation", interrupted)
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "abc"}\n' * 4)
    ran = audit("--json", "--prompts", path)
    assert ran.code == 130
    assert ran.document["num_outputs"] == 2
    ran = audit("--json", "abc")
    assert (ran.code, ran.out) == (130, "")
