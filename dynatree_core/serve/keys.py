"""API keys: who may ask. They are compared in constant time, and neither logged nor printed."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping, Sequence
from pathlib import Path

import attrs

from dynatree_core.errors import InputError

__all__ = ["KEYS_VARIABLE", "Keys", "load_keys"]

KEYS_VARIABLE = "DYNATREE_SERVE_API_KEYS"
SHORTEST = 8  # characters; one that can be guessed is none


@attrs.frozen
class Keys:
    """The keys that are accepted; without any, everybody is."""

    _digests: tuple[bytes, ...] = attrs.field(repr=False)  # of each key, so that all have one length

    @classmethod
    def of(cls, keys: Sequence[str]) -> Keys:
        """Those keys."""
        return cls(tuple(digest(key) for key in keys))

    def __len__(self) -> int:
        return len(self._digests)

    def name_of(self, authorization: str | None) -> str | None:
        """By what name whoever sends this header is counted and logged; None: not one of those who may ask.

        Args:
            authorization: "Bearer KEY", as OpenAI's clients send it.
        """
        scheme, _, key = (authorization or "").partition(" ")
        found = digest(key.strip())
        # all are compared, whichever it is: the time says nothing about them
        places = [place for place, known in enumerate(self._digests) if hmac.compare_digest(known, found)]
        return f"key {places[0] + 1}" if places and scheme.lower() == "bearer" else None


def digest(key: str) -> bytes:
    """What is kept of a key."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def load_keys(file: Path | None, environment: Mapping[str, str]) -> Keys:
    """The keys of a file, one a line, lines that begin with # left out, and those of `DYNATREE_SERVE_API_KEYS`.

    Raises:
        InputError: the file cannot be read or has none, or a key is too short; no key is quoted.
    """
    keys = environment.get(KEYS_VARIABLE, "").split()
    if file is not None:
        found = _lines(file)
        if not found:
            raise InputError(f"a file of API keys must have at least one, a line each, got none in {file}")
        keys += found
    if any(len(key) < SHORTEST for key in keys):
        raise InputError(f"an API key must have at least {SHORTEST} characters, got a shorter one; draw a longer one")
    return Keys.of(list(dict.fromkeys(keys)))


def _lines(file: Path) -> list[str]:
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"a file of API keys must be a text that can be read, got {file} ({error})") from error
    return [line for line in lines if line and not line.startswith("#")]
