"""`dynatree serve --ray`: replicas under Ray Serve on this machine, one of which dies while clients ask."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import attrs
import psutil
import pytest
from test_serve import free_port

from dynatree_core import generate
from dynatree_core.models.load import load_model

PROMPTS = ["the cat sat on the mat. the cat", "a man a plan a canal", "re, in the beginning", "one two one two"]
SECONDS = 120.0


@attrs.frozen
class Answer:
    """What came of one request."""

    status: int
    replica: str | None = None
    text: str | None = None


@attrs.frozen
class Cluster:
    """Replicas that answer on a port."""

    port: int
    command: subprocess.Popen
    words: list[str]  # of the command
    environment: dict[str, str]

    def ask(self, prompt: str, session: str | None = None, max_tokens: int = 16) -> Answer:
        """The answer to a text; status 0 where the connection ended without one."""
        body = {"model": "tiny", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
        headers = {"Content-Type": "application/json", **({"x-session-id": session} if session else {})}
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/completions", json.dumps(body).encode(), headers
        )
        try:
            with urllib.request.urlopen(request, timeout=SECONDS) as response:
                found = json.load(response)
                return Answer(response.status, response.headers["x-dynatree-replica"], found["choices"][0]["text"])
        except urllib.error.HTTPError as error:
            return Answer(error.code)
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return Answer(0)

    def workers(self) -> list[psutil.Process]:
        """The processes of the replicas."""
        found = psutil.Process(self.command.pid).children(recursive=True)
        return [process for process in found if "ServeReplica:dynatree" in " ".join(process.cmdline())]


@pytest.fixture(scope="module")
def cluster(served, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    for name in ("ray", "mmh3"):
        pytest.importorskip(name, reason=f"replicas need {name}, from the extra [ray]")
    port, log = free_port(), tmp_path_factory.mktemp("ray") / "serve.log"
    words = ["serve", "--ray", "--replicas", "2", "--replica-cpus", "0.5", "--port", str(port), "--device", "cpu"]
    words += ["--target", str(served.plain), "--model-name", "tiny", "--drafter", "prompt_lookup"]
    quiet = {"HF_HUB_OFFLINE": "1", "RAY_USAGE_STATS_ENABLED": "0", "RAY_SERVE_HEALTH_CHECK_PERIOD_S": "1"}
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | quiet
    with log.open("w") as output:
        command = subprocess.Popen(
            [sys.executable, "-m", "dynatree_core", *words], env=environment, stdout=output, stderr=output
        )
    try:
        found = Cluster(port, command, words, environment)
        wait_until(lambda: command.poll() is not None or found.ask("a").status == 200)
        assert command.poll() is None, log.read_text()[-4000:]
        yield found
    finally:
        command.send_signal(signal.SIGTERM)
        try:
            assert command.wait(SECONDS) == 0, log.read_text()[-4000:]
        except subprocess.TimeoutExpired:
            for process in [*psutil.Process(command.pid).children(recursive=True), command]:
                process.kill()
            raise


@pytest.fixture(scope="module")
def expected(served) -> dict[str, str]:
    """The text that `generate` gives for each prompt."""
    loaded = load_model(str(served.plain), device="cpu")
    tokenizer = loaded.tokenizer
    texts = {}
    for prompt in PROMPTS:
        found = generate(loaded.model, None, tokenizer(prompt).input_ids, policy="autoregressive", max_new_tokens=16)
        texts[prompt] = tokenizer.decode(found.token_ids, skip_special_tokens=True)
    return texts


def test_all_replicas_answer_as_generate_does(cluster, expected):
    with ThreadPoolExecutor(8) as pool:
        prompts = [prompt for _, prompt in zip(range(24), itertools.cycle(PROMPTS), strict=False)]
        answers = [*pool.map(cluster.ask, prompts)]
    assert [answer.text for answer in answers] == [expected[prompt] for prompt in prompts]
    assert len({answer.replica for answer in answers}) == 2


def test_a_conversation_stays_with_its_replica(cluster):
    for session in ("a", "b", "c", "d"):
        answers = [cluster.ask(prompt, session) for prompt in PROMPTS]
        assert {answer.status for answer in answers} == {200}
        assert len({answer.replica for answer in answers}) == 1


def test_one_replica_dies_and_clients_of_the_others_notice_nothing(cluster, expected):
    sessions = [str(number) for number in range(12)]
    homes = {session: cluster.ask(PROMPTS[0], session).replica for session in sessions}
    assert len(set(homes.values())) == 2
    workers = cluster.workers()
    assert len(workers) == 2
    workers[0].send_signal(signal.SIGKILL)
    asked = [(prompt, session) for session in sessions for prompt in PROMPTS]
    with ThreadPoolExecutor(6) as pool:
        answers = [*pool.map(lambda pair: cluster.ask(*pair), asked)]
    wait_until(lambda: len(cluster.workers()) == 2)
    wait_until(lambda: len({cluster.ask(PROMPTS[0], session).replica for session in sessions} - {None}) == 2)
    later = [cluster.ask(PROMPTS[1], session) for session in sessions]
    assert {answer.text for answer in later} == {expected[PROMPTS[1]]}
    (survivor,) = {answer.replica for answer in later} & set(homes.values())
    for (prompt, session), answer in zip(asked, answers, strict=True):
        if homes[session] == survivor:
            assert answer == Answer(200, survivor, expected[prompt])
        else:  # an answer by the other one, or an error: never a wrong one
            assert answer.text in (None, expected[prompt])


def test_a_later_start_replaces_replicas_under_traffic_and_nobody_notices(cluster, expected, tmp_path):
    """One after another, each when its successor is there; those of before have the time to end what they began."""
    before = {cluster.ask(PROMPTS[0], str(number)).replica for number in range(12)}
    log = tmp_path / "later.log"
    with log.open("w") as output:
        command = subprocess.Popen(
            [sys.executable, "-m", "dynatree_core", *cluster.words, "--max-sequences", "4"],
            env=cluster.environment | {"RAY_ADDRESS": "auto"}, stdout=output, stderr=output,
        )  # fmt: skip
    try:
        answers: list[tuple[str, Answer]] = []
        with ThreadPoolExecutor(2) as pool:
            end = time.monotonic() + SECONDS
            while {answer.replica for _, answer in answers[-12:]} & before or len(seen(answers) - before) < 2:
                assert command.poll() is None, log.read_text()[-4000:]
                assert time.monotonic() < end, (answers[-12:], log.read_text()[-4000:])
                prompts = [PROMPTS[(len(answers) + place) % len(PROMPTS)] for place in range(4)]
                sessions = [str((len(answers) + place) % 12) for place in range(4)]
                answers += zip(prompts, pool.map(cluster.ask, prompts, sessions), strict=True)
        assert [(answer.status, answer.text) for _, answer in answers] == [(200, expected[one]) for one, _ in answers]
    finally:
        command.send_signal(signal.SIGTERM)
        assert command.wait(SECONDS) == 0, log.read_text()[-4000:]


def seen(answers: list[tuple[str, Answer]]) -> set[str | None]:
    """The replicas that have answered."""
    return {answer.replica for _, answer in answers}


def wait_until(is_done: Callable[[], bool]) -> None:
    end = time.monotonic() + SECONDS
    while not is_done():
        assert time.monotonic() < end, "replicas answer, at first and after one of them has died"
        time.sleep(0.5)
