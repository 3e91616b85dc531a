"""What stands between a model and its passes: replaced methods, forwards that hand everything on, other names."""

from __future__ import annotations

import copy
import functools
import types

import pytest
import torch
from transformers import GenerationMixin, LlamaForCausalLM

from dynatree_core import generate, hf
from dynatree_core.errors import UnsupportedModelError
from dynatree_core.models.architectures import cache_argument, forward_parameters
from dynatree_core.models.wrappers import _BEFORE_THE_LOOP, _GENERATION_METHODS, plain_model
from dynatree_core.testing.models import greedy, perturbed, tiny_model

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
FOUND = [name for name in _GENERATION_METHODS if hasattr(LlamaForCausalLM, name)]


def as_class(kind, family="llama"):
    """A tiny model of a class of somebody's own."""
    model = copy.deepcopy(tiny_model(family))
    model.__class__ = kind
    return model


def test_the_methods_that_are_looked_at_are_there():
    assert "prepare_inputs_for_generation" in FOUND
    assert len(FOUND) >= 6  # of some names, versions of transformers have only one


@pytest.mark.parametrize("name", FOUND)
def test_a_method_of_a_class_of_ones_own_is_refused(name):
    def method(self, *args, **given):
        return getattr(super(kind, self), name)(*args, **given)

    kind = type("Own", (LlamaForCausalLM,), {name: method, "__module__": __name__})
    model = as_class(kind)
    for role, call in (
        ("target", lambda: generate(model, None, PROMPT, max_new_tokens=4)),
        ("drafter", lambda: generate(tiny_model("llama"), model, PROMPT, max_new_tokens=4)),
    ):
        with pytest.raises(UnsupportedModelError, match=f"the {role}.*has a {name} of its own"):
            call()
    assert generate(model, None, PROMPT, max_new_tokens=4, trust_model=True).token_ids == greedy(
        tiny_model("llama"), PROMPT, 4
    )


@pytest.mark.parametrize("wrap", [lambda f: f, functools.wraps(LlamaForCausalLM.prepare_inputs_for_generation)])
def test_a_method_that_was_replaced_on_the_model_is_refused(wrap):
    model = copy.deepcopy(tiny_model("llama"))
    before = model.prepare_inputs_for_generation
    model.prepare_inputs_for_generation = wrap(lambda *args, **given: before(*args, **given))
    with pytest.raises(UnsupportedModelError, match="has a prepare_inputs_for_generation of its own"):
        model.generate(torch.tensor([PROMPT]), max_new_tokens=4, custom_generate=hf.generate)
    model.prepare_inputs_for_generation = before  # put back, as PEFT does after its generate
    assert plain_model(model, "target") is model


@pytest.mark.parametrize("name", FOUND)
@pytest.mark.parametrize("owner", [LlamaForCausalLM, GenerationMixin])
def test_a_method_that_was_replaced_on_a_class_of_transformers_is_refused(name, owner, monkeypatch):
    theirs = getattr(owner, name, None)
    if theirs is None:
        pytest.skip(f"{owner.__name__} has no {name} in this version")
    monkeypatch.setattr(owner, name, functools.wraps(theirs)(lambda *args, **given: theirs(*args, **given)))
    with pytest.raises(UnsupportedModelError, match=f"has a {name} of its own"):
        plain_model(tiny_model("llama"), "target")


def penalised(theirs):
    return lambda *args, **given: theirs(*args, **{**given, "repetition_penalty": 3.0})


def on_the_model(monkeypatch):
    model = copy.deepcopy(tiny_model("llama"))
    model.generate = penalised(model.generate)
    return model


def on_a_class_of_ones_own(monkeypatch):
    return as_class(type("Own", (LlamaForCausalLM,), {"generate": penalised(LlamaForCausalLM.generate)}))


def on_transformers_class(monkeypatch):
    monkeypatch.setattr(GenerationMixin, "generate", penalised(GenerationMixin.generate))
    return copy.deepcopy(tiny_model("llama"))


@pytest.mark.parametrize("make", [on_the_model, on_a_class_of_ones_own, on_transformers_class])
def test_a_generate_of_ones_own_is_called_or_refused(make, monkeypatch):
    plain = greedy(tiny_model("llama"), PROMPT, 16)
    model, prompt = make(monkeypatch), torch.tensor([PROMPT])
    expected = model.generate(prompt, max_new_tokens=16).tolist()
    assert expected[0][len(PROMPT) :] != plain
    assert model.generate(prompt, max_new_tokens=16, custom_generate=hf.generate).tolist() == expected
    assert hf.generate_with(model, prompt, max_new_tokens=16).tolist() == expected
    with pytest.raises(UnsupportedModelError, match=r"has a generate of its own.*custom_generate=dynatree_core\.hf"):
        generate(model, None, PROMPT, max_new_tokens=16)
    assert generate(model, None, PROMPT, max_new_tokens=16, trust_model=True).token_ids == plain


@pytest.mark.parametrize("name", [name for name in _BEFORE_THE_LOOP if hasattr(LlamaForCausalLM, name)])
def test_a_method_that_prepares_a_generation_is_called_or_refused(name):
    calls = []

    def method(self, *args, **given):
        calls.append(name)
        return getattr(super(kind, self), name)(*args, **given)

    kind = type("Own", (LlamaForCausalLM,), {name: method, "__module__": __name__})
    model = as_class(kind)
    with pytest.raises(UnsupportedModelError, match=f"has a {name} of its own, which is not called here"):
        generate(model, None, PROMPT, max_new_tokens=4)
    expected = greedy(tiny_model("llama"), PROMPT, 4)
    assert not calls
    found = model.generate(torch.tensor([PROMPT]), max_new_tokens=4, custom_generate=hf.generate)
    assert found[0, len(PROMPT) :].tolist() == expected
    if name != "_maybe_initialize_input_ids_for_generation":  # of a model that is given embeddings, in some versions
        assert calls


def test_methods_of_transformers_own_models_are_fine():
    for family in ("phi3", "gemma3_text", "mistral"):
        assert plain_model(tiny_model(family), "target") is tiny_model(family)


class Handing(LlamaForCausalLM):
    def forward(self, *args, **given):
        return super().forward(*args, **given)


class Naming(LlamaForCausalLM):
    def forward(self, input_ids=None, **given):
        return super().forward(input_ids=input_ids, **given)


def replaced():
    model = copy.deepcopy(tiny_model("llama"))
    inner = model.forward
    model.forward = lambda *args, **given: inner(*args, **given)
    return model


def bound():
    model = copy.deepcopy(tiny_model("llama"))
    inner = model.forward
    model.forward = types.MethodType(lambda self, *args, **given: inner(*args, **given), model)
    return model


@pytest.mark.parametrize("make", [lambda: as_class(Handing), lambda: as_class(Naming), replaced, bound])
def test_a_forward_that_hands_its_arguments_on(make):
    model = make()
    assert {"position_ids", "logits_to_keep"} <= set(forward_parameters(model))
    result = generate(model, perturbed("llama"), PROMPT, policy="fixed(tau=0.0)", max_new_tokens=16)
    assert result.token_ids == greedy(tiny_model("llama"), PROMPT, 16)
    assert generate(tiny_model("llama"), model, PROMPT, max_new_tokens=16).token_ids == result.token_ids


class Around(torch.nn.Module):
    """A module that answers for a model, and computes with it in its own way."""

    def __init__(self, inner):
        super().__init__()
        self.__dict__["inner"] = inner
        self.eval()

    def __getattr__(self, name):
        return getattr(self.__dict__["inner"], name)

    def forward(self, *args, **given):
        return self.inner(*args, **given)


def test_a_module_around_a_model_drafts_with_it():
    target, drafter = tiny_model("llama"), Around(perturbed("llama"))
    asked = {"policy": "fixed(tau=0.0)", "max_new_tokens": 16}
    ours, its_models = generate(target, drafter, PROMPT, **asked), generate(target, drafter.inner, PROMPT, **asked)
    assert ours.token_ids == greedy(target, PROMPT, 16)
    assert ours.report.num_iterations == its_models.report.num_iterations < 16


def test_a_module_around_a_model_is_no_target():
    """Its parts cannot be looked at: they are not its own."""
    with pytest.raises(UnsupportedModelError, match=r"it hands its passes on to a LlamaForCausalLM .* give that model"):
        generate(Around(tiny_model("llama")), None, PROMPT)


def test_a_forward_that_takes_no_positions_is_refused():
    class Fixed(LlamaForCausalLM):
        def forward(self, input_ids=None, attention_mask=None):
            raise AssertionError("never called")

    with pytest.raises(UnsupportedModelError, match="its forward takes no position_ids"):
        generate(as_class(Fixed), None, PROMPT, max_new_tokens=4)


class OldName(LlamaForCausalLM):
    """As models are before transformers 5.24."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, use_cache=None):
        name = cache_argument(tiny_model("llama"))
        return super().forward(input_ids, attention_mask, position_ids, use_cache=use_cache, **{name: past_key_values})


class NewName(LlamaForCausalLM):
    """As models will be once the old name has gone."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, cache=None, use_cache=None):
        name = cache_argument(tiny_model("llama"))
        return super().forward(input_ids, attention_mask, position_ids, use_cache=use_cache, **{name: cache})


@pytest.mark.parametrize(("kind", "name"), [(OldName, "past_key_values"), (NewName, "cache")])
def test_the_cache_goes_by_the_name_that_the_forward_has_for_it(kind, name):
    model = as_class(kind)
    assert cache_argument(model) == name
    expected = greedy(tiny_model("llama"), PROMPT, 16)
    assert generate(model, model, PROMPT, max_new_tokens=16, trust_model=True).token_ids == expected
