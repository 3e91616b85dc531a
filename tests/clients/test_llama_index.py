"""LlamaIndex's HuggingFaceLLM: a folder with trees and the argument of the call give what plain decoding gives."""

from __future__ import annotations

import threading

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from dynatree_core import hf

PROMPT = "the cat sat on the mat. the cat"
ARGUMENT = {"custom_generate": hf.FOLDER, "trust_remote_code": True, "policy": "fixed"}


@pytest.fixture
def make(served):
    """Makes a HuggingFaceLLM of a folder, with further arguments of generate()."""
    module = pytest.importorskip(
        "llama_index.llms.huggingface",
        reason="llama-index-llms-huggingface is not installed: it is in the extra [clients]",
    )
    tokenizer = AutoTokenizer.from_pretrained(served.plain)

    def made(folder, is_trusted=False, **more):
        return module.HuggingFaceLLM(
            model=AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=is_trusted),
            tokenizer=tokenizer,
            model_name="tiny",
            tokenizer_name="tiny",
            context_window=160,
            max_new_tokens=12,
            generate_kwargs={"do_sample": False, **more},
        )

    return made


@pytest.fixture(params=["folder", "argument"])
def pair(request, served, make):
    before, is_folder = served.num_calls, request.param == "folder"
    yield make(served.plain), make(served.trees, True) if is_folder else make(served.plain, **ARGUMENT)
    assert not is_folder or served.num_calls > before


def test_complete_and_stream(pair):
    plain, trees = pair
    expected = plain.complete(PROMPT).text
    assert expected
    assert trees.complete(PROMPT).text == expected
    pieces = [piece.delta for piece in plain.stream_complete(PROMPT)]
    assert [piece.delta for piece in trees.stream_complete(PROMPT)] == pieces
    assert len(pieces) > 1 or pieces[0]


def test_chat_and_stream(pair):
    from llama_index.core.llms import ChatMessage

    plain, trees = pair
    messages = [ChatMessage(role="user", content="the cat")]
    expected = plain.chat(messages).message.content
    assert expected
    assert trees.chat(messages).message.content == expected
    assert "".join(piece.delta for piece in trees.stream_chat(messages)) == "".join(
        piece.delta for piece in plain.stream_chat(messages)
    )


def test_stop(served, make):
    from llama_index.llms.huggingface import HuggingFaceLLM

    tokenizer, texts = AutoTokenizer.from_pretrained(served.plain), []
    [full] = [make(served.plain).complete(PROMPT).raw["model_output"][0].tolist()]
    stop = full[-8]
    for folder, is_trusted in ((served.plain, False), (served.trees, True)):
        llm = HuggingFaceLLM(
            model=AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=is_trusted),
            tokenizer=tokenizer,
            model_name="tiny",
            tokenizer_name="tiny",
            context_window=160,
            max_new_tokens=12,
            stopping_ids=[stop],
            generate_kwargs={"do_sample": False},
        )
        texts.append(llm.complete(PROMPT).raw["model_output"][0].tolist())
    assert texts[0] == texts[1]
    assert len(texts[0]) < len(full)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # LlamaIndex's own thread
def test_a_stream_ends_where_a_generation_fails(served, make):
    """LlamaIndex waits for its streamer without a limit."""
    pieces: list[str] = []
    llm = make(served.trees, True, policy="no_such")
    reader = threading.Thread(
        target=lambda: pieces.extend(piece.delta for piece in llm.stream_complete(PROMPT)), daemon=True
    )
    reader.start()
    reader.join(60)
    assert not reader.is_alive()
    assert "".join(pieces) == ""


def test_what_is_shown(run_shown, make, served, capsys):
    shown = run_shown("llama_index.llms.huggingface")
    printed = capsys.readouterr().out
    plain = make(served.plain)
    plain.max_new_tokens = shown["llm"].max_new_tokens
    expected = plain.complete("The sky is").text
    assert printed == f"{expected}\n{expected}"
