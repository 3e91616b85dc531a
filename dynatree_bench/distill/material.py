"""The user's own files that a distillation learns from, read once and before any model is loaded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import attrs
from transformers import PreTrainedTokenizerBase

from dynatree_core.cli.prompts import PromptPicks
from dynatree_core.text.columns import Prompt
from dynatree_core.text.prompt import encode_messages


@attrs.frozen
class Material:
    """Passages of the texts, and the user's own prompts."""

    passages: tuple[str, ...] = ()
    prompts: tuple[Prompt, ...] = ()
    is_text: bool = False  # the prompts are passages to go on with, not requests

    def fingerprint(self) -> str:
        """The same for the same words."""
        words = [self.passages, [prompt.messages for prompt in self.prompts]]
        return hashlib.sha256(json.dumps(words).encode()).hexdigest()


def read_given(places: Sequence[str], picks: PromptPicks) -> tuple[tuple[Prompt, ...], bool]:
    """The prompts of the user's files, and whether they are running text.

    Raises:
        InputError: what is wrong, with file and line.
    """
    read = [picks.read(place) for place in places]
    return tuple(prompt for one in read for prompt in one.prompts), any(one.is_text for one in read)


def encoded(material: Material, tokenizer: PreTrainedTokenizerBase) -> list[tuple[int, ...]]:
    """The user's prompts in tokens: requests through the chat template where there is one."""
    is_chat = False if material.is_text else None
    return [tuple(encode_messages(prompt.messages, tokenizer, is_chat)) for prompt in material.prompts]
