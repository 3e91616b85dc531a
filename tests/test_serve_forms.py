"""What an answer must be, asked over HTTP: bias, penalties, JSON and regular expressions, as `generate` has them."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from serving import Running, events, new_service, running
from test_grammar import SCHEMA, target, tokenizer

from dynatree_core import Engine, Grammar, generate
from dynatree_core.serve.schema import CompletionBody
from dynatree_core.text.stream import decode_text

PROMPT = "Hello"


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    engine = Engine(target(), "prompt_lookup", tokenizer=tokenizer())
    with running(new_service({"prompt_lookup": engine})) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    with server.openai() as client:
        yield client


def expected(num_tokens: int, **options: Any) -> str:
    prompt = tokenizer()(PROMPT).input_ids
    result = generate(
        target(), None, prompt, policy="autoregressive", max_new_tokens=num_tokens, tokenizer=tokenizer(), **options
    )
    return decode_text(tokenizer(), result.token_ids)


def ask(client: openai.OpenAI, num_tokens: int, **fields: Any) -> Any:
    return client.completions.create(model="tiny", prompt=PROMPT, max_tokens=num_tokens, temperature=0, **fields)


@pytest.mark.parametrize(
    ("fields", "options"),
    [
        ({"presence_penalty": 1.5}, {"presence_penalty": 1.5}),
        ({"frequency_penalty": -0.5}, {"frequency_penalty": -0.5}),
        ({"logit_bias": {"65": 30, "66": -100}}, {"logit_bias": {65: 30.0, 66: -100.0}}),
        ({"presence_penalty": 1, "logit_bias": {"65": 9.5}}, {"presence_penalty": 1.0, "logit_bias": {65: 9.5}}),
    ],
    ids=str,
)
def test_bias_and_penalties(client, fields, options):
    found = ask(client, 24, **fields)
    assert found.choices[0].text == expected(24, **options)
    assert found.choices[0].text != expected(24)


@pytest.mark.parametrize("seed", [None, 3])
def test_a_schema(client, seed):
    format_ = {"type": "json_schema", "json_schema": {"name": "thing", "schema": SCHEMA, "strict": True}}
    sampling = {} if seed is None else {"do_sample": True, "seed": seed, "top_k": 0}
    fields = {} if seed is None else {"seed": seed}
    found = client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=600, temperature=0 if seed is None else 1,
        extra_body={"response_format": format_}, **fields,
    )  # fmt: skip
    assert found.choices[0].text == expected(600, grammar=Grammar.json_schema(SCHEMA), **sampling)
    assert set(json.loads(found.choices[0].text)) == {"name", "kind", "sizes"}
    assert found.choices[0].finish_reason == "stop"


def test_json_of_any_kind_and_text(client):
    found = ask(client, 40, extra_body={"response_format": {"type": "json_object"}})
    assert found.choices[0].text == expected(40, grammar=Grammar.json_schema({"type": "object"}))
    assert found.choices[0].text.lstrip()[:1] == "{"
    assert ask(client, 40, extra_body={"response_format": {"type": "text"}}).choices[0].text == expected(40)


def test_no_client_breaks_a_line_within_an_event(server):
    """httpx reads lines as `str.splitlines` does; each of these characters is several tokens, too."""
    text = "\u2028a\u2029\u0085🌲"
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 40, "temperature": 0, "stream": True}
    asked = {**body, "structured_outputs": {"regex": text}}
    with server.http() as http, http.stream("POST", "/v1/completions", json=asked) as stream:
        records = [*events(stream.iter_lines())]
    assert "".join(record["choices"][0]["text"] for record in records) == text
    assert records[-1]["choices"][0]["finish_reason"] == "stop"


@settings(max_examples=settings().max_examples // 4)
@given(
    text=st.text("aé🎄日\ufffd", min_size=1, max_size=8),
    stops=st.lists(st.text("aé🎄日\ufffd", min_size=1, max_size=2), max_size=2),
)
@example(text="é", stops=[])  # two tokens, in two chunks
@example(text="aab", stops=["ab"])  # its beginning is held back twice
def test_a_stream_counts_characters_as_the_whole(client, text, stops):
    """Also where a character, or what may become a stop text, is shown with a later chunk than its first token."""
    fields = {"stop": stops, "logprobs": 0, "extra_body": {"structured_outputs": {"regex": text}}}
    whole = ask(client, 40, **fields).choices[0]
    chunks = [chunk.choices[0] for chunk in ask(client, 40, stream=True, **fields)]
    assert "".join(chunk.text for chunk in chunks) == whole.text
    offsets = [offset for chunk in chunks if chunk.logprobs for offset in chunk.logprobs.text_offset]
    assert offsets == whole.logprobs.text_offset
    begun = [place + (byte > 0) for place, character in enumerate(text) for byte in range(len(character.encode()))]
    assert offsets == [*begun, len(text)][: len(offsets)]  # a token for each byte, and the end token


def test_a_regex_in_a_stream(client):
    fields = {"structured_outputs": {"regex": "[a-f]{3,9}(-[0-9]{2})*"}}
    chunks = [*ask(client, 40, stream=True, extra_body=fields)]
    text = "".join(chunk.choices[0].text for chunk in chunks)
    assert text == expected(40, grammar=Grammar.regex("[a-f]{3,9}(-[0-9]{2})*"))
    assert re.match("[a-f]{3,9}", text)


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format", "must have a 'json_schema'"),
        (
            {"response_format": {"type": "json_object", "json_schema": {"schema": {"type": "integer"}}}},
            "response_format", "of the type 'json_object' has no schema",
        ),
        (
            {"response_format": {"type": "text", "json_schema": {"schema": {"type": "integer"}}}},
            "response_format", "of the type 'text' has no schema",
        ),
        ({"response_format": {"type": "xml"}}, "response_format.type", "should be 'text'"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "objec"}}}},
            "response_format", "does not take this json_schema",
        ),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs", "does not take this regex"),
        ({"structured_outputs": {"regex": "a", "json": {}}}, "structured_outputs", "either 'json' or 'regex'"),
        ({"structured_outputs": {"choice": ["a"]}}, "structured_outputs.choice", "no parameter"),
        (
            {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
            "structured_outputs", "two ways",
        ),
        ({"structured_outputs": {"regex": "a"}, "ignore_eos": True}, "structured_outputs", "needs an end token"),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_followed_is_refused_by_name(server, fields, param, words):
    answer = server.post("/v1/completions", {"model": "tiny", "prompt": PROMPT, **fields})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param), error
    assert words in error["message"]


def test_without_llguidance_a_form_is_refused_with_the_extras_name(server, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    fields = {"response_format": {"type": "json_object"}}
    answer = server.post("/v1/completions", {"model": "tiny", "prompt": PROMPT, **fields})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "response_format"
    assert "dynatree[grammar]" in answer.json()["error"]["message"]


def test_the_choices_of_a_request_have_their_grammar_read_once(monkeypatch):
    from llguidance import LLMatcher

    read, make = [], LLMatcher.grammar_from_json_schema
    monkeypatch.setattr(LLMatcher, "grammar_from_json_schema", lambda *a, **k: read.append(1) or make(*a, **k))
    engine = Engine(target(), "prompt_lookup", tokenizer=tokenizer())
    schema = {"type": "object", "properties": {"once": {"type": "integer"}}}
    body = CompletionBody(
        model="tiny", prompt=PROMPT, n=4, max_tokens=4,
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
    )  # fmt: skip
    asked = new_service({"prompt_lookup": engine}).reader.completion(body)
    assert (len(asked.requests), len(read)) == (4, 1)
