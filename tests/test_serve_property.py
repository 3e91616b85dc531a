"""`dynatree serve` under bodies of any kind: no failure, no hang, and each answer is that of its own request."""

from __future__ import annotations

import asyncio
import gc
import json
import weakref
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import POLICIES, SECONDS, Running, events, expected_text, new_engine, new_service, running, until

from dynatree_core.engine.handle import Handle
from dynatree_core.serve.refused import REFUSED
from dynatree_core.serve.schema import ChatBody, CompletionBody, TokenizeBody

NUM_EXAMPLES = settings().max_examples  # of the profile
ROUTES = ("/v1/completions", "/v1/chat/completions", "/tokenize")
FIELDS = sorted({*REFUSED, *ChatBody.model_fields, *CompletionBody.model_fields, *TokenizeBody.model_fields})
TEXTS = st.text("abcdehinrst .,!?'", min_size=1, max_size=16)

# right requests, of which the answer is known

COMPLETIONS = st.fixed_dictionaries(
    {"model": st.just("tiny"), "prompt": TEXTS, "max_tokens": st.integers(1, 8), "seed": st.integers(0, 2**62 - 9)},
    optional={
        "temperature": st.sampled_from([0, 0.5, 1, 2]),
        "top_p": st.sampled_from([0.3, 1]),
        "top_k": st.sampled_from([-1, 0, 1, 5]),
        "repetition_penalty": st.sampled_from([0.8, 1.5]),
        "n": st.integers(1, 3),
        "stop": st.one_of(TEXTS.map(lambda text: text[:2]), st.lists(TEXTS.map(lambda text: text[:2]), max_size=3)),
        "stream": st.booleans(),
        "user": st.text(max_size=5),
        "dynatree": st.fixed_dictionaries({}, optional={"policy": st.sampled_from(POLICIES)}),
        "best_of": st.none(),
    },
)

# anything else

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.sampled_from([[], {}, "tiny"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system", "tool", "developer", "nobody"])},
        optional={"content": st.text(max_size=10) | JSON, "tool_calls": JSON, "name": JSON},
    ),
    max_size=3,
)
BODIES = st.builds(
    lambda right, wrong: {**right, **wrong},
    st.fixed_dictionaries(
        {}, optional={"model": st.just("tiny"), "prompt": st.text(max_size=20), "messages": MESSAGES,
                      "max_tokens": st.integers(-1, 200)},
    ),
    st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=10), JSON, max_size=4),
)  # fmt: skip


def handles() -> list[Handle]:
    """All that are kept in this process."""
    gc.collect()
    return [one for one in gc.get_objects() if type(one) is Handle]


@pytest.fixture(scope="module")
def of_others() -> weakref.WeakSet[Handle]:
    """Those that tests of other files have left."""
    return weakref.WeakSet(handles())


@pytest.fixture(scope="module")
def server(of_others) -> Iterator[Running]:
    with running(new_service({"prompt_lookup": new_engine(max_sequences=3)})) as server:
        yield server


def expected(body: dict[str, Any]) -> list[str]:
    """The choices of a right request, by `generate`, and Python's `find` for stop texts."""
    options: dict[str, Any] = {name: body[name] for name in ("repetition_penalty",) if name in body}
    if body.get("temperature", 1) > 0:
        options |= {"do_sample": True, "temperature": float(body.get("temperature", 1))}
        options |= {"top_k": max(body.get("top_k", 0), 0), "top_p": body.get("top_p")}
    stops = [body["stop"]] if isinstance(body.get("stop"), str) else body.get("stop", [])
    texts = []
    for number in range(body.get("n", 1)):
        seed = {"seed": body["seed"] + number} if "do_sample" in options else {}
        text = expected_text(body["prompt"], body["max_tokens"], **options, **seed)
        ends = [place for stop in stops if (place := text.find(stop)) >= 0]
        texts.append(text[: min(ends, default=len(text))])
    return texts


async def answers(server: Running, bodies: list[dict[str, Any]]) -> list[list[str]]:
    """The choices of each request; all are asked at once."""

    async def ask(client: httpx2.AsyncClient, body: dict[str, Any]) -> list[str]:
        answer = await client.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        texts = [""] * body.get("n", 1)
        for record in events(iter(answer.text.splitlines())) if body.get("stream") else [answer.json()]:
            for choice in record["choices"]:
                texts[choice["index"]] += choice["text"]
        return texts

    async with httpx2.AsyncClient(base_url=server.address, timeout=SECONDS, trust_env=False) as client:
        return await asyncio.gather(*(ask(client, body) for body in bodies))


@settings(max_examples=NUM_EXAMPLES // 2)
@given(bodies=st.lists(COMPLETIONS, min_size=1, max_size=6))
def test_each_answer_is_that_of_its_own_request(server, bodies):
    assert asyncio.run(answers(server, bodies)) == [expected(body) for body in bodies]


@settings(max_examples=NUM_EXAMPLES * 2)
@given(route=st.sampled_from(ROUTES), body=BODIES | JSON)
def test_no_body_makes_the_server_fail(server, route, body):
    with server.http() as http:
        content = json.dumps(body).encode()  # NaN, halves of characters and all
        answer = http.post(route, content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code in (200, 400, 404), answer.text
    if answer.status_code != 200:
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["message"]
        assert error["code"] != "internal_error"


@given(route=st.sampled_from(ROUTES), content=st.binary(max_size=60))
def test_no_bytes_make_the_server_fail(server, route, content):
    with server.http() as http:
        assert http.post(route, content=content, headers={"Content-Type": "application/json"}).status_code == 400


def test_nothing_is_left_behind(server, of_others):
    """After all of the above: no sequence runs, and no client is counted."""
    service = server.service
    assert service.loop.is_alive
    assert (service.loop.num_open, service.clients._num_open) == (0, {})
    # a thread may still be on its way out of what has told of the end
    until(lambda: [handle for handle in handles() if handle not in of_others] == [])
    assert [(load.num_running, load.num_waiting) for load in service.loop.loads] == [(0, 0)]
