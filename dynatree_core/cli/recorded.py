"""What `--trace` and `--show-trees` ask for: a trace of the command's generations, and their trees in the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import attrs
import click
from rich.console import Console

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dynatree_core.engine.observer import Observer
    from dynatree_core.trace import Trace

__all__ = ["Recorded"]


@attrs.define(eq=False)
class Recorded:
    """What is recorded of a command's generations.

    Args:
        file: where; None: nowhere.
        is_private: whether prompts are left out of the file.
        shows_trees: whether each iteration's tree is drawn on standard error.

    Raises:
        click.UsageError: there is nothing that could be private.
    """

    file: str | None = None
    is_private: bool = False
    shows_trees: bool = False
    _trace: Trace | None = attrs.field(default=None, init=False)
    _texts: dict[int, str] = attrs.field(factory=dict, init=False)

    def __attrs_post_init__(self) -> None:
        if self.is_private and self.file is None:
            raise click.UsageError("--trace-private says what a trace leaves out, and needs --trace FILE")

    def check(self) -> None:
        """Look whether the file can be written, before models are loaded.

        Raises:
            InputError: it cannot, or it is something else than a trace.
        """
        from dynatree_core.trace import check_trace

        if self.file is not None:
            check_trace(self.file)

    def open(self, tokenizer: PreTrainedTokenizerBase | None) -> Trace | None:
        """Begin, once the target's tokenizer is there; None where nothing is recorded. Again: the same."""
        from dynatree_core.trace import Trace

        if self._trace is None and (self.file is not None or self.shows_trees):
            draw = self._draw if self.shows_trees else None
            self._trace = Trace(self.file, tokenizer=tokenizer, is_private=self.is_private, on_record=draw)
        return self._trace

    def observer(self) -> Observer | None:
        """An observer for one generation; None where nothing is recorded."""
        return None if self._trace is None else self._trace.observer()

    def close(self) -> None:
        """End the file.

        Raises:
            OSError: what is left to write cannot be written.
        """
        if self._trace is not None:
            self._trace.close()

    def __enter__(self) -> Recorded:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _draw(self, record: Mapping[str, Any]) -> None:
        from dynatree_core.trace import iteration_of, print_iteration

        self._texts |= {int(token): text for token, text in (record.get("texts") or {}).items()}
        if record["kind"] == "iteration":
            print_iteration(iteration_of(record), self._texts, Console(stderr=True, highlight=False))
