"""The answers of `dynatree generate` to many prompts: a line for each, in a file that another run can go on with."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs
import click
from filelock import FileLock, Timeout

from dynatree_core.errors import InputError
from dynatree_core.files.folders import expanded
from dynatree_core.files.outputs import check_out
from dynatree_core.files.writing import write_text
from dynatree_core.text.columns import Prompt
from dynatree_core.text.prompt_files import Prompts

__all__ = ["Answers", "Fingerprints"]

MADE_BY = "`dynatree generate`"
HEX_DIGITS = 16  # of each half of a fingerprint

Place = tuple[int, int]  # of an answer: the prompt's index in its file, and the turn, from 1


@attrs.frozen
class Fingerprints:
    """What tells whether an answer in a file is one to this command's question.

    A fingerprint has two halves: all that was asked for but the prompt, and the conversation up to the turn.
    """

    settings: str

    @classmethod
    def of(cls, target: str | None, **settings: Any) -> Fingerprints:
        """Of a command's settings, JSON's types by name; models by their names, and a folder by its files too."""
        name = target or "default"
        asked = {"target": name, "files": _files(expanded(name)), **settings}
        return cls(_digest(asked))

    def of_question(self, prompt: Prompt, turn: int) -> str:
        """Of one question."""
        said = [*prompt.before, prompt.text, *prompt.later[: turn - 1]]
        return f"{self.settings}-{_digest(said)}"

    def is_of(self, found: object) -> bool:
        """Whether an answer was made with these settings."""
        return str(found).partition("-")[0] == self.settings


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:HEX_DIGITS]


def _files(folder: Path) -> list[tuple[str, int, int]]:
    """Where a folder is and what is in it, without reading it: a model that was trained further is another one."""
    if not folder.is_dir():
        return []
    found = [(file.name, *_size_and_time(file)) for file in sorted(folder.iterdir()) if file.is_file()]
    return [(str(folder.resolve()), 0, 0), *found]


def _size_and_time(file: Path) -> tuple[int, int]:
    stat = file.stat()
    return stat.st_size, stat.st_mtime_ns


class Answers:
    """A file of answers, and those that it had before. Without a file they go to standard output.

    While they are written, lines stand in the order in which the answers were finished, at the end in that of the
    prompts. A line that failed is no answer: it is dropped when the file is opened, and its question asked again.

    Args:
        path: the file; None: standard output.
        fingerprints: of the command that writes.
    """

    def __init__(self, path: Path | None, fingerprints: Fingerprints) -> None:
        self.path = path
        self.fingerprints = fingerprints
        self._wanted: dict[int, Prompt] = {}  # by index, those that are asked this time
        self._found: dict[Place, dict[str, Any]] = {}
        self._order: list[Place] = []

    def check(self, prompts: Prompts) -> None:
        """Refuse a file that is not of this request, and take the answers from one that is. Nothing is written.

        Raises:
            InputError: it holds something else, or cannot be written.
        """
        if self.path is None:
            return
        self._wanted = dict(zip(prompts.places, prompts.prompts, strict=True))
        check_out(self.path, MADE_BY, self._is_own, is_file=True)

    def _is_own(self, path: Path) -> bool:
        """Whether every whole line is an answer with the same settings, and to the prompt of that index."""
        self._found, self._order = {}, []
        for record in _whole_lines(path):
            place = _place(record)
            if place is None or not self.fingerprints.is_of(record.get("request")):
                return False
            prompt = self._wanted.get(place[0])  # None: not among those that are taken this time
            if prompt is not None and record["request"] != self.fingerprints.of_question(prompt, place[1]):
                return False
            if record.get("error") is None:
                if place not in self._found:  # or it came twice, as in files that somebody has joined
                    self._order.append(place)
                self._found[place] = record
        return True

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Keep other runs out of the file while the block writes, and leave it in the order of the prompts.

        The answers are those that are there now: another run may have added some, and ended, since `check`.

        Raises:
            InputError: another run is writing to it, or has made something else of it.
        """
        if self.path is None:
            yield
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path.with_name(f".{self.path.name}.lock"))
        try:
            lock.acquire(timeout=0)  # the system frees it however its holder ends
        except Timeout as error:
            raise InputError(
                f"what {MADE_BY} writes needs a file for itself, got {self.path}, to which another run is writing; "
                "wait for that, or choose another"
            ) from error
        try:
            self._found, self._order = {}, []
            check_out(self.path, MADE_BY, self._is_own, is_file=True)
            self._rewrite(self._order)
            yield
            self._rewrite(sorted(self._order))
        finally:
            lock.release()

    def _rewrite(self, places: Iterable[Place]) -> None:
        """The file with these answers, whole."""
        assert self.path is not None, "only a file is written anew"
        text = "".join(_line(self._found[place]) for place in places)
        if not self.path.exists() or self.path.read_text(encoding="utf-8") != text:
            write_text(self.path, text)

    def find(self, place: Place) -> dict[str, Any] | None:
        """The answer that is there already."""
        return self._found.get(place)

    def add(self, place: Place, record: dict[str, Any]) -> None:
        """Write one more line."""
        if self.path is None:
            click.echo(_line(record), nl=False)
            return
        with self.path.open("a", encoding="utf-8", newline="") as file:
            file.write(_line(record))
        self._found[place] = record
        self._order.append(place)


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record) + "\n"


def _whole_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects in a file's lines; for a line that is none, an empty one. A last line that is torn is left out."""
    for line in path.read_bytes().splitlines(keepends=True):
        if not line.endswith(b"\n"):
            return
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        yield record if isinstance(record, dict) else {}


def _place(record: Mapping[str, Any]) -> Place | None:
    index, turn = record.get("index"), record.get("turn")
    return (index, turn) if isinstance(index, int) and isinstance(turn, int) else None
