"""Which of a file's prompts are taken: some categories, so many, evenly or as a seed picks them."""

from __future__ import annotations

import itertools
import random
from collections import defaultdict
from collections.abc import Collection, Sequence
from typing import Protocol, TypeVar

from dynatree_core.errors import InputError, nearest_match

__all__ = ["of_categories", "some_of"]


class Categorised(Protocol):
    """What has a category, such as a prompt."""

    @property
    def category(self) -> str: ...


Some = TypeVar("Some", bound=Categorised)


def of_categories(prompts: Sequence[Some], categories: Collection[str], where: str) -> tuple[Some, ...]:
    """The prompts of these categories, or all where none are named.

    Raises:
        InputError: a category that no prompt has; names those that there are.
    """
    if not categories:
        return tuple(prompts)
    there = list(dict.fromkeys(prompt.category for prompt in prompts))
    if missing := [name for name in categories if name not in there]:
        raise InputError(
            f"{where} must have prompts of category '{missing[0]}'{nearest_match(missing[0], there)}, got the "
            f"categories {', '.join(there[:20])}"
        )
    return tuple(prompt for prompt in prompts if prompt.category in categories)


def some_of(
    prompts: Sequence[Some], num_prompts: int | None, *, is_text: bool, seed: int | None = None
) -> tuple[Some, ...]:
    """So many of the prompts, or all where there are no more: over a text, else from the categories in turn.

    Args:
        prompts: all of them.
        num_prompts: how many; None: all.
        is_text: they are passages of running text, which stay in their order.
        seed: takes them at random, the same ones for the same seed; None: evenly over the text, or the first of each
            category.
    """
    count = len(prompts) if num_prompts is None else min(num_prompts, len(prompts))
    if is_text:
        places = [i * len(prompts) // count for i in range(count)]
        if seed is not None:
            places = sorted(random.Random(seed).sample(range(len(prompts)), count))
        return tuple(prompts[place] for place in places)
    by_category: defaultdict[str, list[Some]] = defaultdict(list)
    for prompt in prompts:
        by_category[prompt.category].append(prompt)
    if seed is not None:
        dice = random.Random(seed)
        for group in by_category.values():
            dice.shuffle(group)
    rounds = itertools.zip_longest(*by_category.values())
    return tuple(itertools.islice((prompt for turn in rounds for prompt in turn if prompt is not None), count))
