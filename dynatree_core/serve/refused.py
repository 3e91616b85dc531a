"""Fields of OpenAI's API that this server does not honour: the values that ask for nothing, and why no other is taken.

A field that is null is taken as one that is not there. One that stands neither here nor in `schema` is unknown.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs

from dynatree_core.serve.errors import ApiError, refused

__all__ = ["REFUSED", "without_neutral"]


MOST_FIELDS = 100


@attrs.frozen
class RefusedField:
    """One field of a request's body."""

    neutral: tuple[object, ...]  # values with which it asks for nothing
    reason: str


REFUSED = {
    "audio": RefusedField((), "answers are text"),
    "best_of": RefusedField((1,), "answers are not ranked; ask for several with n"),
    "echo": RefusedField((False,), "an answer does not repeat its prompt"),
    "function_call": RefusedField(("none", "auto"), "it was replaced by 'tool_choice'"),
    "functions": RefusedField(([],), "they were replaced by 'tools'"),
    "include_obfuscation": RefusedField((False,), "chunks are not padded"),
    "metadata": RefusedField(({},), "nothing is stored"),
    "modalities": RefusedField((["text"],), "answers are text"),
    "prediction": RefusedField((), "what is drafted comes from the drafter"),
    "prompt_cache_key": RefusedField((), "prompts that begin alike are found without one"),
    "prompt_cache_retention": RefusedField((), "what was computed is kept as long as there is room"),
    "reasoning_effort": RefusedField((), "the model has no such setting"),
    "safety_identifier": RefusedField((), "nobody is told of it; 'user' stands in the log"),
    "service_tier": RefusedField(("auto", "default"), "there is one tier"),
    "store": RefusedField((False,), "nothing is stored"),
    "suffix": RefusedField(("",), "text is continued, not filled in"),
    "verbosity": RefusedField((), "the model has no such setting"),
    "web_search_options": RefusedField((), "nothing is searched"),
}


def without_neutral(body: Mapping[str, Any]) -> dict[str, Any]:
    """A body, or an object in it, without the fields that ask for nothing.

    Raises:
        ApiError: a field of the table asks for something, or there are more than anything here has.
    """
    if len(body) > MOST_FIELDS:  # each of them would be an error of its own
        message = f"an object of a request has {MOST_FIELDS} fields at most, got {len(body)}; leave out unknown ones"
        raise ApiError(400, message, code="unknown_parameter")
    kept = {}
    for name, value in body.items():
        field = REFUSED.get(name)
        if value is None:
            continue
        if field is None:
            kept[name] = value
        elif not any(type(value) is type(neutral) and value == neutral for neutral in field.neutral):
            raise refused(
                name, f"'{name}' cannot be honoured, since {field.reason}; leave it out", code="unsupported_parameter"
            )
    return kept
