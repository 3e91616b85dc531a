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
    max_seconds: float | None = None  # from when a request is submitted; what there is by then is its answer
    max_body_bytes: int = 4 * 2**20
    max_requests: int | None = None  # that one client may have open at once
    max_connections: int = 1024  # of all clients, those on which nothing is asked among them
    hosts: tuple[str, ...] = ()  # by what names a request may call the server, beside loopback's and addresses
    warms_up: bool = False  # whether each policy and drafter decodes a few tokens before the first request
    stop_seconds: float = 30.0  # that open requests have to end, once the server is told to
    cors_origins: tuple[str, ...] = ()  # of pages in browsers that may ask; none: pages of this server alone
    logs_prompts: bool = False  # whether prompts and answers stand in the log
    shows_trees: bool = True  # whether a request may ask for its own trees
    on_error: str = "fallback"  # what a fault of a policy or drafter does to its sequence, as in `generate`
    limits: dict[str, object] = attrs.field(factory=dict)  # of trees: `tau`, `max_nodes`, `max_depth`, `max_branch`
