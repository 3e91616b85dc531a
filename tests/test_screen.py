"""An answer on a terminal and in a pipe: colours, control characters, and text from tokens as they come."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
from command import (
    GREEN,
    RESET,
    SAMPLES,
    byte_fallback_tokenizer,
    byte_level_tokenizer,
    dynatree,
    folders,
    for_transformers,
)
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from dynatree_core.cli.group import main
from dynatree_core.cli.screen import Answer
from dynatree_core.text.stream import REPLACEMENT, IncrementalText

__all__ = ["dynatree", "folders"]  # fixtures


@pytest.mark.parametrize(
    ("is_terminal", "environment", "is_coloured"),
    [
        (True, {"TERM": "xterm"}, True),
        (True, {"TERM": "xterm", "NO_COLOR": "1"}, False),
        (True, {"TERM": "dumb"}, False),
        (False, {"TERM": "xterm"}, False),
        (False, {"TERM": "xterm", "FORCE_COLOR": "1"}, False),
    ],
)
def test_colours_where_the_terminal_allows_them(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    folders: SimpleNamespace,
    is_terminal: bool,
    environment: dict[str, str],
    is_coloured: bool,
) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    for stream in (sys.stdout, sys.stderr):
        monkeypatch.setattr(stream, "isatty", lambda: is_terminal)
    options = ["--drafter", str(folders.plain), "--policy", "linear(depth=3)", "--ignore-eos", "--max-new-tokens", "8"]
    with pytest.raises(SystemExit):
        main(["generate", "--target", str(folders.plain), *options, "abc"])
    out, err = capsys.readouterr()
    assert (GREEN in out) == is_coloured
    assert out.count(GREEN) == out.count(RESET)
    assert ("drafted and accepted" in err) == is_coloured
    if not is_coloured:
        assert "\x1b" not in out


def test_accepted_tokens_are_green_and_the_bonus_token_is_not(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    tree, esc = "🌲".encode(), 0x1B
    tokenizer = for_transformers(byte_level_tokenizer())
    ids = {byte: tokenizer.convert_tokens_to_ids(char) for byte, char in byte_to_char().items()}
    answer = Answer(tokenizer)
    answer.show([ids[byte] for byte in b"ab" + tree[:2]], num_accepted=3)
    answer.show([ids[byte] for byte in tree[2:] + b"c"], num_accepted=2)
    answer.show([ids[esc], ids[ord("d")]], num_accepted=0)
    answer.finish([0] * 9)
    assert capsys.readouterr().out == f"{GREEN}ab{RESET}{GREEN}🌲{RESET}c␛d\n"


def test_a_pipe_gets_control_characters_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    answer = Answer(SimpleNamespace(decode=lambda token_ids, **options: "\x1b[31m"[: len(token_ids)]))  # type: ignore
    answer.show(range(5), num_accepted=2)
    answer.finish(range(5))
    assert capsys.readouterr().out == "\x1b[31m\n"


def byte_to_char() -> dict[int, str]:
    """The character that stands for each byte in a byte-level vocabulary."""
    return {
        byte: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(chr(byte))[0][0]
        for byte in [*range(0x80)]
    } | {0xF0: "ð", 0x9F: "Ł", 0x8C: "Į", 0xB2: "²"}


PLAIN = for_transformers(byte_level_tokenizer())
MERGED = for_transformers(byte_level_tokenizer(num_merges=120))
FALLBACK = for_transformers(byte_fallback_tokenizer())
LONG_TEXT = st.lists(st.sampled_from([*SAMPLES, " ", "\n"]), min_size=8, max_size=40).map("".join)


@pytest.mark.parametrize("tokenizer", [PLAIN, MERGED], ids=["bytes", "merged"])
@given(text=LONG_TEXT | st.text(max_size=120))
def test_incremental_text_is_the_text_so_far(tokenizer: Any, text: str) -> None:
    shown, incremental = "", IncrementalText(tokenizer.decode)
    token_ids = tokenizer.encode(text)
    for num, token in enumerate(token_ids, start=1):
        shown += incremental.push(token)
        assert shown == tokenizer.decode(token_ids[:num]).rstrip(REPLACEMENT)
    shown += incremental.finish()
    assert shown == tokenizer.decode(token_ids) == text


@given(token_ids=st.lists(st.integers(0, len(MERGED) - 1), max_size=150))
def test_incremental_text_of_any_bytes(token_ids: list[int]) -> None:
    incremental = IncrementalText(MERGED.decode)
    pieces = [incremental.push(token) for token in token_ids]
    assert "".join(pieces) + incremental.finish() == MERGED.decode(token_ids)


@given(st.data(), st.lists(st.integers(0, len(MERGED) - 1), max_size=100))
def test_incremental_text_of_several_tokens_at_once(data: st.DataObject, token_ids: list[int]) -> None:
    """An iteration's tokens together have the texts of one after another."""
    together, alone, place = IncrementalText(MERGED.decode), IncrementalText(MERGED.decode), 0
    while place < len(token_ids):
        end = place + data.draw(st.integers(1, 6))
        expected = "".join(alone.push(token) for token in token_ids[place:end])
        assert together.push(*token_ids[place:end]) == expected
        place = end
    assert together.finish() == alone.finish()


@given(text=st.text(alphabet="abcdefghé 日🌲", max_size=120))
@example(text="日" * 60)  # one run of bytes, in which the window would begin within a character
def test_incremental_text_with_byte_fallback(text: str) -> None:
    incremental = IncrementalText(FALLBACK.decode)
    token_ids = FALLBACK.encode(text)
    pieces = [incremental.push(token) for token in token_ids]
    assert "".join(pieces) + incremental.finish() == FALLBACK.decode(token_ids) == text


def test_incremental_text_forgets_what_is_settled() -> None:
    lengths = []

    def decode(token_ids: list[int]) -> str:
        lengths.append(len(token_ids))
        return str(MERGED.decode(token_ids))

    incremental = IncrementalText(decode)
    for token in MERGED.encode("plain words again and again, " * 20):
        incremental.push(token)
    assert max(lengths) <= 40
