"""The questions that a command asks one after another: a typed prompt, or those of a file with their later turns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import attrs
from torch import nn

from dynatree_core.errors import ContextLimitError
from dynatree_core.models.architectures import max_positions
from dynatree_core.text.prompt import encode_messages
from dynatree_core.text.prompt_files import Prompts
from dynatree_core.text.stream import decode_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Question", "asked", "check_lengths", "num_asked"]


@attrs.define(eq=False)
class Question:
    """A prompt that is to be answered, and then its answer."""

    prompt_ids: list[int]
    title: str | None = None  # of a file's question
    where: str | None = None  # in which file it stands
    about: dict[str, Any] = attrs.field(factory=dict)  # what its JSON document says of it
    answer_ids: list[int] = attrs.field(factory=list, init=False)

    def answered(self, token_ids: Sequence[int]) -> None:
        """Keep the answer: a later turn's prompt has it in it."""
        self.answer_ids = list(token_ids)


def asked(
    prompts: Prompts, tokenizer: PreTrainedTokenizerBase, is_chat: bool | None, is_played: bool
) -> Iterator[Question]:
    """A question for each prompt.

    Args:
        prompts: of a file.
        tokenizer: the target's.
        is_chat: as for `encode_messages`; None leaves running text as it is.
        is_played: ask the later turns of a conversation too. Each comes after the one before has been answered.
    """
    is_chat = _is_chat(prompts, is_chat)
    for number, prompt in enumerate(prompts.prompts, start=1):
        messages = prompt.messages
        turns = [prompt.text, *(prompt.later if is_played else ())]
        for turn, text in enumerate(turns, start=1):
            part = f", turn {turn} of {len(turns)}" if len(turns) > 1 else ""
            title = f"{prompt.prompt_id} ({number} of {len(prompts.prompts)}{part})"
            about = {"id": prompt.prompt_id, "category": prompt.category, "turn": turn, "prompt": text}
            question = Question(encode_messages(messages, tokenizer, is_chat), title, prompt.where, about)
            yield question
            answer = decode_text(tokenizer, question.answer_ids)
            messages = [*messages, {"role": "assistant", "content": answer}]
            messages += [{"role": "user", "content": words} for words in turns[turn : turn + 1]]


def num_asked(prompts: Prompts, is_played: bool) -> int:
    """How many questions `asked` gives."""
    return sum(1 + (len(prompt.later) if is_played else 0) for prompt in prompts.prompts)


def check_lengths(
    prompts: Prompts, tokenizer: PreTrainedTokenizerBase, is_chat: bool | None, model: nn.Module, max_new_tokens: int
) -> None:
    """Refuse prompts for which the target has no room, before any is answered.

    Raises:
        ContextLimitError: naming the first of them.
    """
    limit = max_positions(model)
    if limit is None:
        return
    for prompt in prompts.prompts:
        length = len(encode_messages(prompt.messages, tokenizer, _is_chat(prompts, is_chat)))
        if length + max_new_tokens > limit:
            raise ContextLimitError(
                f"{prompt.where}: prompt and new tokens must fit the target's context of {limit} tokens, got "
                f"{length} + {max_new_tokens}; shorten or leave out the prompt, or lower --max-new-tokens"
            )


def _is_chat(prompts: Prompts, is_chat: bool | None) -> bool | None:
    return False if is_chat is None and prompts.is_text else is_chat
