"""Makes the notebooks of docs/notebooks: NAME.md is written by hand and tested, NAME.ipynb is made from it.

`python .ci/notebook.py` writes them all. Text becomes cells of text, each Python block a cell of code, with the output
that the page shows behind it, so a notebook is as right as its page, whose blocks run in tests/test_docs.py.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "notebooks"
BLOCK = re.compile(
    r"^```python\n(?P<code>.*?)^```\n(?:\n<!-- output -->\n```text\n(?P<output>.*?)^```\n)?", re.M | re.S
)


def notebook(page: str) -> dict[str, Any]:
    """A page as a notebook of format 4.5."""
    cells: list[dict[str, Any]] = []
    last = 0
    for block in BLOCK.finditer(page):
        cells += _text_cells(page[last : block.start()], len(cells))
        printed = block["output"]
        output = {"name": "stdout", "output_type": "stream", "text": _lines(printed)} if printed else None
        cells.append(
            {
                "cell_type": "code",
                "execution_count": None,
                "id": f"cell-{len(cells)}",
                "metadata": {},
                "outputs": [output] if output else [],
                "source": _lines(block["code"]),
            }
        )
        last = block.end()
    cells += _text_cells(page[last:], len(cells))
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}


def rendered(page: str) -> str:
    """The file's text."""
    return json.dumps(notebook(page), ensure_ascii=False, indent=1) + "\n"


def _text_cells(text: str, number: int) -> list[dict[str, Any]]:
    stripped = text.strip()
    if not stripped:
        return []
    return [{"cell_type": "markdown", "id": f"cell-{number}", "metadata": {}, "source": _lines(stripped)}]


def _lines(text: str) -> list[str]:
    """As the format wants them: each line with its end, but for the last."""
    return text.removesuffix("\n").splitlines(keepends=True)


def main() -> int:
    for page in sorted(FOLDER.glob("*.md")):
        page.with_suffix(".ipynb").write_text(rendered(page.read_text(encoding="utf-8")), encoding="utf-8")
        print(page.with_suffix(".ipynb").relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
