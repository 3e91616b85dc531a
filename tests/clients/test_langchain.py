"""LangChain's Hugging Face classes: a folder with trees and the argument of the call give what plain decoding gives."""

from __future__ import annotations

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from dynatree_core import hf

ASKED = {"do_sample": False, "max_new_tokens": 20, "return_full_text": False}
PROMPT = "the cat sat on the mat. the cat"


@pytest.fixture(params=["folder", "argument"])
def pair(request, served):
    """HuggingFacePipeline by plain decoding and by trees, and the further arguments of the latter."""
    langchain = pytest.importorskip(
        "langchain_huggingface", reason="langchain-huggingface is not installed: it is in the extra [clients]"
    )
    tokenizer = AutoTokenizer.from_pretrained(served.plain)
    is_folder = request.param == "folder"
    models = [
        AutoModelForCausalLM.from_pretrained(served.plain),
        AutoModelForCausalLM.from_pretrained(served.trees, trust_remote_code=True)
        if is_folder
        else AutoModelForCausalLM.from_pretrained(served.plain),
    ]
    pipes = [pipeline("text-generation", model=model, tokenizer=tokenizer) for model in models]
    plain, trees = (langchain.HuggingFacePipeline(pipeline=pipe) for pipe in pipes)
    before = served.num_calls
    yield plain, trees, {} if is_folder else {"custom_generate": hf.FOLDER, "trust_remote_code": True}
    assert not is_folder or served.num_calls > before


def test_invoke(pair):
    plain, trees, more = pair
    expected = plain.invoke(PROMPT, pipeline_kwargs=ASKED)
    assert expected
    assert trees.invoke(PROMPT, pipeline_kwargs={**ASKED, **more}) == expected


def test_stream(pair):
    plain, trees, more = pair
    expected = list(plain.stream(PROMPT, pipeline_kwargs=ASKED))
    assert len(expected) > 1 or expected[0]
    assert list(trees.stream(PROMPT, pipeline_kwargs={**ASKED, **more})) == expected


def test_stop(pair):
    plain, trees, more = pair
    full = plain.invoke(PROMPT, pipeline_kwargs=ASKED)
    stop = {"stop_strings": [full[4:6]], "tokenizer": plain.pipeline.tokenizer}
    expected = plain.invoke(PROMPT, pipeline_kwargs={**ASKED, **stop})
    assert len(expected) < len(full)
    assert trees.invoke(PROMPT, pipeline_kwargs={**ASKED, **stop, **more}) == expected
    streamed = "".join(plain.stream(PROMPT, stop=[full[4]], pipeline_kwargs=ASKED))
    assert "".join(trees.stream(PROMPT, stop=[full[4]], pipeline_kwargs={**ASKED, **more})) == streamed


def test_batch(pair):
    plain, trees, more = pair
    prompts = [PROMPT, "a hen"]
    expected = plain.batch(prompts, pipeline_kwargs=ASKED)
    assert len(set(expected)) == 2
    assert trees.batch(prompts, pipeline_kwargs={**ASKED, **more}) == expected


def test_chat(pair):
    from langchain_huggingface import ChatHuggingFace

    plain, trees, more = pair
    said = [
        ChatHuggingFace(llm=llm, model_id="tiny", tokenizer=plain.pipeline.tokenizer)
        .invoke("the cat", pipeline_kwargs={**ASKED, **arguments})
        .content
        for llm, arguments in ((plain, {}), (trees, more))
    ]
    assert said[0] == said[1] != ""


def test_what_is_shown(run_shown, served, capsys):
    langchain = pytest.importorskip("langchain_huggingface", reason="it is in the extra [clients]")
    shown = run_shown("langchain_huggingface")
    printed = capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(served.plain)
    pipe = pipeline("text-generation", model=model, tokenizer=shown["tokenizer"])
    expected = langchain.HuggingFacePipeline(pipeline=pipe).invoke("The sky is", pipeline_kwargs=shown["asked"])
    assert printed.startswith(f"{expected}\n{expected}")
    assert len(printed) > 2 * len(expected) + 2  # the chat's answer
