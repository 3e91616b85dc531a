"""The custom_generate folder, built in or written by `dynatree hf-folder`, and what transformers does with it."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable

import pytest
import torch
from hf_folders import FOLDER, PLAIN, PROMPT, modules_cache, plain, source, trees, used, written
from tiny_folder import tiny_tokenizer
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    StoppingCriteria,
    TextIteratorStreamer,
    TextStreamer,
    pipeline,
)

from dynatree_core import hf
from dynatree_core.errors import DynaTreeError, ParameterError
from dynatree_core.testing.models import perturbed, tiny_model

__all__ = ["modules_cache", "plain", "source", "trees", "used", "written"]  # fixtures


class Last(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return input_ids[:, -1] % 5 == 0


class Never(LogitsProcessor):
    def __call__(self, input_ids, scores):
        scores[:, input_ids[0, -1]] = -torch.inf
        return scores


ASKED = [
    {},
    {"do_sample": True, "temperature": 0.7, "top_k": 9},
    {"generation_config": GenerationConfig(max_new_tokens=9, repetition_penalty=1.3), "max_new_tokens": None},
    {"logits_processor": [Never()]},
    {"stopping_criteria": [Last()]},
    {"prefix_allowed_tokens_fn": lambda batch, ids: [1, 2, 3, 4 + len(ids) % 5]},
    {"stop_strings": ["e", "th"], "tokenizer": tiny_tokenizer()},
    {"tokenizer": tiny_tokenizer()},
    {"num_return_sequences": 2, "do_sample": True},
    {"negative_prompt_ids": PROMPT, "negative_prompt_attention_mask": torch.ones_like(PROMPT)},
    {"return_dict_in_generate": True},
    {"assistant_model": None, "synced_gpus": None, "streamer": None, "stop_strings": None},
]


def text_of(result):
    return (result if torch.is_tensor(result) else result.sequences).tolist()


@pytest.mark.parametrize("asked", ASKED, ids=lambda asked: "+".join(asked) or "nothing")
def test_both_ways_give_what_generate_gives(plain, trees, used, asked):
    arguments = {**PLAIN, **asked}
    torch.manual_seed(3)
    expected = text_of(plain.generate(PROMPT, **arguments))
    for call in (lambda: plain.generate(PROMPT, **arguments, **FOLDER), lambda: trees.generate(PROMPT, **arguments)):
        torch.manual_seed(3)
        assert text_of(call()) == expected
    assert [one.get("policy") for one in used] == [None, "fixed(depth=3)"]


def test_a_config_alone_brings_no_warning(trees, capsys):
    """transformers warns of settings beside a config, of which the caller has given none."""
    trees.generate(PROMPT, generation_config=GenerationConfig(max_new_tokens=4, pad_token_id=0))
    assert "Passing `generation_config` together with" not in capsys.readouterr().err


def test_several_prompts(plain, trees, used):
    ids = torch.tensor([[0, 0, 1, 2, 3, 1], [4, 5, 6, 4, 5, 6]])
    arguments = {**PLAIN, "attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])}
    expected = plain.generate(ids, **arguments).tolist()
    assert trees.generate(ids, **arguments).tolist() == expected
    assert plain.generate(ids, **arguments, **FOLDER).tolist() == expected
    assert len(used) == 2


def test_arguments_without_a_name(plain, trees):
    config = GenerationConfig(max_new_tokens=6, pad_token_id=0)
    expected = plain.generate(PROMPT, config).tolist()
    assert trees.generate(PROMPT, config).tolist() == expected
    assert trees.generate(inputs=PROMPT, generation_config=config).tolist() == expected
    assert trees.generate(input_ids=PROMPT, generation_config=config).tolist() == expected
    with pytest.raises(TypeError, match="multiple values for argument 'inputs'"):
        trees.generate(PROMPT, inputs=PROMPT)
    with pytest.raises(TypeError, match="too many positional arguments"):
        trees.generate(PROMPT, *[None] * 11)


@pytest.mark.parametrize(
    ("asked", "error", "words"),
    [
        ({"assistant_model": tiny_model("llama")}, ParameterError, "give the small model as drafter="),
        ({"synced_gpus": True}, ParameterError, "decoding runs in one process"),
        ({"num_beams": 2}, ParameterError, "has no num_beams, got 2"),
        ({"guidance_scale": 2.0, "negative_prompt_ids": PROMPT}, ParameterError, "has no guidance_scale"),
        ({"cache_implementation": "paged"}, ParameterError, "got 'paged', continuous batching without trees"),
        ({"stop_strings": ["e"]}, ParameterError, "stop_strings need the target's tokenizer"),
        ({"polcy": "fixed"}, ValueError, "'polcy'"),
        ({"options": [1]}, ParameterError, r"options must be a mapping such as .*, got \[1\]"),
        ({"options": {"max_nodes": -1}}, ParameterError, "max_nodes must be an integer"),
        ({"policy": "no_such"}, DynaTreeError, "no_such"),
        ({"drafter": "no_such"}, DynaTreeError, "no_such"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_what_is_refused_with_the_reason(plain, trees, asked, error, words):
    for call in (
        lambda streamer: plain.generate(PROMPT, **PLAIN, **asked, **FOLDER, streamer=streamer),
        lambda streamer: trees.generate(PROMPT, **PLAIN, **asked, streamer=streamer),
    ):
        streamer = TextIteratorStreamer(tiny_tokenizer(), timeout=60)
        with pytest.raises(error, match=words):
            call(streamer)


def test_a_call_chooses_before_the_folder_does(trees, used):
    drafter = perturbed("llama")
    trees.generate(PROMPT, **PLAIN, drafter=drafter, policy="linear", options={"max_nodes": 4})
    trees.generate(PROMPT, **PLAIN, drafter=None, options={"tau": 0.5})
    [first, second] = used
    assert (first["drafter"], first["policy"], first["options"]) == (drafter, "linear", {"tau": 0.0, "max_nodes": 4})
    assert (second["drafter"], second["policy"], second["options"]) == (None, "fixed(depth=3)", {"tau": 0.5})


def test_another_loop_may_be_named(plain, trees, used):
    def loop(model, input_ids, **ignored):
        return input_ids[:, :2]

    assert trees.generate(PROMPT, **PLAIN, custom_generate=loop).tolist() == [[1, 2]]
    assert used == []
    expected = plain.generate(PROMPT, **PLAIN).tolist()
    assert trees.generate(PROMPT, **PLAIN, custom_generate=hf.generate, policy="fixed").tolist() == expected
    assert trees.generate(PROMPT, **PLAIN, **FOLDER).tolist() == expected
    assert len(used) == 1


class Collecting(TextStreamer):
    text = ""

    def on_finalized_text(self, text, stream_end=False):
        self.text += text


def test_a_streamer(plain, trees, used):
    theirs, folders, bound = (Collecting(tiny_tokenizer()) for _ in range(3))
    plain.generate(PROMPT, **PLAIN, streamer=theirs)
    plain.generate(PROMPT, **PLAIN, streamer=folders, **FOLDER)
    trees.generate(PROMPT, **PLAIN, streamer=bound)
    assert folders.text == bound.text == theirs.text != ""
    assert len(used) == 2


@pytest.mark.parametrize("fault", [{}, {"policy": "no_such"}])
def test_an_iterating_streamer_in_a_thread(plain, trees, fault):
    expected = "" if fault else tiny_tokenizer().decode(plain.generate(PROMPT, **PLAIN)[0, PROMPT.shape[1] :])
    raised = []

    def work(call: Callable[..., object], **arguments: object) -> None:
        try:
            call(PROMPT, **PLAIN, **fault, **arguments)
        except DynaTreeError as error:
            raised.append(error)

    for call, more in ((plain.generate, FOLDER), (trees.generate, {})):
        streamer = TextIteratorStreamer(tiny_tokenizer(), skip_prompt=True, timeout=60)
        thread = threading.Thread(target=work, args=(call,), kwargs={**more, "streamer": streamer})
        thread.start()
        assert "".join(streamer) == expected
        thread.join()
    assert len(raised) == (2 if fault else 0)


@pytest.mark.parametrize("is_bound", [True, False])
def test_pipelines_with_stop_strings_streamer_and_batches(plain, trees, used, is_bound):
    tokenizer = tiny_tokenizer()
    theirs = pipeline("text-generation", model=plain, tokenizer=tokenizer)
    mine = pipeline("text-generation", model=trees, tokenizer=tokenizer) if is_bound else theirs
    more = {} if is_bound else FOLDER
    asked = {"do_sample": False, "max_new_tokens": 16, "return_full_text": False}
    [full] = theirs("the cat", **asked)
    stop = full["generated_text"][4:6]
    chat = [{"role": "user", "content": "the cat"}]
    for prompt, extra in (
        ("the cat", {}),
        ("the cat", {"stop_strings": [stop], "tokenizer": tokenizer}),
        ("the cat", {"stop_sequence": stop[-1]}),
        (["the cat", "a hen"], {}),
        (["the cat", "a hen"], {"batch_size": 2}),
        ([chat], {}),
    ):
        expected = theirs(prompt, **asked, **extra)
        assert mine(prompt, **asked, **extra, **more) == expected
    assert len(used) >= 6
    streams = [Collecting(tokenizer, skip_prompt=True) for _ in range(2)]
    theirs("the cat", **asked, streamer=streams[0])
    mine("the cat", **asked, streamer=streams[1], **more)
    assert streams[0].text == streams[1].text != ""


def test_copies_names_and_helpers(plain, trees, written, used):
    """A copy has its own weights, a pipeline loads the folder by name, another model's generate may call ours."""
    expected = plain.generate(PROMPT, **PLAIN).tolist()
    copied = copy.deepcopy(trees)
    torch.nn.init.zeros_(copied.lm_head.weight)
    assert copied.generate(PROMPT, **PLAIN).tolist() == [[*PROMPT[0].tolist(), *[0] * 20]]
    assert trees.generate(PROMPT, **PLAIN).tolist() == expected
    assert len(used) == 2
    named = pipeline("text-generation", model=str(written), trust_remote_code=True)
    asked = {"do_sample": False, "max_new_tokens": 12}
    assert named("the cat", **asked) == pipeline("text-generation", model=str(written))("the cat", **asked)
    assert len(used) == 3
    assert plain.generate(PROMPT, **PLAIN, assistant_model=trees).tolist() == expected
