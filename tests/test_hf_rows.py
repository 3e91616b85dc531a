"""Several sequences in one call of generate(): each row, its padding and its random numbers as in the batch."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    DynamicCache,
    LogitsProcessor,
    MaxTimeCriteria,
    StoppingCriteria,
    TextStreamer,
)

from dynatree_core import build_drafter, build_stack, hf
from dynatree_core.errors import ParameterError, PromptError
from dynatree_core.models.architectures import cache_argument
from dynatree_core.testing import strategies as ours
from dynatree_core.testing.models import perturbed, tiny_model

TARGET, DRAFTER = tiny_model("llama"), perturbed("llama")
PROMPTS = torch.tensor([[1, 2, 3, 1], [0, 0, 4, 5], [0, 7, 7, 7]])
PLAIN = {"attention_mask": (PROMPTS != 0).long(), "max_new_tokens": 12, "pad_token_id": 0}
TREES = {"custom_generate": hf.generate, "drafter": DRAFTER, "policy": "fixed(tau=0.0)"}


def both(target, prompts, asked, trees):
    torch.manual_seed(5)
    expected = target.generate(prompts, **asked)
    state = torch.random.get_rng_state()
    torch.manual_seed(5)
    result = target.generate(prompts, **asked, **trees)
    assert result.tolist() == expected.tolist()
    if asked.get("do_sample") and expected.shape[1] == prompts.shape[1] + asked["max_new_tokens"]:
        assert torch.equal(torch.random.get_rng_state(), state)
    return result


@settings(max_examples=40)
@given(data=st.data())
def test_any_batch(data):
    family, seed = data.draw(ours.families), data.draw(ours.model_seeds)
    target = tiny_model(family, seed)
    texts = data.draw(st.lists(ours.prompts, min_size=2, max_size=4))
    width = max(map(len, texts))
    prompts = torch.tensor([[0] * (width - len(text)) + text for text in texts])
    mask = torch.tensor([[0] * (width - len(text)) + [1] * len(text) for text in texts])
    asked = {"attention_mask": mask, "max_new_tokens": data.draw(st.integers(1, 16)), "pad_token_id": 0}
    asked["eos_token_id"] = data.draw(st.lists(ours.token_ids, max_size=6)) or None
    asked["do_sample"] = data.draw(st.booleans())
    if data.draw(st.booleans()):
        asked |= {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3}
    trees = {"drafter": data.draw(ours.drafters(family, seed)), "policy": data.draw(ours.stacks())}
    both(target, prompts, asked, {"custom_generate": hf.generate, **trees})


@pytest.mark.parametrize("num", [2, 5])
def test_several_answers_to_one_prompt(num):
    asked = {"max_new_tokens": 12, "pad_token_id": 0, "do_sample": True, "num_return_sequences": num}
    result = both(TARGET, PROMPTS[:1], {**asked, "eos_token_id": [4, 9, 20]}, TREES)
    assert result.shape[0] == num
    both(TARGET, PROMPTS, {**PLAIN, **asked}, TREES)


def test_a_dict_of_several():
    expected = TARGET.generate(PROMPTS, **PLAIN, return_dict_in_generate=True)
    with pytest.warns(RuntimeWarning, match="the result of several sequences has no cache"):
        result = TARGET.generate(PROMPTS, **PLAIN, return_dict_in_generate=True, **TREES)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TARGET.generate(PROMPTS, **PLAIN, return_dict_in_generate=True, use_cache=False, **TREES)
    assert result.sequences.tolist() == expected.sequences.tolist()


class Own(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores


class Stop(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return torch.zeros(len(input_ids), dtype=torch.bool)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"logits_processor": [Own()]}, "Own, which may look at other rows"),
        ({"stopping_criteria": [Stop()], "do_sample": True}, "sampling beside criteria that may look at other rows"),
        ({"prefix_allowed_tokens_fn": lambda row, ids: [row]}, "PrefixConstrainedLogitsProcessor"),
        ({"return_dict_in_generate": True, "output_scores": True}, "output_scores"),
        ({"return_dict_in_generate": True, "output_logits": True}, "output_logits"),
        ({cache_argument(TARGET): DynamicCache(config=TARGET.config)}, "a cache of the caller's"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_looks_at_all_rows_is_refused(asked, message):
    with pytest.raises(ParameterError, match=f"each by itself, which cannot be done with .*{message}"):
        TARGET.generate(PROMPTS, **PLAIN, **asked, **TREES)


class AllHave(StoppingCriteria):
    """Done when each row has had one of these tokens: it keeps count, as lm-eval's does."""

    def __init__(self, ids, num_rows):
        self.ids, self.had = ids, [False] * num_rows

    def __call__(self, input_ids, scores, **kwargs):
        assert scores is None
        for row, text in enumerate(input_ids.tolist()):
            self.had[row] |= text[-1] in self.ids
        return all(self.had)


class Longest(StoppingCriteria):
    """Ends each row by its own text, and by how many others have an even last token."""

    def __call__(self, input_ids, scores, **kwargs):
        return (input_ids[:, -1] % 3 == 0) & ((input_ids[:, -1] % 2 == 0).sum() > 1)


CRITERIA = {
    "bool": lambda num: AllHave([4, 9, 20, 33], num),
    "each row": lambda num: Longest(),
    "function": lambda num: lambda input_ids, scores: input_ids.sum() % 7 == 0,
    "time": lambda num: MaxTimeCriteria(100.0),
    "no time": lambda num: MaxTimeCriteria(0.0),
}


@settings(max_examples=40)
@given(data=st.data())
def test_criteria_that_look_at_all_rows(data):
    family, seed = data.draw(ours.families), data.draw(ours.model_seeds)
    target = tiny_model(family, seed)
    texts = data.draw(st.lists(ours.prompts, min_size=2, max_size=4))
    width = max(map(len, texts))
    prompts = torch.tensor([[0] * (width - len(text)) + text for text in texts])
    mask = torch.tensor([[0] * (width - len(text)) + [1] * len(text) for text in texts])
    asked = {"attention_mask": mask, "max_new_tokens": data.draw(st.integers(1, 16)), "pad_token_id": 0}
    asked["eos_token_id"] = data.draw(st.lists(ours.token_ids, max_size=6)) or None
    make = CRITERIA[data.draw(st.sampled_from(sorted(CRITERIA)))]
    trees = {"custom_generate": hf.generate, "policy": data.draw(ours.stacks())}
    trees["drafter"] = data.draw(st.sampled_from([perturbed(family, seed), "prompt_lookup", None]))
    expected, found = (
        target.generate(prompts, **asked, **way, stopping_criteria=[make(len(texts))]).tolist() for way in ({}, trees)
    )
    assert found == expected


def test_a_row_is_decoded_no_further_than_it_is_needed():
    passes = []
    hook = TARGET.register_forward_hook(lambda *_: passes.append(1))
    asked = {**PLAIN, "max_new_tokens": 60, "stopping_criteria": [MaxTimeCriteria(0.0)]}
    try:
        for _ in range(2):  # a model with a new hook is tried before the first generation
            passes.clear()
            TARGET.generate(PROMPTS, **asked, custom_generate=hf.generate, drafter=None, policy="autoregressive")
    finally:
        hook.remove()
    assert 3 <= len(passes) <= 6


@pytest.mark.parametrize("text", ["phase3", "cost_aware", "governor+fixed"])
def test_one_stack_for_rows_that_are_decoded_together(text):
    trees = {"custom_generate": hf.generate, "drafter": DRAFTER, "policy": build_stack(text)}
    expected = TARGET.generate(PROMPTS, **PLAIN, stopping_criteria=[AllHave([4, 9], 3)])
    assert TARGET.generate(PROMPTS, **PLAIN, **trees, stopping_criteria=[AllHave([4, 9], 3)]).equal(expected)


def test_criteria_that_write_into_several_texts_are_refused():
    def write(input_ids, scores):
        input_ids[0, 0] = 7
        return False

    with pytest.raises(ParameterError, match="must leave their text as it is"):
        TARGET.generate(PROMPTS.clone(), **PLAIN, **TREES, stopping_criteria=[write])


def test_one_drafter_object_for_rows_that_are_decoded_together_is_refused():
    trees = {"custom_generate": hf.generate, "drafter": build_drafter("prompt_lookup")}
    with pytest.raises(ParameterError, match=r"each needs a drafter of its own, got one .*; give its name"):
        TARGET.generate(PROMPTS, **PLAIN, **trees, stopping_criteria=[Stop()])


def test_a_streamer_of_several_is_refused_and_ended():
    ended = []

    class Ending(TextStreamer):
        def put(self, value):
            pass

        def end(self):
            ended.append(1)

    with pytest.raises(ParameterError, match="cannot be done with a streamer"):
        TARGET.generate(PROMPTS, **PLAIN, streamer=Ending(None), **TREES)
    assert ended == [1]


def test_padding_behind_a_prompt_is_refused():
    """generate() goes on behind the padding tokens, of which the model has never seen such a place."""
    asked = {**PLAIN, "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1]])}
    folder = {"custom_generate": hf.FOLDER, "trust_remote_code": True}
    for call in (
        lambda: TARGET.generate(PROMPTS, **asked, **TREES),
        lambda: TARGET.generate(PROMPTS, **asked, **TREES, stopping_criteria=[Stop()]),
        lambda: TARGET.generate(PROMPTS, **asked, **folder),
        lambda: hf.generate_with(TARGET, PROMPTS, **asked),
    ):
        with pytest.raises(PromptError, match="padded at its left only"):
            call()


def test_rows_share_the_targets_passes():
    target = copy.deepcopy(TARGET)
    shapes = []
    target.register_forward_pre_hook(
        lambda _, given, named: shapes.append(tuple(named["input_ids"].shape)), with_kwargs=True
    )
    prompts = torch.tensor([[3, 1, 4], [1, 5, 9], [2, 6, 5]])
    asked = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 0}
    plain = TARGET.generate(prompts, **asked)
    options = {"trust_model": True}
    found = target.generate(prompts, custom_generate=hf.generate, drafter=None, options=options, **asked)
    assert torch.equal(found, plain)
    assert [lanes for lanes, _ in shapes if lanes > 1] == [3] * 6
