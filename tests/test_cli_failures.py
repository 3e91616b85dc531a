"""The `dynatree` command: what a failure and an interrupt leave behind."""

from __future__ import annotations

import os
import signal
import subprocess
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from command import (
    GREEN,
    HIDE_CURSOR,
    ON_CPU,
    RESET,
    SHOW_CURSOR,
    Dynatree,
    dynatree,
    folders,
    generate,
    is_one_error_line,
    more_plugins,
    read_terminal,
    spawn,
)

from dynatree_core.cli.exits import UNREAD
from dynatree_core.cli.group import main
from dynatree_core.cli.screen import Answer
from dynatree_core.policy.build import build_stack
from dynatree_core.text.stream import REPLACEMENT

__all__ = ["dynatree", "folders", "generate", "more_plugins"]  # fixtures


def test_a_folder_that_is_not_there(dynatree: Dynatree, tmp_path: Path) -> None:
    ran = dynatree("generate", "--json", "--target", tmp_path / "nowhere", "abc")
    assert (ran.code, ran.out) == (1, "")
    assert is_one_error_line(ran, "nowhere")


def test_a_target_without_tokenizer(dynatree: Dynatree, folders: SimpleNamespace) -> None:
    ran = dynatree("generate", "--target", folders.mute, "abc")
    assert ran.code == 2
    assert is_one_error_line(ran, "tokenizer")


@pytest.mark.usefixtures("more_plugins")
def test_a_failure_midway_keeps_what_was_committed(generate: Dynatree) -> None:
    whole = generate("--json", "--max-new-tokens", 20, "abc").document
    ran = generate("--policy", "mishap", "--max-new-tokens", 20, "abc")
    document = generate("--policy", "mishap", "--max-new-tokens", 20, "--json", "abc").document
    assert ran.code == 1
    assert ran.err.splitlines()[-1].startswith("dynatree: error: policy 'mishap', hook on_iteration_end: raised")
    assert "two lines" in ran.err
    assert document["stop_reason"] == "error"
    assert 4 <= document["num_new_tokens"] < 20
    assert document["token_ids"] == whole["token_ids"][: document["num_new_tokens"]]
    assert ran.out.rstrip("\n") == document["text"].rstrip("\n")


@pytest.mark.usefixtures("more_plugins")
def test_a_failure_at_once_is_the_error_alone(generate: Dynatree) -> None:
    ran = generate("--policy", "mishap(at=0)", "--max-new-tokens", 20, "abc")
    assert len(ran.err.splitlines()) > 1, "a token was committed"
    ran = generate("--drafter", "broken", "abc")
    assert (ran.code, ran.out) == (1, "")
    assert is_one_error_line(ran, "drafter 'broken' raised ValueError: no draft")


def test_a_runner_that_is_not_here_is_the_error_alone(generate: Dynatree) -> None:
    ran = generate("--runner", "cudagraph", "abc")
    assert (ran.code, ran.out) == (2, "")
    assert is_one_error_line(ran, "the cudagraph runner is for models on a CUDA GPU, got one on cpu")


@pytest.mark.usefixtures("more_plugins")
def test_fallback_goes_on_with_a_warning_of_one_line(generate: Dynatree) -> None:
    args = ("--policy", "mishap", "--on-error", "fallback", "--max-new-tokens", 20)
    ran = generate(*args, "--json", "--compare", "abc")
    assert ran.code == 0
    assert ran.document["identical"] is True
    assert ran.document["num_new_tokens"] == 20
    [line] = ran.err.splitlines()
    assert line.startswith("dynatree: warning: drafting is off")
    assert "two lines" in line
    in_text = generate(*args, "abc")
    assert in_text.err.splitlines()[0] == line, "the warning comes before the table"
    assert in_text.out.rstrip("\n") == ran.document["text"].rstrip("\n")


def test_what_nobody_foresaw_is_a_line_too(generate: Dynatree, monkeypatch: pytest.MonkeyPatch) -> None:
    def burst(text: str) -> None:
        raise LookupError(f"no\n{text}")

    monkeypatch.setattr("dynatree_core.policy.build.build_stack", burst)
    ran = generate("abc")
    assert ran.code == 1
    assert is_one_error_line(ran, "unexpected LookupError: no phase3", "DYNATREE_DEBUG=1")
    monkeypatch.setenv("DYNATREE_DEBUG", "1")
    with pytest.raises(LookupError):
        main(["generate", "abc"])


def test_warnings_of_libraries_are_folded_as_well(generate: Dynatree, monkeypatch: pytest.MonkeyPatch) -> None:
    build = build_stack

    def warn(text: str) -> Any:
        warnings.warn("so\nit is", UserWarning, stacklevel=2)
        return build(text)

    monkeypatch.setattr("dynatree_core.policy.build.build_stack", warn)
    assert generate("--max-new-tokens", 1, "--json", "abc").err == "dynatree: warning: so it is\n"


@pytest.mark.usefixtures("more_plugins")
def test_an_interrupt_leaves_a_document(generate: Dynatree) -> None:
    whole = generate("--json", "--max-new-tokens", 20, "abc").document
    ran = generate("--json", "--policy", "mishap(raises=0)", "--max-new-tokens", 20, "abc")
    assert ran.code == 130
    assert ran.document["stop_reason"] == "interrupted"
    assert 4 <= len(ran.document["token_ids"]) < 20
    assert ran.document["token_ids"] == whole["token_ids"][: len(ran.document["token_ids"])]


@pytest.mark.usefixtures("more_plugins")
def test_an_interrupt_leaves_the_text(generate: Dynatree) -> None:
    document = generate("--json", "--policy", "mishap(raises=0)", "--max-new-tokens", 20, "abc").document
    ran = generate("--policy", "mishap(raises=0)", "--max-new-tokens", 20, "abc")
    assert ran.code == 130
    assert ran.out.rstrip("\n") == document["text"].rstrip("\n")
    assert ran.out.endswith("\n")
    assert "interrupted" in ran.err


def test_an_interrupt_while_loading(generate: Dynatree, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(name: str | None, **options: Any) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("dynatree_core.models.load.load_model", interrupted)
    ran = generate("abc")
    assert (ran.code, ran.out) == (130, "")
    assert "Traceback" not in ran.err
    ran = generate("--json", "--compare", "abc")
    assert ran.code == 130
    assert ran.document["stop_reason"] == "interrupted"
    assert ran.document["token_ids"] == []
    assert ran.document["tokens_per_second"] is None
    assert ran.document["autoregressive"] is None


@pytest.mark.slow
def test_an_interrupt_while_torch_is_imported(tmp_path: Path) -> None:
    """It leaves torch half imported, and a second import of it raises something else."""
    (tmp_path / "torch.py").write_text(
        "import sys\n"
        "again, sys.interrupted = hasattr(sys, 'interrupted'), True\n"
        "raise AttributeError('partially initialized') if again else KeyboardInterrupt\n"
    )
    process = spawn(
        "generate", "--json", "abc", stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={"PYTHONPATH": str(tmp_path)}
    )
    out, err = process.communicate()
    assert (process.returncode, out, err.strip()) == (130, b"", b"")


def test_an_interrupt_elsewhere(dynatree: Dynatree, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dynatree_core.models.embedded.describe", lambda: signal.raise_signal(signal.SIGINT))
    ran = dynatree("models")
    assert (ran.code, ran.out) == (130, "")
    assert "Traceback" not in ran.err


def test_an_interrupt_while_a_step_is_shown_waits_for_its_end(capfd: pytest.CaptureFixture[str]) -> None:
    def decode(token_ids: list[int], **options: bool) -> str:
        if token_ids == [0]:
            signal.raise_signal(signal.SIGINT)
        return "".join(map(chr, (97 + token for token in token_ids)))

    answer = Answer(SimpleNamespace(decode=decode))  # type: ignore[arg-type]
    with pytest.raises(KeyboardInterrupt):
        answer.show([0, 1, 2], num_accepted=2)
    answer.finish([0, 1, 2, 3])
    assert capfd.readouterr().out == "abcd\n"


@pytest.mark.slow
def test_sigint_in_a_pipe(folders: SimpleNamespace, generate: Dynatree) -> None:
    args = ("--ignore-eos", "--policy", "autoregressive", "--max-new-tokens", 15_000, "abc")
    process = spawn(
        "generate", *ON_CPU, "--target", folders.plain, *args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
    )
    assert process.stdout is not None
    start = process.stdout.read(10)
    process.send_signal(signal.SIGINT)
    rest, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert b"Traceback" not in err
    assert b"interrupted" in err
    shown = (start + rest).decode().removesuffix("\n").rstrip(REPLACEMENT)
    whole = generate("--json", "--max-new-tokens", 400, "--policy", "autoregressive", "abc").document["text"]
    whole = whole.rstrip(REPLACEMENT)
    assert len(shown) > 3
    assert shown.startswith(whole) or whole.startswith(shown)


@pytest.mark.slow
def test_sigint_in_a_terminal(folders: SimpleNamespace) -> None:
    args = ("generate", "--target", folders.plain, "--drafter", folders.plain, "--policy", "linear", "--ignore-eos")
    master, slave = os.openpty()
    process = spawn(*args, "--max-new-tokens", 15_000, "abc", stdin=slave, stdout=slave, stderr=slave)
    os.close(slave)
    seen = b""
    for piece in read_terminal(master):
        seen += piece
        if GREEN.encode() in seen and process.poll() is None:
            process.send_signal(signal.SIGINT)
            break
    seen += b"".join(read_terminal(master))
    os.close(master)
    assert process.wait(timeout=120) == 130
    text = seen.decode(errors="replace")
    assert "Traceback" not in text
    assert "loading" in text, "a spinner says what is being waited for"
    assert text.rfind(SHOW_CURSOR) > text.rfind(HIDE_CURSOR) >= 0
    assert text.rfind(RESET) > text.rfind(GREEN)
    assert "drafted and accepted" in text
    assert text.removesuffix(SHOW_CURSOR).endswith("\n")


@pytest.mark.slow
def test_a_reader_that_leaves_is_no_error(folders: SimpleNamespace) -> None:
    args = ("generate", "--target", folders.plain, "--ignore-eos", "--max-new-tokens", 15_000, "abc")
    process = spawn(*args, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.read(5)
    process.stdout.close()
    process.stdout = None
    _, err = process.communicate(timeout=120)
    assert process.returncode == UNREAD
    assert err == b""
