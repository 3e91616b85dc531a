"""Running text as prompts: passages and documents; and which prompts are taken."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prompt_file import ASKED, SEAS, lines, read, texts

from dynatree_core.errors import InputError, PromptError
from dynatree_core.text.passages import cut
from dynatree_core.text.prompt_files import PASSAGE_CHARS, read_documents
from dynatree_core.text.reading import checked_text, first_fault
from dynatree_core.text.selection import of_categories, some_of

__all__ = ["read"]  # fixtures


@given(st.text(st.sampled_from("ab .\n"), max_size=400), st.integers(1, 60))
def test_passages_hold_all_of_a_text(text, num_chars):
    passages = cut(text, num_chars)
    assert "".join("".join(passages).split()) == "".join(text.split())
    assert all(num_chars // 2 <= len(passage) <= 2.5 * num_chars for passage in passages[:-1])
    assert all(passage == passage.strip() and passage for passage in passages)


def test_passages_end_where_lines_sentences_or_words_do():
    assert {passage[-1] for passage in cut("One two three. " * 900, 2000)} == {"."}
    assert all(set(passage.split()) == {"word"} for passage in cut("word " * 3000, 2000))
    assert [len(passage) for passage in cut("x" * 6500, 2000)] == [2000, 2000, 2500]
    assert all(passage.startswith("Chapter") for passage in cut(("Chapter. " + "word " * 420 + "\n") * 20, 2000))


def test_rows_of_running_text(read):
    """Each is a document, which is cut where it is long; pieces that end with lines, as WikiText's do, are one text."""
    found = read(lines([{"text": "short", "id": "s"}, {"text": "word " * 1000, "id": "l"}]))
    assert found.is_text
    assert [prompt.prompt_id for prompt in found.prompts] == ["s", "l/0", "l/1", "l/2"]
    pieces = [{"text": " = A town = \n"}, {"text": ""}, {"text": "It has a harbour . \n"}]
    assert texts(read(lines(pieces))) == ["= A town = \nIt has a harbour ."]


def test_documents(read, tmp_path):
    read("Plain\r\ntext")
    assert read_documents(tmp_path / "file") == ["Plain\ntext"]
    read(lines([{"text": "a", "prompt": "x"}, {"text": "b", "prompt": "y"}]))
    assert read_documents(tmp_path / "file") == ["a", "b"]


def test_categories(read):
    found = read(lines(SEAS * 2)).prompts
    assert [prompt.text for prompt in of_categories(found, ["lake"], "file")] == ASKED[1:] * 2
    assert len(of_categories(found, [], "file")) == 4
    with pytest.raises(InputError, match=r"of category 'lak' \(did you mean 'lake'\?\), got the categories sea, lake"):
        of_categories(found, ["lak"], "file")


def test_a_seed_picks(read):
    rows = [{"prompt": str(i), "category": "ab"[i % 2]} for i in range(40)]
    found = read(lines(rows)).prompts
    first = [prompt.text for prompt in some_of(found, 4, is_text=False)]
    assert first == ["0", "1", "2", "3"]
    picked = [some_of(found, 6, is_text=False, seed=seed) for seed in (1, 1, 2)]
    assert picked[0] == picked[1] != picked[2]
    assert [prompt.category for prompt in picked[0]] == ["a", "b"] * 3
    assert len(some_of(found, None, is_text=False, seed=1)) == 40
    in_order = some_of(found, 5, is_text=True, seed=3)
    assert [int(prompt.text) for prompt in in_order] == sorted(int(prompt.text) for prompt in in_order)


def test_texts_that_somebody_typed():
    assert checked_text("größer 🌲", "--system") == "größer 🌲"
    with pytest.raises(PromptError, match=r"--system must be UTF-8 text, got half a character .* at character 2"):
        checked_text("a\udcff", "--system")
    assert first_fault("a\0b") == (1, "a NUL character")
    assert PASSAGE_CHARS == 2000
