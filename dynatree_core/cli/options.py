"""Options that several commands have: one name each, and groups of those that go together.

A command takes what it needs, `@with_options(*MODEL_OPTIONS, POLICY, JSON)`; its help lists them in that order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from dynatree_core.cli.completion import complete_drafter, complete_model, complete_policy
from dynatree_core.cli.loading import USUAL_DRAFTERS, USUAL_POLICIES, usual_drafter, usual_policy
from dynatree_core.cli.option_types import CountOrAll, FiniteRange, RunnerName, Words

__all__ = [
    "ACTIVATIONS",
    "ANSWER_OPTIONS",
    "DEVICE",
    "DTYPE",
    "FILE_OPTIONS",
    "JSON",
    "JSON_LIST",
    "LIMIT_OPTIONS",
    "MAX_DEPTH",
    "MAX_NODES",
    "MODEL_OPTIONS",
    "OUTPUT_OPTIONS",
    "PICK_OPTIONS",
    "POLICY",
    "TARGET",
    "TRACE_OPTIONS",
    "WEIGHTS",
    "prefix_cache",
    "with_options",
]

Option = Callable[[Callable[..., Any]], Callable[..., Any]]  # what click.option gives


def with_options(*options: Option) -> Option:
    """Give a command these options, in this order."""

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            function = option(function)
        return function

    return add


# the models

TARGET = click.option(
    "--target",
    metavar="ID|PATH",
    shell_complete=complete_model,
    help="The model whose output is wanted.  [default: the embedded one]",
)
DRAFTER = click.option(
    "--drafter",
    metavar="NAME|ID|PATH",
    callback=lambda context, _, given: given or usual_drafter(context.params["target"]),
    shell_complete=complete_drafter,
    show_default=USUAL_DRAFTERS,
    help="Registered drafters joined by '+' (see `dynatree drafters`) or a model with the target's tokens.",
)
DEVICE = click.option("--device", help="cpu, cuda or cuda:N.  [default: CUDA where there is any]")
DTYPE = click.option(
    "--dtype",
    type=click.Choice(["auto", "float64", "float32", "bfloat16", "float16"]),
    default="auto",
    show_default=True,
    help="auto: float32 on the CPU, the checkpoint's own on CUDA.",
)
RUNNER = click.option(
    "--runner",
    type=RunnerName(),
    default="auto",
    show_default=True,
    help="How passes are computed; auto: native or packed on a CPU, else eager.",
)
WEIGHTS = click.option(
    "--weights",
    type=click.Choice(["stored", "fp32", "int8", "int4"]),
    default="stored",
    show_default=True,
    help="Bits of the weights on a CPU: as published, or 32, or rounded to 8 or 4.",
)
ACTIVATIONS = click.option(
    "--activations",
    type=click.Choice(["full", "int8"]),
    default="full",
    show_default=True,
    help="What weights of 4 or 8 bits multiply; int8: rows rounded to 8 bits, faster, for another text.",
)
MODEL_OPTIONS = (TARGET, DRAFTER, DEVICE, DTYPE, RUNNER)  # TARGET first: the usual drafter follows from it

# the trees

POLICY = click.option(
    "--policy",
    metavar="STACK",
    callback=lambda context, _, given: usual_policy(context.params["target"]) if given is None else given,
    shell_complete=complete_policy,
    show_default=USUAL_POLICIES,
    help="How trees grow: a preset or policies joined by '+' (see `dynatree policies`).",
)
TAU = click.option("--tau", type=FiniteRange(0, 1), help="Cut drafted nodes of a lower path probability.")
MAX_NODES = click.option("--max-nodes", type=click.IntRange(min=0), help="Drafted nodes of a tree at most.")
MAX_DEPTH = click.option("--max-depth", type=click.IntRange(min=0), help="Depth of a tree at most.")
MAX_BRANCH = click.option(
    "--max-branch",
    type=click.IntRange(min=1),
    default=16,
    show_default=True,
    help="Children of a node that a policy may ask for; more is an error.",
)
LIMIT_OPTIONS = (TAU, MAX_NODES, MAX_DEPTH, MAX_BRANCH)

# the output: how its prompt is written, and where it ends

OUTPUT_OPTIONS = (
    click.option(
        "--max-new-tokens",
        type=click.IntRange(min=0),
        default=128,
        show_default=True,
        help="Tokens to generate at most.",
    ),
    click.option(
        "--chat/--raw",
        "is_chat",
        default=None,
        help="Wrap the prompt in the chat template, or not.  [default: where there is one]",
    ),
    click.option("--ignore-eos", is_flag=True, help="Do not stop where the model would."),
    click.option(
        "--exact",
        type=click.Choice(["fixed_width"]),
        help="fixed_width: passes of one shape, so that half precision rounds alike with and without trees.",
    ),
)

# an answer to a reader: what it must not say, and what happens when drafting fails

ANSWER_OPTIONS = (
    click.option(
        "--stop",
        "stop_strings",
        type=Words(),
        metavar="TEXT",
        multiple=True,
        help="Stop after this text; may be repeated.",
    ),
    click.option(
        "--repetition-penalty",
        type=FiniteRange(min=0, min_open=True),
        help="Penalty on repeated tokens, as in transformers; above 1 repeats less.",
    ),
    click.option("--no-repeat-ngram-size", type=click.IntRange(min=1), help="No n tokens in a row come twice."),
    click.option(
        "--on-error",
        type=click.Choice(["raise", "fallback"]),
        default="raise",
        show_default=True,
        help="When a policy or drafter fails: end, or go on without drafting.",
    ),
)

# the prompts of a file

PICK_OPTIONS = (
    click.option("--column", metavar="NAME", help="Column of the prompts, where a file has several."),
    click.option(
        "--category", "categories", metavar="NAME", multiple=True, help="Take prompts of it only; may be repeated."
    ),
    click.option(
        "--num-prompts",
        "--limit",
        "num_prompts",
        type=CountOrAll(),
        metavar="N|all",
        help="Take N prompts, from the categories in turn.  [default: all]",
    ),
)
FILE_OPTIONS = (
    click.option(
        "--prompts",
        "prompts_file",
        metavar="FILE|-",
        help="Take the prompts of a file or folder of any kind (docs/files.md).",
    ),
    *PICK_OPTIONS,
    click.option("--turns", "is_played", is_flag=True, help="Play conversations: answer each of the user's turns."),
    click.option("--seed", "pick_seed", type=click.IntRange(min=0), help="With --num-prompts: pick them at random."),
)

# what is kept, and recorded


def prefix_cache(of_what: str) -> Option:
    """The option for the memory of what was computed before, for turns of a conversation or requests."""
    return click.option(
        "--prefix-cache",
        "cache_megabytes",
        metavar="MB",
        type=click.IntRange(min=0),
        default=1024,
        show_default=True,
        help=f"Memory for what earlier {of_what} have computed; 0: compute it again.",
    )


TRACE_OPTIONS = (
    click.option(
        "--trace",
        "trace_file",
        metavar="FILE",
        type=click.Path(dir_okay=False),
        help="Record every iteration in FILE, packed if it ends in .gz (docs/trace.md).",
    ),
    click.option("--trace-private", "is_trace_private", is_flag=True, help="Leave the prompt out of the trace."),
)

# what is printed

JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON document and nothing else.")
JSON_LIST = click.option("--json", "as_json", is_flag=True, help="Print a JSON list instead of a table.")
