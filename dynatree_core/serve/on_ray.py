"""Replicas of a server under Ray Serve, on one machine or many.

Ray does all that concerns several of them: it starts and scales replicas, replaces those that fail and those of an
older version one after another, and routes requests. A conversation stays with the replica that holds its prefix: all
requests with the same `x-session-id` go to one replica, by consistent hashing, as long as it is there. Each replica is
the application that `dynatree serve` runs, with engines of its own.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any

import attrs
from fastapi import FastAPI
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dynatree_core.serve.app import make_app
from dynatree_core.serve.logs import log
from dynatree_core.serve.process import CUT_SECONDS
from dynatree_core.serve.service import Service

if TYPE_CHECKING:
    from ray.serve import Application

__all__ = ["Replicas", "application", "run_on_ray"]

NAME = "dynatree"
REPLICA_HEADER = b"x-dynatree-replica"  # of every answer: which replica has given it
MORE_THAN_FIT = 64  # requests beyond those that a replica computes or lets wait, so that it is the one that refuses


@attrs.frozen(kw_only=True)
class Replicas:
    """How many replicas there are, and what each is given."""

    least: int = 1
    most: int | None = None  # where more wait than are computed; None: always `least`
    num_cpus: float = 1.0  # of each; Ray lets it compute with as many threads
    num_gpus: float = 0.0
    max_sequences: int = 8  # that each computes at once
    max_waiting: int = 64  # that wait in each
    stop_seconds: float = 30.0  # that open requests have to end where a replica is no longer wanted


class Replica:
    """One of the servers.

    Args:
        build: makes its service, with the models loaded. Called where the replica is.
    """

    def __init__(self, build: Callable[[], Service]) -> None:
        self.service = build()

    def __serve_build_asgi_app__(self) -> ASGIApp:
        from ray import serve

        app: FastAPI = make_app(self.service)
        app.add_middleware(NamesReplica, replica=serve.get_replica_context().replica_id.unique_id)
        return app

    def check_health(self) -> None:
        """Called by Ray from time to time, which replaces a replica that raises.

        Raises:
            RuntimeError: the engines' thread has ended with an error.
        """
        error = self.service.loop.error
        if error is not None:
            raise RuntimeError(f"the engines must go on, but ended with {type(error).__name__}: {error}") from error


class NamesReplica:
    """Says in each answer which replica has given it."""

    def __init__(self, app: ASGIApp, replica: str) -> None:
        self.app = app
        self.header = (REPLICA_HEADER, replica.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_name(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), self.header]}
            await send(message)

        await self.app(scope, receive, with_name)


def application(build: Callable[[], Service], replicas: Replicas) -> Application:
    """What `ray.serve.run` takes.

    Args:
        build: makes a replica's service. It is sent to each replica, so it must be picklable.
        replicas: how many there are.
    """
    from ray import serve
    from ray.serve.config import RequestRouterConfig
    from ray.serve.experimental.consistent_hash_router import ConsistentHashRouter

    deployment = serve.deployment(
        serve.ingress()(Replica),
        name=NAME,
        max_ongoing_requests=replicas.max_sequences + replicas.max_waiting + MORE_THAN_FIT,
        graceful_shutdown_timeout_s=replicas.stop_seconds + CUT_SECONDS,
        ray_actor_options={"num_cpus": replicas.num_cpus, "num_gpus": replicas.num_gpus},
        request_router_config=RequestRouterConfig(request_router_class=ConsistentHashRouter),
        **_scaling(replicas),
    )
    return deployment.bind(build)


def _scaling(replicas: Replicas) -> dict[str, Any]:
    from ray.serve.config import AutoscalingConfig

    if replicas.most is None:
        return {"num_replicas": replicas.least}
    scaling = AutoscalingConfig(
        min_replicas=replicas.least,
        max_replicas=replicas.most,
        target_ongoing_requests=replicas.max_sequences,
    )
    return {"autoscaling_config": scaling}


def run_on_ray(build: Callable[[], Service], replicas: Replicas, *, host: str, port: int) -> None:
    """Serve until SIGTERM or Ctrl-C comes.

    With `RAY_ADDRESS` set replicas are made in that cluster, where replicas of an earlier start are replaced one after
    another. Else there is a cluster on this machine alone, which ends with this call.

    Args:
        build: makes a replica's service.
        replicas: how many there are.
        host: where the proxies listen.
        port: likewise.
    """
    import ray
    from ray import serve
    from ray.serve.config import HTTPOptions

    is_own = "RAY_ADDRESS" not in os.environ
    if is_own:  # Ray sends its makers figures of use unless it is told not to; of others' clusters they decide
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    alone = {"include_dashboard": False, "_node_ip_address": "127.0.0.1"} if is_own else {}
    ray.init(configure_logging=False, **alone)
    stop = threading.Event()
    before = {number: signal.signal(number, _setting(stop)) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        serve.start(http_options=HTTPOptions(host=host, port=port))
        serve.run(application(build, replicas), name=NAME, route_prefix="/")
        log("serving", address=f"http://{host}:{port}", replicas=replicas.least)
        deployed_at = _deployed_at()
        stop.wait()
        if _deployed_at() == deployed_at:
            log("stopping", seconds=replicas.stop_seconds)
            serve.delete(NAME)
        else:  # a later start has replaced these replicas, and the ones that are there are not ours to end
            log("replaced")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if is_own:
            serve.shutdown()
        ray.shutdown()


def _deployed_at() -> float | None:
    """When the replicas that are there were last deployed, in seconds since 1970; None: there are none."""
    from ray import serve

    found = serve.status().applications.get(NAME)
    return None if found is None else float(found.last_deployed_time_s)


def _setting(event: threading.Event) -> Callable[[int, FrameType | None], None]:
    """A handler of signals that sets an event: at a second signal, of any kind, Python's own are back."""

    def handle(_: int, __: FrameType | None) -> None:
        event.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    return handle
