"""`dynatree chat`: a conversation, typed in a terminal or line by line from a pipe.

Every answer is a generation of its own whose prompt is the whole conversation, through the tokenizer's chat template.
The prefix cache copies what earlier answers have left of it. Answers go to stdout, everything else to stderr.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import attrs
import click
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dynatree_core.cache.prefix_cache import PrefixCache
from dynatree_core.cli import console
from dynatree_core.cli.exits import DONE, FAILED, INTERRUPTED
from dynatree_core.cli.model_options import chat_ids, load_drafter, registered_drafter
from dynatree_core.drafters.build import as_drafter
from dynatree_core.engine.session import Session
from dynatree_core.errors import ContextLimitError, DynaTreeError, InputError, PromptError, nearest_match
from dynatree_core.generation import run
from dynatree_core.models.architectures import max_positions
from dynatree_core.models.load import LoadedModel
from dynatree_core.policy.build import build_stack
from dynatree_core.report import GenerationResult

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Chat", "converse"]

PROMPT = "> "

_ENDINGS = {
    "interrupted": "stopped",
    "error": "broken off",
    "length": "cut at the limit",
    "stop_string": "ended by --stop",
}


@attrs.define(eq=False)
class Chat:
    """A conversation, and what the next answer is made with."""

    target: LoadedModel
    tokenizer: PreTrainedTokenizerBase
    drafter: Any  # as `generate` takes it
    drafter_name: str  # as it was asked for
    policy: str
    max_new_tokens: int  # of one answer
    prefix_cache: PrefixCache
    system: str | None = None
    seed: int | None = None  # of the first answer, the next one for the second and so on
    options: Mapping[str, Any] = attrs.field(factory=dict)  # of every session
    messages: list[dict[str, str]] = attrs.field(init=False)
    results: list[GenerationResult] = attrs.field(init=False)  # one for each answer

    def __attrs_post_init__(self) -> None:
        self.reset()

    @property
    def context_limit(self) -> int | None:
        """Tokens that the models have positions for, all turns together; None when there is no limit."""
        drafter = as_drafter(self.drafter)
        limits = [max_positions(self.target.model), drafter.context_limit(self.target.model) if drafter else None]
        return min((limit for limit in limits if limit is not None), default=None)

    def reset(self) -> None:
        """Begin a new conversation. Its rows stay in the prefix cache until others take their place."""
        self.messages = [{"role": "system", "content": self.system}] if self.system is not None else []
        self.results = []

    def ask(self, text: str, on_prefill: Callable[[int, int], None] | None = None) -> Session:
        """A session for the answer to this text, which follows all that was said.

        Raises:
            ContextLimitError: the conversation leaves no room for an answer.
        """
        prompt_ids = chat_ids([*self.messages, {"role": "user", "content": text}], self.tokenizer)
        limit, max_new_tokens = self.context_limit, self.max_new_tokens
        if limit is not None:
            if len(prompt_ids) >= limit:
                raise ContextLimitError(
                    f"a conversation must fit the context of {limit} tokens with room for an answer, got "
                    f"{len(prompt_ids)} tokens"
                )
            max_new_tokens = min(max_new_tokens, limit - len(prompt_ids))
        return Session(
            self.target.model,
            self.drafter,
            prompt_ids,
            policy=self.policy,
            max_new_tokens=max_new_tokens,
            prefix_cache=self.prefix_cache,
            on_prefill=on_prefill,
            seed=None if self.seed is None else self.seed + len(self.results),
            tokenizer=self.tokenizer,
            **self.options,
        )

    def remember(self, text: str, result: GenerationResult) -> None:
        """Add a question and its answer, as far as it came; a question without any answer is forgotten."""
        if result.token_ids:
            answer = console.decode_text(self.tokenizer, result.token_ids)
            said = [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
            self.messages, self.results = [*self.messages, *said], [*self.results, result]

    def set_policy(self, policy: str) -> None:
        """Take another stack for the next answers.

        Raises:
            DynaTreeError: it cannot be built; the old one stays.
        """
        build_stack(policy)
        self.policy = policy

    def set_drafter(self, name: str) -> None:
        """Take another drafter for the next answers.

        Raises:
            DynaTreeError: there is none of this name; the old one stays.
        """
        drafter: Any = registered_drafter(name)
        self.drafter = load_drafter(name, self.target).model if drafter is None else drafter
        self.drafter_name = name


def converse(chat: Chat) -> int:
    """Read and answer, line by line, until the input ends.

    Returns:
        The exit status: 130 where it was ended by Ctrl-C; 1 where a line that did not come from a terminal failed.
    """
    is_terminal, exit_code = sys.stdin.isatty(), DONE
    if is_terminal:
        with contextlib.suppress(ImportError):  # not everywhere; then lines are edited as the terminal does it
            import readline  # noqa: F401  # input() uses it
        _say("/help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves")
    was_interrupted = False
    while True:
        try:
            line = _read_line(is_terminal)
            was_interrupted = False
            if line is None or line.strip() == "/quit":
                return exit_code
            with console.warnings_in_one_line():
                _obey_or_answer(chat, line)
        except KeyboardInterrupt:
            if was_interrupted or not is_terminal:
                return INTERRUPTED
            was_interrupted = True
            click.echo(err=True)
            _say("Ctrl-C again, /quit or Ctrl-D leaves")
        except DynaTreeError as error:
            advice = ""
            if isinstance(error, ContextLimitError):
                advice = "; /reset begins a new conversation" if chat.results else "; shorten the text, or --system"
            console.complain("error", f"{error}{advice}")
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


def _obey_or_answer(chat: Chat, line: str) -> None:
    if line.startswith("/"):
        word, _, argument = line.partition(" ")
        command = _COMMANDS.get(word)
        if command is None:
            raise InputError(
                f"'{word}' is no command{nearest_match(word, _COMMANDS)}; /help lists them; put a blank before a text "
                "that begins with /"
            )
        command(chat, argument.strip())
    elif line.strip():
        answer(chat, line.strip())


def answer(chat: Chat, text: str) -> None:
    """Answer on the screen. Ctrl-C or an error ends the answer; what there is of it belongs to the conversation.

    Raises:
        DynaTreeError: what ended it.
    """
    bar, screen = console.PrefillBar(), console.Answer(chat.tokenizer)
    session = chat.ask(text, bar)
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
            chat.remember(text, result)
            _say(_summary(result))


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


def _say(line: str) -> None:
    """A line on stderr that is no error."""
    Console(stderr=True, highlight=False).print(Text(line, style="dim"), soft_wrap=True)


# commands: what is typed -> what it does with the rest of the line


def _help(chat: Chat, argument: str) -> None:
    """what can be typed"""
    rows = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for word, command in _COMMANDS.items():
        rows.add_row(word, command.__doc__)
    rows.add_row("green", "drafted and accepted; the rest: the target's own tokens")
    rows.add_row("Ctrl-C", "stop the answer; what there is of it stays in the conversation")
    rows.add_row("Ctrl-D", "leave")
    Console(stderr=True, highlight=False).print(rows)


def _reset(chat: Chat, argument: str) -> None:
    """begin a new conversation"""
    chat.reset()
    _say("a new conversation")


def _policy(chat: Chat, argument: str) -> None:
    """NAME: grow trees by another policy from now on; without a name: which one it is"""
    if argument:
        chat.set_policy(argument)
    _say(f"policy {chat.policy}")


def _drafter(chat: Chat, argument: str) -> None:
    """NAME: take another drafter from now on; without a name: which one it is"""
    if argument:
        chat.set_drafter(argument)
    _say(f"drafter {chat.drafter_name}")


def _stats(chat: Chat, argument: str) -> None:
    """the numbers of this conversation"""
    reports = [result.report for result in chat.results]
    new, iterations = sum(r.num_new_tokens for r in reports), sum(r.num_iterations for r in reports)
    prompts, reused = sum(r.num_prompt_tokens for r in reports), sum(r.num_reused_tokens for r in reports)
    seconds, limit = sum(r.decode_seconds for r in reports), chat.context_limit
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
        ("prefix cache", f"{chat.prefix_cache.num_bytes / 1e6:.0f} of {chat.prefix_cache.max_bytes / 1e6:.0f} MB"),
        ("policy", chat.policy),
        ("drafter", chat.drafter_name),
    ]:
        table.add_row(label, value)
    Console(stderr=True, highlight=False).print(table)


def _quit(chat: Chat, argument: str) -> None:
    """leave"""


_COMMANDS: dict[str, Callable[[Chat, str], None]] = {
    "/help": _help,
    "/reset": _reset,
    "/policy": _policy,
    "/drafter": _drafter,
    "/stats": _stats,
    "/quit": _quit,
}
