"""The one reader of files of prompts and of text: what a file is, is told by content; what is wrong, with its place."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import re
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dynatree_core.errors import InputError, PromptError
from dynatree_core.text.passages import cut
from dynatree_core.text.prompt_files import PASSAGE_CHARS, name_of, read_documents, read_prompts
from dynatree_core.text.reading import checked_text, first_fault
from dynatree_core.text.selection import of_categories, some_of

SEAS = [
    {"prompt": "Which sea is the saltiest?", "category": "sea"},
    {"prompt": "Wie heißt der See?", "category": "lake"},
]
ASKED = [row["prompt"] for row in SEAS]


def lines(rows, **options):
    return "".join(json.dumps(row, **options) + "\n" for row in rows)


@pytest.fixture
def read(tmp_path):
    """Read a file of this content, whose name says nothing of it."""

    def read(content, *, name="file", **options):
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return read_prompts(path, **options)

    return read


@pytest.fixture
def fault(read, tmp_path):
    """What is said of a file that is refused, without its folder."""

    def fault(content, **options):
        with pytest.raises(InputError) as caught:
            read(content, **options)
        said = str(caught.value)
        assert "\n" not in said
        return said.replace(f"{tmp_path}{os.sep}", "")

    return fault


def texts(read):
    return [prompt.text for prompt in read.prompts]


# bytes


ENCODINGS = {
    "utf-8": "utf-8", "utf-8 with a mark": "utf-8-sig", "utf-16": "utf-16", "utf-32": "utf-32",
    "utf-16-le without a mark": "utf-16-le", "utf-16-be without a mark": "utf-16-be",
}  # fmt: skip
CONTENTS = {
    "JSON lines": lines(SEAS, ensure_ascii=False),
    "a JSON list": json.dumps(SEAS, indent=1, ensure_ascii=False),
    "CSV": "prompt,category\n" + "".join(f'"{row["prompt"]}",{row["category"]}\n' for row in SEAS),
    "TSV": "prompt\tcategory\n" + "".join(f"{row['prompt']}\t{row['category']}\n" for row in SEAS),
    "one column": "prompt\n" + "\n".join(ASKED),
}


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"], ids=repr)
@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("kind", CONTENTS)
def test_kinds_and_encodings_are_told_by_what_stands_in_a_file(read, kind, encoding, ending):
    found = read(CONTENTS[kind].replace("\n", ending).encode(ENCODINGS[encoding]), name="notes.txt")
    assert texts(found) == ASKED
    assert not found.is_text
    if kind != "one column":
        assert [prompt.category for prompt in found.prompts] == ["sea", "lake"]


def zstandard(data):
    return pyarrow.compress(data, codec="zstd", asbytes=True)


PACKINGS = {"gzip": gzip.compress, "bzip2": bz2.compress, "xz": lzma.compress, "zstandard": zstandard}


@pytest.mark.parametrize("packing", PACKINGS)
def test_packed_files_are_told_by_their_first_bytes(read, fault, packing):
    packed = PACKINGS[packing](lines(SEAS).encode())
    assert texts(read(packed)) == ASKED
    assert texts(read(packed + packed, name="joined")) == ASKED * 2  # as `cat` joins them
    assert texts(read(gzip.compress(packed), name="twice")) == ASKED
    assert fault(packed[:-9]).startswith(f"file must be a whole {packing} file, got a damaged or cut-off one (")


def test_without_the_library_it_says_what_to_install(fault, monkeypatch):
    from dynatree_core.text import reading, tables

    def missing(name):
        raise ModuleNotFoundError(f"No module named '{name}'", name="pyarrow")

    for module in (reading, tables):
        monkeypatch.setattr(module.importlib, "import_module", missing)
    packed = pyarrow.compress(b"text", codec="zstd", asbytes=True)
    assert "needs pyarrow, which is not installed; pip install 'dynatree[bench]'" in fault(packed)
    assert "needs pyarrow, which is not installed; pip install 'dynatree[bench]'" in fault(b"PAR1...")


@pytest.mark.parametrize(
    ("content", "place", "what"),
    [
        ("ein See\ngrößer".encode("latin-1"), "line 2, column 3", "bytes 0xf6; if it is Windows' or Latin-1 text"),
        (lines(SEAS, ensure_ascii=False).encode("cp1252"), "line 2, column 20", "iconv -f WINDOWS-1252 -t UTF-8"),
        ("ein großer See".encode()[:8], "line 1, column 8", "ends within a character (0xc3); the file is cut off"),
        (b"a\n\nbc\0d", "line 3, column 3", "got a NUL character"),
        (b"\xff\xfea\0\n\0b\0c", "line 2, column 2", "UTF-16-LE text, as its first bytes say, got the bytes 0x63"),
    ],
    ids=["Latin-1", "JSON lines", "cut off", "NUL", "UTF-16"],
)  # fmt: skip
def test_bytes_that_are_no_text_are_told_with_line_and_column(fault, content, place, what):
    said = fault(content)
    assert said.startswith(f"file, {place}: must be ")
    assert what in said


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"PK\x03\x04rest", "a ZIP archive or a spreadsheet; unpack it, or save it as CSV"),
        (b"%PDF-1.7", "a PDF; save its text"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a pointer of Git LFS .*; run git lfs pull"),
        (b"\0" * 257 + b"ustar\0", "a tar archive; unpack it and give the folder"),
        (b"PAR1 and no more", "must be a whole parquet file"),
    ],
    ids=["zip", "pdf", "lfs", "tar", "parquet"],
)
def test_other_kinds_of_files_are_named(read, content, what):
    with pytest.raises(InputError, match=what):
        read(content)


def test_marks_within_joined_files_are_left_out(read):
    marked = lines(SEAS).encode("utf-8-sig")
    assert texts(read(marked + marked)) == ASKED * 2


# tables


def test_parquet(read, tmp_path):
    rows = [{"question": "Two and three?", "answer": "5"}, {"question": "Four and five?", "answer": "9"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows")
    assert texts(read_prompts(tmp_path / "rows")) == ["Two and three?", "Four and five?"]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([*rows, {"question": None}]), tmp_path / "rows")
    with pytest.raises(InputError, match=r'rows, row 3: "question" must be a text .*, got null'):
        read_prompts(tmp_path / "rows")


@pytest.mark.parametrize(
    "content",
    [
        '"Which sea is the saltiest?"\n"Wie heißt der See?"\n',
        json.dumps(ASKED),
        "\n \n" + lines(SEAS).replace("\n", "\n\n"),
        "".join(json.dumps(row, indent=2) for row in SEAS),
        json.dumps({"data": SEAS}),
        json.dumps({"prompts": ASKED}),
        '"prompt"\n' + "".join(f'"{text}"\n' for text in ASKED),
        json.dumps({"rows": [{"row_idx": i, "row": row} for i, row in enumerate(SEAS)]}),
        "sep=;\nPrompt;Category\n" + "".join(f"{row['prompt']};{row['category']}\n" for row in SEAS),
        "Prompt,Category\n" + "".join(f"{row['prompt']},{row['category']}\n" for row in SEAS),
    ],
    ids=["texts", "list of texts", "blank lines", "jq", "data", "prompts", "quoted", "server", "Excel", "capitals"],
)  # fmt: skip
def test_ways_to_write_rows(read, content):
    assert texts(read(content)) == ASKED


PROSE = [
    "[Chapter 1]\n\nIt rained.",
    "In short, text\nwith commas, here, and there",
    "Roses are red, violets are blue\n" * 2,
    "{% for m in messages %}",
    "[[Link]] is a town.",
    "Prompt, he said.",
    '"Well," he said.\n"No."',
    "text",
    "a\tb and c\n",
]


@pytest.mark.parametrize("text", PROSE)
def test_prose_is_no_table(read, text):
    found = read(text)
    assert found.is_text
    assert texts(found) == [text.strip()]


FAULTS = {
    "a cut line": ('{"prompt": "a"}\n{"prompt": "b\n', 'line 2, column 12: must be JSON, got \'{"prompt": "b\''),
    "a line that is none": (lines(SEAS) + "oops\n", "line 3, column 1: must be JSON, got 'oops'"),
    "a first line that is none": ("oops\n" + lines(SEAS), "line 1, column 1: must be JSON, got 'oops'"),
    "Python's spelling": ("{'prompt': 'a'}\n", "line 1, column 2: must be JSON"),
    "within a list": ('[{"prompt": "a"},\n {"prompt": b}]', "line 2, column 13: must be JSON"),
    "a number": ('{"prompt": "a"}\n{"prompt": 7}\n', 'line 2: "prompt" must be a text or a list'),
    "numbers": ('{"prompt": [1, 2]}\n', "a list with the number 1 in it; token ids must be turned into text first"),
    "a list of numbers": ("[1, 2]", "line 1: must be an object with columns or a text, got the number 1"),
    "null": (
        '{"prompt": "a"}\n{"prompt": null}\n',
        'line 2: "prompt" must be a text or a list of turns or messages, got null',
    ),
    "blank": ('{"prompt": "a"}\n{"prompt": " "}\n', 'line 2: "prompt" must have at least one character'),
    "another column": (
        '{"prompt": "a"}\n{"text": "b"}\n',
        'line 2: must have a "prompt" as the other rows, got the columns text',
    ),
    "no column": ('{"words": "a"}\n', "got the columns words; name one with --column"),
    "half an emoji": (
        '{"prompt": "a"}\n{"prompt": "b \\ud83c"}\n',
        'line 2, column 15: "prompt" must be text, got half a',
    ),
    "its other half": ('[{"prompt": "\\ud83c\\udf32 \\uDF32"}]', "line 1, column 27: "),
    "NUL in JSON": ('{"prompt": "b\\u0000"}\n', 'line 1, column 14: "prompt" must be text, got a NUL character'),
    "a ragged row": (
        "id,prompt\n1,a\n2,b,c\n",
        "line 3: must have 2 cells, as the first line says (id, prompt), got 3",
    ),
    "an open quote": ('id,prompt\n1,"a\n2,b\n', "line 2: must be a row of a table"),
    "nothing": ("", "must have at least one prompt, got none"),
    "blanks": ("\r\n \n\t", "must have at least one prompt, got none"),
    "a mark alone": ("\ufeff", "must have at least one prompt, got none"),
    "a column twice": ("prompt,prompt\na,b\n", "line 1: must name each column once, got 'prompt' twice"),
    "a comment before": ('# of May\n{"prompt": "a"}\n', "line 1, column 1: must be JSON, got '# of May'"),
    "an empty list": ("[]", "must have at least one row, got none"),
    "an empty object": ("{}", "got the columns none"),
    "a list as an id": ('{"prompt": "a", "id": [1]}\n', 'line 1: "id" must be a text or a number, got a list'),
    "an image": ('{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}', "got parts of image_url"),
    "no role": ('{"messages": [{"content": "a"}]}', 'must have a "role" or "from", got one with content'),
    "a tool": ('{"messages": [{"role": "tool", "content": "a"}, {"role": "user", "content": "b"}]}', "of 'tool'"),
    "too deep": ('{"a":' * 100_000, "line 1, column 1: must be JSON that can be read"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_told_with_their_place(fault, name):
    content, said = FAULTS[name]
    assert said in fault(content)


def test_one_bad_line_among_thousands(fault):
    rows = [{"prompt": f"number {i}"} for i in range(5000)]
    bad = lines(rows[:4000]) + '{"prompt": "x",}\n' + lines(rows[4000:])
    assert re.match(r"file, line 4001, column 1[56]: must be JSON", fault(bad))  # one Python counts from the comma
    table = "id,prompt\n" + "".join(f"{i},number {i}\n" for i in range(3000)) + "1,a,b\n"
    assert fault(table).startswith("file, line 3002: must have 2 cells")


def test_a_long_cell_and_a_line_of_two_million_characters(read):
    long = "word " * 400_000
    assert texts(read(f'id,prompt\n1,"{long}"\n')) == [long]
    assert texts(read(json.dumps({"prompt": long}))) == [long]
    assert len(read(long).prompts) > 700


# columns

ROWS = {
    "HumanEval": ({"task_id": "HumanEval/3", "prompt": "def f():\n", "test": "pass"}, "def f():\n"),
    "Spec-Bench": ({"question_id": 81, "category": "writing", "turns": ["First?", "Then?"]}, "First?"),
    "MT-Bench on the hub": ({"prompt_id": 7, "prompt": ["First?", "Then?"]}, "First?"),
    "GSM8K": ({"question": "How many?", "answer": "4"}, "How many?"),
    "ShareGPT": (
        {
            "id": "x",
            "conversations": [
                {"from": "gpt", "value": "Hello."},
                {"from": "human", "value": "First?"},
                {"from": "gpt", "value": "Yes."},
                {"from": "human", "value": "Then?"},
            ],
        },
        "First?",
    ),
    "LMSYS": (
        {"conversation": [{"role": "user", "content": "First?"}, {"role": "assistant", "content": "A"}]},
        "First?",
    ),
    "messages": (
        {"messages": [{"role": "user", "content": "First?"}, {"role": "assistant", "content": "A"}]},
        "First?",
    ),
    "OpenAI's batches": (
        {
            "custom_id": "r-1",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {
                "model": "m",
                "messages": [
                    {"role": "system", "content": "Short."},
                    {"role": "user", "content": [{"type": "text", "text": "Why?"}]},
                ],
            },
        },
        "Why?",
    ),
    "their completions": ({"custom_id": "r-1", "body": {"model": "m", "prompt": "Once"}}, "Once"),
    "Alpaca": ({"instruction": "Sum up.", "input": "A text.", "output": "T", "text": "Below is"}, "Sum up.\n\nA text."),
    "Alpaca without input": ({"instruction": "Name one.", "input": "", "output": "T"}, "Name one."),
    "Dolly": ({"instruction": "Who?", "context": "A tale.", "response": "He"}, "Who?\n\nA tale."),
    "text": ({"text": "A short text."}, "A short text."),
    "a conversation alone": ([{"role": "user", "content": "First?"}], "First?"),
}


@pytest.mark.parametrize("name", ROWS)
def test_columns_as_benchmarks_hand_them_out(read, name):
    row, text = ROWS[name]
    assert texts(read(lines([row, row]))) == [text] * 2
    assert texts(read(json.dumps([row]) if isinstance(row, dict) else json.dumps(row), name="one")) == [text]


def test_what_was_said_before_and_later(read):
    said = [{"role": role, "content": words} for role, words in (("system", "S"), ("user", "a"), ("assistant", "b"))]
    [prompt] = read(json.dumps({"messages": [*said, {"role": "user", "content": "c"}]})).prompts
    assert (prompt.messages, prompt.later) == ([*said, {"role": "user", "content": "c"}], ())
    [prompt] = read(json.dumps({"conversations": [*said, {"role": "user", "content": "c"}]})).prompts
    assert (prompt.messages, prompt.later) == (said[:2], ("c",))
    [prompt] = read(json.dumps({"turns": ["a", "c"], "prompt": "other"}), is_played=True).prompts
    assert (prompt.text, prompt.later) == ("a", ("c",))
    [prompt] = read(json.dumps({"system_prompt": "S", "question": "a"})).prompts
    assert prompt.messages == said[:2]


def test_a_named_column(read, fault):
    rows = lines([{"prompt": "a", "hint": "b"}])
    assert texts(read(rows, column="hint")) == ["b"]
    assert "must have the column 'hnt', got the columns prompt, hint (did you mean 'hint'?)" in fault(
        rows, column="hnt"
    )
    assert texts(read("id,words\n1,a\n", column="words")) == ["a"]
    assert (
        fault("It rained. It rained.", column="words") == "file must be a table with a column 'words', got running text"
    )
    assert "got the columns id, words" in fault("id,words\n1,a\n2,b\n")
    assert "got the columns id, words" in fault("id,words one\n1,a\n", name="x.csv")


def test_ids_and_categories(read):
    rows = [{"prompt": "a", "id": None, "category": None}, {"prompt": "b", "id": 7}, {"prompt": "c", "question_id": 7}]
    found = read(lines(rows), name="mine.jsonl").prompts
    assert [(prompt.prompt_id, prompt.category) for prompt in found] == [
        ("mine-0000", "mine"), ("7", "mine"), ("mine-7", "mine"),
    ]  # fmt: skip
    assert [prompt.where.rpartition(os.sep)[2] for prompt in found] == [f"mine.jsonl, line {i}" for i in (1, 2, 3)]


def test_silent_conversations_are_left_out_and_counted(read):
    rows = [{"conversations": []}, {"conversations": [{"from": "human", "value": "a"}]}]
    found = read(lines(rows))
    assert texts(found) == ["a"]
    assert [note.partition(": ")[2] for note in found.notes] == [
        "1 of 2 rows are left out, in which no user says anything"
    ]


# text


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


# places


def test_folders(tmp_path):
    for name, content in (("b.txt", "second"), ("a.txt", "first"), ("deep/c", "third"), (".hidden", "fourth")):
        (tmp_path / "all" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "all" / name).write_text(content)
    (tmp_path / "all" / "cover.png").write_bytes(b"\x89PNG\r\n")
    (tmp_path / "all" / "zero").write_bytes(b"")
    found = read_prompts(tmp_path / "all")
    assert texts(found) == ["first", "second", "third"]
    assert len({prompt.prompt_id for prompt in found.prompts}) == 3
    assert found.notes == (
        f"{tmp_path / 'all' / 'cover.png'} is left out: an image",
        f"{tmp_path / 'all' / 'zero'} is left out: it has no text",
    )
    (tmp_path / "all" / "rows").write_text(lines(SEAS))
    with pytest.raises(InputError, match="either prompts or running text, got files of both"):
        read_prompts(tmp_path / "all")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="a folder with files of text"):
        read_prompts(tmp_path / "empty")
    with pytest.raises(InputError, match=r"must be a file that can be read, got: No such file.*; check the path"):
        read_prompts(tmp_path / "nowhere")


def test_standard_input_and_a_pipe(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(gzip.compress(lines(SEAS).encode("utf-16")))))
    found = read_prompts("-")
    assert (found.name, texts(found)) == ("stdin", ASKED)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9")))
    with pytest.raises(InputError, match="standard input, line 1, column 4: must be UTF-8 text"):
        read_prompts("-")
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(InputError, match="standard input must be open"):
        read_prompts("-")
    out, into = os.pipe()
    os.write(into, lines(SEAS).encode())
    os.close(into)
    assert texts(read_prompts(f"/dev/fd/{out}")) == ASKED
    os.close(out)


def test_an_address(tmp_path):
    (tmp_path / "question.jsonl").write_text(lines(SEAS))
    handler = partial(SimpleHTTPRequestHandler, directory=tmp_path)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        assert texts(read_prompts(f"{address}/question.jsonl")) == ASKED
        with pytest.raises(InputError, match="must be a file that can be fetched, got HTTPError: HTTP Error 404"):
            read_prompts(f"{address}/nothing")
        server.shutdown()


@pytest.mark.parametrize(
    ("place", "name"),
    [("a/HumanEval.jsonl.gz", "HumanEval"), ("x=y.jsonl", "x=y"), ("https://host/data/q.json", "q"), ("-", "stdin")],
)
def test_names(place, name):
    assert name_of(place) == name


# what is taken


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
