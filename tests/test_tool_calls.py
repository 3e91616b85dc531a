"""Calls of tools in answers: the form is the chat template's, and nothing of an answer is lost."""

from __future__ import annotations

import json

import pytest
from command import byte_level_tokenizer, for_transformers
from hypothesis import given
from hypothesis import strategies as st

from dynatree_core.errors import InputError
from dynatree_core.text.tools import FORMS, ToolCall, ToolText, form_of, text_with_marker

HERMES, MISTRAL, LLAMA = FORMS
PARIS, OSLO = ToolCall("weather", '{"city": "Paris"}'), ToolCall("time", "{}")
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]
# as checkpoints of these families have it, shortened to what matters
TEMPLATES = {
    "hermes": "{% if tools %}{{ tools | tojson }} answer with <tool_call>{{ '{' }}...}</tool_call>{% endif %}",
    "mistral": "{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}{% endif %}{{ '[TOOL_CALLS]' }}",
    "llama": '{% if tools %}{{ tools }}{"name": ..., "parameters": ...}{% endif %}<|python_tag|>',
}
ASK = '{"name": "weather", "arguments": {"city": "Paris"}}'
ASK_LLAMA = ASK.replace("arguments", "parameters")
QUOTED = '{"name": "weather", "arguments": "{\\"city\\": \\"Paris\\"}"}'
ANSWERS = [
    (HERMES, f"Let me see.\n<tool_call>\n{ASK}\n</tool_call>", "Let me see.\n", [PARIS]),
    (HERMES, f'<tool_call>{ASK}</tool_call>\n<tool_call>{{"name": "time"}}</tool_call>', "", [PARIS, OSLO]),
    (HERMES, f"<tool_call>{QUOTED}", "", [PARIS]),
    (
        HERMES,
        f"One. <tool_call>{ASK}</tool_call> Two. <tool_call>{ASK}</tool_call>\nThree.",
        "One. Two. \nThree.",
        [PARIS] * 2,
    ),
    (HERMES, f"<tool_call>{' ' * 2_000}{ASK}{' ' * 2_000}</tool_call>", "", [PARIS]),
    (MISTRAL, f'Sure. [TOOL_CALLS][{ASK}, {{"name": "time", "arguments": {{}}}}]', "Sure. ", [PARIS, OSLO]),
    (MISTRAL, '[TOOL_CALLS] {"name": "time", "arguments": {}}', "", [OSLO]),
    (LLAMA, ASK_LLAMA, "", [PARIS]),
    (LLAMA, f'\n<|python_tag|>{ASK_LLAMA}; {{"name": "time", "parameters": {{}}}}', "\n", [PARIS, OSLO]),
]
NO_CALLS = [
    (HERMES, "no call at all"),
    (HERMES, "a < b, and <tool_ is no marker"),
    (HERMES, '<tool_call>{"name": "weather", "argum'),
    (HERMES, '<tool_call>{"arguments": {}}</tool_call>'),
    (HERMES, '<tool_call>{"name": "a", "arguments": [1]}</tool_call>'),
    (HERMES, '<tool_call>["weather"]</tool_call>'),
    (HERMES, f"<tool_call>x{' ' * 2_000}y</tool_call>"),
    (HERMES, '<tool_call>{"name": "a", "arguments": {"b": NaN}}</tool_call>'),
    (HERMES, '<tool_call>{"name": "a", "arguments": {"b": 1e999}}</tool_call>'),
    (MISTRAL, "[TOOL_CALLS]"),
    (MISTRAL, "[TOOL_CALLS][]"),
    (LLAMA, '{"name": "weather", "parameters": {"city": "Paris"}'),
    (LLAMA, "{x} and more"),
    (LLAMA, 'As JSON: {"name": "weather", "parameters": {}}'),
    (LLAMA, "<|python_tag|>print(1)"),
]


def parted(form, pieces: list[str]) -> tuple[str, list[ToolCall]]:
    text = ToolText(form)
    shown = [text.push(piece) for piece in pieces]
    rest, calls = text.finish()
    return "".join(shown) + rest, calls


def of_template(template: str):
    return for_transformers(byte_level_tokenizer(), chat_template=template)


@pytest.mark.parametrize("place", range(len(ANSWERS)))
@given(data=st.data())
def test_calls_are_read_however_the_text_comes(place, data):
    form, answer, text, calls = ANSWERS[place]
    cuts = sorted(data.draw(st.lists(st.integers(0, len(answer)), max_size=12)))
    pieces = [answer[start:end] for start, end in zip([0, *cuts], [*cuts, len(answer)], strict=True)]
    assert parted(form, pieces) == (text, calls)
    assert parted(form, [*answer]) == (text, calls)


@pytest.mark.parametrize(("form", "answer"), NO_CALLS, ids=lambda one: one if isinstance(one, str) else one.name)
def test_what_is_no_call_is_text_and_none_of_it_is_lost(form, answer):
    assert parted(form, [answer]) == parted(form, [*answer]) == (answer, [])


@given(st.sampled_from(FORMS), st.lists(st.text("<tool_call>[TOOL_CALLS]{}|python ", max_size=9), max_size=9))
def test_any_text_comes_out_whole_unless_it_is_a_call(form, pieces):
    text, calls = parted(form, pieces)
    assert "".join(pieces).startswith(text)
    assert calls or text == "".join(pieces)


def test_text_before_a_call_is_shown_as_it_comes():
    text = ToolText(HERMES)
    assert [text.push(piece) for piece in ("Let me", " see <", "b <tool", "_call>{")] == ["Let me", " see ", "<b ", ""]


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_form_is_that_of_the_template(name):
    assert form_of(of_template(TEMPLATES[name]), TOOLS).name == name


def test_of_several_templates_the_one_for_tools_counts():
    tokenizer = of_template(TEMPLATES["mistral"])
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": TEMPLATES["hermes"]}
    assert form_of(tokenizer, TOOLS).name == "hermes"


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ messages }}", "does nothing with them"),
        ("{% if tools %}<tool_call><function=name>{% endif %}", "a form that is known here"),
        ("{% if tools %}[TOOL_CALLS]name[ARGS]{% endif %}", "a form that is known here"),
        ("{% if tools %}{{ tools }}{% endif %}", "a form that is known here"),
    ],
)
def test_other_templates_are_refused(template, words):
    with pytest.raises(InputError, match=words):
        form_of(of_template(template), TOOLS)


@pytest.mark.parametrize("call", [{"name": "\ud800"}, {"name": "a", "arguments": {"b": "\ud800"}}], ids=str)
def test_a_call_with_half_a_character_stays_text(call):
    """Which no answer can have."""
    answer = f"<tool_call>{json.dumps(call)}</tool_call>"
    assert parted(HERMES, [answer]) == (answer, [])


def test_arguments_are_json_whatever_letters_they_have():
    _, calls = HERMES.read('<tool_call>{"name": "say", "arguments": {"text": "größer 🌲"}}</tool_call>')
    assert json.loads(calls[0].arguments) == {"text": "größer 🌲"}
    assert "🌲" in calls[0].arguments


def test_a_marker_that_is_a_special_token_is_text_and_other_special_tokens_are_not():
    tokenizer = of_template(TEMPLATES["mistral"])
    tokenizer.add_special_tokens({"eos_token": "<end>", "extra_special_tokens": ["[TOOL_CALLS]"]})
    token_ids = tokenizer("a[TOOL_CALLS][]<end>").input_ids
    assert text_with_marker(MISTRAL, tokenizer, token_ids) == "a[TOOL_CALLS][]"
    assert tokenizer.decode(token_ids, skip_special_tokens=True) == "a[]"
