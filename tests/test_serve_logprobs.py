"""Log-probabilities over HTTP are those of `generate`, and chunks say how their tokens came about."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from command import SAMPLES, byte_fallback_tokenizer, byte_level_tokenizer, for_transformers
from serving import POLICIES, TARGET, Running, chat_text, new_service, running
from tiny_folder import TEXTS, tiny_tokenizer

from dynatree_core import TokenLogprob, generate
from dynatree_core.serve.content import chat_logprobs, completion_logprobs
from dynatree_core.serve.tokens import TokenTexts

PROMPT = "the cat sat on the mat. the cat"
MESSAGES = [{"role": "user", "content": "the cat sat"}]
SAMPLED = {"temperature": 1.4, "seed": 5}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(new_service()) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    with server.openai() as client:
        yield client


def expected(prompt: str, num_tokens: int, num_top: int, **options: Any) -> list[TokenLogprob]:
    found = generate(
        TARGET, None, tiny_tokenizer()(prompt).input_ids, policy="autoregressive", max_new_tokens=num_tokens,
        logprobs=num_top, **options,
    ).logprobs  # fmt: skip
    assert found is not None
    return found


def same(found: list[float], wanted: list[float]) -> bool:
    return len(found) == len(wanted) and all(map(lambda a, b: math.isclose(a, b, abs_tol=1e-5), found, wanted))


@pytest.mark.parametrize("sampling", [{"temperature": 0}, SAMPLED], ids=["greedy", "seeded"])
@pytest.mark.parametrize("policy", POLICIES)
def test_of_a_completion(client, policy, sampling):
    options = {} if sampling["temperature"] == 0 else {"do_sample": True, "top_k": 0, **sampling}
    wanted = expected(PROMPT, 12, 2, **options)
    found = client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=12, logprobs=2, extra_body={"dynatree": {"policy": policy}}, **sampling
    ).choices[0]
    assert found.logprobs.tokens == [TEXTS[one.token_id] for one in wanted]
    assert same(found.logprobs.token_logprobs, [one.logprob for one in wanted])
    for top, one in zip(found.logprobs.top_logprobs, wanted, strict=True):
        assert set(top) == {TEXTS[token] for token, _ in one.top} | {TEXTS[one.token_id]}
    for offset, text in zip(found.logprobs.text_offset, found.logprobs.tokens, strict=True):
        assert found.text[offset:].startswith(text) or text == "?"


@pytest.mark.parametrize("num_top", [None, 0, 3])
def test_of_a_chat(client, num_top):
    wanted = expected(chat_text("the cat sat"), 10, num_top or 0)
    asked = {} if num_top is None else {"top_logprobs": num_top}
    found = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=10, temperature=0, logprobs=True, **asked
    )
    content = found.choices[0].logprobs.content
    assert [one.token for one in content] == [TEXTS[one.token_id] for one in wanted]
    assert [one.bytes for one in content] == [[*one.token.encode()] for one in content]
    assert same([one.logprob for one in content], [one.logprob for one in wanted])
    assert [[one.token for one in each.top_logprobs] for each in content] == [
        [TEXTS[token] for token, _ in one.top] for one in wanted
    ]


@pytest.mark.parametrize(
    "tokenizer", [byte_level_tokenizer(), byte_level_tokenizer(num_merges=60), byte_fallback_tokenizer()]
)
@pytest.mark.parametrize("text", ["aé🎄b🌲", "日本 naïve", *SAMPLES])
def test_bytes_of_tokens_are_those_of_the_text(tokenizer, text):
    """Parts of characters too: together they are the text, and each offset is that of the character it is in."""
    listed = [TokenLogprob(token_id, -0.5, ()) for token_id in tokenizer.encode(text).ids]
    tokens = TokenTexts(for_transformers(tokenizer))
    known = [one["bytes"] for one in chat_logprobs(listed, tokens)["content"]]
    assert bytes(itertools.chain.from_iterable(known)).decode().strip() == text.strip()
    record = completion_logprobs(listed, tokens, 5)
    begun = list(itertools.accumulate(sum(byte & 0xC0 != 0x80 for byte in part) for part in known))
    assert record["text_offset"] == [5, *(5 + number for number in begun[:-1])]


def test_a_special_token_is_no_part_of_the_text():
    tokenizer = for_transformers(byte_level_tokenizer(), eos_token="<end>")
    a, end = tokenizer.convert_tokens_to_ids(["a", "<end>"])
    listed = [TokenLogprob(token_id, -0.5, ()) for token_id in (a, end, a, a)]
    record = completion_logprobs(listed, TokenTexts(tokenizer), 0)
    assert (record["tokens"], record["text_offset"]) == (["a", "<end>", "a", "a"], [0, 1, 1, 2])


def test_parts_of_characters_have_names_that_tell_them_apart():
    tokenizer = byte_level_tokenizer()
    listed = [TokenLogprob(first, -0.5, ((second, -1.0),)) for first, second in [tokenizer.encode("é").ids]]
    tokens = TokenTexts(for_transformers(tokenizer))
    assert completion_logprobs(listed, tokens, 0)["top_logprobs"] == [{r"bytes:\xc3": -0.5, r"bytes:\xa9": -1.0}]
    (one,) = chat_logprobs(listed, tokens)["content"]
    assert (one["token"], one["bytes"], one["top_logprobs"][0]["bytes"]) == ("\ufffd", [0xC3], [0xA9])


def test_a_part_of_a_character_that_the_vocabulary_does_not_write_has_no_bytes():
    tokens = TokenTexts(tiny_tokenizer())
    tokens.text = ["\ufffd", "é"].__getitem__
    listed = [TokenLogprob(0, -0.5, ((1, -1.0),))]
    (one,) = chat_logprobs(listed, tokens)["content"]
    assert (one["token"], one["bytes"]) == ("\ufffd", None)
    assert one["top_logprobs"] == [{"token": "é", "logprob": -1.0, "bytes": [0xC3, 0xA9]}]
    assert completion_logprobs(listed, tokens, 0)["tokens"] == ["\ufffd"]


def test_a_stream_has_those_of_the_whole(client):
    asked = {"model": "tiny", "prompt": PROMPT, "max_tokens": 20, "temperature": 0, "logprobs": 1}
    whole = client.completions.create(**asked).choices[0].logprobs
    chunks = [chunk.choices[0].logprobs for chunk in client.completions.create(**asked, stream=True)]
    chunks = [chunk for chunk in chunks if chunk is not None]
    assert len(chunks) > 1
    for field in ("tokens", "text_offset", "top_logprobs"):
        assert [one for chunk in chunks for one in getattr(chunk, field)] == getattr(whole, field)


def test_who_does_not_ask_gets_none(client):
    found = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=4, temperature=0)
    assert found.choices[0].logprobs is None


def test_chunks_say_who_proposed_each_token(server):
    body = {
        "model": "tiny", "messages": MESSAGES, "max_tokens": 40, "temperature": 0, "stream": True,
        "stream_options": {"include_usage": True}, "dynatree": {"steps": True},
    }  # fmt: skip
    lines = server.post("/v1/chat/completions", body).text.split("\n\n")
    records = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    steps = [record["dynatree"] for record in records if "dynatree" in record]
    text = "".join(record["choices"][0]["delta"].get("content", "") for record in records if record["choices"])
    usage = records[-1]["usage"]
    assert "".join(piece for step in steps for piece in step["texts"]) == text
    assert sum(step["accepted"] for step in steps) == usage["dynatree"]["accepted_tokens"] > 0
    assert sum(step["drafted"] for step in steps) == usage["dynatree"]["drafted_tokens"]
    assert all(step["accepted"] <= len(step["texts"]) for step in steps)


@pytest.mark.parametrize(
    ("route", "fields", "param"),
    [
        ("/v1/completions", {"prompt": "a", "logprobs": 21}, "logprobs"),
        ("/v1/completions", {"prompt": "a", "logprobs": True}, "logprobs"),
        ("/v1/chat/completions", {"messages": MESSAGES, "top_logprobs": 3}, "top_logprobs"),
        ("/v1/chat/completions", {"messages": MESSAGES, "logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ("/v1/chat/completions", {"messages": MESSAGES, "logprobs": 3}, "logprobs"),
    ],
)
def test_other_numbers_are_refused_by_name(server, route, fields, param):
    answer = server.post(route, {"model": "tiny", **fields})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
