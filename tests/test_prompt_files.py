"""The one reader of files of prompts and of text: what a file is, is told by content; where it may be."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pyarrow
import pyarrow.parquet
import pytest
from prompt_file import ASKED, SEAS, fault, lines, read, texts

from dynatree_core.errors import InputError
from dynatree_core.text.prompt_files import name_of, read_prompts

__all__ = ["fault", "read"]  # fixtures


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
