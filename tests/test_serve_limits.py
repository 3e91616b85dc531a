"""`dynatree serve`: what it does not take, whom it does not wait for, and how it ends."""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor

import attrs
import httpx2
import openai
import pytest
from pydantic import ValidationError
from serving import SECONDS, Gate, Running, events, expected_text, gated, new_engine, new_service, running

from dynatree_core.errors import InputError
from dynatree_core.serve.answers import Piece, _listener
from dynatree_core.serve.clients import Clients
from dynatree_core.serve.errors import ApiError
from dynatree_core.serve.gate import Gate as BodyGate
from dynatree_core.serve.keys import Keys, load_keys
from dynatree_core.serve.logs import JsonLines, TextLines
from dynatree_core.serve.loop import Update
from dynatree_core.serve.process import Listen
from dynatree_core.serve.schema import ChatBody, CompletionBody
from dynatree_core.serve.service import Service
from dynatree_core.serve.stream import EventStream

LONG = {"model": "tiny", "prompt": "the cat sat", "max_tokens": 100, "temperature": 0, "ignore_eos": True}


def one_lane(max_waiting: int = 0, **settings):
    """A service that computes one answer at a time."""
    return new_service({"prompt_lookup": new_engine(max_sequences=1, max_waiting=max_waiting)}, **settings)


# clients that leave


def test_who_leaves_a_stream_frees_the_lane_within_one_iteration():
    with gated(one_lane()) as (server, gate):
        with server.http() as http, http.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as stream:
            handle = gate.next_handle()
            gate.step(2)
            assert next(events(stream.iter_lines()))["choices"][0]["text"]
        assert gate.cancelled.wait(SECONDS)
        gate.step()  # the one that the engine is in, at most
        assert handle.wait(SECONDS)
        assert (handle.status, server.service.loop.engines["prompt_lookup"].load.num_running) == ("cancelled", 0)
        assert 0 < handle.num_tokens <= 3 * 4


def test_who_leaves_before_a_whole_answer_is_not_computed_for():
    with gated(one_lane()) as (server, gate):
        body = json.dumps(LONG).encode()
        host, port = server.address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as connection:
            head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
            connection.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
            handle = gate.next_handle()
        assert gate.cancelled.wait(SECONDS)
        gate.step()
        assert handle.wait(SECONDS)
        assert handle.status == "cancelled"


@pytest.mark.parametrize(
    "version", ["2.3", "2.4"]
)  # of ASGI; from 2.4 on a server's `send` says that a client has gone
def test_who_does_not_read_is_not_waited_for(monkeypatch, caplog, version):
    monkeypatch.setattr("dynatree_core.serve.stream.SEND_SECONDS", 0.01)
    ended = []

    async def never(*_: object) -> None:
        await asyncio.Event().wait()

    async def one_event() -> AsyncIterator[str]:
        yield "data: {}\n\n"

    scope = {"type": "http", "asgi": {"spec_version": version}}
    asyncio.run(EventStream(one_event(), on_end=lambda: ended.append(1))(scope, never, never))
    assert ended == [1]
    assert [record.msg for record in caplog.records] == ["unread"]


# the waiting line


def test_a_full_line_is_told_at_once_and_all_choices_come_or_none():
    with gated(one_lane()) as (server, gate), server.openai() as client:
        with server.http() as http, http.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as first:
            gate.next_handle()
            gate.step()
            with pytest.raises(openai.RateLimitError) as refused:
                client.completions.create(model="tiny", prompt="a", max_tokens=2)
            assert refused.value.code == "queue_full"
            assert int(refused.value.response.headers["Retry-After"]) >= 1
            gate.open()
            text = "".join(record["choices"][0]["text"] for record in events(first.iter_lines()))
            assert text == expected_text(LONG["prompt"], 100, eos_token_id=[])
        with pytest.raises(openai.RateLimitError):
            client.completions.create(model="tiny", prompt="a", max_tokens=2, n=3)
        assert client.completions.create(model="tiny", prompt="a", max_tokens=2, temperature=0).choices


def test_what_was_refused_takes_no_room():
    """Not for a moment: nothing of it is in the line, where it would wait for the engine's next step to be gone."""
    with gated(one_lane(1)) as (server, gate), ThreadPoolExecutor() as pool:
        body = {"model": "tiny", "prompt": "a", "max_tokens": 2, "temperature": 0}
        answers = [pool.submit(server.post, "/v1/completions", body)]
        gate.next_handle()
        refused = server.post("/v1/completions", {**body, "n": 2})
        assert refused.json()["error"]["code"] == "queue_full"
        answers.append(pool.submit(server.post, "/v1/completions", body))
        gate.next_handle()
        gate.open()
        assert [one.result().json()["choices"][0]["text"] for one in answers] == [expected_text("a", 2)] * 2
    assert server.service.metrics.text().count(b'finished_reason="abort"') == 0


def test_when_there_may_be_room_is_guessed_from_how_long_answers_take():
    service = one_lane(3)
    loop = service.loop
    assert loop.seconds_to_room == 1
    engine = loop.engines["prompt_lookup"]
    handles = [engine.submit([1, 2, 3], max_new_tokens=2) for _ in range(3)]
    for seconds in (10.0, 26.0):  # the mean moves by an eighth of what is new
        handles[0].started_at, handles[0].ended_at = 0.0, seconds
        loop._note_seconds(handles[0])
    assert loop.seconds_to_room == 36  # 12 s for each of the three that wait
    for _ in range(20):
        loop._note_seconds(handles[0])
    assert loop.seconds_to_room == 60


def test_a_client_has_so_many_requests_at_once():
    with gated(one_lane(4, max_requests=1)) as (server, gate), server.http() as http:
        with http.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as first:
            gate.next_handle()
            refused = server.post("/v1/completions", LONG)
            assert (refused.status_code, refused.json()["error"]["code"]) == (429, "too_many_requests")
            gate.open()
            assert [*events(first.iter_lines())]
        assert server.post("/v1/completions", LONG).status_code == 200


def test_a_client_may_ask_again_as_soon_as_it_has_its_answer():
    """Whatever else its request still does in the server."""

    async def asked_twice() -> list[int]:
        sent, begun = [], asyncio.Event()

        async def lingering(scope, receive, send) -> None:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"a", "more_body": True})
            await send({"type": "http.response.body", "body": b"b", "more_body": False})
            begun.set()
            await asyncio.Event().wait()

        async def send(message) -> None:
            sent.append(message.get("status"))

        async def receive():
            return {"type": "http.request"}

        door = BodyGate(lingering, Keys.of([]), Clients(1), 100)
        scope = {"type": "http", "method": "POST", "path": "/", "client": ("10.0.0.1", 1), "state": {"line": {}}}
        scope["headers"] = [(b"content-type", b"application/json")]
        for _ in range(2):
            asking = asyncio.ensure_future(door(scope, receive, send))
            await asyncio.wait({asking, asyncio.ensure_future(begun.wait())}, return_when=asyncio.FIRST_COMPLETED)
            begun.clear()
        return [status for status in sent if status is not None]

    assert asyncio.run(asked_twice()) == [200, 200]


def test_a_client_is_counted_while_its_body_arrives():
    with running(new_service(max_requests=1)) as server:
        host, port = server.address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as connection:
            head = "POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\nExpect: 100-continue\r\n"
            connection.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n")
            assert connection.recv(100).startswith(b"HTTP/1.1 100")  # it is asked for the body
            for path in ("/tokenize", "/v1/completions"):
                refused = server.post(path, LONG)
                assert (refused.status_code, refused.json()["error"]["code"]) == (429, "too_many_requests")
            with server.http() as http:
                assert http.get("/v1/models").status_code == 200


# time


async def late(service: Service, gate: Gate, num_steps: int, *, num_before: int) -> list[Piece]:
    """What comes of a request whose time is over after so many steps, while so many others are computed before it."""
    await service.start()
    asked = await service.read(service.reader.completion, CompletionBody(**LONG))
    others = [service.submitted(asked) for _ in range(num_before)]
    asked = await service.read(service.reader.completion, CompletionBody(**LONG))
    answers = service.submitted(asked)
    try:
        pieces, found = answers.pieces(), []
        gate.step(num_steps)
        while not num_before and sum(bool(piece.update.token_ids) for piece in found) < num_steps:
            found.append(await anext(pieces))
        answers._deadline = 0.0
        rest = asyncio.ensure_future(collected(pieces))
        await asyncio.to_thread(gate.cancelled.wait, SECONDS)
        gate.open()
        return found + await rest
    finally:
        for one in (answers, *others):
            one.close()
        await asyncio.to_thread(service.loop.stop)


async def collected(pieces: AsyncIterator[Piece]) -> list[Piece]:
    return [piece async for piece in pieces]


def test_what_there_is_at_the_deadline_is_the_answer():
    service = one_lane(1, max_seconds=SECONDS)
    pieces = asyncio.run(late(service, Gate(service), 2, num_before=0))
    assert pieces[-1].choice.finish_reason == "length"
    text = "".join(piece.text for piece in pieces)
    assert 2 <= len(text) < 100
    assert expected_text(LONG["prompt"], 100, eos_token_id=[]).startswith(text)


def test_who_has_waited_all_the_time_is_told():
    service = one_lane(1, max_seconds=SECONDS)
    with pytest.raises(ApiError, match="not one token has come") as refused:
        asyncio.run(late(service, Gate(service), 1, num_before=1))
    assert (refused.value.status, refused.value.code) == (503, "timeout")


# bodies


@pytest.fixture(scope="module")
def server():
    with running(new_service(max_body_bytes=2000)) as server:
        yield server


def test_a_body_that_is_too_large(server: Running):
    answer = server.post("/v1/completions", {**LONG, "prompt": "a" * 3000})
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")
    with server.http() as http:  # in chunks, without its length
        answer = http.post(
            "/v1/completions", content=(b" " * 500 for _ in range(10)), headers={"Content-Type": "application/json"}
        )
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")


@pytest.mark.parametrize(
    ("content", "code"),
    [(b"{", "invalid_json"), (b"", "invalid_type"), (b"[1]", "invalid_type"), (b"\xff\xfe", "invalid_json"),
     (b"[" * 1999, "invalid_json"), (b'{"model": NaN}', "invalid_type")],
)  # fmt: skip
def test_a_body_that_is_no_request(server: Running, content, code):
    with server.http() as http:
        answer = http.post("/v1/completions", content=content, headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, code), answer.text


MANY = {f"field-{number}": 1 for number in range(2000)}


@pytest.mark.parametrize(
    "fields",
    [{"prompt": [1.5] * 1000}, {"prompt": [[1.5]] * 1000}, {"logit_bias": MANY}, {"stop": [1] * 1000}],
    ids=lambda fields: str(fields)[:30],
)
def test_of_a_body_with_many_faults_few_are_collected(fields):
    with pytest.raises(ValidationError) as refused:
        CompletionBody(**{"model": "tiny", "prompt": "a", **fields})
    assert refused.value.error_count() < 10


@pytest.mark.parametrize(
    "fields", [{"messages": [{}] * 1000}, {"messages": [{"role": "user", "content": [{}] * 1000}]}]
)
def test_of_a_conversation_with_many_faults_few_are_collected(fields):
    with pytest.raises(ValidationError) as refused:
        ChatBody(model="tiny", **fields)
    assert refused.value.error_count() < 10


@pytest.mark.parametrize("body", [MANY, {"model": "tiny", "messages": [MANY]}], ids=["body", "message"])
def test_more_fields_than_there_are_is_one_error(body):
    with pytest.raises(ApiError, match="100 fields at most, got 2000"):
        ChatBody(**body)


def test_too_many_prompts_are_refused_before_one_is_read():
    reader = attrs.evolve(new_service().reader, tokenizer=None)
    with pytest.raises(ApiError, match="16 choices at most, got 17 prompts") as refused:
        reader.completion(CompletionBody(model="tiny", prompt=["a"] * 17))
    assert refused.value.param == "n"


def test_routes_that_are_not_there(server: Running):
    with server.http() as http:
        for method, path, status, words in [
            ("GET", "/v2", 404, "no such route, got /v2;"),
            ("GET", "/v1/completions", 405, "another method, got GET /v1/completions;"),
        ]:
            answer = http.request(method, path)
            assert (answer.status_code, answer.json()["error"]["code"]) == (status, "http_error")
            assert words in answer.json()["error"]["message"]


def test_a_request_has_an_id(server: Running):
    with server.http() as http:
        assert http.get("/health", headers={"X-Request-Id": "mine-1"}).headers["X-Request-Id"] == "mine-1"
        for wrong in ("two words", "x" * 200):
            assert len(http.get("/health", headers={"X-Request-Id": wrong}).headers["X-Request-Id"]) == 32


# keys


def test_only_who_has_a_key_may_ask():
    with running(new_service(keys=Keys.of(["first-key", "second-key"]))) as server:
        with server.http() as http:
            assert http.get("/health").status_code == 200
            for header in ({}, {"Authorization": "Bearer second-kez"}, {"Authorization": "Basic second-key"}):
                refused = http.get("/v1/models", headers=header)
                assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
                assert refused.headers["WWW-Authenticate"] == "Bearer"
        with server.openai() as client, pytest.raises(openai.AuthenticationError):
            client.models.list()
        with openai.OpenAI(base_url=f"{server.address}/v1", api_key="second-key", max_retries=0) as client:
            assert client.models.list().data


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl, which makes a certificate, is not here")
def test_it_speaks_https(tmp_path):
    certificate, key = str(tmp_path / "certificate.pem"), str(tmp_path / "key.pem")
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-out", certificate, "-keyout", key]
    subprocess.run(command, check=True, capture_output=True)
    trusting = ssl.create_default_context(cafile=certificate)
    with running(new_service(), Listen(certificate=certificate, key=key)) as server:
        address = server.address.replace("http:", "https:")
        with httpx2.Client(base_url=address, verify=trusting, trust_env=False) as http:
            assert http.get("/health").status_code == 200


def test_keys_come_from_a_file_and_the_environment(tmp_path):
    file = tmp_path / "keys"
    file.write_text("# mine\nkey-of-the-file\n\n")
    keys = load_keys(file, {"DYNATREE_SERVE_API_KEYS": "key-of-the-environment another-key"})
    assert len(keys) == 3
    assert keys.name_of("Bearer key-of-the-environment") == "key 1"
    assert keys.name_of("bearer key-of-the-file") == "key 3"
    assert keys.name_of(None) is None
    assert "key-of" not in repr(keys)
    assert not load_keys(None, {})


@pytest.mark.parametrize(("text", "words"), [("", "at least one"), ("short", "8 characters"), (None, "can be read")])
def test_keys_that_cannot_be_used(tmp_path, text, words):
    file = tmp_path / "keys"
    if text is not None:
        file.write_text(text)
    with pytest.raises(InputError, match=words) as refused:
        load_keys(file, {})
    assert "short\n" not in str(refused.value)


def test_pages_of_other_origins_may_ask_where_they_are_named():
    with running(new_service(cors_origins=("https://a.example",))) as server, server.http() as http:
        named, other = (
            http.get("/health", headers={"Origin": origin}) for origin in ("https://a.example", "https://b.example")
        )
        assert named.headers["access-control-allow-origin"] == "https://a.example"
        assert "access-control-allow-origin" not in other.headers
    with running(new_service()) as server, server.http() as http:
        assert "access-control-allow-origin" not in http.get("/health", headers={"Origin": "https://a.example"}).headers


# the end


def test_open_requests_are_finished_before_the_server_ends():
    with gated(one_lane(stop_seconds=SECONDS)) as (server, gate), server.http() as http:
        with http.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as stream:
            gate.next_handle()
            server.service.begin_to_stop()
            refused = server.post("/v1/completions", LONG)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "stopping")
            assert http.get("/health/ready").status_code == 503
            gate.open()
            text = "".join(record["choices"][0]["text"] for record in events(stream.iter_lines()))
        assert text == expected_text(LONG["prompt"], 100, eos_token_id=[])


def test_what_is_not_finished_in_time_is_cut_off_with_an_error():
    with gated(one_lane(stop_seconds=0.01)) as (server, gate), server.http() as http:
        with http.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as stream:
            gate.next_handle()
            server.service.begin_to_stop()
            assert gate.cancelled.wait(SECONDS)
            gate.step()
            *_, last = events(stream.iter_lines())
        assert last["error"]["code"] == "stopping"


def test_who_is_told_when_the_server_has_ended_is_not_waited_for():
    """Its event loop may be closed at any moment: then nobody waits, and the engines' thread must not fail."""

    class Closing:
        is_over = False

        def is_closed(self) -> bool:
            before, self.is_over = self.is_over, True
            return before

        def call_soon_threadsafe(self, *_: object) -> None:
            self.is_over = True
            raise RuntimeError("Event loop is closed")

    _listener(Closing(), asyncio.Queue(), None)(Update(is_last=True))


# the log


@pytest.mark.parametrize("logs_prompts", [False, True])
def test_a_line_of_the_log_has_texts_only_where_it_was_told_so(logs_prompts, caplog):
    with (
        caplog.at_level(logging.INFO, "dynatree.serve"),
        running(new_service(logs_prompts=logs_prompts)) as server,
    ):
        body = {"model": "tiny", "prompt": "the cat", "max_tokens": 3, "temperature": 0, "user": "u-1"}
        request_id = server.post("/v1/completions", body).headers["X-Request-Id"]
        server.post("/v1/completions", {**body, "prompt": "the", "temprature": 1})
    formatter, requests = JsonLines(), [record for record in caplog.records if record.msg == "request"]
    line, refused = (json.loads(formatter.format(record)) for record in requests)
    assert line["event"] == "request"
    expected = {"status": 200, "prompt_tokens": 7, "completion_tokens": 3, "finish": ["length"], "user": "u-1"}
    assert expected.items() <= line.items()
    assert line["client"] == "127.0.0.1"
    assert refused["status"] == 400
    assert line["request_id"] == request_id
    answer = expected_text("the cat", 3)
    assert (line.get("prompts"), line.get("answers")) == ((["the cat"], [answer]) if logs_prompts else (None, None))


def test_a_line_for_readers_has_the_same_fields():
    record = logging.LogRecord("dynatree.serve", logging.INFO, "", 0, "request", (), None)
    record.fields = {"status": 200, "path": "/v1 x", "user": None}
    assert TextLines().format(record).endswith(' info request status=200 path="/v1 x"')
