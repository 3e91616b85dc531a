"""`dynatree serve`: connections, names, and what one request may have the server hold or compute."""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
from serving import SECONDS, Running, events, gated, new_service, running, until
from tiny_folder import TEXTS, tiny_tokenizer

from dynatree_core.errors import ParameterError
from dynatree_core.report import TokenLogprob
from dynatree_core.serve import connections
from dynatree_core.serve.connections import BoundedConnection
from dynatree_core.serve.content import Content, completion_logprobs
from dynatree_core.serve.errors import ApiError
from dynatree_core.serve.gate import check_host_names, is_own_host
from dynatree_core.serve.keys import Keys
from dynatree_core.serve.logs import JsonLines, TextLines, shown
from dynatree_core.serve.schema import ChatBody, CompletionBody
from dynatree_core.serve.start_page import StartPage
from dynatree_core.serve.tokens import TokenTexts

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


@pytest.mark.parametrize("sent", [b"", b"G", HEAD], ids=["none", "byte", "part"])
def test_a_connection_on_which_no_request_comes_is_closed(monkeypatch, sent):
    monkeypatch.setattr(connections, "HEADER_SECONDS", 0.2)
    with running(new_service()) as server, connected(server) as connection:
        with contextlib.suppress(ConnectionError):  # on a busy machine it may be closed by then
            connection.sendall(sent)
        assert is_closed(connection)
        monkeypatch.setattr(connections, "HEADER_SECONDS", SECONDS)
        assert server.post("/tokenize", {"prompt": "a"}).status_code == 200


def test_a_connection_on_which_no_second_request_comes_is_closed(monkeypatch):
    """The first is answered, the second is not there as a whole."""
    with running(new_service()) as server, connected(server) as connection:
        connection.sendall(HEAD + b"\r\n" + HEAD)
        assert connection.recv(1000).startswith(b"HTTP/1.1 200")
        monkeypatch.setattr(connections, "HEADER_SECONDS", 0.2)
        connection.sendall(b"X: 1\r\n")
        assert is_closed(connection)


def test_a_byte_now_and_then_keeps_no_connection(monkeypatch):
    monkeypatch.setattr(connections, "HEADER_SECONDS", 0.3)
    with running(new_service()) as server, connected(server) as connection:
        assert is_closed_while_bytes_come(connection)


def test_the_rest_of_a_body_that_nobody_reads_keeps_no_connection(monkeypatch):
    with running(new_service(keys=Keys.of(["long-enough"]))) as server, connected(server) as connection:
        connection.sendall(b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 401")
        monkeypatch.setattr(connections, "HEADER_SECONDS", 0.3)
        assert is_closed_while_bytes_come(connection)


def test_a_slow_answer_is_no_silent_connection():
    body = {"model": "tiny", "prompt": "the cat", "max_tokens": 9, "ignore_eos": True, "temperature": 0}
    with (
        gated(new_service()) as (server, gate),
        server.http() as http,
        http.stream("POST", "/v1/completions", json={**body, "stream": True}) as stream,
    ):
        gate.next_handle()
        (connection,) = server.process.server_state.connections
        assert connection._waiting is None, "no time runs until there is an answer"
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
        until(lambda: not server.process.server_state.connections)  # when these two have gone there is room
        with server.http() as http:
            assert http.get("/health").status_code == 200


def test_headers_have_a_largest_size():
    with running(new_service()) as server, connected(server) as connection:
        connection.sendall(HEAD + b"X: " + b"a" * (connections.MOST_HEADER_BYTES + 10_000))
        assert connection.recv(1000).startswith(b"HTTP/1.1 400")


@pytest.fixture
def watched(monkeypatch) -> SimpleNamespace:
    """What becomes of connections: bytes that are left at each pause of writing, and whether one has gone."""
    found = SimpleNamespace(left=[], has_gone=threading.Event())

    class Watched(BoundedConnection):
        def pause_writing(self) -> None:
            found.left.append(self.transport.get_write_buffer_size())
            super().pause_writing()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            found.has_gone.set()

    monkeypatch.setattr("dynatree_core.serve.process.BoundedConnection", Watched)
    return found


@pytest.mark.parametrize("num_requests", [1, 300], ids=["one", "pipelined"])
def test_who_does_not_read_is_closed(monkeypatch, watched, caplog, num_requests):
    """Whether it is an answer's rest that waits, or the next answer."""
    monkeypatch.setattr(connections, "_log", connections.SeldomLog())
    monkeypatch.setattr(connections, "SEND_SECONDS", 0.3)
    page = StartPage("x" * (8_000_000 if num_requests == 1 else 50_000), {})
    monkeypatch.setattr("dynatree_core.serve.app.start_page", lambda: page)
    with running(new_service()) as server, connected(server) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" * num_requests)
        assert watched.has_gone.wait(SECONDS)
    assert "unread" in [record.msg for record in caplog.records]


def test_the_last_bytes_that_nobody_reads_keep_no_connection(monkeypatch, watched):
    """Fewer than asyncio would tell of, on a connection that is closing and would wait for them."""
    monkeypatch.setattr(connections, "SEND_SECONDS", 0.3)
    monkeypatch.setattr("dynatree_core.serve.app.start_page", lambda: StartPage("x" * 9000, {}))
    with running(new_service()) as server, connected(server) as connection:
        request = b"GET / HTTP/1.1\r\nHost: localhost\r\n"
        connection.sendall((request + b"\r\n") * 2000)
        assert watched.has_gone.wait(SECONDS)
    assert 0 < watched.left[-1] < 64 * 1024


def test_who_reads_slowly_is_not(monkeypatch):
    """Each look finds that it has read `LEAST_BYTES` since the one before: the time between two passes when it has."""
    monkeypatch.setattr("dynatree_core.serve.app.start_page", lambda: StartPage("x" * 64_000_000, {}))
    looks = []

    class Looked(BoundedConnection):
        def _watch_sending(self) -> None:
            super()._watch_sending()
            looks.append((self, self.transport.get_write_buffer_size()))

    monkeypatch.setattr("dynatree_core.serve.process.BoundedConnection", Looked)
    with running(new_service()) as server, connected(server) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        until(lambda: looks)
        num_read, num_looks = 0, 0
        while part := connection.recv(1_000_000):
            num_read += len(part)
            sending, num_left = looks[-1]
            if num_left - sending.transport.get_write_buffer_size() >= connections.LEAST_BYTES and num_looks < 3:
                num_looks += 1
                sending.loop.call_soon_threadsafe(sending._check_sending, num_left)
                until(lambda number=num_looks: len(looks) > number)
        assert num_read > 64_000_000
        assert num_looks == 3


def test_a_flood_of_connections_is_no_flood_of_lines(monkeypatch, caplog):
    now = [100.0]
    monkeypatch.setattr(connections, "time", SimpleNamespace(monotonic=lambda: now[0]))
    log = connections.SeldomLog()
    with caplog.at_level(logging.INFO, "dynatree.serve"):
        for event, at in [("a", 0.0), *[("a", 0.5)] * 50, ("b", 0.6), ("a", 1.0), ("a", 1.9), ("a", 9.0)]:
            now[0] = 100.0 + at
            log(event, open=1)
    told = [(record.msg, record.fields["count"], record.fields["open"]) for record in caplog.records]
    assert told == [("a", 1, 1), ("b", 1, 1), ("a", 51, 1), ("a", 2, 1)]


def test_connections_that_are_refused_are_told_of_seldom(monkeypatch, caplog):
    monkeypatch.setattr(connections, "_log", connections.SeldomLog())
    monkeypatch.setattr(connections, "LOG_SECONDS", 1000.0)
    caplog.set_level(logging.INFO, "dynatree.serve")
    with running(new_service(max_connections=1)) as server, connected(server) as first:
        first.sendall(HEAD + b"\r\n")
        assert first.recv(1000).startswith(b"HTTP/1.1 200")
        for _ in range(5):
            with connected(server) as one:
                assert is_closed(one)
    assert [record.msg for record in caplog.records].count("too_many_connections") == 1


# names


@pytest.mark.parametrize(
    ("header", "names", "is_own"),
    [
        ("localhost", (), True), ("localhost:8000", (), True), ("LOCALHOST.", (), True), ("a.localhost:1", (), True),
        ("127.0.0.1:8000", (), True), ("[::1]:8000", (), True), ("10.1.2.3", (), True), ("", (), True),
        ("evil.example", (), False), ("evil.example:8000", (), False), ("localhost.evil.example", (), False),
        ("127.0.0.1.evil.example", (), False), ("xlocalhost", (), False), ("[evil.example]", (), False),
        ("box", ("box",), True), ("Box:80", ("BOX",), True), ("box", ("box.",), True), ("a.box", ("box",), False),
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


@pytest.mark.parametrize("name", ["box", "Box.example.", "*.example.org", "*", "::1", "10.0.0.1", "a_b", "*.a"])
def test_names_that_may_be_allowed(name):
    check_host_names([name])


@pytest.mark.parametrize(
    ("name", "hint"),
    [("box:8000", "'box'"), ("*.example.org:80", "'*.example.org'"), ("127.0.0.1:8000", "'127.0.0.1'"),
     ("http://box", "the name alone"), ("http://box:80", "the name alone"), ("box/", "the name alone"),
     ("box:", "'box'"), ("a.*", "the name alone"), ("", "the name alone"), ("[::1]", "the name alone")],
)  # fmt: skip
def test_a_name_that_no_request_could_have_is_refused(name, hint):
    with pytest.raises(ParameterError, match=r"--allow-host must be a name without scheme and port") as refused:
        check_host_names(["box", name])
    assert str(refused.value).endswith(f"give {hint}")


# bodies


def body_sent(server: Running, path: str, kind: bytes | None, body: bytes) -> bytes:
    """The answer to bytes of a request, whose type is said to be this; None: nothing is said."""
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {len(body)}\r\n".encode()
    with connected(server) as connection:
        connection.sendall(head + (b"" if kind is None else b"Content-Type: " + kind + b"\r\n") + b"\r\n" + body)
        return b"".join(iter(lambda: connection.recv(10_000), b""))


def test_a_body_must_say_that_it_is_json():
    completion = json.dumps({"model": "tiny", "prompt": "a", "max_tokens": 1}).encode()
    chat = json.dumps({"model": "tiny", "messages": [{"role": "user", "content": "a"}], "max_tokens": 1}).encode()
    bodies = {"/v1/completions": completion, "/v1/chat/completions": chat, "/tokenize": b'{"prompt": "a"}'}
    with running(new_service()) as server:
        for path, body in bodies.items():
            for kind in (b"application/json", b"Application/JSON; charset=utf-8", b"application/vnd.own+json"):
                assert body_sent(server, path, kind, body).startswith(b"HTTP/1.1 200"), (path, kind)
            for kind in (None, b"", b"text/plain", b"text/json", b"application/x-www-form-urlencoded",
                         b"multipart/form-data; boundary=json", b"text/plain; application/json"):  # fmt: skip
                head, _, told = body_sent(server, path, kind, body).partition(b"\r\n\r\n")
                assert head.startswith(b"HTTP/1.1 415"), (path, kind)
                error = json.loads(told)["error"]
                assert (error["type"], error["code"]) == ("invalid_request_error", "not_json")


# what a request may hold


@pytest.mark.parametrize(
    ("n", "max_tokens", "alternatives", "stream", "is_taken"),
    [(16, 3, 20, False, False), (16, 3, 20, True, False), (16, 2, 20, True, True), (1, 47, 20, False, True),
     (16, 60, 0, False, True), (2, 47, 20, False, False)],
)  # fmt: skip
def test_an_answer_has_so_many_log_probabilities(monkeypatch, n, max_tokens, alternatives, stream, is_taken):
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
            assert "was not given" not in refused.value.message
            fitting = int(refused.value.message.rpartition("max_tokens of ")[2].split(",")[0])
            assert len(read(body.model_copy(update={"max_tokens": fitting})).requests) == n
            with pytest.raises(ApiError):
                read(body.model_copy(update={"max_tokens": fitting + 1}))


def test_what_max_tokens_is_where_it_is_missing_is_told_where_it_is_too_much(monkeypatch):
    monkeypatch.setattr("dynatree_core.serve.asked.MOST_LOGPROBS", 600)
    body = CompletionBody(model="tiny", prompt=["a", "the"], logprobs=20)
    with pytest.raises(ApiError, match=r"where max_tokens was not given and is 16\); give a max_tokens of 14,"):
        new_service().reader.completion(body)


@pytest.mark.parametrize(("stream", "trees", "num_watching"), [(False, False, 0), (True, True, 1)])
def test_an_answer_that_nobody_watches_has_no_observer(stream, trees, num_watching):
    """Since passes of one shape are for those alone."""
    body = CompletionBody(model="tiny", prompt="a", stream=stream, dynatree={"trees": trees})
    (request,) = new_service().reader.completion(body).requests
    assert len(request.observer or ()) == num_watching
    assert (request.observer is None) == (num_watching == 0)


def test_parts_are_joined_in_time_that_grows_with_them():
    logprob, tokens = TokenLogprob(TEXTS.index("ab"), -0.5, ()), TokenTexts(tiny_tokenizer())
    joined = Content.joined([Content("ab", (logprob,)) for _ in range(20_000)])
    assert (joined.text, len(joined.logprobs)) == ("ab" * 20_000, 20_000)
    assert Content.joined([Content("a"), Content("b")]) == Content("ab")
    told = completion_logprobs([logprob] * 20_000, tokens, 3)
    assert told["text_offset"] == [3 + 2 * place for place in range(20_000)]
    assert completion_logprobs([], tokens, 3)["text_offset"] == []


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


def test_what_is_shown_is_the_same_as_character_by_character():
    text = "".join(map(chr, [*range(0x3000), *range(0xD7F0, 0xE010), *range(0xFE00, 0x10100), 0x1F600, 0xE0001]))
    by_character = "".join(one if one.isprintable() or one == "\n" else json.dumps(one)[1:-1] for one in text)
    assert shown(text) == by_character
    assert shown("plain ümlaut") == "plain ümlaut"
