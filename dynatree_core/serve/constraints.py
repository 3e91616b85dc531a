"""What a request says about the form of an answer, as options of `generate`."""

from __future__ import annotations

from typing import Any

from dynatree_core.request.grammar import Grammar
from dynatree_core.serve.errors import refused
from dynatree_core.serve.schema import GenerationBody

__all__ = ["form_options"]


def form_options(body: GenerationBody) -> dict[str, Any]:
    """`logit_bias`, penalties and `grammar`, where the body asks for them.

    Raises:
        ApiError: the form is asked for in two ways.
        GrammarError: a schema that is none.
    """
    options: dict[str, Any] = {}
    if body.logit_bias:
        options["logit_bias"] = {_token_id(name): value for name, value in body.logit_bias.items()}
    if body.presence_penalty:
        options["presence_penalty"] = body.presence_penalty
    if body.frequency_penalty:
        options["frequency_penalty"] = body.frequency_penalty
    grammar = _grammar(body)
    return options if grammar is None else options | {"grammar": grammar}


def _token_id(name: str) -> int:
    # "05" would be a second name for "5", and one of two biases would be lost
    if not (name.isascii() and name.isdecimal() and len(name) < 10 and name == str(int(name))):
        raise refused("logit_bias", f"'logit_bias' must have token ids for names, such as \"17\", got '{name:.60}'")
    return int(name)


def _grammar(body: GenerationBody) -> Grammar | None:
    asked, other = body.response_format, body.structured_outputs
    if asked is not None and asked.type != "json_schema" and asked.json_schema is not None:
        raise refused(
            "response_format",
            f"'response_format' of the type '{asked.type}' has no schema, got a 'json_schema' beside it; make the type "
            "'json_schema', or leave the schema out",
        )
    if other is not None:
        if asked is not None and asked.type != "text":
            raise refused(
                "structured_outputs",
                "'structured_outputs' and 'response_format' say the same thing in two ways; give one",
            )
        if other.regex is not None and other.json_schema is None:
            return Grammar.regex(other.regex)
        if other.json_schema is not None and other.regex is None:
            return Grammar.json_schema(other.json_schema)
        raise refused("structured_outputs", "'structured_outputs' must have either 'json' or 'regex'")
    if asked is None or asked.type == "text":
        return None
    if asked.type == "json_object":
        return Grammar.json_schema({"type": "object"})
    if asked.json_schema is None:
        raise refused(
            "response_format", "'response_format' of the type 'json_schema' must have a 'json_schema' with a 'schema'"
        )
    return Grammar.json_schema(asked.json_schema.schema_)
