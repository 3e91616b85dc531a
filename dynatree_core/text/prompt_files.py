"""A file of any kind to prompts: the one reader of `generate`, `audit`, `bench` and `distill` (docs/files.md)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import attrs

from dynatree_core.errors import InputError
from dynatree_core.text.columns import COLUMNS, TEXT, Prompt, column_of, columns_of, prompt_of, settings_beside
from dynatree_core.text.passages import cut
from dynatree_core.text.reading import STANDARD_INPUT, is_url, other_kind, read_sources
from dynatree_core.text.tables import Row, read_rows

__all__ = ["PASSAGE_CHARS", "Prompts", "name_of", "prompts_of_rows", "read_documents", "read_prompts"]

PASSAGE_CHARS = 2000
_ENDINGS = re.compile(r"(\.(gz|zst|bz2|xz))?$", re.I)


@attrs.frozen
class Prompts:
    """What a file asks."""

    name: str
    prompts: tuple[Prompt, ...]
    is_text: bool  # passages of running text to go on with, not requests
    notes: tuple[str, ...] = ()  # what was left out and why, a sentence each
    # of each prompt among all of the file, from 0: they stay where others are left out
    places: tuple[int, ...] = attrs.field(
        default=attrs.Factory(lambda read: tuple(range(len(read.prompts))), takes_self=True)
    )


def name_of(place: str | Path) -> str:
    """What a file's prompts are called: its name without endings."""
    if str(place) == STANDARD_INPUT:
        return "stdin"
    name = str(place).rstrip("/").rpartition("/")[2] if is_url(str(place)) else Path(place).name
    return Path(_ENDINGS.sub("", name, count=1)).stem or "prompts"


def read_prompts(
    place: str | Path,
    *,
    name: str | None = None,
    column: str | None = None,
    is_played: bool = False,
    is_joined: bool = False,
    passage_chars: int = PASSAGE_CHARS,
) -> Prompts:
    """The prompts of a file, of standard input (`-`), of an http address, or of all files in a folder.

    Args:
        place: where they are.
        name: what they are called where they have no ids and categories; None: the file's own name.
        column: where the prompts are in a table; None: in the first of COLUMNS that there is.
        is_played: prefer a column that holds whole conversations.
        is_joined: rows of running text are pieces of one text.
        passage_chars: of a passage into which running text is cut.

    Raises:
        InputError: what is wrong, with file, line and column, or that there is no prompt.
    """
    name = name or name_of(place)
    found: list[Prompt] = []
    kinds: list[bool] = []
    notes: list[str] = []
    sources = read_sources(place)
    for source in sources:
        is_only = len(sources) == 1
        if not is_only and (other := None if source.is_parquet else other_kind(source.data)):
            notes.append(f"{source.name} is left out: {other.partition(';')[0]}")
            continue
        rows = read_rows(source, COLUMNS, is_table=column is not None)
        if rows is None:
            read = _of_text(source.text, name, len(found), source.name, passage_chars)
            if column is not None and read.prompts:
                raise InputError(f"{source.name} must be a table with a column '{column}', got running text")
            if not is_only and not read.prompts:
                notes.append(f"{source.name} is left out: it has no text")
        else:
            read = prompts_of_rows(
                rows, name, source.name, column=column, is_played=is_played, is_joined=is_joined,
                first=len(found), passage_chars=passage_chars,
            )  # fmt: skip
        if is_only or read.prompts:
            kinds.append(read.is_text)
        found += read.prompts
        notes += read.notes
    if not found:
        raise InputError(f"{_called(place)} must have at least one prompt, got none; give a file with text in it")
    if len(set(kinds)) > 1:
        raise InputError(
            f"{_called(place)} must hold either prompts or running text, got files of both; give one folder of each"
        )
    return Prompts(name, tuple(found), kinds[0], tuple(notes))


def _called(place: str | Path) -> str:
    return "standard input" if str(place) == STANDARD_INPUT else str(place)


def _of_text(text: str, name: str, first: int, where: str, passage_chars: int) -> Prompts:
    """Running text, as passages."""
    prompts = tuple(
        Prompt(f"{name}-{index:04d}", name, passage, where=f"{where}, passage {index - first + 1}")
        for index, passage in enumerate(cut(text, passage_chars), start=first)
    )
    return Prompts(name, prompts, True)


def prompts_of_rows(
    rows: Sequence[Row],
    name: str,
    where: str,
    *,
    column: str | None = None,
    is_played: bool = False,
    is_joined: bool = False,
    is_lenient: bool = False,
    first: int = 0,
    passage_chars: int = PASSAGE_CHARS,
) -> Prompts:
    """The prompts of a table.

    Args:
        rows: its rows.
        name: for prompts without an id or a category.
        where: what errors call the table.
        is_lenient: leave blank prompts out, and say how many; else they are an error.
        first: how many prompts there are before, for those without an id.

    Raises:
        InputError: a row without a prompt, naming it.
    """
    if not rows:
        raise InputError(f"{where} must have at least one row, got none")
    column = column_of(rows, column, is_played=is_played)
    if column == TEXT:
        return _of_text_rows(rows, name, where, is_joined, first, passage_chars)
    prompts, num_silent, num_blank = [], 0, 0
    for index, row in enumerate(rows, start=first):
        prompt = prompt_of(row, column, name, index)
        if prompt is None:
            num_silent += 1
        elif prompt.text.strip() and all(turn.strip() for turn in prompt.later):
            prompts.append(prompt)
        elif is_lenient:
            num_blank += 1
        else:
            raise InputError(
                f'{row.where}: "{column}" must have at least one character that is not blank, got '
                f"{prompt.text[:20]!r}; fill it or leave out the row"
            )
    notes = []
    if num_silent:
        notes.append(f"{where}: {num_silent:,} of {len(rows):,} rows are left out, in which no user says anything")
    if num_blank:
        notes.append(f"{where}: {num_blank:,} of {len(rows):,} rows are left out, which are blank")
    if settings := settings_beside(rows, column):
        notes.append(f"{where}: what its requests set is not applied ({', '.join(settings)}); give options instead")
    return Prompts(name, tuple(prompts), False, tuple(notes))


def _of_text_rows(
    rows: Sequence[Row], name: str, where: str, is_joined: bool, first: int, passage_chars: int
) -> Prompts:
    """Rows of running text: each a document, or pieces of one text where they end with line ends, as WikiText's do."""
    documents = [prompt_of(row, TEXT, name, index) for index, row in enumerate(rows, start=first)]
    texts = [document for document in documents if document is not None]
    if is_joined or any(document.text.endswith("\n") or not document.text for document in texts):
        pieces = [one.text if one.text.endswith("\n") or not one.text else f"{one.text}\n\n" for one in texts]
        return _of_text("".join(pieces), name, first, where, passage_chars)
    prompts: list[Prompt] = []
    for document in texts:
        passages = cut(document.text, passage_chars)
        ids = (
            [document.prompt_id] if len(passages) == 1 else [f"{document.prompt_id}/{i}" for i in range(len(passages))]
        )
        prompts += [attrs.evolve(document, prompt_id=own, text=text) for own, text in zip(ids, passages, strict=True)]
    return Prompts(name, tuple(prompts), True)


def read_documents(place: str | Path, *, column: str | None = None) -> list[str]:
    """The texts of a file or a folder, whole: that of a file of running text, or of each row of a table.

    Raises:
        InputError: what is wrong, with file, line and column.
    """
    documents: list[str] = []
    for source in read_sources(place):
        rows = read_rows(source, COLUMNS, is_table=column is not None)
        if rows is None:
            documents.append(source.text)
            continue
        if not rows:
            raise InputError(f"{source.name} must have at least one row, got none")
        chosen = column or (TEXT if TEXT in columns_of(rows[0]) else None)
        chosen = column_of(rows, chosen, is_played=False)
        found = [prompt_of(row, chosen, "text", index) for index, row in enumerate(rows)]
        texts = [prompt.text for prompt in found if prompt is not None]
        is_in_pieces = any(text.endswith("\n") for text in texts)
        documents += ["".join(texts)] if is_in_pieces else texts
    return documents
