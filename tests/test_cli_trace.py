"""`--trace`, `--trace-private` and `--show-trees` of the `dynatree` command."""

from __future__ import annotations

import json
from pathlib import Path

from command import Dynatree, dynatree, folders, generate, is_one_error_line

from dynatree_core.trace import read

__all__ = ["dynatree", "folders", "generate"]  # fixtures

SHORT = ("--max-new-tokens", 6, "--policy", "fixed(depth=2)")


def test_an_answer_is_traced(generate: Dynatree, tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    document = generate("--trace", path, *SHORT, "--json", "abc").document
    (sequence,) = read(path).sequences
    assert sequence.token_ids == document["token_ids"]
    assert sequence.prompt == document["prompt_ids"]
    text = "".join(one.record["text"] for one in sequence.iterations) + sequence.end["text"]
    assert text == document["text"]
    assert generate("--trace", path, "--trace-private", *SHORT, "abc").code == 0
    assert read(path).sequences[0].prompt is None


def test_every_prompt_of_a_file_is_a_sequence(generate: Dynatree, tmp_path: Path) -> None:
    prompts, path = tmp_path / "prompts.jsonl", tmp_path / "run.jsonl.gz"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("abc", "b", "ca")))
    assert generate("--prompts", prompts, "--trace", path, *SHORT, "--compare").code == 0
    # the answers that are compared with are not in it
    assert [(one.number, one.begin["policy"]) for one in read(path).sequences] == [
        (i, "fixed(depth=2)") for i in range(3)
    ]


def test_trees_are_drawn_before_the_answer(generate: Dynatree) -> None:
    plain, drawn = generate(*SHORT, "abc"), generate("--show-trees", *SHORT, "abc")
    assert drawn.code == 0
    assert drawn.out == plain.out
    assert drawn.err.startswith("iteration 0, ")
    assert "target: " in drawn.err


def test_what_cannot_be_traced(generate: Dynatree, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    ran = generate("--trace", tmp_path / "mine.txt", *SHORT, "abc")
    assert ran.code == 2
    assert is_one_error_line(ran, "mine.txt, which holds something else")
    assert generate("--trace-private", *SHORT, "abc").code == 2
    ran = generate("--trace", "/dev/full", *SHORT, "abc")
    assert ran.code == 2
    assert is_one_error_line(ran, "/dev/full")
