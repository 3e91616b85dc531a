"""`dynatree generate --prompts --out --batch-size`: many prompts at once, into a file that a run can go on with."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from command import ON_CPU, Dynatree, dynatree, folders, generate, is_one_error_line, more_plugins
from filelock import FileLock

from dynatree_core import Engine
from dynatree_core.cli.answers import Answers
from dynatree_core.engine.handle import Event

__all__ = ["dynatree", "folders", "generate", "more_plugins"]  # fixtures

ROWS = [
    {"id": "a", "category": "x", "prompt": "abc abc abc"},
    {"id": "b", "category": "y", "prompt": "def"},
    {"id": "c", "category": "x", "prompt": "ghi ghi"},
    {"id": "d", "category": "y", "prompt": "a longer one, a longer one"},
]
WALL_CLOCK = ("_seconds", "per_second")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def untimed(record: dict[str, Any], *but: str) -> dict[str, Any]:
    return {name: value for name, value in record.items() if not name.endswith(WALL_CLOCK) and name not in but}


@pytest.mark.parametrize("batch_size", [1, 3])
def test_each_answer_is_that_of_the_prompt_alone_in_the_order_of_the_prompts(
    generate: Dynatree, prompts: Path, tmp_path: Path, batch_size: int
) -> None:
    """What `--json` prints without a batch, and besides which question it is, whether it failed and what was asked."""
    out = tmp_path / "new" / "answers.jsonl"
    ran = generate("--max-new-tokens", 6, "--prompts", prompts, "--out", out, "--batch-size", batch_size)
    assert (ran.code, ran.out) == (0, "")
    assert is_note(ran.err, "4 answered; 24 tokens in ")
    alone = generate("--json", "--max-new-tokens", 6, "--prompts", prompts)
    found = lines(out)
    assert [untimed(one, "index", "error", "request") for one in found] == [
        untimed(json.loads(line)) for line in alone.out.splitlines()
    ]
    assert [(one["index"], one["error"]) for one in found] == [(0, None), (1, None), (2, None), (3, None)]


def test_answers_of_a_file_are_audited(
    dynatree: Dynatree, folders: SimpleNamespace, prompts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "answers.jsonl"
    ask = (*ON_CPU, "--target", folders.plain)
    assert dynatree("generate", *ask, "--max-new-tokens", 4, "--prompts", prompts, "--out", out).code == 0
    ran = dynatree("audit", *ask, "--json", "--output", out)
    assert (ran.code, ran.document["num_outputs"], ran.document["verdict"]) == (0, 4, "identical")


def is_note(err: str, *words: str) -> bool:
    return err.startswith("dynatree: note: ") and err.count("\n") == 1 and all(word in err for word in words)


def test_without_a_file_lines_come_as_answers_are_finished(generate: Dynatree, prompts: Path) -> None:
    ran = generate("--json", "--max-new-tokens", 4, "--prompts", prompts, "--batch-size", 2)
    assert (ran.code, ran.err) == (0, "")
    assert sorted(json.loads(line)["index"] for line in ran.out.splitlines()) == [0, 1, 2, 3]


def test_a_run_goes_on_where_one_was_cut_off(generate: Dynatree, prompts: Path, tmp_path: Path) -> None:
    """What is there stays as it is, a torn line is no answer, and more prompts may be asked for than before."""
    out = tmp_path / "answers.jsonl"
    ask = ("--max-new-tokens", 4, "--prompts", prompts, "--out", out, "--batch-size", 2, "--json")
    first = generate(*ask, "--category", "y")
    assert first.document["num_answered"] == 2
    there = lines(out)
    assert [one["index"] for one in there] == [1, 3]
    marked = [{**one, "text": f"marked {one['index']}"} for one in there]
    out.write_text(json.dumps(marked[0]) + "\n" + json.dumps(marked[1])[:50])
    ran = generate(*ask)
    assert (ran.code, ran.document["num_answered"], ran.document["num_found"]) == (0, 3, 1)
    found = lines(out)
    assert [one["index"] for one in found] == [0, 1, 2, 3]
    assert [one["text"].startswith("marked") for one in found] == [False, True, False, False]
    assert untimed(found[3]) == untimed(there[1])
    before = out.read_bytes()
    assert generate(*ask).document["num_answered"] == 0
    assert out.read_bytes() == before


@pytest.mark.parametrize(
    "change",
    [
        ("--max-new-tokens", 5), ("--policy", "linear"), ("--stop", "q"), ("--raw",), ("--runner", "eager"),
        ("--repetition-penalty", 1.1), ("--column", "category"),
    ],
    ids=lambda change: change[0],
)  # fmt: skip
def test_a_file_of_another_request_is_refused_and_left_as_it_is(
    dynatree: Dynatree, generate: Dynatree, prompts: Path, tmp_path: Path, change: tuple[object, ...]
) -> None:
    out = tmp_path / "answers.jsonl"
    ask = ("--max-new-tokens", 2, "--prompts", prompts, "--out", out)
    assert generate(*ask, "--num-prompts", 2).code == 0
    before = out.read_bytes()
    ran = generate(*ask, *change)
    assert ran.code == 2
    assert is_one_error_line(ran, "must go to a file that is new, empty or made by it", str(out))
    assert out.read_bytes() == before


def test_files_of_somebody_else_and_other_prompts_are_refused(
    dynatree: Dynatree, generate: Dynatree, prompts: Path, folders: SimpleNamespace, tmp_path: Path
) -> None:
    out = tmp_path / "answers.jsonl"
    ask = ("--max-new-tokens", 2, "--out", out, "--prompts")
    for text in ("mine\n", "[]\n", '{"index": 0}\n'):
        out.write_text(text)
        assert is_one_error_line(generate(*ask, prompts), "which holds something else")
        assert out.read_text() == text
    assert is_one_error_line(generate("--prompts", prompts, "--out", prompts), "which holds something else")
    out.write_text("")
    assert generate(*ask, prompts).code == 0
    prompts.write_text("".join(json.dumps({**row, "prompt": "else"}) + "\n" for row in ROWS))
    assert is_one_error_line(generate(*ask, prompts), "which holds something else")
    other = dynatree("generate", *ON_CPU, "--ignore-eos", "--target", folders.chat, *ask, prompts)
    assert is_one_error_line(other, "which holds something else")


def test_a_file_that_was_joined_with_itself_has_each_answer_once(
    generate: Dynatree, prompts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "answers.jsonl"
    ask = ("--max-new-tokens", 2, "--prompts", prompts, "--out", out)
    assert generate(*ask).code == 0
    once = out.read_text()
    out.write_text(once * 2)
    assert generate(*ask).code == 0
    assert out.read_text() == once


def test_a_home_that_is_nobodys_is_a_file_that_is_not_there(dynatree: Dynatree, prompts: Path, tmp_path: Path) -> None:
    """As in a shell, which leaves such a name as it is."""
    ran = dynatree("generate", "--prompts", "~nobody-of-that-name/prompts", "--out", tmp_path / "out")
    assert is_one_error_line(ran, "~nobody-of-that-name/prompts must be a file that can be read")
    ran = dynatree(
        "generate", "--target", "~nobody-of-that-name/model", "--prompts", prompts, "--out", tmp_path / "out"
    )
    assert is_one_error_line(ran, "cannot load '~nobody-of-that-name/model'")


def test_what_does_not_go_with_many_prompts_is_refused_first(dynatree: Dynatree, prompts: Path) -> None:
    for args, words in [
        (("--out", "f", "abc"), "--out is about a file of prompts, and needs --prompts FILE"),
        (("--batch-size", 2, "abc"), "--batch-size is about a file of prompts, and needs --prompts FILE"),
        (("--batch-size", 2, "--prompts", prompts), "--batch-size needs --out FILE, or --json"),
        (("--batch-size", 2, "--prompts", prompts, "--json", "--compare"), "leave out --batch-size"),
        (
            ("--batch-size", 2, "--prompts", prompts, "--json", "--trace", "t"),
            "--trace takes one prompt after the other",
        ),
        (("--out", "f", "--prompts", prompts, "--show-trees"), "--show-trees takes one prompt after the other"),
        (("--batch-size", 0, "--prompts", prompts, "--json"), "0 is not in the range x>=1"),
    ]:
        ran = dynatree("generate", "--target", "no/such-model", *args)
        assert ran.code == 2
        assert is_one_error_line(ran, words)


def test_conversations_are_played_beside_each_other(
    dynatree: Dynatree, folders: SimpleNamespace, tmp_path: Path
) -> None:
    """Each later turn stands behind the model's own answer, of an earlier run too."""
    path, out = tmp_path / "question.jsonl", tmp_path / "answers.jsonl"
    rows = [{"question_id": 1, "turns": ["abc", "def", "g"]}, {"question_id": 2, "turns": ["h"]}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    ask = ("generate", *ON_CPU, "--target", folders.chat, "--ignore-eos", "--max-new-tokens", 5, "--prompts", path)
    alone = [json.loads(line) for line in dynatree(*ask, "--turns", "--json").out.splitlines()]
    assert dynatree(*ask, "--turns", "--out", out, "--batch-size", 2).code == 0
    found = lines(out)
    assert [(one["id"], one["turn"], one["token_ids"]) for one in found] == [
        (one["id"], one["turn"], one["token_ids"]) for one in alone
    ]
    out.write_text(json.dumps(found[0]) + "\n")
    ran = dynatree(*ask, "--turns", "--out", out, "--batch-size", 2, "--json")
    assert (ran.document["num_answered"], ran.document["num_found"]) == (3, 1)
    assert [untimed(one) for one in lines(out)] == [untimed(one) for one in found]


def test_a_fault_is_written_down_and_the_others_go_on(
    dynatree: Dynatree, folders: SimpleNamespace, tmp_path: Path
) -> None:
    """A second turn for which there is no room: its conversation ends there, and another run asks it again."""
    path, out = tmp_path / "question.jsonl", tmp_path / "answers.jsonl"
    rows = [{"question_id": 1, "turns": ["abc", "abc " * 5000, "d"]}, {"question_id": 2, "turns": ["h", "i"]}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    ask = ("generate", *ON_CPU, "--target", folders.chat, "--ignore-eos", "--max-new-tokens", 5, "--prompts", path)
    ran = dynatree(*ask, "--turns", "--out", out, "--batch-size", 2)
    assert ran.code == 1
    assert f"dynatree: warning: {path}, line 1: " in ran.err
    assert "3 answered, 1 failed; 15 tokens" in ran.err
    found = lines(out)
    assert [(one["index"], one["turn"], one["error"] is None) for one in found] == [
        (0, 1, True), (0, 2, False), (1, 1, True), (1, 2, True),
    ]  # fmt: skip
    assert (found[1]["stop_reason"], found[1]["token_ids"]) == ("error", [])
    again = dynatree(*ask, "--turns", "--out", out, "--json")
    assert again.code == 1
    counts = {name: again.document[name] for name in ("num_answered", "num_found", "num_failed")}
    assert counts == {"num_answered": 0, "num_found": 3, "num_failed": 1}
    assert [untimed(one) for one in lines(out)] == [untimed(one) for one in found]


def test_a_policy_that_raises_ends_its_own_sequence(
    generate: Dynatree, more_plugins: None, prompts: Path, tmp_path: Path
) -> None:
    """In its third iteration; what was committed before stands in the line."""
    out = tmp_path / "answers.jsonl"
    policy = ("--policy", "autoregressive+mishap(at=2)")
    ran = generate("--max-new-tokens", 6, "--prompts", prompts, "--out", out, "--batch-size", 3, *policy)
    assert ran.code == 1
    assert "0 answered, 4 failed" in ran.err
    for one in lines(out):
        assert "policy 'mishap'" in one["error"]
        assert "ValueError" in one["error"]
        assert (one["stop_reason"], len(one["token_ids"])) == ("error", 3)


def test_an_interrupt_keeps_what_is_done(
    generate: Dynatree, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes in the second step of the second pair."""
    out, ask = tmp_path / "answers.jsonl", Engine.step
    num_steps = iter(range(100))

    def step(engine: Engine) -> list[Event]:
        if next(num_steps) == 3:
            signal.raise_signal(signal.SIGINT)
        return ask(engine)

    monkeypatch.setattr(Engine, "step", step)
    options = ("--policy", "autoregressive", "--max-new-tokens", 2, "--prompts", prompts, "--out", out)
    ran = generate(*options, "--batch-size", 2)
    assert ran.code == 130
    assert is_note(ran.err, "2 answered; 4 tokens")
    assert [one["index"] for one in lines(out)] == [0, 1]
    monkeypatch.undo()
    assert generate(*options, "--batch-size", 2, "--json").document["num_found"] == 2
    assert [one["index"] for one in lines(out)] == [0, 1, 2, 3]


def test_settings_that_no_prompt_can_have_end_the_command(generate: Dynatree, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"
    ran = generate("--max-new-tokens", 30_000, "--prompts", prompts, "--out", out)
    assert ran.code == 2
    assert is_one_error_line(ran, f"{prompts}, line 1: ", "20000")
    assert not out.exists()


def test_what_another_run_has_added_until_the_file_is_free_is_there(
    generate: Dynatree, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends while this one loads its models: between the look at the file and the lock."""
    out = tmp_path / "answers.jsonl"
    options = ("--max-new-tokens", 2, "--prompts", prompts, "--out", out, "--json")
    assert generate(*options).code == 0
    whole, opened = out.read_text(), Answers.opened
    out.write_text("".join(whole.splitlines(keepends=True)[:2]))

    def opened_later(self: Answers) -> Any:
        out.write_text(whole)
        return opened(self)

    monkeypatch.setattr(Answers, "opened", opened_later)
    assert generate(*options).document["num_found"] == 4
    assert out.read_text() == whole


def test_two_runs_do_not_write_to_one_file(generate: Dynatree, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"
    with FileLock(tmp_path / ".answers.jsonl.lock"):
        ran = generate("--max-new-tokens", 2, "--prompts", prompts, "--out", out)
    assert ran.code == 2
    assert is_one_error_line(ran, "to which another run is writing")
