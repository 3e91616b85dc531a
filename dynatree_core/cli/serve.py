"""`dynatree serve`: an HTTP server with the routes of OpenAI's API."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from dynatree_core.cli import console
from dynatree_core.cli.checks import check_names, check_settings, checkable
from dynatree_core.cli.exits import DONE
from dynatree_core.cli.loading import is_packed, load, load_drafter, loadable_weights
from dynatree_core.cli.options import LIMIT_OPTIONS, MODEL_OPTIONS, POLICY, WEIGHTS, with_options
from dynatree_core.errors import DynaTreeError, ParameterError
from dynatree_core.models import embedded

if TYPE_CHECKING:
    from dynatree_core.engine.engine import Engine
    from dynatree_core.models.load import LoadedModel

__all__ = ["serve"]

NEEDED = ("fastapi", "prometheus_client", "uvicorn")  # of the extra


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, metavar="ADDRESS", help="Where it listens.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: any that is free.")
@with_options(*MODEL_OPTIONS, WEIGHTS, POLICY, *LIMIT_OPTIONS)
@click.option(
    "--allow-policy",
    "more_policies",
    metavar="STACK",
    multiple=True,
    help="One that a request may choose beside --policy; may be repeated.",
)
@click.option(
    "--allow-drafter",
    "more_drafters",
    metavar="NAME|ID|PATH",
    multiple=True,
    help="One that a request may choose beside --drafter; may be repeated.",
)
@click.option(
    "--model-name",
    "model_names",
    metavar="NAME",
    multiple=True,
    help="What requests call the model; may be repeated.  [default: the target's own name]",
)
@click.option("--max-tokens", type=click.IntRange(min=1), default=4096, show_default=True, help="Of one answer.")
@click.option(
    "--max-sequences", type=click.IntRange(min=1), default=8, show_default=True, help="Answers computed at once."
)
@click.option(
    "--max-waiting", type=click.IntRange(min=0), default=64, show_default=True, help="Answers that may wait for that."
)
@click.option(
    "--prefix-cache",
    "cache_megabytes",
    metavar="MB",
    type=click.IntRange(min=0),
    default=1024,
    show_default=True,
    help="Memory for what earlier requests have computed; 0: compute it again.",
)
@click.option(
    "--on-error",
    type=click.Choice(["raise", "fallback"]),
    default="fallback",
    show_default=True,
    help="When a policy or drafter fails: end the request with an error, or go on without drafting.",
)
def serve(
    host: str,
    port: int,
    target: str | None,
    drafter: str,
    policy: str,
    device: str | None,
    dtype: str,
    weights: str,
    more_policies: Sequence[str],
    more_drafters: Sequence[str],
    model_names: Sequence[str],
    max_tokens: int,
    max_sequences: int,
    max_waiting: int,
    cache_megabytes: int,
    on_error: str,
    **settings: Any,
) -> int:
    """Serve the model over HTTP, with the routes of OpenAI's API (docs/serve.md).

    \b
    Examples:
      dynatree serve
      dynatree serve --target ./model --policy phase3 --allow-policy autoregressive --port 8080
    """
    check_extra()
    policies, drafters = unique([policy, *more_policies]), unique([drafter, *more_drafters])
    for name in policies:
        check_names(policy=name)
    for name in drafters:
        check_names(drafter=name)
    if target in (None, "default"):
        embedded.check_early(is_packed=is_packed(weights, **settings))
    sources = [
        check_settings(target=target, drafter=name, policy=policies[0], device=device, **checkable(settings))
        for name in drafters
    ]
    for name in policies[1:]:
        check_settings(target=target, policy=name, device=device, **checkable(settings))
    loaded = load(target, device, dtype, loadable_weights(weights, **settings))
    models = [load_drafter(name, loaded).model if source is None else source
              for name, source in zip(drafters, sources, strict=True)]  # fmt: skip
    engines = dict(zip(drafters, _engines(
        loaded, models, settings["runner"], max_sequences, max_waiting, cache_megabytes
    ), strict=True))  # fmt: skip
    from dynatree_core.serve.app import make_app
    from dynatree_core.serve.process import Listen, ServerProcess
    from dynatree_core.serve.service import Service
    from dynatree_core.serve.settings import Settings

    limits = {name: settings[name] for name in ("tau", "max_nodes", "max_depth", "max_branch")}
    service = Service(
        engines,
        Settings(
            model_names=tuple(model_names) or (loaded.name,),
            policies=tuple(policies),
            drafters=tuple(drafters),
            max_tokens=max_tokens,
            on_error=on_error,
            limits={name: value for name, value in limits.items() if value is not None},
        ),
    )
    process = ServerProcess(make_app(service), Listen(host=host, port=port))
    service.loop.on_death = process.note_death
    console.complain("note", f"serving {loaded.name} on http://{host}:{port}/v1")
    process.run_until_stopped()
    if process.error is not None:
        raise DynaTreeError(f"the engines must go on, but ended with {type(process.error).__name__}: {process.error}")
    return DONE


def check_extra() -> None:
    """Refuse to begin without what the server is made of.

    Raises:
        ParameterError: naming what to install.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ParameterError(
            f"`dynatree serve` needs {', '.join(missing)}, which are not installed; python -m pip install "
            "'dynatree[serve]'"
        )


def unique(names: Sequence[str]) -> list[str]:
    """Each name once, in their order."""
    return [*dict.fromkeys(names)]


def _engines(
    target: LoadedModel, drafters: Sequence[Any], runner: str, max_sequences: int, max_waiting: int, megabytes: int
) -> list[Engine]:
    """An engine for each drafter. They share the target, and what earlier requests have computed of prompts."""
    from dynatree_core.cache.prefix_cache import PrefixCache
    from dynatree_core.engine.engine import Engine
    from dynatree_core.text.prompt import tokenizer_of

    prefix_cache = PrefixCache(max_bytes=megabytes * 10**6) if megabytes else None
    return [
        Engine(
            target.model,
            drafter,
            runner=runner,
            tokenizer=tokenizer_of(target),
            prefix_cache=prefix_cache,
            max_sequences=max_sequences,
            max_waiting=max_waiting,
        )
        for drafter in drafters
    ]
