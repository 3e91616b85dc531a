"""Files of prompts in tests: their rows, and readers of one whose name says nothing of it."""

from __future__ import annotations

import json
import os

import pytest

from dynatree_core.errors import InputError
from dynatree_core.text.prompt_files import read_prompts

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
