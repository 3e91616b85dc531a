"""`dynatree chat` in a terminal: what Ctrl-C stops, errors within an answer, the progress of a long prompt."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from command import HIDE_CURSOR, ON_CPU, SHOW_CURSOR, Ran, read_terminal, spawn
from talk import as_shown, conversation, folders, say

from dynatree_core import StepReport, hookimpl
from dynatree_core.cli import console
from dynatree_core.cli.chat_lines import answer
from dynatree_core.cli.console import PrefillBar
from dynatree_core.cli.group import main
from dynatree_core.cli.screen import Answer
from dynatree_core.conversation import Conversation
from dynatree_core.errors import PolicyError
from dynatree_core.runners import passes
from dynatree_core.text.stream import decode_text

__all__ = ["conversation", "folders", "say"]  # fixtures


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
    conversation: Conversation, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
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
    conversation: Conversation, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(passes, "PREFILL_CHUNK", 8)
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


def test_an_error_within_an_answer(conversation: Conversation) -> None:
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
        self.num_seen = 0  # bytes, from the beginning

    def wait_for(self, text: bytes) -> None:
        """Read on until this text comes; what came before it is done with."""
        while text not in self.seen:
            piece = next(self.pieces)
            self.seen += piece
            self.num_seen += len(piece)
        self.seen = self.seen.partition(text)[2]

    def type(self, text: bytes) -> None:
        os.write(self.master, text)

    def interrupt_input(self) -> None:
        """Ctrl-C at the prompt. One that comes before readline waits there counts with the next signal or key only, so
        signals follow that do nothing else.
        """
        self.wait_for(b"> ")
        self.process.send_signal(signal.SIGINT)
        threading.Thread(target=self._nudge, args=(self.num_seen,), daemon=True).start()

    def _nudge(self, num_seen: int) -> None:
        """Tell the process that its window may have another size, until it has written something."""
        while self.num_seen == num_seen and self.process.poll() is None:
            time.sleep(0.1)
            self.process.send_signal(signal.SIGWINCH)

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
    monkeypatch.setattr(passes, "PREFILL_CHUNK", 8)


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
    monkeypatch.setattr(passes, "PREFILL_CHUNK", 8)
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
