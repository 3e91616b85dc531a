"""Tools of a conversation: which form of calls a chat template teaches its model, and the calls in an answer.

A model calls a tool by writing. How it writes is what its chat template has shown it, so the form is read off the
template: Hermes' and Qwen's `<tool_call>{json}</tool_call>`, Mistral's `[TOOL_CALLS][{json}, …]`, and Llama 3's JSON
with `parameters`. Others are not guessed at.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import attrs

from dynatree_core.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["FORMS", "ToolCall", "ToolForm", "ToolText", "form_of", "text_with_marker"]


@attrs.frozen
class ToolCall:
    """One call that a model has written."""

    name: str
    arguments: str  # a JSON object, as the model wrote its values


@attrs.frozen
class ToolForm:
    """How calls are written."""

    name: str
    marker: str  # calls begin with it; what stands before is text
    is_marker_needed: bool  # without: an answer that begins with "{" is a call too
    # of a text that begins with the marker, the text beside the calls, and the calls; ValueError: it has none
    read: Callable[[str], tuple[str, list[ToolCall]]]
    is_taught_by: Callable[[str], bool]  # whether a chat template shows this form


_HERMES_CALL = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.S)


def _hermes(text: str) -> tuple[str, list[ToolCall]]:
    calls = [_call(json.loads(part.strip()), "arguments") for part in _HERMES_CALL.findall(text)]
    return _HERMES_CALL.sub("", text).strip(), calls


def _mistral(text: str) -> tuple[str, list[ToolCall]]:
    calls = json.loads(text.removeprefix("[TOOL_CALLS]"))
    return "", [_call(call, "arguments") for call in (calls if isinstance(calls, list) else [calls])]


def _llama(text: str) -> tuple[str, list[ToolCall]]:
    decoder, rest, calls = json.JSONDecoder(), text.removeprefix("<|python_tag|>").strip(), []
    while rest:
        call, end = decoder.raw_decode(rest)
        calls.append(_call(call, "parameters"))
        rest = rest[end:].lstrip("; \n")
    return "", calls


def _call(record: Any, key: str) -> ToolCall:
    if not isinstance(record, dict) or not isinstance(record.get("name"), str):
        raise ValueError("a call must have a name")
    arguments = record.get(key, {})
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    if not isinstance(arguments, dict):
        raise ValueError(f"a call's {key} must be a mapping")
    # Python reads and writes NaN, infinities and halves of characters, which are no JSON
    call = ToolCall(record["name"], json.dumps(arguments, ensure_ascii=False, allow_nan=False))
    (call.name + call.arguments).encode()
    return call


FORMS = (
    ToolForm("hermes", "<tool_call>", True, _hermes, lambda text: "<tool_call>" in text and "<function=" not in text),
    ToolForm("mistral", "[TOOL_CALLS]", True, _mistral, lambda text: "[TOOL_CALLS]" in text and "[ARGS]" not in text),
    ToolForm(
        "llama", "<|python_tag|>", False, _llama, lambda text: "<|python_tag|>" in text and '"parameters"' in text
    ),
)


def form_of(tokenizer: PreTrainedTokenizerBase, tools: list[dict[str, Any]]) -> ToolForm:
    """The form that the tokenizer's chat template teaches.

    Raises:
        InputError: it does nothing with tools, or teaches a form that is not known here.
    """
    template = str(tokenizer.get_chat_template(tools=tools))
    if not re.search(r"\btools\b", template):
        raise InputError("tools need a chat template that shows them to the model, got one that does nothing with them")
    for form in FORMS:
        if form.is_taught_by(template):
            return form
    known = ", ".join(f"{form.name} ({form.marker})" for form in FORMS)
    raise InputError(
        "tools need a chat template that teaches calls in a form that is known here, got another one; there are: "
        f"{known}. Ask without 'tools' and read the answer yourself"
    )


def text_with_marker(form: ToolForm, tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> str:
    """The text of tokens without special ones, but with the marker, which may be one."""
    marker_id = tokenizer.convert_tokens_to_ids(form.marker)
    special = set(tokenizer.all_special_ids) - {marker_id}
    shown = [token_id for token_id in token_ids if token_id not in special]
    return str(tokenizer.decode(shown, skip_special_tokens=False, clean_up_tokenization_spaces=False))


class ToolText:
    """Parts an answer into what is text for the reader and what is calls, as the text comes.

    What may yet become a call is held back. What looks like a call and is none, since its JSON is broken or the answer
    was cut off inside it, is text.

    Args:
        form: how calls are written.
    """

    def __init__(self, form: ToolForm) -> None:
        self._form = form
        self._held = ""  # characters that nobody was given
        self._is_call = False  # whether what is held begins a call
        self._is_start = True  # whether nothing but blanks has come

    def push(self, piece: str) -> str:
        """The characters that this piece lets the reader have."""
        self._held += piece
        if self._is_call:
            return ""
        start = self._call_start()
        if start is None:
            start = len(self._held) - self._num_held()
        else:
            self._is_call = True
        shown, self._held = self._held[:start], self._held[start:]
        self._is_start = self._is_start and not shown.strip()
        return shown

    def finish(self) -> tuple[str, list[ToolCall]]:
        """What was held back, as text or as calls, when no more will come."""
        held, self._held = self._held, ""
        if not self._is_call:
            return held, []
        try:
            rest, calls = self._form.read(held.strip())
        except (ValueError, RecursionError):
            return held, []
        return (rest, calls) if calls else (held, [])

    def _call_start(self) -> int | None:
        """Where in what is held a call begins."""
        begins_with_json = not self._form.is_marker_needed and self._is_start and self._held.lstrip()[:1] == "{"
        if begins_with_json:
            return len(self._held) - len(self._held.lstrip())
        place = self._held.find(self._form.marker)
        return None if place < 0 else place

    def _num_held(self) -> int:
        """Characters at the end of what is held that may be the beginning of a marker."""
        marker = self._form.marker
        lengths = range(min(len(self._held), len(marker) - 1), 0, -1)
        return next((length for length in lengths if self._held.endswith(marker[:length])), 0)
