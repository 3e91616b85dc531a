"""Clients of OpenAI's API on `dynatree serve`: LangChain, LlamaIndex and `llm` get what `generate` gives."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import Running, chat_text, expected_text, new_service, running

QUESTION, LENGTH = "the cat sat on the mat. the cat", 20
ANSWER = expected_text(chat_text(QUESTION), LENGTH)


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(new_service()) as server:
        yield server


def test_langchain(server):
    langchain = pytest.importorskip("langchain_openai", reason="langchain-openai is of the extra [clients]")
    model = langchain.ChatOpenAI(
        base_url=f"{server.address}/v1", api_key="none", model="tiny", temperature=0, max_tokens=LENGTH, max_retries=0
    )
    answer = model.invoke(QUESTION)
    assert answer.content == ANSWER
    assert answer.usage_metadata["output_tokens"] == LENGTH
    assert "".join(chunk.content for chunk in model.stream(QUESTION)) == ANSWER
    logprobs = model.bind(logprobs=True, top_logprobs=2).invoke(QUESTION).response_metadata["logprobs"]["content"]
    assert "".join(one["token"] for one in logprobs) == ANSWER
    assert [one.content for one in model.batch([QUESTION] * 3)] == [ANSWER] * 3
    # what its middleware shortens a conversation at
    from langchain_core.exceptions import ContextOverflowError

    with pytest.raises(ContextOverflowError):
        model.invoke("a" * 160)


def test_llama_index(server):
    llms = pytest.importorskip(
        "llama_index.llms.openai_like", reason="llama-index-llms-openai-like is of the extra [clients]"
    )
    from llama_index.core.llms import ChatMessage

    model = llms.OpenAILike(
        api_base=f"{server.address}/v1", api_key="none", model="tiny", temperature=0, max_tokens=LENGTH, max_retries=0,
        is_chat_model=True, context_window=160,
    )  # fmt: skip
    messages = [ChatMessage(role="user", content=QUESTION)]
    assert model.chat(messages).message.content == ANSWER
    assert "".join(chunk.delta or "" for chunk in model.stream_chat(messages)) == ANSWER
    plain = model.model_copy(update={"is_chat_model": False})
    assert plain.complete(QUESTION).text == expected_text(QUESTION, LENGTH)


def test_llm(server, environment, tmp_path: Path):
    pytest.importorskip("llm", reason="llm is of the extra [clients]")
    # the form of llm's own documentation, of which JSON is a part
    known = [{"model_id": "tiny", "model_name": "tiny", "api_base": f"{server.address}/v1"}]
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps(known))
    words = ["-m", "tiny", "-o", "temperature", "0", "-o", "max_tokens", str(LENGTH), "--key", "none", "--no-log"]
    apart = {"LLM_USER_PATH": str(tmp_path), "LLM_LOAD_PLUGINS": ""}  # whatever plugins are installed
    for more in ([], ["--no-stream"]):
        ran = subprocess.run(
            [sys.executable, "-m", "llm", *words, *more, QUESTION],
            capture_output=True, text=True, check=False, env={**environment, **apart},
        )  # fmt: skip
        assert (ran.returncode, ran.stderr) == (0, ""), ran.stderr
        assert ran.stdout.removesuffix("\n") == ANSWER
