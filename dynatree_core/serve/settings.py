"""What a server is run with. Nothing of it can be changed by a request."""

from __future__ import annotations

import attrs

__all__ = ["Settings"]


@attrs.frozen(kw_only=True)
class Settings:
    """What a server allows, and what it takes where a request says nothing."""

    model_names: tuple[str, ...]  # that a request may call the model by; answers have the first
    policies: tuple[str, ...]  # that a request may choose; the first is taken where it chooses none
    drafters: tuple[str, ...]  # likewise
    max_tokens: int = 4096  # of one answer
    max_choices: int = 16  # sequences of one HTTP request
    on_error: str = "fallback"  # what a fault of a policy or drafter does to its sequence, as in `generate`
    limits: dict[str, object] = attrs.field(factory=dict)  # of trees: `tau`, `max_nodes`, `max_depth`, `max_branch`
