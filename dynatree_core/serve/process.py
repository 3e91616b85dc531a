"""The process of a server: uvicorn, signals, and how it ends."""

from __future__ import annotations

import logging
import socket
from types import FrameType

import attrs
import uvicorn
from fastapi import FastAPI

from dynatree_core.errors import DynaTreeError
from dynatree_core.serve.connections import MOST_HEADER_BYTES, BoundedConnection
from dynatree_core.serve.logs import log
from dynatree_core.serve.service import Service

__all__ = ["Listen", "ServerProcess"]


CUT_SECONDS = 10  # in which requests that were cut off have told their clients so


@attrs.frozen(kw_only=True)
class Listen:
    """Where a server listens."""

    host: str = "127.0.0.1"
    port: int = 8000  # 0: any that is free
    certificate: str | None = None  # file of the certificate, for HTTPS
    key: str | None = None  # and of its key

    def bound(self) -> socket.socket:
        """A socket of that address, which takes no connections yet.

        Raises:
            DynaTreeError: there is no such address here, or another program has it.
        """
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)[0]
            found = socket.socket(family, kind, protocol)
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            found.bind(address)
        except OSError as error:
            raise DynaTreeError(
                f"a server must be able to listen on {self.host}, port {self.port}, got: {error.strerror}; take "
                "another --host or --port"
            ) from error
        return found


class ServerProcess(uvicorn.Server):
    """uvicorn's server, which ends at once at a second signal of any kind, and where the engines have failed."""

    def __init__(self, app: FastAPI, service: Service, listen: Listen) -> None:
        config = uvicorn.Config(
            app,
            ssl_certfile=listen.certificate,
            ssl_keyfile=listen.key,
            log_config=None,
            access_log=False,
            server_header=False,
            http=BoundedConnection,
            ws="none",
            limit_concurrency=service.settings.max_connections + 1,
            h11_max_incomplete_event_size=MOST_HEADER_BYTES,
            timeout_graceful_shutdown=int(service.settings.stop_seconds) + CUT_SECONDS,
        )
        super().__init__(config)
        self.error: BaseException | None = None  # what has ended the engines
        self._service = service
        service.loop.on_death = self.note_death

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal has come: the first ends the server when its requests are done or cut off, the second at once."""
        if self.should_exit:
            self.force_exit = True
            logging.getLogger("uvicorn.error").disabled = True  # that it is broken off is no error
        else:
            self._service.begin_to_stop()
        self.should_exit = True

    def note_death(self, error: BaseException) -> None:
        """End, since the engines have. Called by their thread."""
        self.error = error
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen, and say where."""
        await super().startup(sockets)
        scheme = "http" if self.config.ssl is None else "https"
        for host, port, *_ in [listener.getsockname() for server in self.servers for listener in server.sockets]:
            place = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
            log("serving", address=f"{scheme}://{place}", model=self._service.settings.model_names[0])
