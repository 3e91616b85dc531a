"""`dynatree serve`: an HTTP server with the routes of OpenAI's API."""

from __future__ import annotations

import functools
import importlib.util
import ipaddress
import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from dynatree_core.advice import pip_install
from dynatree_core.cli import console
from dynatree_core.cli.checks import check_names, check_settings, checkable
from dynatree_core.cli.exits import DONE, INTERRUPTED
from dynatree_core.cli.loading import is_packed, load_drafter, load_target
from dynatree_core.cli.recorded import Recorded
from dynatree_core.cli.serve_options import name_variables, printed_config, serve_options
from dynatree_core.errors import DynaTreeError, ParameterError
from dynatree_core.models import embedded

if TYPE_CHECKING:
    from dynatree_core.engine.engine import Engine
    from dynatree_core.models.load import LoadedModel
    from dynatree_core.serve.keys import Keys
    from dynatree_core.serve.process import Listen
    from dynatree_core.serve.service import Service
    from dynatree_core.serve.settings import Settings
    from dynatree_core.serve.spans import Spans

__all__ = ["serve"]

NEEDED = ("fastapi", "prometheus_client", "uvicorn")  # of the extra
RAY = "ray"  # of another
OTEL = ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http")  # of a third
LIMITS = ("tau", "max_nodes", "max_depth", "max_branch")


@click.command()
@serve_options
def serve(
    print_config: bool,
    host: str,
    port: int,
    ssl_certfile: str | None,
    ssl_keyfile: str | None,
    api_key_file: Path | None,
    log_format: str,
    trace_file: str | None,
    is_trace_private: bool,
    on_ray: bool,
    replicas: int,
    max_replicas: int | None,
    replica_cpus: float | None,
    **options: Any,
) -> int:
    """Serve the model over HTTP, with the routes of OpenAI's API (docs/serve.md).

    Each option may come from the environment, as DYNATREE_SERVE_ and its name, or from the file of --config.

    \b
    Examples:
      dynatree serve
      dynatree serve --target ./model --policy phase3 --allow-policy autoregressive --port 8080
      dynatree serve --config server.toml --print-config
      dynatree serve --ray --replicas 2
    """
    context = click.get_current_context()
    if print_config:
        click.echo(printed_config(context), nl=False)
        return DONE
    check_extra()
    if (ssl_certfile is None) != (ssl_keyfile is None):
        raise click.UsageError("HTTPS takes a certificate and its key: --ssl-certfile and --ssl-keyfile", context)
    recorded = Recorded(trace_file, is_trace_private)
    from dynatree_core.serve.gate import check_host_names
    from dynatree_core.serve.keys import load_keys
    from dynatree_core.serve.logs import set_up_logs
    from dynatree_core.serve.process import Listen

    keys = load_keys(api_key_file, os.environ)
    check_host_names(options["more_hosts"])
    options["more_hosts"] = [host, *options["more_hosts"]]
    listen = Listen(host=host, port=port, certificate=ssl_certfile, key=ssl_keyfile)
    warn_of_strangers(host, keys)
    recorded.check()
    set_up_logs(log_format)
    if on_ray:
        refuse_beside_ray(ssl_certfile, trace_file, port, context.get_parameter_source("max_connections"))
        if max_replicas is not None and max_replicas < replicas:
            raise click.UsageError(f"--max-replicas must be at least --replicas, {replicas}, got {max_replicas}")
        return _run_on_ray(
            host, port, replicas, max_replicas, replica_cpus, keys=keys, log_format=log_format, **options
        )
    with listen.bound() as bound, recorded:
        return _run(service_of(keys, recorded, **options), listen, bound)


name_variables(serve)


def check_extra() -> None:
    """Refuse to begin without what the server is made of.

    Raises:
        ParameterError: naming what to install.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ParameterError(
            f"`dynatree serve` needs {', '.join(missing)}, which are not installed; {pip_install('dynatree[serve]')}"
        )


def new_spans() -> Spans:
    """Spans of requests, which go where the environment says.

    Raises:
        ParameterError: naming what to install, or what of the environment cannot be used.
    """
    if not all(map(is_installed, OTEL)):
        raise ParameterError(f"--otel needs OpenTelemetry; {pip_install('dynatree[otel]')}")
    from dynatree_core.serve.spans import spans_of_environment

    return spans_of_environment()


def is_installed(module: str) -> bool:
    """Whether a module is there; its packages are imported to find out."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a package above it is not
        return False


def refuse_beside_ray(
    certificate: str | None, trace_file: str | None, port: int, connections_from: ParameterSource | None
) -> None:
    """Refuse what replicas cannot share.

    Raises:
        click.UsageError: naming the option and what to do instead.
    """
    if importlib.util.find_spec(RAY) is None:
        raise ParameterError(f"--ray needs Ray Serve; {pip_install('dynatree[ray]')}")
    if certificate is not None:
        raise click.UsageError("--ray listens by Ray's own proxies, without HTTPS; put one that has it before them")
    if port == 0:
        raise click.UsageError(
            "Ray's proxies must be told where to listen, so --port 0 goes without --ray; name a port"
        )
    if trace_file is not None:
        raise click.UsageError("a trace is of one process, so --trace goes without --ray")
    if connections_from is not ParameterSource.DEFAULT:
        raise click.UsageError(
            "Ray's own proxies hold the connections, so --max-connections goes without --ray; leave it out, and put a "
            "proxy that bounds them before Ray's"
        )


def equal_share(num_cpus: int, num_replicas: int) -> float:
    """CPUs for each replica: whole ones where there are enough, else parts of one, so that all replicas are made."""
    return float(num_cpus // num_replicas or num_cpus / num_replicas)


def warn_of_strangers(host: str, keys: Keys) -> None:
    """Say so where anybody on the network may ask."""
    try:
        is_loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_loopback = host == "localhost"
    if not is_loopback and not keys:
        console.complain(
            "WARNING",
            f"ANYBODY WHO REACHES {host} MAY USE THIS SERVER, since no API keys are set; give --api-key-file FILE, or "
            "leave out --host",
        )


def service_of(
    keys: Keys,
    recorded: Recorded,
    *,
    has_spans: bool,
    target: str | None,
    drafter: str,
    policy: str,
    device: str | None,
    dtype: str,
    weights: str,
    activations: str,
    more_policies: Sequence[str],
    more_drafters: Sequence[str],
    model_names: Sequence[str],
    **options: Any,
) -> Service:
    """What a server's routes work with, the models loaded, after everything that can be refused without them."""
    policies, drafters = [*dict.fromkeys([policy, *more_policies])], [*dict.fromkeys([drafter, *more_drafters])]
    sources = _checked(target, policies, drafters, device, options, is_packed(weights, **checkable(options)))
    spans = new_spans() if has_spans else None
    from dynatree_core.serve.service import Service
    from dynatree_core.text.prompt import tokenizer_of

    loaded = load_target(target, device, dtype, weights=weights, activations=activations, **checkable(options))
    trace = recorded.open(tokenizer_of(loaded))
    named = {name: load_drafter(name, loaded).model if source is None else source for name, source in sources.items()}
    engines = _engines(loaded, named, **options)
    settings = _settings(tuple(model_names) or (loaded.name,), tuple(policies), tuple(drafters), options)
    observers = {} if trace is None else {name: trace.observer() for name in engines}
    return Service(engines, settings, keys, observers, spans)


def replica_of(keys: Keys, log_format: str, options: Mapping[str, Any]) -> Service:
    """The same in a process that Ray has started."""
    from dynatree_core.serve.logs import set_up_logs

    set_up_logs(log_format)
    return service_of(keys, Recorded(), **options)


def _checked(
    target: str | None,
    policies: Sequence[str],
    drafters: Sequence[str],
    device: str | None,
    options: Mapping[str, Any],
    is_packed_model: bool,
) -> dict[str, Any]:
    """Refuse what no model could make right; the registered drafters by name, None for a model that is to be loaded."""
    for name in policies:
        check_names(policy=name)
    for name in drafters:
        check_names(drafter=name)
    if target in (None, "default"):
        embedded.check_early(is_packed=is_packed_model)
    limits = checkable(options)
    for name in policies[1:]:
        check_settings(target=target, policy=name, device=device, **limits)
    return {
        name: check_settings(target=target, drafter=name, policy=policies[0], device=device, **limits)
        for name in drafters
    }


def _engines(
    target: LoadedModel,
    drafters: Mapping[str, Any],
    *,
    runner: str,
    max_sequences: int,
    max_waiting: int,
    max_megabytes: int | None,
    cache_megabytes: int,
    **_: Any,
) -> dict[str, Engine]:
    """An engine for each drafter. They share the target, and what earlier requests have computed of prompts."""
    from dynatree_core.cache.prefix_cache import PrefixCache
    from dynatree_core.engine.engine import Engine

    prefix_cache = PrefixCache(max_bytes=cache_megabytes * 10**6) if cache_megabytes else None
    return {
        name: Engine(
            target.model,
            drafter,
            runner=runner,
            tokenizer=target.tokenizer,
            prefix_cache=prefix_cache,
            max_sequences=max_sequences,
            max_waiting=max_waiting,
            max_bytes=None if max_megabytes is None else max_megabytes * 10**6,
        )
        for name, drafter in drafters.items()
    }


def _settings(
    model_names: tuple[str, ...], policies: tuple[str, ...], drafters: tuple[str, ...], options: Mapping[str, Any]
) -> Settings:
    from dynatree_core.serve.settings import Settings

    limits = ("max_tokens", "max_choices", "max_seconds", "max_requests", "max_connections", "stop_seconds")
    same = (*limits, "on_error", "logs_prompts", "shows_trees")
    return Settings(
        model_names=model_names,
        policies=policies,
        drafters=drafters,
        max_body_bytes=options["max_kilobytes"] * 1024,
        warms_up=True,
        cors_origins=tuple(options["cors_origins"]),
        hosts=tuple(options["more_hosts"]),
        limits={name: options[name] for name in LIMITS if options[name] is not None},
        **{name: options[name] for name in same},
    )


def _run(service: Service, listen: Listen, bound: socket.socket) -> int:
    """Serve until a signal comes; the exit status.

    Raises:
        DynaTreeError: the engines have failed.
    """
    from dynatree_core.serve.app import make_app
    from dynatree_core.serve.process import ServerProcess

    process = ServerProcess(make_app(service), service, listen)
    process.run([bound])
    if process.error is not None:
        raise DynaTreeError(f"the engines must go on, but ended with {type(process.error).__name__}: {process.error}")
    return INTERRUPTED if process.force_exit else DONE


def _run_on_ray(
    host: str,
    port: int,
    least: int,
    most: int | None,
    num_cpus: float | None,
    *,
    keys: Keys,
    log_format: str,
    **options: Any,
) -> int:
    """Serve by replicas until a signal comes; the exit status."""
    if options["has_spans"]:
        new_spans().shutdown()  # refuses what each replica would
    policies, drafters = [options["policy"], *options["more_policies"]], [options["drafter"], *options["more_drafters"]]
    is_packed_model = is_packed(options["weights"], **checkable(options))
    _checked(options["target"], policies, drafters, options["device"], options, is_packed_model)
    from dynatree_core.serve.on_ray import Replicas, run_on_ray

    has_gpu = str(options["device"] or "").startswith("cuda")
    replicas = Replicas(
        least=least,
        most=most,
        num_cpus=num_cpus or equal_share(os.cpu_count() or 1, most or least),
        num_gpus=float(has_gpu),
        max_sequences=options["max_sequences"],
        max_waiting=options["max_waiting"],
        stop_seconds=options["stop_seconds"],
    )
    run_on_ray(functools.partial(replica_of, keys, log_format, options), replicas, host=host, port=port)
    return DONE
