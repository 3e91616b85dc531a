"""Outputs that are to be audited, read from a file: those of `dynatree generate --json`, or of another program.

What cannot be judged is refused here, with the reason, before a model is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs

from dynatree_core.errors import InputError, PromptError
from dynatree_core.files.folders import expanded
from dynatree_core.text.prompt import encode_prompt
from dynatree_core.text.reading import first_fault, read_source
from dynatree_core.text.tables import Row, read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Given", "read_outputs", "target_of"]

ALIKE = ("target", "dtype", "exact", "max_nodes", "ignore_eos")  # in all outputs of one file


@attrs.frozen
class Given:
    """An output that was made elsewhere."""

    where: str  # it stands
    document: Mapping[str, Any]

    @property
    def needs_cutting(self) -> bool:
        """Whether its text is all that is known of its tokens."""
        return self.document.get("token_ids") is None

    def prompt_ids(
        self, prompt: str | None, tokenizer: PreTrainedTokenizerBase, is_chat: bool | None, vocab: int
    ) -> list[int]:
        """The prompt's tokens; a prompt is cut into tokens again only where their ids are missing.

        Raises:
            InputError: there is neither, or they are not the target's.
        """
        ids = self.document.get("prompt_ids")
        if ids is None:
            text = prompt if prompt is not None else self.document.get("prompt")
            if text is None:
                raise InputError(
                    'an output without "prompt_ids" or "prompt" needs its PROMPT on the command line, got none'
                )
            ids = encode_prompt(str(text), tokenizer, is_chat)
        return self._checked("prompt_ids", ids, vocab)

    def token_ids(self, tokenizer: PreTrainedTokenizerBase, vocab: int) -> list[int]:
        """The output's own tokens, or those of its text.

        Raises:
            InputError: they are not the target's.
        """
        ids = self.document.get("token_ids")
        if ids is None:
            ids = list(tokenizer(str(self.document["text"]), add_special_tokens=False).input_ids)
        return self._checked("token_ids", ids, vocab)

    def _checked(self, name: str, ids: Sequence[int], vocab: int) -> list[int]:
        if wrong := [one for one in ids if not 0 <= one < vocab]:
            raise PromptError(
                f'{self.where} must have "{name}" from 0 to {vocab - 1}, the target\'s vocabulary, got {wrong[0]}; '
                "is it an output of another model?"
            )
        return list(ids)


def read_outputs(path: Path) -> list[Given]:
    """Documents such as `dynatree generate --json` prints: one, or several as JSON lines or a JSON list.

    Raises:
        InputError: one is not a JSON object with "token_ids" or "text", has something of another kind in it, or was
            made in a way that no audit can tell anything of: with a cache that forgets, changed logits or drawn
            tokens. Or they were not made alike.
    """
    source = read_source(path)
    try:
        rows = read_json(source)
    except InputError as error:
        raise InputError(f"{error}; an audit reads what `dynatree generate --json` prints") from error
    found = [Given(str(path) if len(rows) == 1 else row.where, _checked_document(row, path, len(rows))) for row in rows]
    if not found:
        raise InputError(f"{path} must have at least one output in it, as `dynatree generate --json` prints, got none")
    first = found[0]
    for other in found[1:]:
        for name in ALIKE:
            if other.document.get(name) != first.document.get(name):
                raise InputError(
                    f'{other.where} must have the "{name}" of the first output, {first.document.get(name)!r}, got '
                    f"{other.document.get(name)!r}; audit one file for each"
                )
    return found


def _checked_document(row: Row, path: Path, count: int) -> Mapping[str, Any]:
    where, found = str(path) if count == 1 else row.where, row.value
    if not isinstance(found, dict) or (found.get("token_ids") is None and found.get("text") is None):
        raise InputError(
            f'{where} must be a JSON object with "token_ids", or at least "text", got {str(found)[:60]!r}; '
            "`dynatree generate --json` prints one"
        )
    for name, kind, is_so in _KINDS:
        value = found.get(name)
        if value is not None and not is_so(value):
            raise InputError(f'{where} must have {kind} as "{name}", got {str(value)[:60]!r}')
    for name in ("text", "prompt"):
        if (fault := first_fault(found.get(name) or "")) is not None:
            raise InputError(f'{where} must have a text as "{name}", got {fault[1]} at its character {fault[0] + 1}')
    if found.get("cache") is not None:
        raise InputError(
            f"{where} must be an output of a cache that keeps all tokens, got one with --cache {found['cache']}; "
            "`dynatree generate --compare` takes that option"
        )
    if found.get("rounded") is not None:
        raise InputError(
            f"{where} must be an output of the published weights, with which the audit computes, got one of a target "
            f"that was rounded ({found['rounded']}); `dynatree generate --compare` compares with plain decoding of that"
        )
    if found.get("logits_processors"):
        raise InputError(
            f"{where} must be an output that the target's own logits chose, got one of logits that were changed by "
            f"{', '.join(found['logits_processors'])} (--repetition-penalty, --no-repeat-ngram-size, or the "
            "target's generation config); `dynatree generate --compare` takes those options"
        )
    if found.get("do_sample") or found.get("temperature"):
        raise InputError(
            f'{where} must be an output of the best token each time, got one of drawn tokens ("do_sample" or '
            '"temperature"); generate it greedily'
        )
    return found


def target_of(given: Given, asked: str | None) -> str | None:
    """The model that an output is said to come from, which is also the one that was asked for, if one was.

    Raises:
        InputError: it is another one.
    """
    made_by: str | None = given.document.get("target")
    if asked is None or made_by is None:
        return asked or made_by
    if expanded(asked).resolve() != expanded(made_by).resolve():  # ids on the hub are compared too
        raise InputError(
            f"an output must be audited with the target that it was made by, '{made_by}', got --target '{asked}'; "
            'leave --target out, or take "target" out of the file if the two are one model'
        )
    return asked


def _is_ids(value: object) -> bool:
    return isinstance(value, list) and all(type(token_id) is int for token_id in value)


def _is_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


# what an audit reads in an output: name, what it must be, whether it is so
_KINDS: tuple[tuple[str, str, Callable[[Any], bool]], ...] = (
    ("token_ids", "a list of whole numbers", _is_ids),
    ("prompt_ids", "a list of whole numbers", _is_ids),
    ("text", "a text", _is_text),
    ("prompt", "a text", _is_text),
    ("target", "the name of a model", _is_text),
    ("dtype", "the name of a dtype", _is_text),
    ("exact", '"fixed_width" or null', lambda value: value == "fixed_width"),
    ("max_nodes", "a whole number", lambda value: type(value) is int and value >= 0),
    ("logits_processors", "a list of names", _is_names),
    ("ignore_eos", "true or false", lambda value: isinstance(value, bool)),
    ("temperature", "a number", lambda value: isinstance(value, (int, float))),
    ("do_sample", "true or false", lambda value: isinstance(value, bool)),
)
