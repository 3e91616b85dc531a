"""Fields for the parameters of policies and drafters, checked when made and whenever they are changed.

    @attrs.define
    class MyPolicy:
        depth: int = count(4)
        threshold: float = fraction(0.3)
        signal: str = choice("confidence", ("confidence", "cumulative"))

A value of the wrong type or outside its range is a `ParameterError` that says what is allowed. The range stands in the
field's metadata under `DOMAIN`, so that the conformance kit can draw values: (lowest, highest) or the options.
"""

from __future__ import annotations

import math
from typing import Any

import attrs

from dynatree_core.errors import ParameterError

__all__ = ["DOMAIN", "as_python", "choice", "count", "fraction"]

DOMAIN = "dynatree_domain"


def as_python(value: Any) -> Any:
    """A number of numpy or torch, also as an array or a tensor without dimensions, as Python's; all else as it is."""
    return value.item() if getattr(value, "shape", None) == () and hasattr(value, "item") else value


def count(default: int, *, minimum: int = 1, maximum: int | None = None) -> int:
    """An integer parameter of at least `minimum`."""
    upper = math.inf if maximum is None else maximum
    allowed = f"an integer of at least {minimum}" if maximum is None else f"an integer from {minimum} to {maximum}"

    def check(instance: Any, attribute: attrs.Attribute[int], value: Any) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= upper:
            _refuse(instance, attribute.name, allowed, value)

    return attrs.field(default=default, converter=as_python, validator=check, metadata={DOMAIN: (minimum, maximum)})


def fraction(default: float) -> float:
    """A number in [0, 1]: a probability or a rate."""

    def check(instance: Any, attribute: attrs.Attribute[float], value: Any) -> None:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            _refuse(instance, attribute.name, "a number from 0 to 1", value)

    return attrs.field(default=default, converter=as_python, validator=check, metadata={DOMAIN: (0.0, 1.0)})


def choice(default: str, options: tuple[str, ...]) -> str:
    """One of some names."""

    def check(instance: Any, attribute: attrs.Attribute[str], value: Any) -> None:
        if value not in options:
            _refuse(instance, attribute.name, "one of " + ", ".join(map(repr, options)), value)

    return attrs.field(default=default, validator=check, metadata={DOMAIN: options})


def _refuse(instance: Any, name: str, allowed: str, value: Any) -> None:
    raise ParameterError(f"{type(instance).__name__}'s parameter '{name}' must be {allowed}, got {value!r}")
