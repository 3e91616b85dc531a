"""`dynatree chat`: a conversation, typed in a terminal or line by line from a pipe.

Answers go to stdout, everything else to stderr.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from dynatree_core.cli import console
from dynatree_core.cli.checks import check_names, check_settings, checkable
from dynatree_core.cli.exits import DONE, FAILED, INTERRUPTED
from dynatree_core.cli.loading import is_packed, load_drafter, load_target
from dynatree_core.cli.option_types import FiniteRange, Typed
from dynatree_core.cli.options import (
    ACTIVATIONS,
    ANSWER_OPTIONS,
    LIMIT_OPTIONS,
    MODEL_OPTIONS,
    POLICY,
    TRACE_OPTIONS,
    WEIGHTS,
    prefix_cache,
    with_options,
)
from dynatree_core.cli.recorded import Recorded
from dynatree_core.errors import ContextLimitError, DynaTreeError, InputError, PromptError
from dynatree_core.models import embedded

if TYPE_CHECKING:
    from dynatree_core.conversation import Conversation

__all__ = ["chat"]

PROMPT = "> "

SAMPLING_OPTIONS = (
    click.option(
        "--temperature", type=FiniteRange(min=0), help="Draw tokens, the more freely the higher; 0: take the best."
    ),
    click.option("--top-p", type=FiniteRange(0, 1, min_open=True), help="Draw from the best that sum to so much."),
    click.option("--seed", type=click.IntRange(min=0), help="With --temperature or --top-p: repeat the same draws."),
)


@click.command()
@with_options(*MODEL_OPTIONS, WEIGHTS, ACTIVATIONS, POLICY, *ANSWER_OPTIONS, *LIMIT_OPTIONS, *SAMPLING_OPTIONS)
@click.option("--system", type=Typed(), metavar="TEXT", help="What the model is told before the conversation.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=512, show_default=True, help="Of an answer.")
@prefix_cache("turns")
@with_options(*TRACE_OPTIONS)
def chat(
    target: str | None,
    drafter: str,
    policy: str,
    device: str | None,
    dtype: str,
    weights: str,
    activations: str,
    system: str | None,
    max_new_tokens: int,
    temperature: float | None,
    top_p: float | None,
    seed: int | None,
    cache_megabytes: int,
    stop_strings: Sequence[str],
    trace_file: str | None,
    is_trace_private: bool,
    **settings: Any,
) -> int:
    """Talk with a model, turn by turn.

    Type `/help` for the commands, among them `/policy NAME`, `/stats` and `/reset`. Ctrl-C stops an answer, Ctrl-D
    leaves. Lines from a pipe are taken one by one. Answers go to standard output.

    \b
    Examples:
      dynatree chat
      dynatree chat --system "Answer in one sentence." --temperature 0.7 --seed 1
      printf 'Why is the sky blue?\\n/policy fixed\\nAnd at night?\\n' | dynatree chat
    """
    is_sampled = temperature != 0 and (temperature, top_p) != (None, None)
    if seed is not None and not is_sampled:
        raise click.UsageError("--seed repeats what is drawn, and needs --temperature or --top-p")
    recorded = Recorded(trace_file, is_trace_private)
    check_names(policy=policy, drafter=drafter)
    if target in (None, "default"):
        embedded.check_early(is_packed=is_packed(weights, **settings))
    from dynatree_core.cache.prefix_cache import PrefixCache
    from dynatree_core.conversation import Conversation
    from dynatree_core.text.prompt import tokenizer_of

    limits = checkable(settings)
    source: Any = check_settings(target=target, drafter=drafter, policy=policy, device=device, **limits)
    recorded.check()
    loaded = load_target(target, device, dtype, weights=weights, activations=activations, **settings)
    tokenizer = tokenizer_of(loaded)
    if tokenizer.chat_template is None:
        raise InputError(
            f"a chat needs a target whose tokenizer has a chat template, got none with '{loaded.name}'; take a model "
            "that was trained to chat, or `dynatree generate`"
        )
    source = load_drafter(drafter, loaded).model if source is None else source
    options = {name: value for name, value in settings.items() if value is not None}
    if is_sampled:
        warpers = {"temperature": temperature, "top_p": top_p}
        options |= {"do_sample": True, **{name: value for name, value in warpers.items() if value is not None}}
    if stop_strings:
        options["stop_strings"] = list(stop_strings)
    recorded.open(tokenizer)
    options["observer"] = recorded.observer()  # an answer after the other: each is a sequence
    conversation = Conversation(
        target=loaded,
        tokenizer=tokenizer,
        drafter=source,
        drafter_name=drafter,
        policy=policy,
        max_new_tokens=max_new_tokens,
        prefix_cache=PrefixCache(max_bytes=cache_megabytes * 10**6),
        system=system,
        seed=seed,
        options=options,
    )
    try:
        return _converse(conversation)
    finally:
        console.show_title("")
        recorded.close()


def _converse(conversation: Conversation) -> int:
    """Read and answer, line by line, until the input ends.

    Returns:
        The exit status: 130 where it was ended by Ctrl-C; 1 where a line that did not come from a terminal failed.
    """
    from dynatree_core.cli.chat_lines import obey_or_answer, say

    is_terminal, exit_code = sys.stdin.isatty(), DONE
    if is_terminal:
        with contextlib.suppress(ImportError):  # not everywhere; then lines are edited as the terminal does it
            import readline  # noqa: F401  # input() uses it
        say("/help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves")
    was_interrupted = False
    while True:
        try:
            line = _read_line(is_terminal)
            was_interrupted = False
            if line is None or line.partition(" ")[0].rstrip() == "/quit":
                return exit_code
            with console.warnings_in_one_line():
                obey_or_answer(conversation, line)
        except KeyboardInterrupt:
            if was_interrupted or not is_terminal:
                return INTERRUPTED
            was_interrupted = True
            click.echo(err=True)
            say("Ctrl-C again, /quit or Ctrl-D leaves")
        except DynaTreeError as error:
            advice = ""
            if isinstance(error, ContextLimitError):
                advice = (
                    "; /reset begins a new conversation" if conversation.results else "; shorten the text, or --system"
                )
            console.complain("error", f"{console.words_of(error)}{advice}")
            # at a terminal somebody has seen it and goes on; a script has to be told at the end
            exit_code = DONE if is_terminal else FAILED


def _read_line(is_terminal: bool) -> str | None:
    """The next line without its end; None where there is none.

    Raises:
        PromptError: it is not UTF-8 text.
    """
    try:
        if not is_terminal:
            line = sys.stdin.buffer.readline().decode().removeprefix("\ufeff")  # some programs begin with a mark
            return line.removesuffix("\n").removesuffix("\r") if line else None
        if not sys.stdout.isatty():  # where input() would write its prompt
            click.echo(PROMPT, nl=False, err=True)
        line = input(PROMPT if sys.stdout.isatty() else "")
        line.encode()  # fails for what Python makes of other bytes
        return line
    except EOFError:
        click.echo(err=True)
        return None
    except UnicodeError as error:
        raise PromptError(f"a line must be UTF-8 text, got {error}") from error
