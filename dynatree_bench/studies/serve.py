"""Does the server hold under load, and how quickly does it answer?

Question: with 8 and 32 clients at once, is each answer the one that the engine alone gives, does memory stay flat, and
how long does a client wait for the first token and between tokens? With trees and without, and from `transformers
serve` with and without continuous batching, where its packages are installed.

Method: each server is a process of its own on loopback, with the same model, and answers chat completions in a stream,
greedily. Clients are threads that take requests from one line: prompts of the workload with answers of 8, 24 and 64
tokens at most, in an order that a seed draws. Of a hundred requests to our server 8 are cut off after the first chunk,
6 are malformed and 4 are larger than a body may be; the rest must get the text that `generate` gives without drafting.
`transformers serve`, which is slower, gets the whole ones among the first hundred.
Prompts come again and again, and our server keeps their rows (`--prefix-cache 256`), so its first tokens mostly come
without a prefill; `transformers serve` runs as it is.
Policies are fields of requests to one server. Servers take turns, in rotating order, several times over, each time
after a warm-up. A token's pause is that of its chunk divided by the chunk's tokens; of `transformers serve` each chunk
counts as one token. Memory is the server's resident set, twice a second.

Output: tables of tokens/s in total, first tokens, pauses between chunks and between tokens (p50, p95, p99), memory over
time, and what became of the requests.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import queue
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import attrs
import psutil

from dynatree_bench.data.workloads import load_workload
from dynatree_bench.report.series import Panel, lines_of
from dynatree_bench.report.tables import Spread, Table, simple
from dynatree_bench.run.pairs import Models, Pair
from dynatree_bench.run.progress import Job, in_rounds
from dynatree_bench.studies.study import Asked, Study
from dynatree_core import generate
from dynatree_core.cli.loading import usual_policy
from dynatree_core.errors import InputError
from dynatree_core.text.prompt import chat_ids, tokenizer_of
from dynatree_core.text.stream import decode_text

PLAIN = "autoregressive"
THEIRS = {"transformers serve": (), "transformers serve, continuous batching": ("--continuous-batching",)}
NEEDED_BY_THEIRS = ("fastapi", "openai", "uvicorn")
CLIENTS, QUICK_CLIENTS = (8, 32), (2,)
LENGTHS, QUICK_LENGTHS = (8, 24, 64), (3, 6)
CUT, MALFORMED, OVERSIZED = "cut off", "malformed", "oversized"
SHARES = {CUT: 0.08, MALFORMED: 0.06, OVERSIZED: 0.04}  # of the requests; the others are whole
MOST_OF_THEIRS = 100  # requests that other servers get: of a rate, more would be the same
MAX_BODY_KB = 256
START_SECONDS, ANSWER_SECONDS = 180.0, 300.0
SAMPLE_SECONDS = 0.5  # between two looks at the memory
PERCENTILES = (50, 95, 99)


@attrs.frozen
class Question:
    """One request."""

    kind: str  # "whole", or one of SHARES
    messages: list[dict[str, str]]
    num_tokens: int  # at most
    expected: str  # the answer


@attrs.define(eq=False)
class Answered:
    """What became of one request."""

    kind: str
    became: str  # "right", "wrong", "cut", "refused" or "failed"
    num_tokens: int = 0
    first: float | None = None  # seconds to the first chunk with text
    gaps: list[tuple[float, int]] = attrs.field(factory=list)  # seconds between chunks, and the later one's tokens


@attrs.frozen
class Server:
    """A server that runs."""

    process: subprocess.Popen[bytes]
    port: int
    model: str  # as requests name it
    is_ours: bool


def measure(asked: Asked) -> dict[str, Any]:
    """{"total", "first", "chunk", "token": method -> clients -> numbers; "outcomes", "memory", "errors"}"""
    pair = asked.load()
    if tokenizer_of(pair.target).chat_template is None:
        raise InputError("this study asks chat completions; name a target whose tokenizer has a chat template")
    sizes = sorted(set(asked.batch_sizes)) or list(QUICK_CLIENTS if asked.is_quick else CLIENTS)
    lengths = tuple(asked.max_new_tokens) or (QUICK_LENGTHS if asked.is_quick else LENGTHS)
    number = int(str(asked.num_prompts or (12 if asked.is_quick else 500)))
    rounds = asked.rounds(full=3, quick=1)
    policies = list(dict.fromkeys([*(asked.policies or (usual_policy(asked.models.target),)), PLAIN]))
    with tempfile.TemporaryDirectory(prefix="dynatree-serve-") as folder:
        load = Load(asked, pair, questions(pair, asked, number, lengths), policies, Path(folder))
        load.run(sizes, rounds)
    said = {
        **pair.said(),
        "clients": sizes,
        "requests": number,
        "lengths": list(lengths),
        "rounds": rounds,
    }
    return {"provenance": said, **load.found}


def questions(pair: Pair, asked: Asked, number: int, lengths: Sequence[int]) -> list[Question]:
    """So many requests, in an order that the seed draws, with the answers of the engine alone."""
    prompts = [prompt for name in asked.workloads or ("built-in",) for prompt in load_workload(name, 16).prompts]
    answers = [answer_alone(pair, list(prompt.messages), max(lengths)) for prompt in prompts]
    draw = random.Random(asked.seed)
    kinds = [kind for kind, share in SHARES.items() for _ in range(max(1, round(share * number)))]
    kinds += ["whole"] * (number - len(kinds))
    draw.shuffle(kinds)
    made = []
    for kind in kinds:
        place, length = draw.randrange(len(prompts)), draw.choice(lengths)
        expected = decode_text(tokenizer_of(pair.target), answers[place][:length])
        made.append(Question(kind, list(prompts[place].messages), length, expected))
    return made


def answer_alone(pair: Pair, messages: list[dict[str, str]], length: int) -> list[int]:
    """The tokens of an answer, decoded without drafting."""
    prompt_ids = chat_ids(messages, tokenizer_of(pair.target))
    return generate(pair.target.model, None, prompt_ids, policy=PLAIN, max_new_tokens=length).token_ids


class Load:
    """Servers, and what was found about them.

    Args:
        asked: whose models our server is told to load.
        pair: the same ones.
        questions: the requests of a round.
        policies: of our server, plain decoding among them.
        folder: for the model as `transformers serve` takes it, and for what servers say.
    """

    def __init__(
        self, asked: Asked, pair: Pair, questions: Sequence[Question], policies: Sequence[str], folder: Path
    ) -> None:
        self.asked, self.pair, self.questions = asked, pair, questions
        self.policies, self.folder = policies, folder
        self.found: dict[str, Any] = {
            **{name: defaultdict(lambda: defaultdict(list)) for name in ("total", *WAITS)},
            "outcomes": defaultdict(Counter),  # method -> kind and outcome -> how many
            "memory": defaultdict(list),  # server -> [seconds, MB] over its life
            "errors": {},
        }

    def run(self, sizes: Sequence[int], rounds: int) -> None:
        """Measure everything; servers run one after another, so that none is in another's way."""
        saved = self.folder / "model"
        with quiet():
            self.pair.target.model.save_pretrained(saved)
            tokenizer_of(self.pair.target).save_pretrained(saved)
        servers = {"dynatree serve": lambda: our_server(self.asked.models, self.policies, self.folder)}
        missing = [name for name in NEEDED_BY_THEIRS if find_spec(name) is None]
        for name, words in THEIRS.items():
            if missing:
                self.found["errors"][name] = f"{', '.join(missing)} not installed: the extra [clients] has them"
            else:
                servers[name] = lambda words=words: their_server(saved, words, self.folder)
        in_rounds([self._job(name, start, sizes) for name, start in servers.items()], rounds)

    def _job(
        self, name: str, start: Callable[[], contextlib.AbstractContextManager[Server]], sizes: Sequence[int]
    ) -> Job:
        def job(turn: int) -> None:
            if name in self.found["errors"] or turn == 0:  # each start of a server has a warm-up of its own
                return
            try:
                with start() as server, watched(server, self.found["memory"][name]):
                    self._load(name, server, sizes)
            except ServerError as error:
                if server_is_ours(name):
                    raise
                self.found["errors"][name] = str(error)  # a result, too

        return job

    def _load(self, name: str, server: Server, sizes: Sequence[int]) -> None:
        questions = self.questions if server.is_ours else self.questions[:MOST_OF_THEIRS]
        ask_all(server, questions[:4], 2, self.policies[0])
        for size in sizes:
            for policy in self.policies if server.is_ours else [""]:
                begin = time.perf_counter()
                answered = ask_all(server, questions, size, policy)
                self._note(policy or name, str(size), answered, time.perf_counter() - begin)

    def _note(self, method: str, size: str, answered: Sequence[Answered], seconds: float) -> None:
        found = self.found
        found["total"][method][size].append(sum(one.num_tokens for one in answered) / seconds)
        found["first"][method][size] += [1000 * one.first for one in answered if one.first is not None]
        gaps = [gap for one in answered for gap in one.gaps]
        found["chunk"][method][size] += [1000 * gap for gap, _ in gaps]
        found["token"][method][size] += [1000 * gap / num for gap, num in gaps for _ in range(num)]
        for one in answered:
            found["outcomes"][method][f"{one.kind}: {one.became}"] += 1


class ServerError(RuntimeError):
    """A server that does not start."""


def server_is_ours(name: str) -> bool:
    return name not in THEIRS


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the bars of saving a model, which nobody has asked for."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        yield


def our_server(models: Models, policies: Sequence[str], folder: Path) -> contextlib.AbstractContextManager[Server]:
    """`dynatree serve`, with policies that requests choose."""
    words = ["-m", "dynatree_core", "serve", "--model-name", "model", "--max-waiting", "1024", "--policy", policies[0]]
    words += ["--dtype", models.dtype]
    given = {"--target": models.target, "--drafter": next(iter(models.drafters), None), "--device": models.device}
    words += [word for option, value in given.items() if value is not None for word in (option, value)]
    words += ["--max-body", str(MAX_BODY_KB), "--max-requests", "1024", "--prefix-cache", "256"]
    for policy in policies[1:]:
        words += ["--allow-policy", policy]
    return started(words, "model", folder / "ours.log", is_ours=True)


def their_server(saved: Path, words: Sequence[str], folder: Path) -> contextlib.AbstractContextManager[Server]:
    """`transformers serve`."""
    program = "from transformers.cli.transformers import main; main()"
    return started(["-c", program, "serve", str(saved), *words], str(saved), folder / "theirs.log", is_ours=False)


@contextlib.contextmanager
def started(words: Sequence[str], model: str, log: Path, *, is_ours: bool) -> Iterator[Server]:
    """A server on a free port, once it answers, until the block ends.

    Raises:
        ServerError: it ends, or does not answer in time.
    """
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, *words, "--host", "127.0.0.1", "--port", str(port)],
            stdout=output, stderr=output, env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
    try:
        _wait_for(process, port, log)
        yield Server(process, port, model, is_ours)
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_for(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(OSError), contextlib.closing(connected(port)) as connection:
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        time.sleep(0.25)
    last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:] or ["it said nothing"]
    raise ServerError(f"a server must answer within {START_SECONDS:.0f} s, but did not: {last[0]:.300}")


def connected(port: int) -> http.client.HTTPConnection:
    return http.client.HTTPConnection("127.0.0.1", port, timeout=ANSWER_SECONDS)


@contextlib.contextmanager
def watched(server: Server, samples: list[list[float]]) -> Iterator[None]:
    """Look at the server's memory meanwhile: seconds since the block began, and MB."""
    process, ended = psutil.Process(server.process.pid), threading.Event()
    begin = time.monotonic()

    def look() -> None:
        while not ended.wait(SAMPLE_SECONDS):
            with contextlib.suppress(psutil.NoSuchProcess):  # it has ended: there is nothing more to see
                samples.append([round(time.monotonic() - begin, 2), process.memory_info().rss / 1e6])

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def ask_all(server: Server, asked: Sequence[Question], num_clients: int, policy: str) -> list[Answered]:
    """What becomes of all requests, by so many clients at once. Servers that are not ours get the whole ones alone."""
    waiting: queue.SimpleQueue[Question] = queue.SimpleQueue()
    for question in asked:
        if server.is_ours or question.kind == "whole":
            waiting.put(question)
    answered: list[Answered] = []

    def client() -> None:
        while True:
            try:
                question = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                answered.append(ask(server, question, policy))
            except (OSError, http.client.HTTPException, ValueError) as error:
                answered.append(Answered(question.kind, f"failed ({type(error).__name__})"))

    threads = [threading.Thread(target=client) for _ in range(num_clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answered


def body_of(server: Server, question: Question, policy: str) -> bytes:
    """A request as it is sent."""
    body: dict[str, Any] = {
        "model": server.model, "messages": question.messages, "max_tokens": question.num_tokens, "temperature": 0,
        "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    if server.is_ours:
        body["dynatree"] = {"policy": policy, "steps": True}
    else:
        del body["stream_options"]
    if question.kind == OVERSIZED:
        body["messages"] = [{"role": "user", "content": "x" * (MAX_BODY_KB * 1024 + 1)}]
    text = json.dumps(body)
    return text[: len(text) // 2].encode() if question.kind == MALFORMED else text.encode()


def ask(server: Server, question: Question, policy: str) -> Answered:
    """Ask one request, and see what comes."""
    with contextlib.closing(connected(server.port)) as connection:
        begin = time.perf_counter()
        body = body_of(server, question, policy)
        connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            wanted = {MALFORMED: 400, OVERSIZED: 413}.get(question.kind)
            return Answered(question.kind, "refused" if response.status == wanted else f"failed ({response.status})")
        return _listen(response, question, begin)


def _listen(response: http.client.HTTPResponse, question: Question, begin: float) -> Answered:
    answered, text, last = Answered(question.kind, "wrong"), "", begin
    for line in response:
        if not line.startswith(b"data: {"):
            continue
        record = json.loads(line.removeprefix(b"data: "))
        if record.get("usage"):  # tokens without a text of their own, such as the last, are in no chunk that is counted
            answered.num_tokens = record["usage"]["completion_tokens"]
        delta = record["choices"][0]["delta"] if record.get("choices") else {}
        piece = delta.get("content") or ""
        if not piece:
            continue
        now = time.perf_counter()
        num_tokens = max(1, len(record.get("dynatree", {}).get("texts", [1])))
        if answered.first is None:
            answered.first = now - begin
        else:
            answered.gaps.append((now - last, num_tokens))
        text, last = text + piece, now
        answered.num_tokens += num_tokens
        if question.kind == CUT:
            answered.became = "cut"
            return answered
    answered.became = "right" if text == question.expected else "wrong"
    return answered


# what clients wait for
WAITS = {
    "first": "First token, ms",
    "chunk": "Between two chunks, ms",
    "token": "Between two tokens, ms",
}


def percentile(values: Sequence[float], percent: int) -> float | None:
    """The value that so many percent are not above; None of nothing."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, len(ordered) * percent // 100)] if ordered else None


def _waits(found: Mapping[str, Any], name: str) -> list[list[Any]]:
    return [
        [method, size, *(percentile(values, percent) for percent in PERCENTILES)]
        for method, by_size in found[name].items()
        for size, values in by_size.items()
    ]


def _memory(found: Mapping[str, Any]) -> list[list[Any]]:
    """MB of each server: in the first tenth of its samples, halfway, in the last tenth, and the most."""
    rows = []
    for name, samples in found["memory"].items():
        values = [value for _, value in samples]
        if values:
            tenth = max(1, len(values) // 10)
            half = len(values) // 2
            parts = (values[:tenth], values[half : half + tenth], values[-tenth:])
            rows.append([name, *(statistics.median(part) for part in parts), max(values)])
    return rows


def tables(found: Mapping[str, Any]) -> Sequence[Table | None]:
    sizes = list(map(str, found["provenance"]["clients"]))
    total = [
        [method, *(Spread.of(by_size[size], digits=1) if by_size.get(size) else None for size in sizes)]
        for method, by_size in found["total"].items()
    ]
    outcomes = [
        [method, what, number]
        for method, counts in found["outcomes"].items()
        for what, number in sorted(counts.items())
    ]
    waits = ("method", "clients", *(f"p{percent}" for percent in PERCENTILES))
    return [
        simple("total", "Tokens/s in total", "With the waiting line; median and quartiles of the rounds.",
               ("clients", *sizes), total),
        *(simple(name, title, "", waits, _waits(found, name), digits=1) for name, title in WAITS.items()),
        simple("memory", "Memory of the server, MB", "Its resident set.",
               ("server", "at first", "halfway", "at last", "most"), _memory(found), digits=0),
        simple("outcomes", "What became of the requests", "", ("method", "kind and outcome", "requests"), outcomes),
    ]  # fmt: skip


def panels(found: Mapping[str, Any]) -> Sequence[Panel]:
    return [
        Panel("in total", "clients", "tokens/s", lines_of(found["total"]), is_doubling=True),
        Panel("first token", "clients", "ms", lines_of(found["first"]), is_doubling=True, is_log=True),
    ]


def sentences(found: Mapping[str, Any]) -> Sequence[str]:
    said = []
    ours = {method: counts for method, counts in found["outcomes"].items() if server_is_ours(method)}
    bad = sum(
        number
        for counts in ours.values()
        for what, number in counts.items()
        if what.endswith("wrong") or "failed" in what
    )
    number = sum(sum(counts.values()) for counts in ours.values())
    said.append(f"{bad} of {number} requests to our server went wrong" if bad else
                f"none of {number} requests to our server went wrong")  # fmt: skip
    for method, counts in found["outcomes"].items():
        if method not in ours and (num_other := counts.get("whole: wrong", 0)):
            said.append(f"{method}: {num_other} of {sum(counts.values())} answers differ from plain decoding alone")
    return [*said, *(f"{method} does not run here: {error}" for method, error in found["errors"].items())]


STUDY = Study(
    ("target", "drafters", "device", "dtype", "policies", "workloads", "num_prompts", "max_new_tokens", "repeats",
     "batch_sizes"),
    measure,
    tables,
    panels,
    sentences,
)  # fmt: skip
