"""Types of options that click does not have."""

from __future__ import annotations

import math
from typing import Any

import click
from click.shell_completion import CompletionItem

from dynatree_core.errors import UnknownPluginError
from dynatree_core.plugins.registry import check_runner_name, runner_names
from dynatree_core.text.reading import checked_text

__all__ = ["ALL", "CountOrAll", "FiniteRange", "RunnerName", "Typed", "Words"]

ALL = "all"


class CountOrAll(click.ParamType):  # type: ignore[type-arg, unused-ignore]  # generic since click 8.4
    """A number of at least 1, or "all"."""

    name = "n|all"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        if value == ALL or isinstance(value, int):
            return value if value == ALL else int(value)
        if not (str(value).isdecimal() and int(value) >= 1):
            self.fail(f"must be a number of at least 1, or 'all', got {value!r}", param, ctx)
        return int(value)


class Typed(click.ParamType):  # type: ignore[type-arg, unused-ignore]  # generic since click 8.4
    """A text that every tokenizer takes."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return checked_text(str(value), param.opts[0] if param is not None else "a text")


class Words(Typed):
    """A text of an option that has at least one character."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if not value:
            self.fail("must be a text of at least one character, got none", param, ctx)
        return super().convert(value, param, ctx)


class FiniteRange(click.FloatRange):
    """A range of finite numbers; click's own takes NaN, which is beyond no bound."""

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
