"""`dynatree generate --prompts`: what is asked one after another, and the conversations that are played."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import attrs
from torch import nn

from dynatree_core.cli import console
from dynatree_core.cli.model_options import encode_messages
from dynatree_core.errors import ContextLimitError
from dynatree_core.models.architectures import max_positions
from dynatree_core.text.columns import Prompt
from dynatree_core.text.prompt_files import Prompts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Question", "asked", "check_lengths", "prompt_ids_of"]


@attrs.define(eq=False)
class Question:
    """A prompt's turn that is to be answered, and then its answer."""

    prompt: Prompt
    turn: int  # from 1
    title: str
    text: str
    prompt_ids: list[int]
    answer_ids: list[int] = attrs.field(factory=list, init=False)

    @property
    def where(self) -> str:
        return self.prompt.where

    @property
    def about(self) -> dict[str, Any]:
        """What its line of JSON says of it."""
        return {
            "id": self.prompt.prompt_id, "category": self.prompt.category, "turn": self.turn, "prompt": self.text,
        }  # fmt: skip

    def answered(self, token_ids: Sequence[int]) -> None:
        self.answer_ids = list(token_ids)


def asked(
    prompts: Prompts, tokenizer: PreTrainedTokenizerBase, is_chat: bool | None, is_played: bool
) -> Iterator[Question]:
    """What is to be answered. A later turn follows when the one before it has been answered, and holds that answer."""
    is_chat = _is_chat(prompts, is_chat)
    for number, prompt in enumerate(prompts.prompts, start=1):
        messages = prompt.messages
        turns = [prompt.text, *(prompt.later if is_played else ())]
        for turn, text in enumerate(turns, start=1):
            part = f", turn {turn} of {len(turns)}" if len(turns) > 1 else ""
            title = f"{prompt.prompt_id} ({number} of {len(prompts.prompts)}{part})"
            question = Question(prompt, turn, title, text, encode_messages(messages, tokenizer, is_chat))
            yield question
            answer = console.decode_text(tokenizer, question.answer_ids)
            messages = [*messages, {"role": "assistant", "content": answer}]
            messages += [{"role": "user", "content": words} for words in turns[turn : turn + 1]]


def check_lengths(
    prompts: Prompts, tokenizer: PreTrainedTokenizerBase, is_chat: bool | None, model: nn.Module, max_new_tokens: int
) -> None:
    """Refuse prompts for which the target has no room, before any is answered.

    Raises:
        ContextLimitError: naming the first of them.
    """
    limit = max_positions(model)
    for prompt in prompts.prompts if limit is not None else ():
        length = len(prompt_ids_of(prompt, prompts, tokenizer, is_chat))
        if limit is not None and length + max_new_tokens > limit:
            raise ContextLimitError(
                f"{prompt.where}: prompt and new tokens must fit the target's context of {limit} tokens, got "
                f"{length} + {max_new_tokens}; shorten or leave out the prompt, or lower --max-new-tokens"
            )


def prompt_ids_of(
    prompt: Prompt, prompts: Prompts, tokenizer: PreTrainedTokenizerBase, is_chat: bool | None
) -> list[int]:
    """A prompt's tokens: requests in the chat template where there is one, running text as it is."""
    return encode_messages(prompt.messages, tokenizer, _is_chat(prompts, is_chat))


def _is_chat(prompts: Prompts, is_chat: bool | None) -> bool | None:
    return False if is_chat is None and prompts.is_text else is_chat
