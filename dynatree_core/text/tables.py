"""Text to rows: JSON lines, JSON, CSV and parquet, told by what stands in them. Anything else is running text."""

from __future__ import annotations

import csv
import importlib
import io
import itertools
import json
import re
import sys
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import attrs

from dynatree_core.errors import InputError
from dynatree_core.text.reading import Source, place_of

__all__ = ["Row", "read_json", "read_rows", "rows_of_values"]

DELIMITERS = (",", "\t", ";", "|")
NUM_LOOKED_AT = 200  # lines, to tell what a file is
MAX_SHOWN = 60  # characters of what is wrong
_WHITE = re.compile(r"\s*")
# what JSON begins with and hardly any prose does
_JSON_START = re.compile(r"""\{\s*["'}]|\[\s*["{]|\[\s*\[\s*\{""")
_WORD = re.compile(r"[A-Za-z_][\w .()/-]{0,40}")  # a table's column, where none is known
# objects that hold the rows under one of these, as other programs write them
_CONTAINERS = ("data", "rows", "prompts", "examples", "instances", "train", "test")


@attrs.frozen
class Row:
    """A row as it stands in a file, and where."""

    value: Any  # an object's columns, or a text
    name: str  # of the file
    line: int | None = None  # from 1; None where a file has no lines
    number: int = 1  # of the row, from 1
    raw: str = attrs.field(default="", repr=False)  # what it was read from, where it is JSON
    column: int = 1  # where that begins in its line

    @property
    def where(self) -> str:
        return f"{self.name}, line {self.line}" if self.line is not None else f"{self.name}, row {self.number}"

    def where_of(self, fault: re.Pattern[str]) -> str:
        """Where a spelling stands in the row, with its column as far as that can be told."""
        found = fault.search(self.raw)
        if found is None or self.line is None:
            return self.where
        line_start = self.raw.rfind("\n", 0, found.start()) + 1
        line = self.line + self.raw.count("\n", 0, found.start())
        column = found.start() - line_start + (self.column if line_start == 0 else 1)
        return f"{self.name}, line {line}, column {column}"


def read_rows(source: Source, known: Collection[str], *, is_table: bool = False) -> list[Row] | None:
    """A file's rows; None where it is running text.

    Args:
        source: the file.
        known: names of columns, in small letters, by which a CSV file is known.
        is_table: whether somebody has named a column, so that it must be a table.

    Raises:
        InputError: rows that cannot be read, with line and column.
    """
    if source.is_parquet:
        return list(_parquet(source))
    text = source.text
    if _is_json(text, known):
        return _json(text, source.name)
    return _csv(text, source.name, known, is_table=is_table)


def read_json(source: Source) -> list[Row]:
    """The values of a file of JSON: of JSON lines, the elements of a list, or one value.

    Raises:
        InputError: it is not JSON, with line and column.
    """
    text = source.text
    if not text.strip():
        raise InputError(f"{source.name} must be JSON, got an empty file")
    rows = _json(text, source.name, is_unwrapped=False)
    return list(_elements(text, source.name)) if len(rows) == 1 and isinstance(rows[0].value, list) else rows


def rows_of_values(values: Sequence[Any], name: str) -> list[Row]:
    """Rows that come from elsewhere than from a file."""
    return [Row(value, name, number=number) for number, value in enumerate(values, start=1)]


def _after_white(text: str, offset: int) -> int:
    found = _WHITE.match(text, offset)
    assert found is not None, "the pattern matches nothing too"
    return found.end()


# JSON


def _is_json(text: str, known: Collection[str]) -> bool:
    """Whether a text is JSON, be it faulty: it begins so, it is a JSON list, or half of its first lines are JSON."""
    start = _after_white(text, 0)
    if _JSON_START.match(text, start):
        return True
    if text.startswith("[", start) and isinstance(_value_or_none(text), list):
        return True
    lines = [line for line in itertools.islice(io.StringIO(text), NUM_LOOKED_AT) if line.strip()]
    values = [_value_or_none(line) for line in lines if line.lstrip()[0] in '{["']
    if lines and len(values) == len(lines) and all(isinstance(value, str) for value in values):
        return values[0] not in known  # lines such as "Name a river.", or a table of one column in quotes
    num_objects = sum(isinstance(value, dict) for value in values)
    return num_objects > 0 and 2 * num_objects >= len(lines)


def _json(text: str, name: str, *, is_unwrapped: bool = True) -> list[Row]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        pass  # several values, or a fault that is told below with its place
    else:
        return _unwrapped(value, text, name) if is_unwrapped else [_whole(value, text, name)]
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    # a line that is a value of its own makes the file JSON lines, so that a fault is told by its line
    is_lines = lines[0][1].strip() not in "[{" and any(_value_or_none(line) is not None for _, line in lines[:2])
    if len(lines) > 1 and is_lines:
        return [
            Row(_parsed(line, name, number), name, number, index, line)
            for index, (number, line) in enumerate(lines, start=1)
        ]
    return list(_values(text, name))


def _value_or_none(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _parsed(line: str, name: str, number: int) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{name}, line {number}, column {error.colno}: must be JSON, got {_shown(line)} ({error.msg})"
        ) from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name}, line {number}: must be JSON that can be read, got {error}") from error


@attrs.define
class _Places:
    """Lines and columns of places in a text, asked from its beginning on."""

    text: str
    line: int = 1
    line_start: int = 0

    def at(self, offset: int) -> tuple[int, int]:
        """Line and column, from 1."""
        num_ends = self.text.count("\n", self.line_start, offset)
        if num_ends:
            self.line += num_ends
            self.line_start = self.text.rindex("\n", self.line_start, offset) + 1
        return self.line, offset - self.line_start + 1


def _values(text: str, name: str) -> Iterator[Row]:
    """JSON values one after another, over as many lines as they take."""
    places, offset = _Places(text), _after_white(text, 0)
    for number in itertools.count(1):
        value, end = _decoded_at(text, offset, name)
        line, column = places.at(offset)
        yield Row(value, name, line, number, text[offset:end], column)
        offset = _after_white(text, end)
        if offset == len(text):
            return


def _decoded_at(text: str, offset: int, name: str) -> tuple[Any, int]:
    try:
        return json.JSONDecoder().raw_decode(text, offset)
    except json.JSONDecodeError as error:
        line = text[error.pos - error.colno + 1 :].partition("\n")[0]
        raise InputError(
            f"{name}, {place_of(text, error.pos)}: must be JSON, got {_shown(line)} ({error.msg})"
        ) from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name}, {place_of(text, offset)}: must be JSON that can be read, got {error}") from error


def _unwrapped(value: Any, text: str, name: str) -> list[Row]:
    """The rows of a file that is one JSON value: a list, an object that holds a list, or one row."""
    if isinstance(value, list) and not _is_conversation(value):
        return list(_elements(text, name))
    if isinstance(value, dict):
        for key in _CONTAINERS:
            rows = value.get(key)
            if isinstance(rows, list) and rows and all(isinstance(one, dict | str) for one in rows):
                # the hub's server of rows wraps each one once more
                is_wrapped = all(isinstance(one, dict) and isinstance(one.get("row"), dict) for one in rows)
                return rows_of_values([one["row"] for one in rows] if is_wrapped else rows, name)
    return [_whole(value, text, name)]


def _whole(value: Any, text: str, name: str) -> Row:
    start = _after_white(text, 0)
    line, column = _Places(text).at(start)
    return Row(value, name, line, 1, text[start:], column)


def _is_conversation(value: list[Any]) -> bool:
    return bool(value) and all(isinstance(one, dict) and {"role", "content"} <= set(one) for one in value)


def _elements(text: str, name: str) -> Iterator[Row]:
    """The elements of a list, each with the place at which it begins."""
    places, offset = _Places(text), _after_white(text, text.index("[") + 1)
    for number in itertools.count(1):
        if text[offset] == "]":
            return
        value, end = _decoded_at(text, offset, name)
        line, column = places.at(offset)
        yield Row(value, name, line, number, text[offset:end], column)
        offset = _after_white(text, end)
        if text[offset] == ",":
            offset = _after_white(text, offset + 1)


# CSV


def _csv(text: str, name: str, known: Collection[str], *, is_table: bool) -> list[Row] | None:
    """The rows of a table whose first line names its columns; None where the text is no table."""
    num_skipped, marks = 0, [*DELIMITERS]
    if text[:4].lower() == "sep=" and text[4:5]:  # how Excel is told
        marks, num_skipped, text = [text[4]], 1, text.partition("\n")[2]
    head = text.partition("\n")[0]
    # a file's ending counts only where nothing in it tells
    is_table = is_table or num_skipped > 0 or re.search(r"\.(csv|tsv)\b", name, re.I) is not None
    for mark in marks:
        cells = _header(head, mark)
        if len(cells) < 2 or not all(_WORD.fullmatch(cell) for cell in cells):
            continue
        named = [cell for cell in cells if cell.lower() in known]
        is_named = bool({*named} & {*known}) and not any(" " in cell for cell in cells)  # no sentence has that
        if is_table or is_named or _is_even(text, mark, is_named=bool(named)):
            return _cells(text, name, mark, num_skipped)
    has_rows = len(text) > len(head) + 1
    is_known = head.strip().strip('"') in known
    if (is_known and (has_rows or is_table)) or (is_table and has_rows and re.fullmatch(r"\w+", head.strip())):
        return _cells(text, name, "\t", num_skipped)  # one column
    return None


def _header(head: str, delimiter: str) -> list[str]:
    try:
        return [cell.strip() for cell in next(csv.reader([head], delimiter=delimiter), [])]
    except csv.Error:
        return []


def _is_even(text: str, delimiter: str, *, is_named: bool) -> bool:
    """Whether the lines have as many cells as the first: most where a column's name is known, else all, in words."""
    try:
        rows = [
            row for row in itertools.islice(csv.reader(io.StringIO(text), delimiter=delimiter), NUM_LOOKED_AT) if row
        ]
    except csv.Error:
        return False
    first, *others = rows
    num_even = sum(len(row) == len(first) for row in others)
    if is_named:
        return num_even > len(others) // 2
    is_of_words = delimiter == "\t" or not any(" " in cell.strip() for cell in first)
    return is_of_words and len(set(first)) == len(first) and 0 < num_even == len(others)


def _cells(text: str, name: str, delimiter: str, skipped: int) -> list[Row]:
    try:
        return list(_csv_rows(text, name, delimiter, skipped, csv.QUOTE_MINIMAL))
    except InputError:
        if delimiter != "\t":
            raise
        # many write tabs without quotes, and then a quote is a letter
        return list(_csv_rows(text, name, delimiter, skipped, csv.QUOTE_NONE))


def _csv_rows(text: str, name: str, delimiter: str, skipped: int, quoting: Any) -> Iterator[Row]:
    before = csv.field_size_limit(sys.maxsize)  # a text may have more than the 131,072 characters of the default
    try:
        reader = csv.reader(io.StringIO(text), delimiter=delimiter, quoting=quoting, strict=True)
        columns = [cell.strip() for cell in next(reader)]
        if twice := {column for column in columns if columns.count(column) > 1}:
            raise InputError(f"{name}, line {skipped + 1}: must name each column once, got '{min(twice)}' twice")
        line = skipped + 1 + reader.line_num
        try:
            for cells in reader:
                if cells and len(cells) != len(columns):
                    raise InputError(
                        f"{name}, line {line}: must have {len(columns)} cells, as the first line says "
                        f"({', '.join(columns)}), got {len(cells)}; put a cell with {delimiter!r} in it in quotes"
                    )
                if cells:
                    yield Row(dict(zip(columns, cells, strict=True)), name, line, line - skipped - 1)
                line = skipped + 1 + reader.line_num
        except csv.Error as error:
            raise InputError(f"{name}, line {line}: must be a row of a table, got {error}; check its quotes") from error
    finally:
        csv.field_size_limit(before)


# parquet


def _parquet(source: Source) -> Iterator[Row]:
    try:
        arrow = importlib.import_module("pyarrow")
        parquet = importlib.import_module("pyarrow.parquet")
    except ModuleNotFoundError as error:
        raise InputError(
            f"{source.name} is a parquet file, which needs {error.name}, which is not installed; "
            "pip install 'dynatree[bench]', or save it as JSON lines"
        ) from error
    try:
        batches = parquet.ParquetFile(arrow.BufferReader(source.data)).iter_batches()
        rows = (row for batch in batches for row in batch.to_pylist())
        yield from (Row(row, source.name, number=number) for number, row in enumerate(rows, start=1))
    except (arrow.ArrowException, OSError) as error:
        came = " ".join(str(error).split())[:120]
        raise InputError(f"{source.name} must be a whole parquet file, got: {came}; fetch it again") from error


def _shown(line: str) -> str:
    return repr(line if len(line) <= MAX_SHOWN else line[:MAX_SHOWN] + "…")
