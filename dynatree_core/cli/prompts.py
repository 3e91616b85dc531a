"""The prompts that a command is to take: typed, from standard input, or from a file."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import click

from dynatree_core.cli import console
from dynatree_core.cli.option_types import ALL
from dynatree_core.errors import PromptError
from dynatree_core.text.prompt_files import Prompts, read_prompts
from dynatree_core.text.reading import checked_text, read_standard_input
from dynatree_core.text.selection import of_categories, some_of

__all__ = ["PromptPicks", "typed_prompt"]


@attrs.frozen
class PromptPicks:
    """Which prompts of a file are asked for."""

    column: str | None = None
    categories: Sequence[str] = ()
    num_prompts: int | str | None = None
    is_played: bool = False
    seed: int | None = None

    def check(self, prompt: str | None, prompts_file: str | None) -> None:
        """Refuse no prompt, two kinds of them, and what needs a file where there is none.

        Raises:
            UsageError: naming it.
        """
        if (prompt is None) == (prompts_file is None):
            raise click.UsageError("give either PROMPT or --prompts FILE", click.get_current_context())
        asked = {
            "--column": self.column, "--category": self.categories, "--num-prompts": self.num_prompts,
            "--turns": self.is_played, "--seed": self.seed is not None,
        }  # fmt: skip
        if prompts_file is None and (without := [name for name, value in asked.items() if value]):
            raise click.UsageError(f"{without[0]} is about a file of prompts, and needs --prompts FILE")

    def read(self, place: str) -> Prompts:
        """The prompts that are asked for, in the order of the file; what was left out of it is told.

        Raises:
            InputError: a file without such prompts.
        """
        read = read_prompts(place, column=self.column, is_played=self.is_played)
        for note in read.notes:
            console.complain("note", note)
        if read.is_text:
            console.complain(
                "note", f"{place} is running text, in {len(read.prompts):,} passages to go on with (docs/files.md)"
            )
        places = {id(prompt): index for index, prompt in enumerate(read.prompts)}
        prompts = of_categories(read.prompts, self.categories, place)
        count = None if self.num_prompts in (None, ALL) else int(self.num_prompts or 0)
        some = some_of(prompts, count, is_text=read.is_text, seed=self.seed)
        if len(some) < len(read.prompts):
            console.complain("note", f"{len(some):,} of {len(read.prompts):,} prompts are taken")
        ordered = sorted(some, key=lambda prompt: places[id(prompt)])
        return attrs.evolve(read, prompts=tuple(ordered), places=tuple(places[id(prompt)] for prompt in ordered))


def typed_prompt(prompt: str) -> str:
    """The prompt itself; `-` stands for standard input, less the newline that ends a file.

    Raises:
        InputError: no text.
    """
    if prompt == "-":
        prompt = read_standard_input().text.removesuffix("\n")
    if not prompt:
        raise PromptError("a prompt must have at least one character, got none; give some text")
    return checked_text(prompt, "a prompt")
