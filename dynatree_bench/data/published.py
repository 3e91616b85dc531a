"""The published numbers of DynaTree, of other models on another machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def published() -> dict[str, Any]:
    """The published rows of each experiment, and under "source" where they come from."""
    text = Path(__file__).with_name("published.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    return found
