"""What `dynatree chat` does with a line that was typed: answer it, or obey a command such as `/reset`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dynatree_core.cli import console
from dynatree_core.cli.loading import load_drafter, registered_drafter
from dynatree_core.cli.screen import Answer
from dynatree_core.conversation import Conversation
from dynatree_core.errors import InputError, nearest_match
from dynatree_core.generation import run
from dynatree_core.report import GenerationResult

__all__ = ["answer", "obey_or_answer", "say"]

_ENDINGS = {
    "interrupted": "stopped",
    "error": "broken off",
    "length": "cut at the limit",
    "stop_string": "ended by --stop",
}


def obey_or_answer(conversation: Conversation, line: str) -> None:
    """Do what a command says, and answer any other line.

    Raises:
        InputError: there is no such command.
        DynaTreeError: what ended the answer.
    """
    if line.startswith("/"):
        word, _, argument = line.partition(" ")
        command = _COMMANDS.get(word)
        if command is None:
            raise InputError(
                f"'{word}' is no command{nearest_match(word, _COMMANDS)}; /help lists them; put a blank before a text "
                "that begins with /"
            )
        command(conversation, argument.strip())
    elif line.strip():
        answer(conversation, line.strip())


def answer(conversation: Conversation, text: str) -> None:
    """Answer on the screen. Ctrl-C or an error ends the answer; what there is of it belongs to the conversation.

    Raises:
        DynaTreeError: what ended it.
    """
    bar, screen = console.PrefillBar(), Answer(conversation.tokenizer)
    session = conversation.ask(text, bar)
    stop_reason = "error"
    try:
        with bar:
            for report in run(session):
                screen.show(report.token_ids, num_accepted=report.num_accepted)
                console.show_title(
                    f"dynatree: {_ratio(len(session.new_token_ids), session.num_iterations)} tokens/iteration"
                )
    except KeyboardInterrupt:
        stop_reason = "interrupted"
    finally:
        with console.interrupts_wait():
            screen.finish(session.new_token_ids)
            result = session.result(stop_reason)
            conversation.remember(text, result)
            say(_summary(result))


def _summary(result: GenerationResult) -> str:
    """A line about one answer."""
    report = result.report
    if not result.token_ids:
        return f"{_ENDINGS.get(result.stop_reason, 'ended')} before the first token; the question is forgotten"
    parts = [
        f"{report.num_new_tokens} tokens",
        f"{_ratio(report.num_new_tokens, report.num_iterations)} tokens/iteration",
        f"{report.tokens_per_second or 0:.1f} tokens/s",
        f"{report.num_reused_tokens} of {report.num_prompt_tokens} prompt tokens reused",
    ]
    if result.stop_reason in _ENDINGS:
        parts.append(_ENDINGS[result.stop_reason])
    return " · ".join(parts)


def _ratio(tokens: int, iterations: int) -> str:
    return f"{tokens / iterations:.2f}" if iterations else "–"


def say(line: str) -> None:
    """A line on stderr that is no error."""
    Console(stderr=True, highlight=False).print(Text(line, style="dim"), soft_wrap=True)


# commands: what is typed -> what it does with the rest of the line


def _help(conversation: Conversation, argument: str) -> None:
    """what can be typed"""
    rows = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for word, command in _COMMANDS.items():
        rows.add_row(word, command.__doc__)
    rows.add_row("green", "drafted and accepted; the rest: the target's own tokens")
    rows.add_row("Ctrl-C", "stop the answer; what there is of it stays in the conversation")
    rows.add_row("Ctrl-D", "leave")
    Console(stderr=True, highlight=False).print(rows)


def _reset(conversation: Conversation, argument: str) -> None:
    """begin a new conversation"""
    conversation.reset()
    say("a new conversation")


def _policy(conversation: Conversation, argument: str) -> None:
    """NAME: grow trees by another policy from now on; without a name: which one it is"""
    if argument:
        conversation.set_policy(argument)
    say(f"policy {conversation.policy}")


def _drafter(conversation: Conversation, argument: str) -> None:
    """NAME: take another drafter from now on; without a name: which one it is"""
    if argument:
        drafter: Any = registered_drafter(argument)
        drafter = load_drafter(argument, conversation.target).model if drafter is None else drafter
        conversation.drafter, conversation.drafter_name = drafter, argument
    say(f"drafter {conversation.drafter_name}")


def _stats(conversation: Conversation, argument: str) -> None:
    """the numbers of this conversation"""
    reports = [result.report for result in conversation.results]
    new, iterations = sum(r.num_new_tokens for r in reports), sum(r.num_iterations for r in reports)
    prompts, reused = sum(r.num_prompt_tokens for r in reports), sum(r.num_reused_tokens for r in reports)
    seconds, limit = sum(r.decode_seconds for r in reports), conversation.context_limit
    cache = conversation.prefix_cache
    filled = reports[-1].num_prompt_tokens + reports[-1].num_new_tokens if reports else 0
    table = Table(box=box.SIMPLE_HEAD, show_header=False)
    for label, value in [
        ("answers", str(len(reports))),
        ("new tokens", str(new)),
        ("tokens / iteration", _ratio(new, iterations)),
        ("tokens / s", f"{new / seconds:.2f}" if seconds else "–"),
        ("prompt tokens", f"{prompts}, {reused} of them reused"),
        ("prefill", f"{sum(r.prefill_seconds for r in reports):.2f} s"),
        ("context", f"{filled} tokens" + (f" of {limit}" if limit is not None else "")),
        ("prefix cache", f"{cache.num_bytes / 1e6:.0f} of {cache.max_bytes / 1e6:.0f} MB"),
        ("policy", conversation.policy),
        ("drafter", conversation.drafter_name),
    ]:
        table.add_row(label, value)
    Console(stderr=True, highlight=False).print(table)


def _quit(conversation: Conversation, argument: str) -> None:
    """leave"""


_COMMANDS: dict[str, Callable[[Conversation, str], None]] = {
    "/help": _help,
    "/reset": _reset,
    "/policy": _policy,
    "/drafter": _drafter,
    "/stats": _stats,
    "/quit": _quit,
}
