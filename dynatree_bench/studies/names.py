"""Which studies there are, without importing them."""

from __future__ import annotations

import ast
from pathlib import Path

OTHERS = ("__init__", "names", "study")  # files here that are no study


def studies() -> dict[str, str]:
    """The name and question of each, from the files alone: importing them would take seconds."""
    files = sorted(file for file in Path(__file__).parent.glob("*.py") if file.stem not in OTHERS)
    return {
        file.stem.replace("_", "-"): (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").split("\n")[
            0
        ]
        for file in files
    }
