"""`transformers serve`: chat completions of a folder with trees, at once and streamed."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

SECONDS = 120.0  # until it answers, and for each answer
START = "from transformers.cli.transformers import main; main()"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def address(served, environment, tmp_path: Path) -> Iterator[str]:
    for name in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(name, reason=f"transformers serve needs {name}, from the extra [clients]")
    port, log = free_port(), tmp_path / "serve.log"
    words = ["serve", str(served.trees), "--trust-remote-code", "--host", "127.0.0.1", "--port", str(port)]
    with log.open("w") as output:
        server = subprocess.Popen(
            [sys.executable, "-c", START, *words, "--device", "cpu"], env=environment, stdout=output, stderr=output
        )
    try:
        wait_for(f"http://127.0.0.1:{port}/health", server, log)
        yield f"http://127.0.0.1:{port}/v1/chat/completions"
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def wait_for(address: str, server: subprocess.Popen, log: Path) -> None:
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        assert server.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except urllib.error.URLError:
            time.sleep(0.5)
    raise AssertionError(f"transformers serve must answer within {SECONDS} s: {log.read_text()}")


def asked(address: str, body: dict) -> str:
    request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=SECONDS) as answer:
        return answer.read().decode()


def test_chat_completions(served, address):
    tokenizer, plain = AutoTokenizer.from_pretrained(served.plain), AutoModelForCausalLM.from_pretrained(served.plain)
    messages = [{"role": "user", "content": "the cat sat on the mat"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    new = plain.generate(**ids, do_sample=False, max_new_tokens=16)[0, ids["input_ids"].shape[1] :]
    expected = tokenizer.decode(new, skip_special_tokens=True)
    assert expected

    before = served.num_calls
    body = {"model": str(served.trees), "messages": messages, "max_tokens": 16, "temperature": 0}
    answer = json.loads(asked(address, body))
    assert answer["choices"][0]["message"]["content"] == expected
    assert served.num_calls == before + 1

    events = [line.removeprefix("data: ") for line in asked(address, {**body, "stream": True}).splitlines() if line]
    chunks = [json.loads(event)["choices"][0] for event in events if event != "[DONE]"]
    assert "".join(chunk["delta"].get("content", "") for chunk in chunks) == expected
    assert chunks[-1]["finish_reason"] == "length"
    assert served.num_calls == before + 2
