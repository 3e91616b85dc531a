"""The start page: a small chat, one HTML document that loads nothing, whose script and style the browser checks."""

from __future__ import annotations

import base64
import functools
import hashlib
from importlib.resources import files

import attrs

__all__ = ["StartPage", "start_page"]


@attrs.frozen
class StartPage:
    """The document, and the headers that it comes with."""

    html: str
    headers: dict[str, str]


@functools.cache
def start_page() -> StartPage:
    """The page, from the files in `page`. What the model writes is never more than text in it.

    Its Content-Security-Policy names the one script and the one style sheet by their hashes and lets it speak with this
    server alone.
    """
    html = _text("page.html")
    # the viewer's drawing of trees, which `make viewer` builds, before what uses it
    style, script = (_text(f"trees.{kind}") + _text(f"page.{kind}") for kind in ("css", "js"))
    policy = [
        "default-src 'none'",
        f"script-src {_hash(script)}",
        f"style-src {_hash(style)}",
        "connect-src 'self'",
        "img-src data:",  # the empty icon, so that no browser asks for one
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    ]
    headers = {
        "Content-Security-Policy": "; ".join(policy),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
    return StartPage(html.replace("@@style@@", style).replace("@@script@@", script), headers)


def _text(name: str) -> str:
    return files("dynatree_core.serve").joinpath("page", name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
