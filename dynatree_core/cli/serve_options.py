"""The options of `dynatree serve`, and where else they may come from: a TOML file, and the environment.

The command line goes before the environment, which goes before the file.
"""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from dynatree_core.cli.option_types import FiniteRange
from dynatree_core.cli.options import (
    ACTIVATIONS,
    LIMIT_OPTIONS,
    MODEL_OPTIONS,
    POLICY,
    TRACE_OPTIONS,
    WEIGHTS,
    prefix_cache,
    with_options,
)
from dynatree_core.errors import nearest_match

__all__ = ["name_variables", "printed_config", "serve_options", "variable_of"]

PREFIX = "DYNATREE_SERVE"
NOT_IN_FILES = ("config", "print_config", "help")


def variable_of(option: click.Parameter) -> str:
    """The environment variable that gives an option: DYNATREE_SERVE_MAX_TOKENS for --max-tokens."""
    return f"{PREFIX}_{_file_name(option).upper().replace('-', '_')}"


def name_variables(command: click.Command) -> None:
    """Have each option of the command read from its variable, where the command line does not give it."""
    for option in command.params:
        if isinstance(option, click.Option) and option.name != "print_config":
            option.envvar = variable_of(option)


def read_config(context: click.Context, parameter: click.Parameter, file: Path | None) -> Path | None:
    """Take the file's values as the options' defaults."""
    if file is None:
        return None
    try:
        found = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise click.UsageError(
            f"--config must be a TOML file that can be read, got {file}: {error}", context
        ) from error
    names = {_file_name(option): str(option.name) for option in context.command.params if _is_in_files(option)}
    for name in found:
        if name not in names:
            hint = nearest_match(name, names)
            raise click.UsageError(f"{file} names '{name}', which is no option of this command{hint}", context)
    context.default_map = {names[name]: value for name, value in found.items()}
    return file


def _is_in_files(parameter: click.Parameter) -> bool:
    return isinstance(parameter, click.Option) and parameter.name not in NOT_IN_FILES


def _file_name(parameter: click.Parameter) -> str:
    """An option as a file names it: `max-tokens` for --max-tokens."""
    return max(parameter.opts, key=len).removeprefix("--")


def printed_config(context: click.Context) -> str:
    """What the command is run with, as a file that --config takes, and where each value has come from."""
    lines = []
    for option in context.command.params:
        value = context.params.get(str(option.name))
        if not _is_in_files(option) or value in (None, ()):
            continue
        source = context.get_parameter_source(str(option.name))
        named = SOURCES.get(source, "default")
        lines.append(f"{_file_name(option)} = {_toml(value)}  # {named}\n")
    return "".join(lines)


SOURCES: dict[ParameterSource | None, str] = {
    ParameterSource.COMMANDLINE: "command line",
    ParameterSource.ENVIRONMENT: "environment",
    ParameterSource.DEFAULT_MAP: "file",
}


def _toml(value: Any) -> str:
    """A value as TOML, which writes texts, numbers, truth values and lists of them as JSON does."""
    return json.dumps([*value] if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value)


CONFIG = (
    click.option(
        "--config",
        metavar="FILE",
        type=click.Path(path_type=Path, dir_okay=False),
        is_eager=True,
        expose_value=False,
        callback=read_config,
        help="A TOML file with options by their names, such as max-tokens = 1024.",
    ),
    click.option("--print-config", is_flag=True, help="Print what it would run with, and do not run."),
)
LISTEN = (
    click.option("--host", default="127.0.0.1", show_default=True, metavar="ADDRESS", help="Where it listens."),
    click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: any that is free."),
    click.option(
        "--ssl-certfile", metavar="FILE", type=click.Path(exists=True), help="With --ssl-keyfile: HTTPS by uvicorn."
    ),
    click.option("--ssl-keyfile", metavar="FILE", type=click.Path(exists=True), help="The certificate's key."),
    click.option(
        "--api-key-file",
        metavar="FILE",
        type=click.Path(path_type=Path),
        help="Keys of those who may ask, one a line; also from DYNATREE_SERVE_API_KEYS.",
    ),
    click.option(
        "--cors-origin",
        "cors_origins",
        metavar="URL",
        multiple=True,
        help="Origin of pages in browsers that may ask; may be repeated.",
    ),
    click.option(
        "--allow-host",
        "more_hosts",
        metavar="NAME",
        multiple=True,
        help="A name, without a port, that requests may call the server by, where there are no keys; may be repeated.",
    ),
)
CHOICES = (
    click.option(
        "--allow-policy",
        "more_policies",
        metavar="STACK",
        multiple=True,
        help="One that a request may choose beside --policy; may be repeated.",
    ),
    click.option(
        "--allow-drafter",
        "more_drafters",
        metavar="NAME|ID|PATH",
        multiple=True,
        help="One that a request may choose beside --drafter; may be repeated.",
    ),
    click.option(
        "--model-name",
        "model_names",
        metavar="NAME",
        multiple=True,
        help="What requests call the model; may be repeated.  [default: the target's own name]",
    ),
    click.option(
        "--on-error",
        type=click.Choice(["raise", "fallback"]),
        default="fallback",
        show_default=True,
        help="When a policy or drafter fails: end the request with an error, or go on without drafting.",
    ),
)
CAPACITY = (
    click.option(
        "--max-sequences", type=click.IntRange(min=1), default=8, show_default=True, help="Answers computed at once."
    ),
    click.option(
        "--max-waiting", type=click.IntRange(min=0), default=64, show_default=True, help="Answers that wait at most."
    ),
    click.option(
        "--cache-memory",
        "max_megabytes",
        metavar="MB",
        type=click.IntRange(min=1),
        help="Memory for what is computed now; where it is short, answers wait.  [default: a whole answer's for each]",
    ),
    prefix_cache("requests"),
)
REQUEST = (
    click.option("--max-tokens", type=click.IntRange(min=1), default=4096, show_default=True, help="Of one answer."),
    click.option(
        "--max-choices", type=click.IntRange(min=1), default=16, show_default=True, help="Answers of one request."
    ),
    click.option(
        "--max-seconds",
        type=FiniteRange(min=0, min_open=True),
        default=600,
        show_default=True,
        help="Of one request, waiting among it; what there is by then is the answer.",
    ),
    click.option(
        "--max-body",
        "max_kilobytes",
        metavar="KB",
        type=click.IntRange(min=1),
        default=4096,
        show_default=True,
        help="Size of a request.",
    ),
    click.option(
        "--max-requests",
        type=click.IntRange(min=1),
        default=32,
        show_default=True,
        help="That one client, a key or an address, has open at once.",
    ),
    click.option(
        "--max-connections",
        type=click.IntRange(min=1),
        default=1024,
        show_default=True,
        help="Of all clients; further ones are closed at once.",
    ),
)
PROCESS = (
    click.option(
        "--stop-seconds",
        type=FiniteRange(min=0),
        default=30,
        show_default=True,
        help="After SIGTERM or Ctrl-C, for requests to end; then they are cut off. A second signal ends it at once.",
    ),
    click.option(
        "--log-format", type=click.Choice(["json", "text"]), default="json", show_default=True, help="Of its lines."
    ),
    click.option(
        "--trees/--no-trees",
        "shows_trees",
        default=True,
        show_default=True,
        help="Whether a request may see the trees of its own answer, as the start page does.",
    ),
    click.option("--log-prompts", "logs_prompts", is_flag=True, help="Have prompts and answers in the log."),
    click.option(
        "--otel", "has_spans", is_flag=True, help="A span of OpenTelemetry for each request; OTEL_* say where they go."
    ),
)
RAY = (
    click.option("--ray", "on_ray", is_flag=True, help="Serve by replicas under Ray Serve (docs/serve.md)."),
    click.option("--replicas", type=click.IntRange(min=1), default=1, show_default=True, help="With --ray: at least."),
    click.option("--max-replicas", type=click.IntRange(min=1), help="With --ray: at most, as many as requests want."),
    click.option(
        "--replica-cpus",
        type=FiniteRange(min=0, min_open=True),
        help="With --ray: of each replica.  [default: an equal share of this machine's]",
    ),
)
serve_options = with_options(
    *LISTEN, *MODEL_OPTIONS, WEIGHTS, ACTIVATIONS, POLICY, *CHOICES, *LIMIT_OPTIONS, *CAPACITY, *REQUEST, *PROCESS,
    *RAY, *TRACE_OPTIONS, *CONFIG,
)  # fmt: skip
