"""Whether the model hub can be reached, asked once and briefly.

Without a connection the hub's own client tries each file again and again, for half a minute and more. Here one request
decides, within `SECONDS`: if it fails, only what was fetched before is looked for.
"""

from __future__ import annotations

import functools
import threading
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import HFValidationError

__all__ = ["fetched_folder", "offline_reason", "unreachable_reason"]

SECONDS = 2.0  # for the connection and an answer, the look-up of the address included


def offline_reason() -> str | None:
    """Why nothing can be fetched from the hub; None where it answers. It is asked once a process."""
    return "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else unreachable_reason()


def unreachable_reason() -> str | None:
    """Why the hub does not answer; None where it does, and in offline mode, in which its client fails at once."""
    return None if constants.HF_HUB_OFFLINE else _unreachable(constants.ENDPOINT)


def fetched_folder(name: str) -> Path | None:
    """Where a model's files are in the hub's local cache; None where its config.json is not."""
    try:
        config = huggingface_hub.try_to_load_from_cache(name, "config.json")
    except HFValidationError:
        return None  # no id of a model
    return Path(config).parent if isinstance(config, str) else None


@functools.cache
def _unreachable(endpoint: str) -> str | None:
    """Why an address does not answer; None for any HTTP answer, an error status too."""
    failed: list[str] = []

    def ask() -> None:
        try:
            huggingface_hub.get_session().head(endpoint, timeout=SECONDS)
        except Exception as error:  # noqa: BLE001  # the client is another library in each version of the hub's package
            failed.append(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)

    # name resolution has no time limit, so a thread does it and is abandoned if it takes too long
    thread = threading.Thread(target=ask, daemon=True, name="hub")
    thread.start()
    thread.join(SECONDS)
    if thread.is_alive():
        return f"{endpoint} does not answer within {SECONDS:g} s"
    return f"{endpoint} cannot be reached ({failed[0]})" if failed else None
