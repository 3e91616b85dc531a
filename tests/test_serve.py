"""`dynatree serve`: what OpenAI's client gets is what `generate` gives."""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import Iterator

import openai
import pytest
from serving import Running, chat_text, events, expected_text, new_service, running
from test_docs import DOCS, first_words, table

from dynatree_core.errors import InputError
from dynatree_core.serve.errors import ApiError
from dynatree_core.serve.schema import ChatBody, CompletionBody, Message
from dynatree_core.serve.text import AnswerText

PROMPTS = ["the cat sat on the mat. the cat", "a man a plan a canal", "re, in the beginning"]
MESSAGES = [{"role": "user", "content": "the cat sat on the mat"}]


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(new_service()) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    with server.openai() as client:
        yield client


@pytest.mark.parametrize("policy", ["fixed(depth=3)", "autoregressive"])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_completions(client, prompt, policy):
    found = client.completions.create(
        model="tiny", prompt=prompt, max_tokens=24, temperature=0, extra_body={"dynatree": {"policy": policy}}
    )
    assert found.choices[0].text == expected_text(prompt, 24)
    assert found.usage.dynatree["policy"] == policy


def test_greedy_chat(client):
    found = client.chat.completions.create(model="tiny", messages=MESSAGES, max_completion_tokens=20, temperature=0)
    assert found.object == "chat.completion"
    assert found.choices[0].message.content == expected_text(chat_text(MESSAGES[0]["content"]), 20)
    assert found.choices[0].message.role == "assistant"


def test_seeded_answers(client):
    sampling = {"temperature": 1.5, "top_p": 0.9}
    found = client.completions.create(model="tiny", prompt="the cat", max_tokens=16, seed=7, n=3, **sampling)
    expected = [expected_text("the cat", 16, do_sample=True, seed=7 + i, top_k=0, **sampling) for i in range(3)]
    assert [choice.text for choice in found.choices] == expected
    assert len(set(expected)) == 3


def test_streams(client):
    stream = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=20, temperature=0, stream=True,
        stream_options={"include_usage": True},
    )  # fmt: skip
    *chunks, last = stream
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.model_dump()["usage"] for chunk in chunks] == [None] * len(chunks)
    assert all("usage" in chunk.model_fields_set for chunk in chunks)  # as OpenAI's API has it
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == expected_text(chat_text(MESSAGES[0]["content"]), 20)
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] in ("length", "stop")
    assert last.choices == []
    assert last.usage.completion_tokens <= 20
    assert last.usage.dynatree["iterations"] <= last.usage.completion_tokens


@pytest.mark.parametrize("include_usage", [True, False])
def test_each_chunk_has_the_usage_by_then_where_it_was_asked_for(server, include_usage):
    options = {"continuous_usage_stats": True, "include_usage": include_usage}
    body = {"model": "tiny", "prompt": PROMPTS[:2], "max_tokens": 9, "temperature": 0, "n": 2}
    text = server.post("/v1/completions", {**body, "stream": True, "stream_options": options}).text
    records = [*events(iter(text.splitlines()))]
    counts = [record["usage"]["completion_tokens"] for record in records]
    assert counts == sorted(counts)
    assert (counts[0] < 9, counts[-1]) == (True, 36)
    assert {record["usage"]["prompt_tokens"] for record in records} == {sum(map(len, PROMPTS[:2]))}
    assert (records[-1]["choices"] == []) == include_usage


def test_many_at_once(server):
    """Mixed lengths, greedy and seeded, streamed and whole: each answer is that of its prompt alone."""

    async def ask(client: openai.AsyncOpenAI, number: int) -> str:
        options = {"model": "tiny", "prompt": PROMPTS[number % 3], "max_tokens": 5 + number, "seed": number}
        options["temperature"] = float(number % 2)
        if number % 4 < 2:
            return (await client.completions.create(**options)).choices[0].text
        stream = await client.completions.create(**options, stream=True)
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def ask_all() -> list[str]:
        async with server.async_openai() as client:
            return await asyncio.gather(*(ask(client, number) for number in range(20)))

    expected = [
        expected_text(PROMPTS[i % 3], 5 + i, **({"do_sample": True, "seed": i, "top_k": 0} if i % 2 else {}))
        for i in range(20)
    ]
    assert asyncio.run(ask_all()) == expected


def test_several_prompts(client):
    found = client.completions.create(model="alias", prompt=PROMPTS, max_tokens=6, temperature=0)
    assert [choice.text for choice in found.choices] == [expected_text(prompt, 6) for prompt in PROMPTS]
    assert found.usage.prompt_tokens == sum(map(len, PROMPTS))


def test_models_and_tokens(server, client):
    assert [model.id for model in client.models.list()] == ["tiny", "alias"]
    assert client.models.retrieve("tiny").owned_by == "dynatree"
    assert client.models.retrieve("tiny").root == "tiny"  # which vLLM's benchmark asks for
    assert server.post("/tokenize", {"prompt": "abc"}).json() == {"count": 3, "max_model_len": 160, "tokens": [0, 1, 2]}
    ids = server.post("/tokenize", {"messages": MESSAGES}).json()["tokens"]
    assert len(ids) == len(chat_text(MESSAGES[0]["content"]))
    with server.http() as http:
        assert http.get("/health").status_code == http.get("/health/live").status_code == 200


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"frequency_penalty": 3}, "frequency_penalty", "less than or equal to 2"),
        ({"logit_bias": {"a": 1}}, "logit_bias", "must have token ids for names"),
        ({"logit_bias": {"05": 100, "5": -100}}, "logit_bias", "such as \"17\", got '05'"),
        ({"logit_bias": {"5000": 1}}, "logit_bias", "logit_bias must name token ids"),
        ({"logit_bias": {"5": 101}}, "logit_bias", "less than or equal to 100"),
        ({"best_of": 2}, "best_of", "cannot be honoured"),
        ({"temprature": 1}, "temprature", "did you mean 'temperature'?"),
        ({"temperature": "1"}, "temperature", "should be a valid number"),
        ({"temperature": 3}, "temperature", "less than or equal to 2"),
        ({"temperature": 1e-40}, "temperature", "must be 0, which takes the most probable token, or at least 1e-05"),
        ({"repetition_penalty": 1e-40}, "repetition_penalty", "greater than or equal to 0.01"),
        ({"repetition_penalty": 1e40}, "repetition_penalty", "less than or equal to 100"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 99}, "n", "16 choices at most"),
        ({"max_tokens": 5000}, "max_tokens", "4096 tokens at most"),
        (
            {"max_tokens": 158},
            "prompt",
            "maximum context length is 160 tokens, got 7 of the prompt and 158 of the answer",
        ),
        ({"max_tokens": 158}, "prompt", "give a max_tokens of 153 at most"),
        ({"prompt": "a" * 160, "max_tokens": 1}, "prompt", "shorten the prompt to 159 tokens at most"),
        ({"prompt": "a" * 161, "max_tokens": None}, "prompt", "got 161 of the prompt and 1 of the answer"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens", "at most 'max_tokens', 4, got 5"),
        ({"min_tokens": 17}, "min_tokens", "at most 'max_tokens', 16, got 17"),
        (
            {"max_completion_tokens": 5},
            "max_completion_tokens",
            "no parameter of this route, but of /v1/chat/completions",
        ),
        ({"stop": 5}, "stop", "it should be a valid string, got 5"),
        ({"stop": ["a"] * 17}, "stop", "at most 16 items, not 17"),
        ({"logit_bias": [1]}, "logit_bias", "should be an object, got a list"),
        ({"dynatree": 5}, "dynatree", "should be an object, got 5"),
        ({"user": "a" * 999}, "user", 'at most 256 characters, got "' + "a" * 59 + "…"),
        ({"prompt_cache_key": "a"}, "prompt_cache_key", "are found without one"),
        ({"prompt": []}, "prompt", ""),
        ({"prompt": [1, 999]}, "prompt", "vocabulary"),
        ({"stop": [""]}, "stop.0", "at least 1 character"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "set 'stream' to true"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x", "no parameter"),
        ({"dynatree": {"policy": "fixed(depth=9)"}}, "dynatree.policy", "there are: fixed(depth=3), autoregressive"),
        ({"dynatree": {"drafter": "../model"}}, "dynatree.drafter", "there are: prompt_lookup"),
        ({"prompt": "a\ud800"}, "prompt", "UTF-8"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(server, fields, param, words):
    body = json.dumps({"model": "tiny", "prompt": "the cat", **fields})
    with server.http() as http:
        answer = http.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param), error
    assert words in error["message"]


def test_text_before_a_stop_text_that_is_complete_at_the_very_end_is_shown():
    """The answer ends within a character, which is U+FFFD when no token will come, and so is the stop text's last."""
    text = AnswerText(lambda ids: bytes(ids).decode(errors="replace"), ["abc", "b\ufffd"])
    assert [text.push([byte]) for byte in b"ab\xc3"] == ["", "", ""]
    assert (text.finish(), text.is_stopped) == ("a", True)


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_a_conversation_that_is_too_long_is_refused_as_clients_know_it(client, field):
    """By the code that OpenAI's API has, after which they shorten the conversation."""
    long = [{"role": "user", "content": "a" * 150}]
    with pytest.raises(openai.BadRequestError, match=f"give a {field} of 8 at most") as refused:
        client.chat.completions.create(model="tiny", messages=long, **{field: 9})
    assert (refused.value.code, refused.value.param) == ("context_length_exceeded", "messages")
    assert client.chat.completions.create(model="tiny", messages=long, **{field: 8}).choices
    with pytest.raises(openai.BadRequestError, match="4096 tokens at most here, got 5000") as refused:
        client.chat.completions.create(model="tiny", messages=long, **{field: 5000})
    assert refused.value.param == field


@pytest.mark.parametrize(
    ("message", "field"),
    [({"role": "user", "content": "a", "name": "eve"}, "name"),
     ({"role": "assistant", "content": "a", "tool_calls": [{"function": {"name": "f"}}]}, "tool_calls")],
)  # fmt: skip
def test_what_the_template_does_not_show_is_refused(server, message, field):
    answer = server.post("/v1/chat/completions", {"model": "tiny", "messages": [*MESSAGES, message]})
    assert answer.status_code == 400
    assert f"does nothing with the '{field}' of a message" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("template", "shown", "field"),
    [
        ("{% if m.role == 'tool' %}{{ m.name }}{% endif %}{{ m.content }}", [0], "name"),
        ("{% if m.name == 'eve' %}e{% endif %}{{ m.content }}", [0, 1], "name"),
        ("{% if m.role == 'tool' %}{{ m['name'] | tojson }}{% endif %}{{ m.content }}", [0], "name"),
        ("{{ m.content or m.tool_calls[0].function.name }}", [2], "tool_calls"),
        ("{{ m.content or m.tool_calls | tojson }}", [2], "tool_calls"),
    ],
)
def test_each_kind_of_message_must_be_shown(template, shown, field):
    """That a field of another message is shown does not make up for one that is not."""
    messages = [
        {"role": "tool", "content": "b", "name": "eve"},
        {"role": "user", "content": "a", "name": "eve"},
        {"role": "assistant", "tool_calls": [{"function": {"name": "eve"}}]},
        {"role": "assistant", "content": "c", "tool_calls": [{"function": {"name": "eve"}}]},
    ]
    reader = new_service().reader
    reader.tokenizer.chat_template = "{% for m in messages %}" + template + "{% endfor %}"
    alike = [place for place, message in enumerate(messages) if field in message]
    for places in ([place] for place in alike), [alike]:
        for some in places:
            read = functools.partial(reader.conversation_ids, [Message(**messages[place]) for place in some])
            missing = next((number for number, place in enumerate(some) if place not in shown), None)
            if missing is None:
                assert read()
            else:
                with pytest.raises(ApiError, match=f"'{field}' of a message such as messages.{missing};"):
                    read()


@pytest.mark.parametrize(
    ("call", "arguments"),
    [("a | tojson", "{}"), ("1 // c.arguments.x", '{"x": 0}'), ("c.arguments.x", '{"x": "\\ud800"}')],
    ids=["TypeError", "ZeroDivisionError", "UnicodeEncodeError"],
)
def test_what_a_template_fails_with_is_refused(call, arguments):
    reader = new_service().reader
    reader.tokenizer.chat_template = "{% set c = messages[0].tool_calls[0].function %}{{ " + call + " }}"
    message = Message(role="assistant", tool_calls=[{"function": {"name": "f", "arguments": arguments}}])
    with pytest.raises(InputError, match="must take a conversation of assistant, but refuses it"):
        reader.conversation_ids([message])


def test_a_refusal_is_an_error_of_the_client(client):
    with pytest.raises(openai.BadRequestError, match="'top_k' cannot be used") as refused:
        client.completions.create(model="tiny", prompt="the cat", extra_body={"top_k": "all"})
    assert refused.value.param == "top_k"


def test_another_model_is_not_found(client):
    with pytest.raises(openai.NotFoundError) as refused:
        client.completions.create(model="gpt-4", prompt="a")
    assert (refused.value.param, refused.value.code) == ("model", "model_not_found")


@pytest.mark.parametrize("neutral", [{"logprobs": None}, {"logit_bias": {}}, {"presence_penalty": 0}, {"best_of": 1}])
def test_neutral_values_ask_for_nothing(client, neutral):
    found = client.completions.create(model="tiny", prompt="the cat", max_tokens=4, temperature=0, **neutral)
    assert found.choices[0].text == expected_text("the cat", 4)


def test_the_page_lists_every_route(server):
    rows = first_words(table(DOCS / "serve.md", "route", "what it does"))
    app = server.process.config.app
    routes = {
        f"{method} {route.path}"
        for route in app.routes
        for method in route.methods
        if method not in ("HEAD", "OPTIONS")
    }
    assert set(rows) == {route.replace("/{name:path}", "") for route in routes}
    with server.http() as http:
        assert set(http.get("/openapi.json").json()["paths"]) >= {"/v1/completions", "/v1/chat/completions"}


def test_the_page_lists_every_field():
    rows = first_words(table(DOCS / "serve.md", "field", "option", "where it is missing"))
    listed = {row.split(".")[0] for row in rows}
    assert {*ChatBody.model_fields, *CompletionBody.model_fields} - {"model", "prompt", "messages"} <= listed
