"""Bytes to text: where they come from, how they are packed and how they are encoded, told by what they are.

A file's ending is never asked. What is wrong is said with file, line and column.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import http.client
import importlib
import lzma
import re
import sys
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable
from pathlib import Path

import attrs

from dynatree_core.errors import InputError, PromptError
from dynatree_core.files.folders import expanded

__all__ = [
    "STANDARD_INPUT",
    "Source",
    "checked_text",
    "decoded",
    "first_fault",
    "is_url",
    "other_kind",
    "place_of",
    "read_source",
    "read_sources",
    "read_standard_input",
    "unpacked",
]

STANDARD_INPUT = "-"
FETCH_SECONDS = 30.0  # without an answer
MAX_LAYERS = 3  # of packing, such as a .gz of a .zst

# longest first: UTF-32's begins with UTF-16's
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
# what is no text: beginning -> what it is, and what to do
_OTHERS = (
    (b"PK\x03\x04", "a ZIP archive or a spreadsheet", "unpack it, or save it as CSV"),
    (b"%PDF-", "a PDF", "save its text"),
    (b"ARROW1", "an Arrow file", "save it as parquet or JSON lines"),
    (b"\xff\xff\xff\xff", "an Arrow stream", "save it as parquet or JSON lines"),
    (b"SQLite format 3\0", "an SQLite database", "save a table of it as CSV"),
    (b"\x89PNG", "an image", "give text"),
    (b"\xff\xd8\xff", "an image", "give text"),
    (b"version https://git-lfs", "a pointer of Git LFS in place of the file", "run git lfs pull"),
)
PARQUET = b"PAR1"
# half a character comes of JSON's \\ud83d without its other half, and of arguments that are not UTF-8
_FAULT = re.compile("[\0\ud800-\udfff]")


@attrs.frozen
class Source:
    """A file's bytes, unpacked, and what errors call it."""

    name: str
    data: bytes = attrs.field(repr=False)

    @property
    def is_parquet(self) -> bool:
        return self.data.startswith(PARQUET)

    @property
    def text(self) -> str:
        """What it says; line ends are newlines.

        Raises:
            InputError: it is not text, with line and column.
        """
        return decoded(self.data, self.name).replace("\r\n", "\n").replace("\r", "\n")


def read_sources(place: str | Path) -> list[Source]:
    """A file, standard input (`-`), an http address, or all files below a folder, unpacked.

    Names that begin with a dot are passed over in a folder.

    Raises:
        InputError: it cannot be read or unpacked, or the folder has no file.
    """
    path = expanded(place)
    if str(place) == STANDARD_INPUT or is_url(str(place)) or not path.is_dir():
        return [read_source(place)]
    files = [
        file
        for file in sorted(path.rglob("*"))
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(path).parts)
    ]
    if not files:
        raise InputError(f"{path} must be a folder with files of text, got none in it; check the path")
    return [read_source(file) for file in files]


def read_source(place: str | Path) -> Source:
    """A file, standard input (`-`) or an http address, unpacked.

    Raises:
        InputError: it cannot be read or unpacked.
    """
    if str(place) == STANDARD_INPUT:
        return read_standard_input()
    if is_url(str(place)):
        return Source(str(place), unpacked(_fetched(str(place)), str(place)))
    path = expanded(place)
    try:
        data = path.read_bytes()
    except (OSError, ValueError) as error:  # a path with NUL in it is a ValueError
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path} must be a file that can be read, got: {reason}; check the path") from error
    return Source(str(path), unpacked(data, str(path)))


def read_standard_input() -> Source:
    """All of standard input, unpacked.

    Raises:
        InputError: it is closed, or cannot be read or unpacked.
    """
    if sys.stdin is None:
        raise InputError("standard input must be open to be read as `-`, got a closed one; redirect a file to it")
    try:
        data = sys.stdin.buffer.read()
    except OSError as error:
        raise InputError(f"standard input must be something to read, got: {error.strerror or error}") from error
    return Source("standard input", unpacked(data, "standard input"))


def is_url(place: str) -> bool:
    return place.startswith(("http://", "https://"))


def _fetched(address: str) -> bytes:
    try:
        with urllib.request.urlopen(address, timeout=FETCH_SECONDS) as answer:
            data: bytes = answer.read()
    except (OSError, urllib.error.URLError, http.client.HTTPException, ValueError) as error:
        came = " ".join(str(error).split())[:160]
        raise InputError(f"{address} must be a file that can be fetched, got {type(error).__name__}: {came}") from error
    return data


# packing


def unpacked(data: bytes, name: str) -> bytes:
    """What gzip, bzip2, xz or zstandard has packed, told by the first bytes; other bytes as they are.

    Raises:
        InputError: a damaged or cut-off file, or a package that is missing.
    """
    for _ in range(MAX_LAYERS):
        found = next(((kind, unpack) for start, kind, unpack in _PACKINGS if data.startswith(start)), None)
        if found is None:
            return data
        kind, unpack = found
        try:
            data = unpack(data)
        except ModuleNotFoundError as error:
            raise InputError(
                f"{name} is packed by {kind}, which needs {error.name}, which is not installed; "
                "pip install 'dynatree[bench]', or unpack the file first"
            ) from error
        except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
            raise InputError(
                f"{name} must be a whole {kind} file, got a damaged or cut-off one ({error}); fetch it again"
            ) from error
    raise InputError(f"{name} must be packed at most {MAX_LAYERS} times, got more; unpack it first")


def _unpacked_zstandard(data: bytes) -> bytes:
    try:
        library = importlib.import_module("compression.zstd")  # since Python 3.14
    except ModuleNotFoundError:
        arrow = importlib.import_module("pyarrow")
        with arrow.CompressedInputStream(arrow.BufferReader(data), "zstd") as stream:
            found: bytes = stream.read()
            return found
    try:
        whole: bytes = library.decompress(data)
    except library.ZstdError as error:
        raise ValueError(error) from error
    return whole


_PACKINGS: tuple[tuple[bytes, str, Callable[[bytes], bytes]], ...] = (
    (b"\x1f\x8b", "gzip", gzip.decompress),
    (b"BZh", "bzip2", bz2.decompress),
    (b"\xfd7zXZ\0", "xz", lzma.decompress),
    (b"\x28\xb5\x2f\xfd", "zstandard", _unpacked_zstandard),
)


# encoding


def decoded(data: bytes, name: str) -> str:
    """UTF-8 with or without a byte order mark, or UTF-16 or UTF-32; marks inside, at a line's start, are left out too.

    Raises:
        InputError: other bytes, or a NUL character; with line and column.
    """
    other = other_kind(data)
    if other is not None:
        raise InputError(f"{name} must be text, got {other}")
    encoding = _encoding(data)
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise InputError(_not_text(data, encoding, error, name)) from error
    text = text.removeprefix("\ufeff").replace("\n\ufeff", "\n")  # files with marks, joined
    fault = text.find("\0")
    if fault >= 0:
        raise InputError(f"{name}, {place_of(text, fault)}: must be text, got a NUL character; mend the file")
    return text


def other_kind(data: bytes) -> str | None:
    """What bytes are that are known not to be text, and what to do; None where they may be text."""
    for start, kind, advice in _OTHERS:
        if data.startswith(start):
            return f"{kind}; {advice}"
    return "a tar archive; unpack it and give the folder" if data[257:262] == b"ustar" else None


def _encoding(data: bytes) -> str:
    for mark, encoding in _MARKS:
        if data.startswith(mark):
            return encoding
    sample = data[:4000]
    even, odd = sample[::2].count(0), sample[1::2].count(0)
    # UTF-16 without a mark: every second byte of Western text is zero
    if len(sample) >= 4 and len(sample) % 2 == 0 and max(even, odd) > len(sample) // 5 and min(even, odd) == 0:
        return "utf-16-le" if odd else "utf-16-be"
    return "utf-8"


def _not_text(data: bytes, encoding: str, error: UnicodeDecodeError, name: str) -> str:
    before = data[: error.start].decode(encoding, errors="replace").removeprefix("\ufeff")
    place, wrong = place_of(before, len(before)), data[error.start : error.end].hex(" ")
    wanted = "UTF-8 text" if encoding == "utf-8" else f"{encoding.upper()} text, as its first bytes say"
    if encoding == "utf-8" and 0 in data[:4000]:
        return f"{name}, {place}: must be {wanted}, got bytes that are no text (0x{wrong}); give a file of text"
    if error.end == len(data) and "unexpected end" in error.reason:
        return f"{name}, {place}: must be {wanted}, but ends within a character (0x{wrong}); the file is cut off"
    if encoding != "utf-8":
        return f"{name}, {place}: must be {wanted}, got the bytes 0x{wrong}; the file is damaged or cut off"
    return (
        f"{name}, {place}: must be {wanted}, got the bytes 0x{wrong}; "
        "if it is Windows' or Latin-1 text: iconv -f WINDOWS-1252 -t UTF-8"
    )


def place_of(text: str, offset: int) -> str:
    """ "line 3, column 8" of a place in a text; both count from 1."""
    line_start = text.rfind("\n", 0, offset) + 1
    return f"line {text.count(chr(10), 0, offset) + 1}, column {offset - line_start + 1}"


def first_fault(text: str) -> tuple[int, str] | None:
    """Where a character stands that no tokenizer can take, and what it is; None where there is none."""
    found = _FAULT.search(text)
    if found is None:
        return None
    kind = "a NUL character" if found[0] == "\0" else f"half a character (\\u{ord(found[0]):04x})"
    return found.start(), kind


def checked_text(text: str, what: str) -> str:
    """A text that somebody typed, such as an option's.

    Raises:
        PromptError: it has half a character or a NUL in it, as bytes that are not UTF-8 become.
    """
    fault = first_fault(text)
    if fault is not None:
        offset, kind = fault
        raise PromptError(f"{what} must be UTF-8 text, got {kind} at character {offset + 1}; convert it first")
    return text
