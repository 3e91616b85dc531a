"""`dynatree serve`: its options, where they come from, and the process."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import attrs
import click
import openai
import pytest
from command import Dynatree, dynatree, is_one_error_line, spawn
from serving import expected_text, new_service, running
from test_docs import DOCS, code_words, table
from test_serve_spans import BODY, Kept
from tiny_folder import save_tiny

from dynatree_core import Engine
from dynatree_core.cli.serve import equal_share, serve
from dynatree_core.cli.serve_options import variable_of
from dynatree_core.serve import on_ray
from dynatree_core.serve.logs import LIBRARIES
from dynatree_core.trace import read

__all__ = ["dynatree"]  # a fixture


@pytest.fixture(autouse=True)
def logs_as_before() -> Iterator[None]:
    """A command has lines written to its own standard error, for its whole process."""
    loggers = [logging.getLogger(name) for name in ("dynatree.serve", *LIBRARIES)]
    before = [(logger.handlers, logger.propagate, logger.level) for logger in loggers]
    yield
    for logger, (handlers, propagate, level) in zip(loggers, before, strict=True):
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)
    logging.captureWarnings(False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"))


# where options come from


def test_the_command_line_goes_before_the_environment_and_that_before_the_file(
    dynatree: Dynatree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "server.toml"
    file.write_text('port = 1\nmax-tokens = 2\nmax-waiting = 3\nallow-policy = ["fixed", "linear(depth=2)"]\n')
    monkeypatch.setenv("DYNATREE_SERVE_PORT", "11")
    monkeypatch.setenv("DYNATREE_SERVE_MAX_TOKENS", "22")
    monkeypatch.setenv("DYNATREE_SERVE_LOG_PROMPTS", "1")
    monkeypatch.setenv("DYNATREE_SERVE_API_KEYS", "not-to-be-seen")
    ran = dynatree("serve", "--config", file, "--port", 111, "--print-config")
    assert ran.code == 0
    assert "not-to-be-seen" not in ran.out + ran.err
    lines = ran.out.splitlines()
    for line in (
        "port = 111  # command line", "max-tokens = 22  # environment", "max-waiting = 3  # file",
        'allow-policy = ["fixed", "linear(depth=2)"]  # file', "log-prompts = true  # environment",
        'host = "127.0.0.1"  # default',
    ):  # fmt: skip
        assert line in lines
    file.write_text(ran.out)
    again = dynatree("serve", "--config", file, "--print-config")
    assert tomllib.loads(again.out) == tomllib.loads(ran.out) | {"port": 11}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("max-tokn = 1", ["names 'max-tokn'", "did you mean 'max-tokens'?"]),
        ("config = 'x'", ["names 'config'"]),
        ("port = ", ["TOML"]),
        ("port = 'many'", ["--port"]),
    ],
)
def test_a_file_that_cannot_be_used(dynatree: Dynatree, tmp_path: Path, text: str, words: list[str]) -> None:
    file = tmp_path / "server.toml"
    file.write_text(text)
    ran = dynatree("serve", "--config", file, "--print-config")
    assert ran.code == 2
    assert is_one_error_line(ran, *words), ran.err


def test_every_option_has_a_variable_of_its_own() -> None:
    options = [option for option in serve.params if option.name not in ("print_config", "help")]
    assert len({variable_of(option) for option in options}) == len(options)
    assert all(isinstance(option, click.Option) and option.envvar == variable_of(option) for option in options)


def test_the_page_lists_every_option_with_its_variable() -> None:
    rows = table(DOCS / "serve.md", "option", "variable", "default", "meaning")
    listed = {code_words(row["option"])[0]: row for row in rows}
    shown = [option for option in serve.params if isinstance(option, click.Option) and option.name != "help"]
    assert list(listed) == [max(option.opts, key=len) for option in shown]
    for option, row in zip(shown, rows, strict=True):
        has_variable = option.name != "print_config"
        assert row["variable"] == (f"`{variable_of(option)}`" if has_variable else "")
        assert row["default"].strip("`") == shown_default(option), option.name
        assert row["meaning"]


def test_the_page_lists_every_attribute_of_a_span() -> None:
    kept = Kept()
    with running(new_service(spans=kept.spans)) as server:
        server.post("/v1/completions", BODY)
        found = {*kept.next().attributes, "error.type"}
    rows = table(DOCS / "serve.md", "attribute", "what it says")
    listed = {name for row in rows for name in code_words(row["attribute"])}
    kinds = tuple(name.removesuffix("*") for name in listed if name.endswith("*"))
    assert {name for name in found if not name.startswith(kinds)} == {name for name in listed if name[-1] != "*"}


def shown_default(option: click.Option) -> str:
    has_one = isinstance(option.default, int | float | str) and not option.is_flag
    return str(option.default) if has_one else ""


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--policy", "phse3"], ["did you mean 'phase3'"]),
        (["--allow-policy", "fixed(dpth=1)"], ["did you mean 'depth'"]),
        (["--allow-drafter", "promptlookup"], ["did you mean 'prompt_lookup'"]),
        (["--ssl-certfile", __file__], ["--ssl-keyfile"]),
        (["--api-key-file", "/nowhere"], ["API keys", "/nowhere"]),
        (["--max-seconds", "0"], ["--max-seconds"]),
        (["--trace-private"], ["--trace FILE"]),
    ],
)
def test_what_cannot_be_used_is_told_before_a_model_is_loaded(
    dynatree: Dynatree, folder: Path, args: list[str], words: list[str]
) -> None:
    ran = dynatree("serve", "--target", folder, *args)
    assert ran.code == 2
    assert is_one_error_line(ran, *words), ran.err


def test_other_commands_do_not_import_what_the_server_is_made_of() -> None:
    code = (
        "import sys, dynatree_core.cli.serve; print({'fastapi', 'uvicorn', 'torch', 'transformers'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_without_the_extra_it_says_what_to_install(dynatree: Dynatree, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dynatree_core.cli.serve.NEEDED", ("fastapi", "no_such_package"))
    ran = dynatree("serve")
    assert ran.code == 2
    assert is_one_error_line(ran, "needs no_such_package", "pip install 'dynatree[serve]'")


def test_replicas_need_ray(dynatree: Dynatree, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dynatree_core.cli.serve.RAY", "no_such_package")
    ran = dynatree("serve", "--ray")
    assert ran.code == 2
    assert is_one_error_line(ran, "--ray needs Ray Serve", "dynatree[ray]")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--replicas", "3", "--max-replicas", "2"], ["--max-replicas", "at least --replicas, 3, got 2"]),
        (["--trace", "run.jsonl"], ["a trace is of one process"]),
        (["--ssl-certfile", __file__, "--ssl-keyfile", __file__], ["without HTTPS"]),
        (["--max-connections", "1024"], ["--max-connections goes without --ray"]),
        (["--allow-host", "box:8000"], ["without scheme and port", "give 'box'"]),
        (["--port", "0"], ["must be told where to listen", "name a port"]),
        (["--policy", "phse3"], ["did you mean 'phase3'"]),
    ],
)
def test_what_replicas_cannot_do_is_told_before_any_is_made(
    dynatree: Dynatree, monkeypatch: pytest.MonkeyPatch, args: list[str], words: list[str]
) -> None:
    monkeypatch.setattr("dynatree_core.cli.serve.RAY", "attrs")  # something that is installed
    ran = dynatree("serve", "--ray", *args)
    assert ran.code == 2
    assert is_one_error_line(ran, *words), ran.err


@pytest.mark.parametrize(("num_cpus", "num_replicas", "share"), [(8, 2, 4), (8, 3, 2), (2, 2, 1), (2, 4, 0.5)])
def test_replicas_share_the_cpus(num_cpus: int, num_replicas: int, share: float) -> None:
    assert equal_share(num_cpus, num_replicas) == share


@pytest.fixture
def made_ray(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What Ray Serve is asked for, without Ray: `deployed_at` says when replicas were last made."""
    made = SimpleNamespace(deployed_at=1.0, calls=[])

    def status() -> SimpleNamespace:
        return SimpleNamespace(applications={"dynatree": SimpleNamespace(last_deployed_time_s=made.deployed_at)})

    def noting(name: str) -> Callable[..., None]:
        return lambda *_, **__: made.calls.append(name)

    serving = ModuleType("ray.serve")
    vars(serving).update({name: noting(name) for name in ("start", "run", "delete", "shutdown")}, status=status)
    config, ray = ModuleType("ray.serve.config"), ModuleType("ray")
    vars(config).update(HTTPOptions=SimpleNamespace)
    vars(ray).update(serve=serving, init=noting("init"), shutdown=noting("ray.shutdown"))
    for module in (ray, serving, config):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.setattr(on_ray, "application", lambda *_: None)
    return made


@pytest.mark.parametrize(
    ("is_replaced", "ended"), [(False, ["delete"]), (True, [])], ids=["its own", "a later start's"]
)
def test_a_command_ends_the_replicas_that_it_has_made(
    made_ray: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, is_replaced: bool, ended: list[str]
) -> None:
    class Event(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            made_ray.deployed_at += is_replaced
            return True

    monkeypatch.setattr(on_ray, "threading", SimpleNamespace(Event=Event))
    on_ray.run_on_ray(lambda: None, on_ray.Replicas(), host="127.0.0.1", port=8000)  # type: ignore[arg-type,return-value]
    assert made_ray.calls == ["init", "start", "run", *ended, "ray.shutdown"]


def test_a_cluster_of_its_own_ends_with_the_command_and_tells_nobody(
    made_ray: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "1")
    monkeypatch.delenv("RAY_USAGE_STATS_ENABLED")  # and it is forgotten after the test
    monkeypatch.setattr(on_ray, "threading", SimpleNamespace(Event=lambda: SimpleNamespace(wait=lambda: True)))
    on_ray.run_on_ray(lambda: None, on_ray.Replicas(), host="127.0.0.1", port=8000)  # type: ignore[arg-type,return-value]
    assert made_ray.calls == ["init", "start", "run", "delete", "shutdown", "ray.shutdown"]
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"


def test_a_second_signal_of_any_kind_meets_pythons_own_handlers() -> None:
    event = threading.Event()
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        signal.signal(signal.SIGTERM, on_ray._setting(event))
        signal.raise_signal(signal.SIGTERM)
        assert event.is_set()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_engines_that_fail_end_the_process(dynatree: Dynatree, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Engine) -> None:
        raise RuntimeError("the bits have fallen out")

    monkeypatch.setattr(Engine, "step", fail)
    ran = dynatree("serve", "--target", folder, "--device", "cpu", "--port", 0)
    assert ran.code == 1
    assert "the engines must go on, but ended with RuntimeError: the bits have fallen out" in ran.err


def test_an_address_that_another_program_has(dynatree: Dynatree) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        ran = dynatree("serve", "--target", "/nowhere", "--port", other.getsockname()[1])
    assert ran.code == 1
    assert is_one_error_line(ran, "listen on 127.0.0.1", "in use", "another --host or --port"), ran.err


def test_strangers_are_warned_of(dynatree: Dynatree, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dynatree_core.cli.serve._run", lambda process, bound: 0)
    plain = dynatree("serve", "--target", folder, "--port", 0, "--host", "0.0.0.0")
    assert "ANYBODY WHO REACHES 0.0.0.0" in plain.err
    monkeypatch.setenv("DYNATREE_SERVE_API_KEYS", "a-long-key")
    for args in (["--host", "0.0.0.0"], ["--host", "127.0.0.2"], ["--host", "localhost"]):
        assert "ANYBODY" not in dynatree("serve", "--target", folder, "--port", 0, *args).err


# the process


@attrs.frozen
class Served:
    """A server in a process of its own."""

    process: subprocess.Popen[bytes]
    address: str

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.address}/v1", api_key="none", max_retries=0, timeout=120)

    def lines(self) -> Iterator[dict[str, object]]:
        """The log's lines, as they come."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if line.startswith(b"{"):
                yield json.loads(line)


def started(folder: Path, *args: object) -> Served:
    environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = spawn(
        "serve", "--target", folder, "--device", "cpu", "--dtype", "float64", "--port", 0, "--model-name", "tiny",
        *args,
        stderr=subprocess.PIPE, env=environment,
    )  # fmt: skip
    served = Served(process, "")
    for line in served.lines():
        if line["event"] == "serving":
            return attrs.evolve(served, address=str(line["address"]))
    raise AssertionError(f"a server says where it serves, but ended with {process.wait()}")


@pytest.mark.slow
def test_a_server_answers_records_logs_and_ends_at_a_signal(folder: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    served = started(folder, "--trace", trace, "--policy", "fixed(depth=3)")
    with served.client() as client:
        answer = client.completions.create(model="tiny", prompt="the cat sat", max_tokens=12, temperature=0)
        assert answer.choices[0].text == expected_text("the cat sat", 12)
        served.process.send_signal(signal.SIGTERM)
    lines = list(served.lines())
    assert served.process.wait() == 0
    [line] = [line for line in lines if line["event"] == "request"]
    assert (line["status"], line["completion_tokens"], line["policy"]) == (200, 12, "fixed(depth=3)")
    assert "cat" not in json.dumps(lines)
    assert len(read(trace).sequences) == 1  # what warms it up is not recorded


@pytest.mark.slow
def test_a_second_signal_ends_it_at_once(folder: Path) -> None:
    served = started(folder, "--stop-seconds", 1000)
    host, port = served.address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:  # a request whose body does not come
        head = ["POST /tokenize HTTP/1.1", "Host: localhost", "Content-Type: application/json", "Content-Length: 9"]
        connection.sendall("\r\n".join([*head, "Expect: 100-continue", "", ""]).encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 100")
        served.process.send_signal(signal.SIGTERM)
        assert any(line["event"] == "stopping" for line in served.lines())
        served.process.send_signal(signal.SIGTERM)
        left = list(served.lines())
        assert served.process.wait(60) == 130
    assert "error" not in {line["level"] for line in left}
