"""Tools over HTTP: the template shows them, and what the model writes becomes `tool_calls`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from command import byte_level_tokenizer, for_transformers
from serving import Running, new_service, running
from test_grammar import target

from dynatree_core import Engine

TEMPLATE = (
    "{% if tools %}T{{ tools | length }}<tool_call>{% endif %}"
    "{% for m in messages %}<{{ m.role[:1] }}{{ m.name or '' }}>{{ m.content }}"
    "{% for c in m.tool_calls %}{{ c.function.name }}{{ c.function.arguments.city }}{% endfor %}{% endfor %}"
)
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
ASKED = [{"role": "user", "content": "Paris?"}]
# the tiny model writes what a grammar lets it write
CALL = r'(ab)?<tool_call>\{"name": "weather", "arguments": \{"city": "[a-f]{2,5}"\}\}</tool_call>'
BROKEN = r'<tool_call>\{"name": "weather", "argum[a-f]{2,5}'


def serving(template: str | None) -> Running:
    tokenizer = for_transformers(byte_level_tokenizer(), eos_token="<end>", chat_template=template)
    return running(new_service({"prompt_lookup": Engine(target(), "prompt_lookup", tokenizer=tokenizer)}))


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving(TEMPLATE) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    with server.openai() as client:
        yield client


def ask(client: openai.OpenAI, pattern: str, messages: list[dict[str, Any]] | None = None, **fields: Any) -> Any:
    return client.chat.completions.create(
        model="tiny", messages=messages or ASKED, tools=fields.pop("tools", [WEATHER]), temperature=0, max_tokens=120,
        extra_body={"structured_outputs": {"regex": pattern}}, **fields,
    )  # fmt: skip


def test_a_call_becomes_tool_calls(client):
    choice = ask(client, CALL).choices[0]
    (call,) = choice.message.tool_calls
    assert choice.finish_reason == "tool_calls"
    assert (call.type, call.function.name) == ("function", "weather")
    assert set(json.loads(call.function.arguments)) == {"city"}
    assert choice.message.content in (None, "ab")
    assert call.id.startswith("call_")


def test_a_stream_has_the_same_call_in_one_chunk(client):
    whole = ask(client, CALL).choices[0].message
    chunks = [chunk.choices[0] for chunk in ask(client, CALL, stream=True)]
    calls = [call for chunk in chunks for call in chunk.delta.tool_calls or []]
    assert [call.function for call in calls] == [
        type(calls[0].function)(**call.function.model_dump()) for call in whole.tool_calls
    ]
    assert "".join(chunk.delta.content or "" for chunk in chunks) == (whole.content or "")
    assert chunks[-1].finish_reason == "tool_calls"
    assert calls[0].index == 0


def test_what_is_no_call_stays_text(client):
    choice = ask(client, BROKEN).choices[0]
    assert choice.message.tool_calls is None
    assert choice.message.content.startswith('<tool_call>{"name": "weather", "argum')
    assert choice.finish_reason == "stop"


def test_text_without_a_call_is_text(client):
    choice = ask(client, "[a-f]{3,6}").choices[0]
    assert (choice.message.tool_calls, choice.finish_reason) == (None, "stop")


def test_the_template_sees_tools_calls_and_results(server):
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    talk = [
        *ASKED,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "name": "north", "content": "rain"},
    ]
    text = "<u>Paris?<a>weatherOslo<tnorth>rain"
    for tools, shown in (([WEATHER], "T1<tool_call>" + text), ([], text)):
        body = {"model": "tiny", "messages": talk, "tools": tools, "max_tokens": 1}
        answer = server.post("/v1/chat/completions", body)
        assert answer.json()["usage"]["prompt_tokens"] == len(shown), answer.text


def test_with_tool_choice_none_the_model_is_shown_none(server):
    body = {"model": "tiny", "messages": ASKED, "tools": [WEATHER], "tool_choice": "none", "max_tokens": 1}
    assert server.post("/v1/chat/completions", body).json()["usage"]["prompt_tokens"] == len("<u>Paris?")


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"tool_choice": "required"}, "tool_choice", "cannot be enforced"),
        ({"tool_choice": {"type": "function", "function": {"name": "weather"}}}, "tool_choice", "cannot be enforced"),
        ({"parallel_tool_calls": False}, "parallel_tool_calls", "several calls"),
        ({"tools": [{"type": "function", "function": {"name": "a", "strict": True}}]}, "tools", "strict"),
        ({"tools": [{"type": "retrieval"}]}, "tools.0.type", "should be 'function'"),
        ({"messages": [{"role": "user"}]}, "messages.0", "must have a content"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "a", "arguments": "{"}}]}]},
            "messages.0.tool_calls.0.function.arguments", "a JSON object",
        ),
        ({"functions": [{"name": "a"}]}, "functions", "replaced by 'tools'"),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_honoured_is_refused_by_name(server, fields, param, words):
    body = {"model": "tiny", "messages": ASKED, "tools": [WEATHER], **fields}
    answer = server.post("/v1/chat/completions", body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param), error
    assert words in error["message"]


def test_without_a_template_there_is_no_conversation_with_tools_either():
    with serving(None) as server:
        answer = server.post("/v1/chat/completions", {"model": "tiny", "messages": ASKED, "tools": [WEATHER]})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "no_chat_template")


def test_tools_that_this_conversation_does_not_show_are_refused():
    template = "{% if messages[0].role == 'system' %}" + TEMPLATE.replace("{% for", "{% endif %}{% for", 1)
    system = {"role": "system", "content": "a"}
    with serving(template) as server:
        answers = [
            server.post(
                "/v1/chat/completions", {"model": "tiny", "messages": talk, "tools": [WEATHER], "max_tokens": 1}
            )
            for talk in ([system, *ASKED], ASKED)
        ]
    assert [answer.status_code for answer in answers] == [200, 400]
    assert answers[1].json()["error"]["param"] == "tools"


@pytest.mark.parametrize("template", ["{{ messages }}", "{% if tools %}{{ tools }}{% endif %}{{ messages }}"])
def test_a_template_without_a_known_form_is_refused(template):
    with serving(template) as server:
        answer = server.post("/v1/chat/completions", {"model": "tiny", "messages": ASKED, "tools": [WEATHER]})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "tools")
