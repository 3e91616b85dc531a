"""`dynatree serve`: connections, names, and what one request may have the server hold or compute."""

from __future__ import annotations

import json
import logging
import socket
import time
from typing import Any

import pytest
from serving import SECONDS, Running, events, gated, new_service, running

from dynatree_core.report import TokenLogprob
from dynatree_core.serve import connections
from dynatree_core.serve.content import Content, completion_logprobs
from dynatree_core.serve.errors import ApiError
from dynatree_core.serve.gate import is_own_host
from dynatree_core.serve.keys import Keys
from dynatree_core.serve.logs import JsonLines, TextLines
from dynatree_core.serve.schema import ChatBody, CompletionBody

HEAD = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"


def connected(server: Running) -> socket.socket:
    host, port = server.address.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=SECONDS)


def is_closed(connection: socket.socket) -> bool:
    """Whether the server closes it, whatever it has sent before; a timeout is an error."""
    try:
        while connection.recv(1000):
            pass
    except ConnectionResetError:
        pass
    return True


def is_closed_while_bytes_come(connection: socket.socket) -> bool:
    begin = time.monotonic()
    try:
        while time.monotonic() < begin + SECONDS:
            connection.sendall(b"X")
            time.sleep(0.02)
    except ConnectionError:
        return True
    return False


# connections


@pytest.mark.parametrize("sent", [b"", b"G", HEAD, HEAD + b"\r\n" + HEAD], ids=["none", "byte", "part", "second"])
def test_a_connection_on_which_no_request_comes_is_closed(monkeypatch, sent):
    monkeypatch.setattr(connections, "HEADER_SECONDS", 0.2)
    with running(new_service()) as server, connected(server) as connection:
        connection.sendall(sent)
        if sent.count(HEAD) == 2:  # the first is answered, the second is not there as a whole
            assert connection.recv(1000).startswith(b"HTTP/1.1 200")
            connection.sendall(b"X: 1\r\n")
        assert is_closed(connection)
        assert server.post("/tokenize", {"prompt": "a"}).status_code == 200


def test_a_byte_now_and_then_keeps_no_connection(monkeypatch):
    monkeypatch.setattr(connections, "HEADER_SECONDS", 0.3)
    with running(new_service()) as server, connected(server) as connection:
        assert is_closed_while_bytes_come(connection)


def test_the_rest_of_a_body_that_nobody_reads_keeps_no_connection(monkeypatch):
    monkeypatch.setattr(connections, "HEADER_SECONDS", 0.3)
    with running(new_service(keys=Keys.of(["long-enough"]))) as server, connected(server) as connection:
        connection.sendall(b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 401")
        assert is_closed_while_bytes_come(connection)


def test_a_slow_answer_is_no_silent_connection(monkeypatch):
    monkeypatch.setattr(connections, "HEADER_SECONDS", 1.0)
    body = {"model": "tiny", "prompt": "the cat", "max_tokens": 9, "ignore_eos": True, "temperature": 0}
    with (
        gated(new_service()) as (server, gate),
        server.http() as http,
        http.stream("POST", "/v1/completions", json={**body, "stream": True}) as stream,
    ):
        gate.next_handle()
        time.sleep(1.5)
        gate.open()
        assert sum(len(record["choices"][0]["text"]) for record in events(stream.iter_lines())) >= 9


def test_there_are_so_many_connections():
    with running(new_service(max_connections=2)) as server:
        with connected(server) as first, connected(server) as second:
            for one in (first, second):  # each is known to the server
                one.sendall(HEAD + b"\r\n")
                assert one.recv(1000).startswith(b"HTTP/1.1 200")
            with connected(server) as third:
                assert is_closed(third)
        with server.http() as http:  # when these two have gone
            for _ in range(100):
                try:
                    assert http.get("/health").status_code == 200
                    break
                except Exception:  # noqa: BLE001  # whatever a client says of a closed connection
                    time.sleep(0.05)
            else:
                pytest.fail("a connection that has gone leaves its place to another")


def test_headers_have_a_largest_size():
    with running(new_service()) as server, connected(server) as connection:
        connection.sendall(HEAD + b"X: " + b"a" * (connections.MOST_HEADER_BYTES + 10_000))
        assert connection.recv(1000).startswith(b"HTTP/1.1 400")


# names


@pytest.mark.parametrize(
    ("header", "names", "is_own"),
    [
        ("localhost", (), True), ("localhost:8000", (), True), ("LOCALHOST.", (), True), ("a.localhost:1", (), True),
        ("127.0.0.1:8000", (), True), ("[::1]:8000", (), True), ("10.1.2.3", (), True), ("", (), True),
        ("evil.example", (), False), ("evil.example:8000", (), False), ("localhost.evil.example", (), False),
        ("127.0.0.1.evil.example", (), False), ("xlocalhost", (), False), ("[evil.example]", (), False),
        ("box", ("box",), True), ("Box:80", ("BOX",), True), ("a.box", ("box",), False),
        ("a.b.example", ("*.b.example",), True), ("b.example", ("*.b.example",), False), ("any.thing", ("*",), True),
    ],
)  # fmt: skip
def test_names_that_are_the_servers_own(header, names, is_own):
    assert is_own_host(header, names) is is_own


def test_a_page_of_somebody_else_cannot_ask_through_a_name_of_theirs():
    with running(new_service(hosts=("box",))) as server, server.http() as http:
        for path in ("/", "/v1/models", "/health"):
            refused = http.get(path, headers={"Host": "evil.example"})
            assert (refused.status_code, refused.json()["error"]["code"]) == (400, "host_not_allowed")
            assert http.get(path, headers={"Host": "box:1"}).status_code == 200
    with running(new_service(keys=Keys.of(["long-enough"]))) as server, server.http() as http:
        told = {"Host": "proxy.example", "Authorization": "Bearer long-enough"}
        assert http.get("/v1/models", headers=told).status_code == 200


# what a request may hold


@pytest.mark.parametrize(
    ("n", "max_tokens", "alternatives", "stream", "is_taken"),
    [(16, 3, 20, False, False), (16, 3, 20, True, True), (16, 2, 20, False, True), (1, 47, 20, False, True),
     (16, 60, 0, False, True), (2, 47, 20, False, False)],
)  # fmt: skip
def test_a_whole_answer_has_so_many_log_probabilities(monkeypatch, n, max_tokens, alternatives, stream, is_taken):
    monkeypatch.setattr("dynatree_core.serve.asked.MOST_LOGPROBS", 1000)
    service = new_service()
    reader = service.reader
    options: dict[str, Any] = {"model": "tiny", "n": n, "max_tokens": max_tokens, "stream": stream}
    completion = CompletionBody(**options, prompt="a cat", logprobs=alternatives)
    chat = ChatBody(**options, messages=[{"role": "user", "content": "the"}], logprobs=True, top_logprobs=alternatives)
    for read, body in ((reader.completion, completion), (reader.chat, chat)):
        if is_taken:
            assert len(read(body).requests) == n
        else:
            with pytest.raises(ApiError, match="1000 log-probabilities at most") as refused:
                read(body)
            assert refused.value.param == "logprobs"


def test_parts_are_joined_in_time_that_grows_with_them():
    logprob = TokenLogprob(1, -0.5, ())
    joined = Content.joined([Content("ab", (logprob,)) for _ in range(20_000)])
    assert (joined.text, len(joined.logprobs)) == ("ab" * 20_000, 20_000)
    assert Content.joined([Content("a"), Content("b")]) == Content("ab")
    told = completion_logprobs([logprob] * 20_000, lambda _: "ab", 3)
    assert told["text_offset"] == [3 + 2 * place for place in range(20_000)]
    assert completion_logprobs([], lambda _: "ab", 3)["text_offset"] == []


# the log


def test_no_character_of_a_client_reaches_a_terminal():
    record = logging.LogRecord("dynatree.serve", logging.INFO, "", 0, "request", (), None)
    record.fields = {"path": "/\x1b[31m\x9b31m\x7f\u202e\u2028", "user": "\ud800 ümlaut", "code": "a\nb"}
    for formatter in (TextLines(), JsonLines()):
        line = formatter.format(record)
        assert all(one.isprintable() for one in line), line
        assert "\\u009b" in line
        assert "ümlaut" in line
        line.encode()
    assert json.loads(JsonLines().format(record))["path"] == record.fields["path"]
