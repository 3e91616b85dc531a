"""A prompt's tokens, through the tokenizer's chat template where there is one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dynatree_core.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dynatree_core.models.load import LoadedModel

__all__ = ["chat_ids", "chat_text", "encode_messages", "encode_prompt", "text_ids", "tokenizer_of"]

# Python's own errors that a template meets where it computes with what a message does not have, as `tojson` of it
TEMPLATE_FAULTS = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)


def tokenizer_of(target: LoadedModel) -> PreTrainedTokenizerBase:
    """The target's tokenizer.

    Raises:
        InputError: it came without one.
    """
    if target.tokenizer is None:
        raise InputError(
            f"the target must come with a tokenizer to read a text, got none with '{target.name}'; save one in its "
            "folder, or pass token ids to dynatree_core.generate"
        )
    return target.tokenizer


def chat_ids(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    begins_answer: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> list[int]:
    """The tokens of a conversation, as `chat_text` takes and writes it."""
    return text_ids(chat_text(messages, tokenizer, begins_answer=begins_answer, tools=tools), tokenizer)


def text_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens of what a chat template has written, special ones too."""
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def chat_text(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    begins_answer: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> str:
    """What the chat template writes of a conversation, up to where the model's answer begins.

    Args:
        messages: each with `role` and `content`.
        tokenizer: the target's, with a chat template.
        tools: what the model may call, as the template takes it.
        begins_answer: whether what the template writes before an answer stands at the end.

    Raises:
        InputError: the template refuses the conversation, for example because of a system message, or fails with it.
    """
    from jinja2 import TemplateError

    try:
        text = str(
            tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tools=None if tools is None else [dict(tool) for tool in tools],
                add_generation_prompt=begins_answer,
                tokenize=False,
            )
        )
        text.encode()  # arguments of calls may have halves of characters, which no tokenizer takes
    except (TemplateError, *TEMPLATE_FAULTS) as error:
        roles = ", ".join(message["role"] for message in messages)
        raise InputError(
            f"the model's chat template must take a conversation of {roles}, but refuses it: {error}"
        ) from error
    return text


def encode_prompt(text: str, tokenizer: PreTrainedTokenizerBase, is_chat: bool | None = None) -> list[int]:
    """The tokens of one user message, as `encode_messages` gives them."""
    return encode_messages([{"role": "user", "content": text}], tokenizer, is_chat)


def encode_messages(
    messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, is_chat: bool | None = None
) -> list[int]:
    """The tokens of a conversation.

    Args:
        messages: each with `role` and `content`.
        is_chat: True: through the chat template; False: as plain text, a blank line between messages; None: through
            the template if the tokenizer has one.

    Raises:
        InputError: the template is asked for and the tokenizer has none, or the template refuses the conversation.
    """
    has_template = tokenizer.chat_template is not None
    if is_chat and not has_template:
        raise InputError("--chat needs a target whose tokenizer has a chat template, got one without; use --raw")
    if is_chat is False or not has_template:
        return list(tokenizer("\n\n".join(message["content"] for message in messages)).input_ids)
    return chat_ids(messages, tokenizer)
