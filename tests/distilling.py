"""What the tests of distillation share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    file = tmp_path / "book.txt"
    file.write_text("".join(f"the cat number {chr(97 + i % 26)} sat on a mat. it was happy\n" for i in range(120)))
    return file


class Interrupted(Exception):
    """In place of a signal."""
