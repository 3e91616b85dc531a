"""What a `custom_generate` folder calls: the arguments of `model.generate`, as transformers hands them to it.

In `model.generate(custom_generate=FOLDER)` they are all there, None where the caller gave none. For a model that
`from_pretrained(FOLDER, trust_remote_code=True)` has loaded they are what the caller of `model.generate` wrote.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers import GenerationMixin
from transformers.generation.utils import GenerateDecoderOnlyOutput

from dynatree_core.errors import ParameterError
from dynatree_core.hf.custom_generate import generate_with

__all__ = ["generate_as_asked"]


def generate_as_asked(
    model: Any, positional: Sequence[Any], arguments: Mapping[str, Any], defaults: Mapping[str, Any]
) -> Tensor | GenerateDecoderOnlyOutput:
    """Generate by `hf.generate_with`, or by another loop if the caller names one as `custom_generate`.

    Args:
        model: the target.
        positional: the arguments without a name, in the order of `model.generate`.
        arguments: the others; `drafter`, `policy` and `options` too.
        defaults: `drafter`, `policy` and `options` of the folder. The caller's come before them; of the options, each.

    Raises:
        TypeError: an argument given twice, or more of them without a name than there are.
        ParameterError: options that are no mapping, or what `hf.generate_with` refuses.
    """
    asked = _by_name(model, positional, arguments)
    another_loop = asked.pop("custom_generate", None)
    if another_loop is not None:
        return type(model).generate(model, custom_generate=another_loop, **asked)  # type: ignore[no-any-return]
    options = asked.pop("options", None)
    if options is not None and not isinstance(options, Mapping):
        raise ParameterError(f"options must be a mapping such as {{'tau': 0.1}}, got {options!r:.60}")
    merged = {**defaults.get("options", {}), **(options or {})}
    return generate_with(model, **{**defaults, **asked, "options": merged})


def _by_name(model: Any, positional: Sequence[Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    bound = inspect.signature(GenerationMixin.generate).bind(model, *positional, **arguments).arguments
    return {
        **{name: value for name, value in bound.items() if name not in ("self", "kwargs")},
        **bound.get("kwargs", {}),
    }
