"""Commands that read files of prompts: `generate --prompts`, `audit` of them and of others' outputs, typed texts."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from command import ON_CPU, Dynatree, dynatree, folders, generate, is_one_error_line

__all__ = ["dynatree", "folders", "generate"]  # fixtures

ROWS = [
    {"id": "a", "category": "x", "prompt": "abc"},
    {"id": "b", "category": "y", "prompt": "def"},
    {"id": "c", "category": "x", "prompt": "ghi"},
]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-16")
    return path


def documents(out: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in out.splitlines()]


def test_each_prompt_of_a_file_is_answered_as_it_is_alone(generate: Dynatree, prompts: Path) -> None:
    ran = generate("--json", "--max-new-tokens", 6, "--prompts", prompts)
    assert (ran.code, ran.err) == (0, "")
    found = documents(ran.out)
    assert [(one["id"], one["category"], one["turn"], one["prompt"]) for one in found] == [
        (row["id"], row["category"], 1, row["prompt"]) for row in ROWS
    ]
    for row, one in zip(ROWS, found, strict=True):
        alone = generate("--json", "--max-new-tokens", 6, row["prompt"]).document
        assert (one["token_ids"], one["prompt_ids"]) == (alone["token_ids"], alone["prompt_ids"])


def test_some_prompts_are_taken_and_their_number_is_told(generate: Dynatree, prompts: Path) -> None:
    def taken(*args: object) -> list[object]:
        ran = generate("--json", "--max-new-tokens", 1, "--prompts", prompts, *args)
        found = documents(ran.out)
        assert ran.err == f"dynatree: note: {len(found)} of 3 prompts are taken\n"
        return [one["id"] for one in found]

    assert taken("--category", "x") == ["a", "c"]
    assert taken("--num-prompts", 2) == ["a", "b"]
    assert taken("--num-prompts", 2, "--seed", 4) == taken("--num-prompts", 2, "--seed", 4)
    assert taken("--category", "y", "--num-prompts", "all") == ["b"]


def test_answers_on_a_terminal_follow_their_titles(generate: Dynatree, prompts: Path) -> None:
    ran = generate("--compare", "--max-new-tokens", 4, "--prompts", prompts)
    assert ran.code == 0
    assert ran.out.count("\n") >= 3
    assert [line for line in ran.err.splitlines() if " of 3)" in line] == ["a (1 of 3)", "b (2 of 3)", "c (3 of 3)"]


def test_a_conversation_is_played(dynatree: Dynatree, folders: SimpleNamespace, tmp_path: Path) -> None:
    """The second turn stands behind the model's own first answer."""
    path = tmp_path / "question.jsonl"
    path.write_text(json.dumps({"question_id": 81, "turns": ["abc", "def"]}))
    ask = ("generate", *ON_CPU, "--target", folders.chat, "--ignore-eos", "--json", "--max-new-tokens", 5)
    first, second = documents(dynatree(*ask, "--prompts", path, "--turns").out)
    assert [(one["id"], one["turn"], one["prompt"]) for one in (first, second)] == [
        ("question-81", 1, "abc"), ("question-81", 2, "def"),
    ]  # fmt: skip
    talk = f"<user>abc<assistant>{first['text']}<user>def<assistant>"
    assert folders.tokenizer.decode(second["prompt_ids"]) == talk
    [only] = documents(dynatree(*ask, "--prompts", path).out)
    assert only == first | {name: only[name] for name in only if name.endswith(("_seconds", "per_second"))}


def test_what_is_wrong_is_told_before_a_model_is_loaded(dynatree: Dynatree, prompts: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    bad.write_text('{"prompt": "a"}\n{"prompt": "b \\ud83c"}\n')
    for args, words in [
        (("--prompts", bad), (f"{bad}, line 2, column 15: ", "half a character")),
        (("--prompts", prompts, "abc"), ("give either PROMPT or --prompts FILE",)),
        ((), ("give either PROMPT or --prompts FILE",)),
        (("--column", "x", "abc"), ("--column is about a file of prompts",)),
        (("--prompts", prompts, "--num-prompts", 0), ("a number of at least 1, or 'all', got '0'",)),
        (("--prompts", prompts, "--category", "z"), ("category 'z'", "got the categories x, y")),
        (("--prompts", prompts, "--column", "z"), ("must have the column 'z', got the columns id, category, prompt",)),
        (("--stop", "a\udcff", "abc"), ("--stop must be UTF-8 text",)),
    ]:
        ran = dynatree("generate", "--target", "no/such-model", *args)
        assert ran.code == 2
        assert is_one_error_line(ran, *words)
    assert is_one_error_line(dynatree("chat", "--system", "a\udcff"), "--system must be UTF-8 text")


def test_a_prompt_without_room_is_told_before_the_first_answer(generate: Dynatree, tmp_path: Path) -> None:
    path = tmp_path / "p"
    path.write_text('{"prompt": "abc"}\n{"prompt": "%s"}\n' % ("abc " * 5000))
    ran = generate("--json", "--prompts", path)
    assert (ran.code, ran.out) == (2, "")
    assert is_one_error_line(ran, f"{path}, line 2: prompt and new tokens must fit", "20000 + 128")


@pytest.mark.parametrize("data", [b"\xef\xbb\xbfabc\r\n", "abc\n".encode("utf-16")], ids=["mark", "UTF-16"])
def test_a_prompt_from_standard_input_has_no_mark(
    generate: Dynatree, monkeypatch: pytest.MonkeyPatch, data: bytes
) -> None:
    plain = generate("--json", "--max-new-tokens", 1, "abc").document
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert generate("--json", "--max-new-tokens", 1, "-").document["prompt_ids"] == plain["prompt_ids"]


# audit


@pytest.fixture
def audit(dynatree: Dynatree, folders: SimpleNamespace) -> Dynatree:
    return lambda *args: dynatree("audit", *ON_CPU, "--target", folders.plain, *args)


def test_answers_of_a_file_are_audited_again(
    audit: Dynatree, generate: Dynatree, prompts: Path, tmp_path: Path
) -> None:
    """In any spelling: JSON lines, a list, with a mark, in UTF-16 as PowerShell writes it."""
    out = generate("--json", "--max-new-tokens", 4, "--prompts", prompts).out
    rows = [json.loads(line) for line in out.splitlines()]
    for data in (out.encode(), json.dumps(rows).encode("utf-8-sig"), out.replace("\n", "\r\n").encode("utf-16")):
        (tmp_path / "answers").write_bytes(data)
        ran = audit("--json", "--output", tmp_path / "answers")
        assert (ran.code, ran.document["num_outputs"], ran.document["verdict"]) == (0, 3, "identical")
    (tmp_path / "answers").write_text(json.dumps([rows[0], {**rows[1], "exact": "fixed_width"}]))
    assert is_one_error_line(audit("--output", tmp_path / "answers"), 'must have the "exact" of the first output')


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ({"text": "ab", "prompt": [{"role": "user", "content": "Hi"}]}, 'must have a text as "prompt"'),
        ({"text": 5, "prompt": "Hi"}, "must have a text as \"text\", got '5'"),
        ({"text": ["ab"], "prompt": "Hi"}, 'must have a text as "text"'),
        ({"text": "a\ud83d", "prompt": "Hi"}, "half a character"),
        ({"text": "ab", "prompt": "H\0"}, "a NUL character"),
        ({"choices": [{"message": {"content": "ab"}}]}, 'must be a JSON object with "token_ids"'),
        ({"token_ids": [10**9], "prompt_ids": [5]}, 'must have "token_ids" from 0 to 256'),
        ({"token_ids": [5], "prompt_ids": [-1]}, 'must have "prompt_ids" from 0 to 256'),
        ({"token_ids": [5.0], "prompt_ids": [1]}, 'a list of whole numbers as "token_ids"'),
        ({"token_ids": [5], "prompt_ids": [1], "temperature": 0.7}, "got one of drawn tokens"),
        ({"token_ids": [5], "prompt_ids": [1], "do_sample": True}, "got one of drawn tokens"),
        ({"token_ids": [], "prompt_ids": [1]}, "must have at least one token"),
    ],
    ids=str,
)
def test_others_outputs_that_cannot_be_judged_are_refused(
    audit: Dynatree, tmp_path: Path, document: dict[str, object], words: str
) -> None:
    path = tmp_path / "answer.json"
    path.write_text(json.dumps(document))
    ran = audit("--output", path)
    assert (ran.code, ran.out) == (2, "")
    assert is_one_error_line(ran, words)


def test_running_text_is_audited_without_the_chat_template(
    dynatree: Dynatree, folders: SimpleNamespace, tmp_path: Path
) -> None:
    (tmp_path / "book").write_text("Once upon a time")
    ran = dynatree(
        "audit", *ON_CPU, "--target", folders.chat, "--json", "--max-new-tokens", 2, "--prompts", tmp_path / "book"
    )
    assert ran.document["audits"][0]["prompt_ids"] == folders.tokenizer("Once upon a time").input_ids


def test_each_turn_of_a_conversation_is_audited(
    audit: Dynatree, dynatree: Dynatree, folders: SimpleNamespace, tmp_path: Path
) -> None:
    """The prompt of the second turn holds the answer to the first."""
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps({"question_id": 81, "turns": ["abc", "def"]}))
    asked = ("--target", folders.chat, "--ignore-eos", "--json", "--max-new-tokens", 5, "--prompts", path, "--turns")
    answers = documents(dynatree("generate", *ON_CPU, *asked).out)
    ran = dynatree("audit", *ON_CPU, *asked)
    assert (ran.code, ran.document["num_outputs"], ran.document["verdict"]) == (0, 2, "identical")
    for answer, audited in zip(answers, ran.document["audits"], strict=True):
        for name in ("id", "turn", "prompt", "prompt_ids", "token_ids"):
            assert audited[name] == answer[name]
    ran = audit("--turns", "abc")
    assert ran.code == 2
    assert is_one_error_line(ran, "--turns is about a file of prompts")
