"""`dynatree chat`: what is said, remembered and shown, what the commands do, and what Ctrl-C stops."""

from __future__ import annotations

import io
import itertools
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_cli import (
    HIDE_CURSOR,
    ON_CPU,
    SHOW_CURSOR,
    TEMPLATE,
    Ran,
    byte_level_tokenizer,
    for_transformers,
    is_one_error_line,
    read_terminal,
    save_model,
    spawn,
)

from dynatree_core import PrefixCache, StepReport, generate, hookimpl, load_model
from dynatree_core.cli import console
from dynatree_core.cli.chat import Chat, answer
from dynatree_core.cli.console import Answer, PrefillBar, decode_text
from dynatree_core.cli.main import main
from dynatree_core.errors import ContextLimitError, PolicyError
from dynatree_core.runners import runner

# as many checkpoints' own: a system's message may stand first, and roles alternate
STRICT = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}" + TEMPLATE.removeprefix("{% for m in messages %}")
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Models that never end a text by themselves: with a chat template, a strict one, none, and a short context."""
    root = tmp_path_factory.mktemp("models")

    def save(name: str, template: str | None, *, context: int = 20_000, seed: int = 0) -> Path:
        folder = root / name
        save_model(folder, for_transformers(byte_level_tokenizer(), chat_template=template), seed=seed)
        for file in ("config.json", "generation_config.json"):
            settings = json.loads((folder / file).read_text()) | {"eos_token_id": None}
            if file == "config.json":
                settings["max_position_embeddings"] = context
            (folder / file).write_text(json.dumps(settings))
        return folder

    return SimpleNamespace(
        plain=save("plain", TEMPLATE),
        strict=save("strict", STRICT),
        mute=save("mute", None),
        short=save("short", TEMPLATE, context=120),
        drafter=save("drafter", TEMPLATE, seed=1),
    )


@pytest.fixture
def say(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, folders: SimpleNamespace
) -> Callable[..., Ran]:
    """Runs `dynatree chat` with these lines on standard input."""

    def run(*lines: str | bytes, args: tuple[object, ...] = (), target: object = None) -> Ran:
        data = b"".join(line if isinstance(line, bytes) else f"{line}\n".encode() for line in lines)
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))
        words = ["chat", *ON_CPU, "--target", target or folders.plain, "--max-new-tokens", 12, *args]
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(word) for word in words])
        captured = capfd.readouterr()
        assert isinstance(ended.value.code, int)
        return Ran(ended.value.code, captured.out, captured.err)

    return run


@pytest.fixture
def conversation(folders: SimpleNamespace) -> Chat:
    loaded = load_model(str(folders.plain), device="cpu", dtype="float64")
    assert loaded.tokenizer is not None
    return Chat(
        target=loaded,
        tokenizer=loaded.tokenizer,
        drafter="prompt_lookup",
        drafter_name="prompt_lookup",
        policy="phase3",
        max_new_tokens=20,
        prefix_cache=PrefixCache(),
    )


def expected_answers(folder: Path, *said: str, system: str | None = None, **options: Any) -> list[str]:
    """What generation without a prefix cache and without drafting answers, turn by turn."""
    loaded = load_model(str(folder), device="cpu", dtype="float32")
    tokenizer: Any = loaded.tokenizer
    messages = [{"role": "system", "content": system}] if system else []
    answers = []
    for number, text in enumerate(said):
        messages.append({"role": "user", "content": text})
        prompt = tokenizer(
            tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ).input_ids
        asked = {**options, "seed": options["seed"] + number} if "seed" in options else options
        result = generate(loaded.model, None, prompt, policy="autoregressive", max_new_tokens=12, **asked)
        answers.append(decode_text(tokenizer, result.token_ids))
        messages.append({"role": "assistant", "content": answers[-1]})
    return answers


def as_shown(answers: list[str]) -> str:
    return "".join(text + ("" if text.endswith("\n") else "\n") for text in answers)


SUMMARY = re.compile(
    r"^(\d+) tokens · ([\d.]+) tokens/iteration · [\d.]+ tokens/s · (\d+) of (\d+) prompt tokens reused"
)


def summaries(ran: Ran) -> list[re.Match[str]]:
    return [found for line in ran.err.splitlines() if (found := SUMMARY.match(line))]


# what is said


@pytest.mark.parametrize("policy", ["phase3", "fixed", "autoregressive"])
def test_answers_are_those_of_the_whole_conversation(
    say: Callable[..., Ran], folders: SimpleNamespace, policy: str
) -> None:
    """Only they are on stdout; a line on stderr tells about each, with what was reused of the turns before."""
    said = ("abc", "and then?", "größer")
    ran = say(*said, args=("--policy", policy))
    assert ran.code == 0
    assert ran.out == as_shown(expected_answers(folders.plain, *said))
    found = summaries(ran)
    assert [(summary[1], summary[3]) for summary in found][:1] == [("12", "0")]
    # the last prompt at least; not always its answer, whose bytes may be no text and are read otherwise then
    assert [int(after[3]) >= int(before[4]) for before, after in itertools.pairwise(found)] == [True, True]
    assert len(ran.err.splitlines()) == 3


def test_a_system_message_and_settings(say: Callable[..., Ran], folders: SimpleNamespace) -> None:
    ran = say("abc", "def", args=("--system", "Be brief.", "--repetition-penalty", 1.5))
    assert ran.out == as_shown(
        expected_answers(folders.plain, "abc", "def", system="Be brief.", repetition_penalty=1.5)
    )


def test_sampling_repeats_with_a_seed(say: Callable[..., Ran], folders: SimpleNamespace) -> None:
    args = ("--temperature", 0.8, "--top-p", 0.9, "--seed", 5)
    wanted = expected_answers(
        folders.plain, "abc", "def", do_sample=True, temperature=0.8, top_p=0.9, seed=5
    )  # the second answer is drawn by the next seed
    assert say("abc", "def", args=args).out == as_shown(wanted)
    assert say("abc", "def", args=(*args, "--policy", "linear", "--drafter", folders.drafter)).out == as_shown(wanted)
    assert say("abc", "def").out == say("abc", "def", args=("--temperature", 0)).out != as_shown(wanted)
    ran = say("abc", args=("--seed", 5))
    assert ran.code == 2
    assert is_one_error_line(ran, "--seed repeats what is drawn")


def test_without_a_prefix_cache(say: Callable[..., Ran]) -> None:
    ran = say("abc", "def", args=("--prefix-cache", 0))
    assert [found[3] for found in summaries(ran)] == ["0", "0"]
    assert ran.out == say("abc", "def").out


def test_what_is_no_question(say: Callable[..., Ran]) -> None:
    assert say().out == say("", "  ", "\t").out == ""
    ran = say("abc", b"caf\xe9\n", "def\r")
    assert ran.code == 1, "a script has to be told that a line failed"
    assert len(summaries(ran)) == 2
    assert "a line must be UTF-8 text" in ran.err
    assert say("abc", b"def").out == say("abc", "def").out, "the last line may lack its end"
    assert say(b"\xef\xbb\xbfabc\r\n").out == say("abc").out, "a byte order mark is no part of a line"
    assert "policy fixed" in say(b"\xef\xbb\xbf/policy fixed\n").err


# commands


def test_reset_begins_anew(say: Callable[..., Ran], folders: SimpleNamespace) -> None:
    [first] = expected_answers(folders.plain, "abc")
    ran = say("abc", "def", "/reset", "abc")
    assert ran.out == as_shown([*expected_answers(folders.plain, "abc", "def"), first])
    assert "a new conversation" in ran.err
    # all but the last token: the rows are still there
    assert summaries(ran)[-1][3] == str(len("<user>abc<assistant>") - 1)


def test_policy_changes_from_the_next_answer_on(say: Callable[..., Ran]) -> None:
    ran = say("abc", "/policy", "/policy autoregressive", "def", "/policy", "/policy atoregressive", "ghi")
    assert ran.code == 1
    assert [found[2] for found in summaries(ran)][1:] == ["1.00", "1.00"]
    lines = ran.err.splitlines()
    assert lines[1] == "policy phase3"
    assert lines[2] == lines[4] == "policy autoregressive"
    assert lines[5].startswith("dynatree: error: 'atoregressive' is not an installed policy")
    assert "did you mean 'autoregressive'" in lines[5]
    assert ran.out == say("abc", "def", "ghi").out, "a policy changes no answer"


def test_drafter(say: Callable[..., Ran], folders: SimpleNamespace) -> None:
    ran = say("abc", f"/drafter {folders.plain}", "/policy linear(depth=3)", "def", "/drafter promptlookup", "/drafter")
    assert summaries(ran)[1][2] == "4.00"  # the target's own drafts are all right
    assert ran.err.splitlines()[-1] == f"drafter {folders.plain}"
    assert "did you mean 'prompt_lookup'" in ran.err
    assert ran.out == say("abc", "def").out


def test_stats(say: Callable[..., Ran]) -> None:
    rows = dict(
        re.split(r" {3,}", line.strip(), maxsplit=1)
        for line in say("/stats", "abc", "def", "/stats").err.splitlines()
        if re.search(r"\w {3,}", line)
    )
    assert rows["answers"] == "2"
    assert rows["new tokens"] == "24"
    assert re.fullmatch(r"\d+, [1-9]\d* of them reused", rows["prompt tokens"])
    assert rows["context"].endswith("tokens of 20000")
    assert (rows["policy"], rows["drafter"]) == ("phase3", "prompt_lookup")


def test_help_and_quit(say: Callable[..., Ran]) -> None:
    ran = say("/help", "/quit", "abc")
    assert (ran.code, ran.out) == (0, "")
    for word in ("/help", "/reset", "/policy", "/drafter", "/stats", "/quit", "Ctrl-C", "Ctrl-D"):
        assert word in ran.err


def test_a_command_that_is_none(say: Callable[..., Ran], folders: SimpleNamespace) -> None:
    ran = say("/polcy fixed", " /polcy fixed")
    assert ran.err.startswith("dynatree: error: '/polcy' is no command (did you mean '/policy'?)")
    assert ran.out == as_shown(expected_answers(folders.plain, "/polcy fixed"))


# what cannot be done


def test_a_target_without_a_template(say: Callable[..., Ran], folders: SimpleNamespace) -> None:
    ran = say("abc", target=folders.mute)
    assert (ran.code, ran.out) == (2, "")
    assert is_one_error_line(ran, "has a chat template, got none", "dynatree generate")


def test_a_template_that_refuses(say: Callable[..., Ran], folders: SimpleNamespace) -> None:
    ran = say("abc", target=folders.strict, args=("--system", "x"))
    assert (ran.code, ran.out) == (1, "")
    assert is_one_error_line(ran, "a conversation of system, user", "roles must alternate")
    assert len(summaries(say("abc", "def", target=folders.strict))) == 2


def test_the_end_of_the_context(say: Callable[..., Ran], folders: SimpleNamespace) -> None:
    """Answers get what is left; then there is a kind word, and room again after /reset."""
    ran = say("abc", "d" * 40, "ghi", "/reset", "abc", target=folders.short, args=("--max-new-tokens", 30))
    assert ran.code == 1
    first, second, third = summaries(ran)
    assert (first[1], third[1]) == ("30", "30")
    assert 0 < int(second[1]) < 30
    assert int(second[1]) + int(second[4]) == 120
    assert "must fit the context of 120 tokens with room for an answer" in ran.err
    assert "/reset begins a new conversation" in ran.err
    alone = say("d" * 200, target=folders.short)
    assert "shorten the text" in alone.err
    assert "/reset" not in alone.err, "nothing is gained by it"


@pytest.mark.parametrize("spec", ["{}", "model(model='{}')", "model(model='{}')+prompt_lookup"])
def test_the_drafters_context_counts(conversation: Chat, folders: SimpleNamespace, spec: str) -> None:
    conversation.set_drafter(spec.format(folders.short))
    assert conversation.context_limit == 120
    with pytest.raises(ContextLimitError, match="context of 120 tokens"):
        conversation.ask("a" * 120)


@pytest.mark.parametrize("option", [("--policy", "phse3"), ("--drafter", "promptlookup")])
def test_mistakes_are_told_before_anything_is_loaded(say: Callable[..., Ran], option: tuple[str, str]) -> None:
    ran = say("abc", target="/nowhere", args=option)
    assert ran.code == 2
    assert is_one_error_line(ran, "did you mean")


# interrupts and errors


def interrupt_after(monkeypatch: pytest.MonkeyPatch, num_steps: int) -> None:
    """Ctrl-C when so many steps of an answer have been shown."""
    show, shown = Answer.show, []

    def showing(self: Answer, token_ids: Any, *, num_accepted: int) -> None:
        show(self, token_ids, num_accepted=num_accepted)
        shown.append(token_ids)
        if len(shown) == num_steps:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Answer, "show", showing)


def test_ctrl_c_stops_the_answer_and_not_the_chat(
    conversation: Chat, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """What there is of it is remembered, and its rows are reused."""
    conversation.policy = "autoregressive"
    whole = conversation.ask("abc").prompt_ids
    interrupt_after(monkeypatch, 5)
    answer(conversation, "abc")
    [result] = conversation.results
    assert (result.stop_reason, len(result.token_ids)) == ("interrupted", 5)
    partial = decode_text(conversation.tokenizer, result.token_ids)
    assert conversation.messages == [{"role": "user", "content": "abc"}, {"role": "assistant", "content": partial}]
    captured = capfd.readouterr()
    assert captured.out == as_shown([partial])
    assert captured.err.rstrip("\n").endswith("· stopped")
    answer(conversation, "def")
    second = conversation.results[1].report
    assert second.num_new_tokens == 20
    assert second.num_reused_tokens >= len(whole)


def test_ctrl_c_before_the_first_token(
    conversation: Chat, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runner, "PREFILL_CHUNK", 8)
    monkeypatch.setattr(PrefillBar, "__call__", lambda self, done, total: signal.raise_signal(signal.SIGINT))
    answer(conversation, "abc")
    assert (conversation.messages, conversation.results) == ([], [])
    assert capfd.readouterr().err == "stopped before the first token; the question is forgotten\n"


class Failing:
    """A policy that raises at its third iteration."""

    @hookimpl
    def on_iteration_end(self, report: StepReport) -> None:
        if report.iteration == 2:
            raise ValueError("enough")


def test_an_error_within_an_answer(conversation: Chat) -> None:
    conversation.policy = ["autoregressive", Failing()]  # type: ignore[assignment]
    with pytest.raises(PolicyError, match="enough"):
        answer(conversation, "abc")
    assert (conversation.results[0].stop_reason, len(conversation.results[0].token_ids)) == ("error", 3)
    conversation.set_policy("autoregressive")
    answer(conversation, "def")
    assert conversation.results[1].report.num_reused_tokens > 0
    assert len(conversation.messages) == 4


class Terminal:
    """`dynatree chat` in a pseudo-terminal."""

    def __init__(self, *args: object) -> None:
        self.master, slave = os.openpty()
        self.process = spawn("chat", *ON_CPU, *args, stdin=slave, stdout=slave, stderr=slave)
        os.close(slave)
        self.pieces = read_terminal(self.master)
        self.timer = threading.Timer(120, self.process.kill)  # then reading ends, and the test fails
        self.timer.start()
        self.seen = b""

    def wait_for(self, text: bytes) -> None:
        """Read on until this text comes; what came before it is done with."""
        while text not in self.seen:
            self.seen += next(self.pieces)
        self.seen = self.seen.partition(text)[2]

    def type(self, text: bytes) -> None:
        os.write(self.master, text)

    def interrupt_input(self) -> None:
        """Ctrl-C at the prompt, once readline waits there: one that comes before counts with the next key only."""
        self.wait_for(b"> ")
        time.sleep(0.5)
        self.process.send_signal(signal.SIGINT)

    def end(self) -> tuple[int, bytes]:
        """Exit code, and what was written last."""
        rest = self.seen + b"".join(self.pieces)
        os.close(self.master)
        self.timer.cancel()
        return self.process.wait(timeout=120), rest


@pytest.mark.slow
def test_a_conversation_in_a_terminal(folders: SimpleNamespace) -> None:
    """Ctrl-C stops a long answer; the conversation goes on, and ends by Ctrl-D."""
    terminal = Terminal("--target", folders.plain, "--max-new-tokens", 15_000, "--policy", "autoregressive")
    terminal.wait_for(b"/help lists the commands")
    terminal.wait_for(b"> ")
    terminal.type(b"abc\n")
    terminal.wait_for(b"tokens/iteration\x07")  # the title, while the answer comes
    terminal.process.send_signal(signal.SIGINT)
    terminal.wait_for("· stopped".encode())
    terminal.wait_for(b"> ")
    terminal.type(b"/stats\n")
    terminal.wait_for(b"answers")
    terminal.wait_for(b"> ")
    terminal.type(b"\x04")
    code, rest = terminal.end()
    assert code == 0
    assert b"Traceback" not in rest


@pytest.mark.slow
def test_ctrl_c_at_the_prompt_leaves_at_the_second_time(folders: SimpleNamespace) -> None:
    terminal = Terminal("--target", folders.plain)
    terminal.interrupt_input()
    terminal.wait_for(b"Ctrl-C again")
    terminal.wait_for(b"> ")
    terminal.type(b"/policy\n")  # not in a row
    terminal.wait_for(b"policy phase3")
    terminal.interrupt_input()
    terminal.wait_for(b"Ctrl-C again")
    terminal.interrupt_input()
    code, rest = terminal.end()
    assert code == 130
    assert b"Traceback" not in rest


# the progress of a long prompt


def pretend_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """To be called by the test itself: while fixtures are made, other streams are captured."""
    monkeypatch.setenv("TERM", "xterm")
    for stream in (sys.stdout, sys.stderr):
        monkeypatch.setattr(stream, "isatty", lambda: True)
    monkeypatch.setattr(runner, "PREFILL_CHUNK", 8)


@pytest.mark.parametrize(("seconds", "is_shown"), [(0.0, True), (60.0, False)])
def test_a_long_prefill_has_a_bar(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    folders: SimpleNamespace,
    seconds: float,
    is_shown: bool,
) -> None:
    pretend_terminal(monkeypatch)
    monkeypatch.setattr(console, "LONG_PREFILL", seconds)
    with pytest.raises(SystemExit) as ended:
        main(["generate", *ON_CPU, "--target", str(folders.plain), "--max-new-tokens", "4", "a" * 50])
    err = capsys.readouterr().err
    assert ended.value.code == 0
    assert ("reading the prompt" in err) == is_shown
    assert err.rfind(SHOW_CURSOR) >= err.rfind(HIDE_CURSOR)


def test_no_bar_where_there_is_no_terminal(say: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "LONG_PREFILL", 0.0)
    monkeypatch.setattr(runner, "PREFILL_CHUNK", 8)
    assert "reading" not in say("a" * 50).err


def test_an_interrupt_while_there_is_a_bar(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, folders: SimpleNamespace
) -> None:
    pretend_terminal(monkeypatch)
    monkeypatch.setattr(console, "LONG_PREFILL", 0.0)
    call = PrefillBar.__call__

    def interrupted(self: PrefillBar, num_done: int, num_tokens: int) -> None:
        call(self, num_done, num_tokens)
        if num_done == 24:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(PrefillBar, "__call__", interrupted)
    with pytest.raises(SystemExit) as ended:
        main(["generate", *ON_CPU, "--target", str(folders.plain), "--max-new-tokens", "4", "a" * 50])
    captured = capsys.readouterr()
    assert ended.value.code == 130
    assert captured.out == ""
    assert "reading the prompt" in captured.err
    assert "Traceback" not in captured.err
    assert captured.err.rfind(SHOW_CURSOR) > captured.err.rfind(HIDE_CURSOR) >= 0


def test_the_title_is_left_alone_where_there_is_no_terminal(say: Callable[..., Ran]) -> None:
    assert "\x1b" not in say("abc").err
