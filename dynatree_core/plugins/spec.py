"""Stack strings: `confidence(high=0.9)+dynamic_depth:plan+history`.

    stack   = plugin { "+" plugin }
    plugin  = name [ ":" variant ] [ "(" [ parameter { "," parameter } ] ")" ]
    parameter = name "=" number, string, True, False or None, as Python writes them

A name is letters, digits and `_`, and begins with no digit. `-` and `.` may be written for `_`: packages have dashes in
their names, so their authors give them to policies too. Parsing knows nothing of what is installed.
`format_stack(parse_stack(text))` is the canonical spelling, and parsing that gives the same stack again.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable

import attrs

from dynatree_core.errors import StackSyntaxError

__all__ = [
    "NAME_RULE",
    "ParameterValue",
    "PluginSpec",
    "canonical_name",
    "format_stack",
    "is_name",
    "parameter_values",
    "parse_stack",
]

ParameterValue = bool | int | float | str | None

NAME_RULE = "letters, digits and '_' ('-' and '.' stand for '_'), beginning with no digit"

_PLUGIN = re.compile(r"\s*(?P<name>[^\W\d][\w.-]*)\s*(?::\s*(?P<variant>\w+)\s*)?(?:\((?P<parameters>.*)\))?\s*", re.S)


@attrs.frozen
class PluginSpec:
    """One plugin of a stack by name: which variant of its parameters, and which are set by hand."""

    name: str
    variant: str | None = None
    parameters: dict[str, ParameterValue] = attrs.field(factory=dict)

    def __str__(self) -> str:
        variant = f":{self.variant}" if self.variant else ""
        parameters = ",".join(f"{name}={_written(value)}" for name, value in self.parameters.items())
        return f"{self.name}{variant}{f'({parameters})' if parameters else ''}"


def _written(value: ParameterValue) -> str:
    """A value as Python reads it; infinity has no name there."""
    return repr(value).replace("inf", "1e999") if isinstance(value, float) else repr(value)


def parse_stack(text: str) -> list[PluginSpec]:
    """The plugins of a stack string, left to right.

    Raises:
        StackSyntaxError: the string is empty or does not follow the grammar; the message points at the part.
    """
    return [_parse_plugin(part, text) for part in _split_at_plus(text)]


def canonical_name(name: str) -> str:
    """A plugin's name with `_` for each run of `-` and `.`."""
    return re.sub("[-.]+", "_", name)


def is_name(name: str) -> bool:
    """Whether a canonical name can be written in a stack string."""
    return re.fullmatch(r"[^\W\d]\w*", name) is not None


def parameter_values(plugin: object) -> dict[str, ParameterValue]:
    """The parameters of an attrs plugin as they are now; {} for a plain object, whose constructor's are not kept."""
    kind = type(plugin)
    if not attrs.has(kind):
        return {}
    fields = (field for field in attrs.fields(kind) if field.init)
    values = {field.alias: getattr(plugin, field.name) for field in fields}
    return {name: value for name, value in values.items() if isinstance(value, ParameterValue)}


def format_stack(specs: Iterable[PluginSpec]) -> str:
    """The canonical spelling of a stack."""
    return "+".join(map(str, specs))


def _split_at_plus(text: str) -> list[str]:
    """Split at every + outside parentheses and quotes."""
    parts, start, level, quote, is_escaped = [], 0, 0, "", False
    for i, char in enumerate(text):
        if quote:
            quote = "" if char == quote and not is_escaped else quote
            is_escaped = char == "\\" and not is_escaped
        elif char in "'\"":
            quote = char
        elif char in "()":
            level += 1 if char == "(" else -1
        elif char == "+" and level == 0:
            parts.append(text[start:i])
            start = i + 1
    return [*parts, text[start:]]


def _parse_plugin(part: str, text: str) -> PluginSpec:
    match = _PLUGIN.fullmatch(part)
    if match is None:
        raise StackSyntaxError(
            "a policy stack is names joined by '+', each with parameters in parentheses if any, such as "
            f"'confidence(high=0.9)+history'; cannot read '{part.strip()}' in '{text}'"
        )
    parameters = _parse_parameters(match["parameters"] or "", part)
    return PluginSpec(canonical_name(match["name"]), match["variant"], parameters)


def _parse_parameters(parameters: str, part: str) -> dict[str, ParameterValue]:
    if not parameters.strip():  # Python's parser takes a fifth of the time in which a generation begins
        return {}
    try:
        call = ast.parse(f"_({parameters})", mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
            raise ValueError("a value without a name, or parentheses that do not match")
        values: dict[str, ParameterValue] = {}
        for keyword in call.keywords:
            if keyword.arg is None or keyword.arg in values:
                raise ValueError("a name that is missing or given twice")
            values[keyword.arg] = _literal(keyword.value)
            if not isinstance(values[keyword.arg], ParameterValue):
                raise ValueError(f"{keyword.arg} is not a number, string, True, False or None")
    except (SyntaxError, ValueError) as error:
        raise StackSyntaxError(
            f"parameters are written as name=value, with a number, a quoted string, True, False or None as value; "
            f"cannot read '{part.strip()}' ({error.args[0] if error.args else error})"
        ) from error
    return values


def _literal(written: ast.expr) -> ParameterValue:
    try:
        value: ParameterValue = ast.literal_eval(written)
    except ValueError as error:  # whose words name an object of the parser
        raise ValueError(f"{ast.unparse(written)} is not a number, string, True, False or None") from error
    return value
