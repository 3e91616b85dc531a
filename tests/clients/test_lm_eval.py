"""The `lm-eval` command on a folder with trees: the answers that it logs are those of plain decoding."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

TASK = """
task: letters
dataset_path: json
dataset_kwargs:
  data_files:
    test: {questions}
output_type: generate_until
test_split: test
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs:
  until: ["e"]
  max_gen_toks: 24
  do_sample: false
metric_list:
  - metric: exact_match
"""
QUESTIONS = ["the cat", "a hen in the barn", "the cat sat on the mat. the cat"]


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: it is in the extra [clients]")
    folder = tmp_path / "tasks"
    folder.mkdir()
    lines = [json.dumps({"text": text, "answer": "x"}) for text in QUESTIONS]
    (folder / "letters.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "letters.yaml").write_text(TASK.format(questions=folder / "letters.jsonl"))
    return folder


def evaluate(model: Path, tasks: Path, environment: dict[str, str], *more: str) -> subprocess.CompletedProcess:
    command = Path(sys.executable).with_name("lm-eval")
    words = ["run", "--model", "hf", "--model_args", f"pretrained={model},dtype=float64", "--tasks", "letters"]
    words += [
        "--include_path",
        str(tasks),
        "--device",
        "cpu",
        "--log_samples",
        "--output_path",
        str(tasks / model.name),
    ]
    return subprocess.run(
        [str(command), *words, *more], env=environment, capture_output=True, text=True, check=False, timeout=300
    )


def answers(model: Path, tasks: Path) -> list[str]:
    [file] = (tasks / model.name).rglob("samples_*.jsonl")
    logged = [json.loads(line) for line in file.read_text().splitlines()]
    return [one["resps"][0][0] for one in sorted(logged, key=lambda one: one["doc_id"])]


@pytest.mark.parametrize("more", [(), ("--batch_size", "2")], ids=["one by one", "in batches"])
def test_answers_until_a_stop(served, tasks, environment, more):
    """Its stopping criterion for a batch looks at all rows, and ends none of them before all have ended."""
    before = served.num_calls
    for model, trusted in ((served.plain, ()), (served.trees, ("--trust_remote_code",))):
        done = evaluate(model, tasks, environment, *trusted, *more)
        assert done.returncode == 0, done.stdout + done.stderr
    assert answers(served.trees, tasks) == answers(served.plain, tasks)
    assert len(set(answers(served.trees, tasks))) == len(QUESTIONS)
    assert served.num_calls == before + (2 if more else len(QUESTIONS))
