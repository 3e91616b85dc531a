"""Caches of the caller's through `hf.generate`: used and filled as by generate, or refused."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, GenerationConfig, StaticCache

from dynatree_core import PrefixCache, generate, hf
from dynatree_core.errors import ParameterError
from dynatree_core.models.architectures import cache_argument
from dynatree_core.testing import strategies as ours
from dynatree_core.testing.models import perturbed, tiny_model

TARGET, DRAFTER = tiny_model("llama"), perturbed("llama")
PROMPT = torch.tensor([[3, 1, 4, 1, 5, 9, 2]])
PLAIN = {"attention_mask": torch.ones_like(PROMPT), "max_new_tokens": 12, "pad_token_id": 0}
TREES = {"custom_generate": hf.generate, "drafter": DRAFTER, "policy": "fixed(tau=0.0)"}


def rows_of(cache):
    """Keys and values of each layer, those that were written."""
    num = int(cache.get_seq_length())
    return [
        states[:, :, :num] for layer in cache.layers if layer.is_initialized for states in (layer.keys, layer.values)
    ]


def same_rows(ours_, theirs):
    assert int(ours_.get_seq_length()) == int(theirs.get_seq_length())
    for mine, other in zip(rows_of(ours_), rows_of(theirs), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-6)


def dynamic(model):
    return DynamicCache(config=model.config)


def static(model):
    return StaticCache(config=model.config, max_cache_len=64)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "gemma3_text", "qwen2"])
@pytest.mark.parametrize("make", [dynamic, static])
def test_an_empty_cache_is_filled_as_by_generate(make, family):
    target, drafter = tiny_model(family), perturbed(family)
    name = cache_argument(target)
    theirs, mine = make(target), make(target)
    expected = target.generate(PROMPT, **PLAIN, **{name: theirs})
    result = target.generate(
        PROMPT, **PLAIN, **{name: mine}, custom_generate=hf.generate, drafter=drafter, policy="fixed(tau=0.0)"
    )
    assert result.tolist() == expected.tolist()
    same_rows(mine, theirs)


@settings(max_examples=20)
@given(data=st.data())
def test_a_text_goes_on_from_a_cache(data):
    """Turn by turn with one cache: ours, theirs and mixed, by any model without a window, at any length."""
    family = data.draw(st.sampled_from(["llama", "gpt2", "gpt_neox", "qwen3", "opt"]))
    seed = data.draw(ours.model_seeds)
    target, drafter = tiny_model(family, seed), data.draw(ours.drafters(family, seed))
    name = cache_argument(target)
    theirs, mine = dynamic(target), dynamic(target)
    text = torch.tensor([data.draw(ours.prompts)])
    for _ in range(3):
        asked = {"max_new_tokens": data.draw(st.integers(1, 8)), "pad_token_id": 0, "do_sample": False}
        asked |= {"attention_mask": torch.ones_like(text)}
        expected = target.generate(text, **asked, **{name: theirs})
        trees = {"custom_generate": hf.generate, "drafter": drafter, "policy": data.draw(ours.stacks())}
        if data.draw(st.booleans(), label="decoded by transformers"):
            trees = {}
        assert target.generate(text, **asked, **{name: mine}, **trees).tolist() == expected.tolist()
        same_rows(mine, theirs)
        more = torch.tensor([data.draw(st.lists(ours.token_ids, min_size=1, max_size=4))])
        text = torch.cat([expected, more], dim=1)


def test_the_cache_of_a_dict_is_filled():
    asked = {**PLAIN, "return_dict_in_generate": True}
    name = cache_argument(TARGET)
    expected = TARGET.generate(PROMPT, **asked)
    result = TARGET.generate(PROMPT, **asked, **TREES)
    same_rows(result[name], expected[name])
    assert getattr(TARGET.generate(PROMPT, **asked, use_cache=False, **TREES), name) is None


def test_a_padded_prompt_leaves_rows_that_the_same_mask_hides():
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.int64), PROMPT], dim=1)
    mask = (torch.arange(10) >= 3).long()[None]
    name = cache_argument(TARGET)
    asked = {"max_new_tokens": 6, "pad_token_id": 0, "attention_mask": mask}
    mine, theirs = dynamic(TARGET), dynamic(TARGET)
    text = TARGET.generate(padded, **asked, **{name: mine}, **TREES)
    assert text.tolist() == TARGET.generate(padded, **asked, **{name: theirs}).tolist()
    assert mine.get_seq_length() == theirs.get_seq_length()
    asked["attention_mask"] = torch.cat([mask, torch.ones(1, 6, dtype=torch.int64)], dim=1)
    expected = TARGET.generate(text, **asked, **{name: theirs})
    assert TARGET.generate(text, **asked, **{name: mine}).tolist() == expected.tolist()
    with pytest.raises(ParameterError, match="cannot be taken over beside padding"):
        TARGET.generate(text, **asked, **{name: theirs}, **TREES)


class Rounding(DynamicCache):
    def update(self, keys, values, *others, **more):
        return tuple((states * 2).round() / 2 for states in super().update(keys, values, *others, **more))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Rounding(config=TARGET.config), "got a Rounding, which may not"),
        (lambda: DynamicCache(config=TARGET.config, offloading=True), "got a DynamicCache that is offloaded"),
    ],
)
def test_a_cache_of_another_kind_is_refused(make, message):
    with pytest.raises(ParameterError, match=message):
        TARGET.generate(PROMPT, **PLAIN, **{cache_argument(TARGET): make()}, **TREES)


def filled(model, num, make=dynamic):
    cache = make(model)
    with torch.no_grad():
        model(PROMPT[:, :num], **{cache_argument(model): cache})
    return cache


def test_rows_that_cannot_be_taken_over_are_refused():
    name = cache_argument(TARGET)
    with pytest.raises(ParameterError, match="got 7 rows and 7 tokens"):
        TARGET.generate(PROMPT, **PLAIN, **{name: filled(TARGET, 7)}, **TREES)
    behind = {**PLAIN, "attention_mask": torch.ones(1, 10, dtype=torch.int64)}
    with pytest.raises(ParameterError, match=r"input_ids must be the whole text.*got 7 tokens and a mask.*for 10"):
        TARGET.generate(PROMPT, **behind, **{name: filled(TARGET, 3)}, **TREES)
    for option in ({"cache": "sinks=1,window=8"}, {"exact": "fixed_width"}, {"prefix_cache": PrefixCache()}):
        with pytest.raises(ParameterError, match=f"cannot be taken over beside {next(iter(option))}"):
            TARGET.generate(PROMPT, **PLAIN, **{name: filled(TARGET, 3)}, **TREES, options=option)
    windowed = tiny_model("mistral")  # of six tokens
    long = torch.arange(1, 13)[None]
    cache = dynamic(windowed)
    with torch.no_grad():
        windowed(long[:, :10], **{name: cache})
    with pytest.raises(ParameterError, match="a sliding window that kept"):
        windowed.generate(long, max_new_tokens=4, pad_token_id=0, **{name: cache}, custom_generate=hf.generate)


@pytest.mark.parametrize("make", [dynamic, static])
@pytest.mark.parametrize(("own", "other"), [("float64", "float32"), ("float32", "bfloat16"), ("bfloat16", "float32")])
def test_rows_of_another_dtype_are_refused(make, own, other):
    """generate() promotes them where the model's dtype is the wider one and the cache can grow, and fails elsewhere."""
    target, another = (copy.deepcopy(TARGET).to(getattr(torch, name)) for name in (own, other))
    asked = {**PLAIN, cache_argument(TARGET): filled(another, 4, make), "custom_generate": hf.generate}
    with pytest.raises(ParameterError, match=f"must hold those of this model in torch.{own}, got torch.{other}; make"):
        target.generate(PROMPT, **asked)


def test_rows_made_under_autocast_are_taken_over_under_autocast():
    target = copy.deepcopy(TARGET).float()
    name = cache_argument(target)
    with torch.autocast("cpu", torch.bfloat16):
        cache = filled(target, 4)
        assert {cache.layers[0].keys.dtype, cache.layers[0].values.dtype} != {torch.float32}
        expected = target.generate(PROMPT, **PLAIN, **{name: filled(target, 4)})
        found = target.generate(PROMPT, **PLAIN, **{name: cache}, custom_generate=hf.generate, policy="autoregressive")
    assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("implementation", ["quantized", "offloaded", "offloaded_static"])
def test_a_cache_that_is_asked_for_by_name(implementation):
    config = GenerationConfig(cache_implementation=implementation, max_new_tokens=4)
    for asked in ({"generation_config": config}, {"generation_config": config, "do_sample": True}):
        with pytest.raises(ParameterError, match=f"cache_implementation='{implementation}'"):
            generate(TARGET, None, PROMPT, **asked)
    own = TARGET.generation_config
    own.cache_implementation = implementation
    try:
        with pytest.raises(ParameterError, match=f"cache_implementation='{implementation}'"):
            generate(TARGET, None, PROMPT, max_new_tokens=4)
    finally:
        own.cache_implementation = None
    static_asked = TARGET.generate(PROMPT, **PLAIN, cache_implementation="static", **TREES)
    assert static_asked.tolist() == TARGET.generate(PROMPT, **PLAIN).tolist()


def test_a_cache_of_several_sequences_is_refused_beside_one_prompt():
    cache = dynamic(TARGET)
    TARGET(PROMPT[:, :4].repeat(2, 1), use_cache=True, **{cache_argument(TARGET): cache})
    with pytest.raises(ParameterError, match="must hold those of one sequence, got 2"):
        TARGET.generate(PROMPT, **PLAIN, **{cache_argument(TARGET): cache}, **TREES)


def test_a_cache_beside_use_cache_false_is_refused():
    with pytest.raises(ParameterError, match="got one beside use_cache=False"):
        TARGET.generate(PROMPT, **PLAIN, use_cache=False, **{cache_argument(TARGET): dynamic(TARGET)}, **TREES)
