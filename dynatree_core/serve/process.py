"""The process of a server: uvicorn, signals, and how it ends."""

from __future__ import annotations

import signal
from types import FrameType

import attrs
import uvicorn
from fastapi import FastAPI

__all__ = ["Listen", "ServerProcess"]


@attrs.frozen(kw_only=True)
class Listen:
    """Where a server listens."""

    host: str = "127.0.0.1"
    port: int = 8000  # 0: any that is free


class ServerProcess(uvicorn.Server):
    """uvicorn's server, which ends at once at a second signal of any kind, and where the engines have failed."""

    def __init__(self, app: FastAPI, listen: Listen) -> None:
        super().__init__(uvicorn.Config(app, host=listen.host, port=listen.port, log_config=None, access_log=False))
        self.error: BaseException | None = None  # what has ended the engines

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            self.force_exit = True
        self.should_exit = True

    def note_death(self, error: BaseException) -> None:
        """End, since the engines have. Called by their thread."""
        self.error = error
        self.should_exit = True

    def run_until_stopped(self) -> None:
        """Serve until a signal comes or the engines fail."""
        before = signal.getsignal(signal.SIGTERM)
        self.run()
        signal.signal(signal.SIGTERM, before)
