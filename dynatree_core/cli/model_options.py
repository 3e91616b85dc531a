"""The models that a command line names: loading them, with a word about what is being waited for.

torch and transformers, which take seconds to import, are imported when a model is asked for.
"""

from __future__ import annotations

import logging
import math
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from dynatree_core.cli import console
from dynatree_core.errors import (
    InputError,
    ModelLoadError,
    UnknownPluginError,
    VocabularyMismatchError,
    nearest_match,
)
from dynatree_core.plugins.registry import DRAFTERS, check_runner_name, plugin_table, runner_names
from dynatree_core.plugins.spec import canonical_name, parse_stack

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dynatree_core.drafters.base import Drafter
    from dynatree_core.models.load import LoadedModel

__all__ = [
    "USUAL_DRAFTERS",
    "FiniteRange",
    "RunnerName",
    "chat_ids",
    "check_drafter_model",
    "check_drafter_name",
    "encode_messages",
    "encode_prompt",
    "load",
    "load_drafter",
    "registered_drafter",
    "tokenizer_of",
    "usual_drafter",
]


class FiniteRange(click.FloatRange):
    """A range of numbers, to which click itself counts NaN: that compares with no bound."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


class RunnerName(click.ParamType):  # type: ignore[type-arg, unused-ignore]  # generic since click 8.4
    """The name of an installed runner, or "auto"."""

    name = "runner"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            check_runner_name(value)
        except UnknownPluginError as error:
            self.fail(str(error), param, ctx)
        return str(value)

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        return f"[{'|'.join(runner_names())}]"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(name) for name in runner_names() if name.startswith(incomplete)]


def tokenizer_of(target: LoadedModel) -> PreTrainedTokenizerBase:
    if target.tokenizer is None:
        raise InputError(
            f"the target must come with a tokenizer to read a text, got none with '{target.name}'; save one in its "
            "folder, or pass token ids to dynatree_core.generate"
        )
    return target.tokenizer


def chat_ids(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens of a conversation through the chat template, up to where the model's answer begins.

    Raises:
        InputError: the template does not take it, such as one without a place for a system's message.
    """
    from jinja2 import TemplateError

    try:
        text = str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise InputError(
            f"the model's chat template must take a conversation of {roles}, but refuses it: {error}"
        ) from error
    return list(tokenizer(text, add_special_tokens=False).input_ids)  # the template has written them


def encode_prompt(text: str, tokenizer: PreTrainedTokenizerBase, is_chat: bool | None = None) -> list[int]:
    """The prompt's tokens, through the chat template if there is one or if it is asked for."""
    return encode_messages([{"role": "user", "content": text}], tokenizer, is_chat)


def encode_messages(
    messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, is_chat: bool | None = None
) -> list[int]:
    """A conversation's tokens, through the chat template if there is one or if it is asked for.

    Without a template it is read as one text, what was said with a blank line between.
    """
    has_template = tokenizer.chat_template is not None
    if is_chat and not has_template:
        raise InputError("--chat needs a target whose tokenizer has a chat template, got one without; use --raw")
    if is_chat is False or not has_template:
        return list(tokenizer("\n\n".join(message["content"] for message in messages)).input_ids)
    return chat_ids(messages, tokenizer)


def load(name: str | None, device: str | None, dtype: str) -> LoadedModel:
    """Load a model, telling on a terminal what is being waited for."""
    from dynatree_core.models.load import DEFAULT_MODEL, load_model

    _quiet_libraries()
    is_here = name is None or name == DEFAULT_MODEL or Path(name).expanduser().exists()
    with console.spinner(f"loading {name or 'the default model'}", is_animated=is_here) as progress:
        return load_model(name, device=device, dtype=dtype, progress=progress)


def _quiet_libraries() -> None:
    """No notices of several lines between ours: what matters comes as an error. Bars on a terminal only."""
    from transformers.utils import logging as transformers_logging

    for name in ("huggingface_hub", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # those of the hub as well


USUAL_DRAFTERS = "distilled+prompt_lookup for the embedded model, else prompt_lookup"  # as a help text says it


def usual_drafter(target: str | None) -> str:
    """The drafter where none is asked for: the embedded model has a student of its own (docs/results/drafter.md)."""
    return "distilled+prompt_lookup" if target in (None, "default") else "prompt_lookup"


def check_drafter_name(text: str) -> None:
    """Refuse names of drafters that nothing installed has; nothing is imported.

    A word that is nearly a drafter's name is refused too: nobody has a model of that name.

    Raises:
        StackSyntaxError, UnknownPluginError.
    """
    known = plugin_table(DRAFTERS)
    if _first_name(text) in known:
        unknown = next((spec.name for spec in parse_stack(text) if spec.name not in known), None)
    else:
        is_near = nearest_match(_first_name(text), known) and "/" not in text and not Path(text).exists()
        unknown = text if is_near else None
    if unknown is not None:
        raise UnknownPluginError(
            f"'{unknown}' is not an installed drafter{nearest_match(unknown, known)}; known are: {', '.join(known)}; "
            "a model on the hub is written owner/name, a folder ./name"
        )


def _first_name(text: str) -> str:
    return canonical_name(re.split("[:(+]", text, maxsplit=1)[0].strip())


def registered_drafter(text: str) -> Drafter | None:
    """The registered drafter or the student's folder that is meant, or None for a model's id or folder."""
    check_drafter_name(text)
    from dynatree_core.drafters.build import build_drafter
    from dynatree_core.drafters.distilled import DistilledDrafter
    from dynatree_core.models.student import is_student

    if _first_name(text) in plugin_table(DRAFTERS):
        return build_drafter(text)
    return DistilledDrafter(text) if is_student(Path(text).expanduser()) else None


def check_drafter_model(name: str) -> None:
    """Refuse a model as drafter that cannot be loaded: a folder without one, or an id without a hub."""
    from dynatree_core.models.load import check_model_name

    with _naming_drafters(name):
        check_model_name(name)


@contextmanager
def _naming_drafters(name: str) -> Iterator[None]:
    """A word that is no model may have been meant for a drafter."""
    try:
        yield
    except ModelLoadError as error:
        if "/" in name:
            raise
        known = ", ".join(plugin_table(DRAFTERS))
        raise ModelLoadError(f"{error}; or name an installed drafter: {known}") from error


def load_drafter(name: str, target: LoadedModel) -> LoadedModel:
    """A model as drafter, on the target's device and in its dtype.

    Raises:
        VocabularyMismatchError: its tokenizer gives tokens other ids than the target's.
    """
    from dynatree_core.models.load import vocabularies_match

    with _naming_drafters(name):
        drafter = load(name, str(target.model.device), str(target.model.dtype).removeprefix("torch."))
    if vocabularies_match(target.tokenizer, drafter.tokenizer) is False:
        raise VocabularyMismatchError(
            f"target and drafter must give every token the same id, but the tokenizers of '{target.name}' and "
            f"'{drafter.name}' do not; choose a drafter of the target's family, or prompt_lookup"
        )
    return drafter
