"""The page of `dynatree view`: one HTML file that holds everything it needs and loads nothing.

The page's code is built of the sources in `viewer/` (`make viewer`) and stands in `page.html`. What comes from a trace
is data: it goes into blocks that no browser runs, escaped so that nothing in it can end its block, and the page's
Content-Security-Policy names its one script and its one style sheet by their hashes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from dynatree_core.errors import InputError
from dynatree_core.trace.reading import read
from dynatree_core.trace.summary import run_of

__all__ = ["inert_json", "is_page", "page", "page_of"]

DATA = "@@data@@"  # where the template has room for it
MARK = b'<meta name="dynatree-viewer-sources"'
MOST_RUNS = 2  # that stand side by side
HEAD_BYTES = 2000  # within which a page has its mark
INERT = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"}  # in JSON they stand in strings only


def page_of(*paths: str | os.PathLike[str]) -> str:
    """A self-contained HTML page that shows one trace, or two side by side.

    Args:
        paths: of traces, compressed or not. One that breaks off is shown up to there, and the page says so.

    Raises:
        InputError: there are more than two, or one is no trace or has no generation.
        OSError: one cannot be read.
    """
    if not 1 <= len(paths) <= MOST_RUNS:
        raise InputError(f"a page must show one trace or two, got {len(paths)}")
    return page([_run(Path(path)) for path in paths])


def _run(path: Path) -> tuple[dict[str, Any], list[list[dict[str, Any]]]]:
    if path.is_dir():
        raise InputError(f"a trace must be a file, got the folder {path}; name what --trace has written")
    trace = read(path)
    if not trace.sequences:
        raise InputError(f"a trace must hold a generation, got {path} with a header alone; wait until one has begun")
    return run_of(path.name, trace)


def page(runs: Sequence[tuple[Mapping[str, Any], Sequence[Iterable[Any]]]]) -> str:
    """A self-contained HTML page, in ASCII.

    Args:
        runs: one or two traces, each what `viewer/src/data.ts` calls a `Run`, with a `Detail` for each iteration of
            each of its sequences.
    """
    blocks = [_block("runs", inert_json([run for run, _ in runs]))]
    for number, (_, sequences) in enumerate(runs):
        for place, details in enumerate(sequences):
            blocks.append(_block(f"detail-{number}-{place}", "\n".join(map(inert_json, details))))
    template = files("dynatree_core.trace").joinpath("page.html").read_text(encoding="utf-8")
    before, _, after = template.partition(DATA)
    return before + "\n".join(blocks) + after


def is_page(path: Path) -> bool:
    """Whether a file is a page of this kind, of whatever version."""
    with path.open("rb") as file:
        return MARK in file.read(HEAD_BYTES)


def inert_json(value: Any) -> str:
    """JSON in ASCII without `<`, `>` and `&`, so that no text in it can end a block of data or begin anything."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    for character, escape in INERT.items():
        text = text.replace(character, escape)
    return text


def _block(name: str, text: str) -> str:
    return f'<script type="application/json" id="{name}">\n{text}\n</script>'
