"""What small benchmarks share: a few prompts of three kinds, so that none needs a data set, and decoding them in turns.

"prose" asks for new text, "code" for a program, "copying" for an answer that repeats much of its question.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.progress import Progress

from dynatree_core import LoadedModel
from dynatree_core.cli import model_options as cli_models
from dynatree_core.text.prompt_files import read_prompts

__all__ = ["BUILT_IN", "chat_ids", "in_turns", "load_prompts", "parsed_arguments"]

WARM_UP_TOKENS = 8
Way = TypeVar("Way")
Made = TypeVar("Made")

BUILT_IN: dict[str, list[str]] = {
    "prose": [
        "Describe a morning in a small harbour town in autumn.",
        "Why do people keep gardens? Answer in two paragraphs.",
        "Tell the story of a clock that runs backwards.",
        "What should somebody know before they adopt an old dog?",
        "Explain to a child why the sea is salty.",
    ],
    "code": [
        "Write a Python function that returns the n-th Fibonacci number, with a docstring.",
        "Write a Python class for a stack with push, pop and peek methods, then show how it is used.",
        "Write a SQL query that lists the five customers with the largest total of orders, and explain it.",
        "Write a JavaScript function that removes duplicates from an array. Give three different versions.",
        "Write a Python script that counts the words of a text file and prints the ten most frequent ones.",
    ],
    "copying": [
        "Repeat the following list, sorted by price, and keep the format: apples - 3 euros - green; pears - 5 euros - "
        "yellow; plums - 2 euros - blue; cherries - 9 euros - red; melons - 4 euros - green; figs - 7 euros - purple.",
        "Rewrite this text with every 'cat' replaced by 'dog' and change nothing else: The cat sat on the mat. The cat "
        "was happy. A cat is a small animal. The cat likes milk, and the cat likes fish. At night the cat sleeps.",
        "Correct the spelling of this text and repeat it: The libary was clozed on Monday, so the childern went to the "
        "museeum. The museeum had a libary of its own, and the childern read there until the museeum was clozed too.",
        "Add a comment to every line of this code:\ndef mean(values):\n    total = 0\n    count = 0\n    for value in "
        "values:\n        total = total + value\n        count = count + 1\n    return total / count",
        "Summarise in one sentence, using its own words: The committee met on Tuesday to discuss the new bridge. The "
        "new bridge will cross the river north of the old bridge. The committee agreed that it should carry "
        "trams, and that the old bridge should be kept for people on foot.",
    ],
}


def load_prompts(path: Path | None, per_kind: int) -> dict[str, list[str]]:
    """The first prompts of each kind.

    Args:
        path: a file of prompts with categories (docs/files.md); None for the built-in prompts.
        per_kind: how many of each kind.

    Raises:
        InputError: what is wrong with the file, and in which line.
    """
    if path is None:
        return {kind: prompts[:per_kind] for kind, prompts in BUILT_IN.items()}
    kinds: defaultdict[str, list[str]] = defaultdict(list)
    for prompt in read_prompts(path).prompts:
        if len(kinds[prompt.category]) < per_kind:
            kinds[prompt.category].append(prompt.text)
    return dict(kinds)


def parsed_arguments(parser: argparse.ArgumentParser, *, max_new_tokens: int) -> argparse.Namespace:
    """The arguments of a command, after which prompts and how many new tokens were added to them.

    Args:
        parser: it has the command's own.
        max_new_tokens: unless another number is asked for.
    """
    parser.add_argument("--prompts", type=Path, help="a file of prompts with categories (default: built-in prompts)")
    parser.add_argument("--per-kind", type=int, default=5, help="prompts of each kind (default: %(default)s)")
    parser.add_argument(
        "--max-new-tokens", type=int, default=max_new_tokens, help="of each output (default: %(default)s)"
    )
    arguments = parser.parse_args()
    if min(arguments.per_kind, arguments.max_new_tokens) < 1:
        parser.error("--per-kind and --max-new-tokens must be at least 1")
    return arguments


def in_turns(
    prompts: Sequence[str], ways: Sequence[Way], decode: Callable[[str, Way, int], Made], max_new_tokens: int
) -> Iterator[dict[Way, Made]]:
    """What each way makes of a prompt, prompt by prompt: the ways one after another in rotating order.

    Before, each way decodes a little of the first prompt: the first passes allocate and choose kernels.

    Args:
        prompts: at least one.
        ways: each is a key of what comes back.
        decode: told the prompt, the way, and how many tokens there are to be at most.
        max_new_tokens: of each output.
    """
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("decoding", total=len(prompts) * len(ways))
        for way in ways:
            decode(prompts[0], way, WARM_UP_TOKENS)
        for i, prompt in enumerate(prompts):
            start, found = i % len(ways), {}
            for way in (*ways[start:], *ways[:start]):
                found[way] = decode(prompt, way, max_new_tokens)
                progress.advance(task)
            yield found


def chat_ids(target: LoadedModel, prompt: str) -> list[int]:
    """A prompt in the target's chat template, if it has one.

    Raises:
        InputError: the target has no tokenizer.
    """
    return cli_models.encode_prompt(prompt, cli_models.tokenizer_of(target))
