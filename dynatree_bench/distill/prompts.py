"""What the target is asked, so that it writes the text that its drafter learns from.

A drafter is used on the target's own output, so that is what it has to predict well. Three kinds of prompts make
the target write: passages of plain text to go on with, questions about passages, and the questions that a chat
model itself thinks a user would ask (Xu et al. 2024, "Magpie", section 2.1: give it the template up to the user's words
and let it write them).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import attrs
from transformers import PreTrainedTokenizerBase

from dynatree_core.errors import InputError
from dynatree_core.text.passages import cut
from dynatree_core.text.prompt import encode_prompt
from dynatree_core.text.prompt_files import read_documents

PLACE = "{text}"  # where a question holds its passage
_USER_WORDS = "\u2603"  # stands for the user's words while the template is cut around it


@attrs.frozen
class Prompt:
    """What the target goes on from, and how."""

    token_ids: tuple[int, ...]
    temperature: float  # 0: greedy


def read_passages(files: Sequence[Path], num_chars: int) -> list[str]:
    """Files of text, cut where lines, sentences or words end into passages of about `num_chars` characters.

    Raises:
        InputError: a file that cannot be read, or too little text for one passage.
    """
    text = "\n\n".join(document for file in files for document in read_documents(file)).strip()
    if len(text) < num_chars:
        raise InputError(
            f"--text needs at least {num_chars} characters of text, got {len(text)} in {len(files)} files; give more"
        )
    return cut(text, num_chars)


def continue_prompts(passages: Sequence[str], tokenizer: PreTrainedTokenizerBase, num_tokens: int) -> list[list[int]]:
    """The first tokens of each passage."""
    return [list(tokenizer(passage).input_ids)[:num_tokens] for passage in passages]


def ask_prompts(
    passages: Sequence[str], questions: Sequence[str], tokenizer: PreTrainedTokenizerBase, num_chars: int
) -> list[list[int]]:
    """Each passage's first characters inside one of the questions in turn, in the target's chat template.

    Raises:
        InputError: a question without a place for the passage.
    """
    for question in questions:
        if PLACE not in question:
            raise InputError(f"a question needs {PLACE} where the passage goes, got {question!r}")
    asked = [
        questions[index % len(questions)].replace(PLACE, passage[:num_chars].rsplit(" ", 1)[0])
        for index, passage in enumerate(passages)
    ]
    return [encode_prompt(words, tokenizer) for words in asked]


def chat_prefix(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The chat template before the user's words, and between them and the answer.

    Raises:
        InputError: the tokenizer has no chat template.
    """
    if tokenizer.chat_template is None:
        raise InputError(
            "--self-prompts needs a target with a chat template, got none; use --self-prompts 0, and --text"
        )
    text = str(
        tokenizer.apply_chat_template(
            [{"role": "user", "content": _USER_WORDS}], tokenize=False, add_generation_prompt=True
        )
    )
    before, _, behind = text.partition(_USER_WORDS)
    return (
        list(tokenizer(before, add_special_tokens=False).input_ids),
        list(tokenizer(behind, add_special_tokens=False).input_ids),
    )


def mixed(token_ids: Sequence[Sequence[int]], sampled: float, temperature: float, seed: int) -> list[Prompt]:
    """Prompts in random order, a share of them to be sampled from, the others greedy."""
    order = random.Random(seed)
    prompts = [Prompt(tuple(ids), temperature if order.random() < sampled else 0.0) for ids in token_ids]
    order.shuffle(prompts)
    return prompts
