"""Models with code of somebody's own: those whose rows depend on each other are refused, all others are decoded."""

from __future__ import annotations

import copy
import functools
import itertools
import sys
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dynatree_core import generate, generate_batch
from dynatree_core.audit import audit_generation
from dynatree_core.engine import row_probe
from dynatree_core.engine.row_probe import row_fault
from dynatree_core.errors import UnsupportedModelError
from dynatree_core.testing import strategies as ours
from dynatree_core.testing.models import greedy, perturbed, tiny_model

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


class Wrapped(nn.Module):
    """A layer of somebody's own around another, whose output it changes."""

    def __init__(self, inner, change):
        super().__init__()
        self.inner, self.change = inner, change

    def forward(self, rows):
        return self.change(self.inner(rows))


def with_layer(change, family="llama", dtype=torch.float64, seed=0):
    """A model whose first feed-forward layer is wrapped."""
    model = copy.deepcopy(tiny_model(family, seed)).to(dtype)
    name, part = next((name, part) for name, part in model.named_modules() if type(part).__name__.endswith("MLP"))
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, Wrapped(part, change))
    return model


def with_hook(hook, family="llama", dtype=torch.float64):
    model = copy.deepcopy(tiny_model(family)).to(dtype)
    model.model.layers[0].register_forward_hook(hook)
    return model


def scaled_together(rows):
    """int8 activations with one scale for all rows."""
    scale = rows.abs().amax() / 127
    return (rows / scale).round() * scale


def scaled_each(rows):
    """int8 activations with a scale for each row."""
    scale = rows.abs().amax(dim=-1, keepdim=True).clamp(min=1e-9) / 127
    return (rows / scale).round() * scale


def passes_of(model):
    """A list that grows by the number of rows of each pass."""
    seen = []
    model.register_forward_pre_hook(
        lambda part, args, given: seen.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    return seen


class Observer:
    """What quantisation-aware training leaves on: the range that it has seen so far."""

    def __init__(self):
        self.top = 0.0

    def __call__(self, rows):
        self.top = max(self.top, float(rows.abs().amax()))
        return rows.clamp(-0.9 * self.top, 0.9 * self.top)


class Counter:
    def __init__(self):
        self.calls = 0

    def __call__(self, rows):
        self.calls += 1
        return rows + 0.01 * self.calls


def centred(rows):
    return rows - rows.mean(dim=1, keepdim=True)


def nothing(part, args, out):
    """A hook that looks and changes nothing."""


def at_last(part, args, out):
    return torch.cat([out[:, :-1], out[:, -1:] + 0.5], 1)


def at_first(part, args, out):
    return torch.cat([out[:, :1] + 0.5, out[:, 1:]], 1)


def from_call(first):
    calls = itertools.count()
    return lambda part, args, out: out * (1.5 if next(calls) >= first else 1)


def after_token(token_id):
    """On from the pass on that has this token in a row."""
    seen = []

    def hook(part, args, out):
        seen.extend([1] * bool((args[0] == token_id).any()))
        return out * 2 if seen else out

    model = copy.deepcopy(tiny_model("llama"))
    model.model.embed_tokens.register_forward_hook(hook)
    return model


def with_norm(*layers):
    """A model with layers of torch's behind its last norm."""
    model = copy.deepcopy(tiny_model("llama"))
    model.model.norm = nn.Sequential(model.model.norm, *layers).double().eval()
    return model


MIXING = {
    "one scale": (lambda: with_layer(scaled_together), "rows depend on each other"),
    "mean of rows": (lambda: with_layer(centred), "rows depend on each other"),
    "observer": (lambda: with_layer(Observer()), "rows depend on each other|repeated"),
    "counter": (lambda: with_layer(Counter()), "a pass that is repeated gives other numbers"),
    "last row": (lambda: with_hook(at_last), "depend on their place"),
    "single rows": (lambda: with_hook(lambda part, args, out: out + (out.shape[1] == 1)), "depend on their place"),
    "many rows": (lambda: with_hook(lambda part, args, out: out + (out.shape[1] > 1)), "depend on their place"),
    "first row": (lambda: with_hook(at_first), "depend on their place|depend on each other"),
    "large passes": (lambda: with_hook(lambda part, args, out: out * (1 + (out.shape[1] > 64))), "pass of 129 rows"),
    "from a call on": (lambda: with_hook(from_call(20)), "a pass that is repeated gives other numbers"),
    "torch's softmax over rows": (lambda: with_norm(nn.Softmax(dim=1)), "rows depend on each other"),
    "torch's encoder": (
        lambda: with_norm(nn.TransformerEncoderLayer(32, 4, 48, dropout=0.0, batch_first=True)),
        "rows depend on each other",
    ),
    "after a token": (lambda: after_token(17), "a pass that is repeated gives other numbers"),
}


@pytest.mark.parametrize("kind", MIXING)
def test_rows_that_depend_on_others_are_refused(kind):
    make, message = MIXING[kind]
    model = make()
    for policy in ("fixed(tau=0.0)", "autoregressive"):
        with pytest.raises(UnsupportedModelError, match=message) as caught:
            generate(model, perturbed("llama"), PROMPT, policy=policy, max_new_tokens=8)
    assert "trust_model=True" in str(caught.value)
    named = "forward hook", f"{__name__}.Wrapped", "torch.nn.modules."
    assert any(name in str(caught.value) for name in named)
    generate(model, perturbed("llama"), PROMPT, max_new_tokens=8, trust_model=True)


ROW_BY_ROW = {
    "one scale a row": lambda dtype: with_layer(scaled_each, dtype=dtype),
    "low rank": lambda dtype: with_layer(lambda rows: rows + 0.1 * rows.flip(-1), dtype=dtype),
    "gpt2": lambda dtype: with_layer(torch.tanh, "gpt2", dtype),
    "window": lambda dtype: with_layer(torch.tanh, "mistral", dtype),
    "experts": lambda dtype: with_hook(nothing, "mixtral", dtype),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ROW_BY_ROW)
def test_layers_that_look_at_one_row_are_taken(kind, dtype):
    model = ROW_BY_ROW[kind](dtype)
    fault = row_fault(model)
    assert fault is None or (fault.is_rounding and kind == "one scale a row" and dtype == torch.float32)
    if dtype == torch.float64:
        result = generate(model, perturbed("llama"), PROMPT, policy="fixed(tau=0.0)", max_new_tokens=24)
        assert result.token_ids == greedy(model, PROMPT, 24)


class PassedOver(nn.Module):
    """In the place of a layer that was taken out."""

    def forward(self, rows, *others, **more):
        return rows


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("is_drafter", [False, True])
def test_a_layer_may_be_passed_over(layer, is_drafter):
    """Keys and values of some layers are none then, the first one among them."""
    model = copy.deepcopy(tiny_model("llama"))
    model.model.layers[layer] = PassedOver()
    target, drafter = (tiny_model("llama"), model) if is_drafter else (model, perturbed("llama"))
    asked = {"policy": "fixed(tau=0.0)", "max_new_tokens": 24}
    assert generate(target, drafter, PROMPT, **asked).token_ids == greedy(target, PROMPT, 24)
    texts = [PROMPT, PROMPT[:3]]
    found = [result.token_ids for result in generate_batch(target, drafter, texts, **asked)]
    assert found == [greedy(target, text, 24) for text in texts]


@pytest.mark.parametrize("seed", range(3))
def test_activations_of_few_steps_are_refused_where_passes_have_several_shapes(seed):
    def rounded(part, args):
        scale = args[0].abs().amax(dim=-1, keepdim=True).clamp(min=1e-9) / 127
        return (args[0] / scale).round() * scale

    torch.manual_seed(seed)
    size = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 2}
    config = LlamaConfig(
        vocab_size=tiny_model("llama").config.vocab_size, initializer_range=0.4, eos_token_id=None, **size
    )
    model = LlamaForCausalLM(config).eval()
    for part in model.model.modules():
        if isinstance(part, nn.Linear):
            part.register_forward_pre_hook(rounded)
    for policy in ("fixed(tau=0.0)", "autoregressive"):
        with pytest.raises(UnsupportedModelError, match=r"amplifies rounding.*exact='fixed_width'.*trust_model=True"):
            generate(model, perturbed("llama"), PROMPT, policy=policy, max_new_tokens=8)
    plain, tree = (
        generate(model, perturbed("llama"), PROMPT, policy=policy, max_new_tokens=24, exact="fixed_width").token_ids
        for policy in ("autoregressive", "fixed(tau=0.0)")
    )
    assert tree == plain
    _, report = audit_generation(model, perturbed("llama"), PROMPT, max_new_tokens=24)
    assert report.row_fault is None  # rounding is what an audit measures


@settings(max_examples=25)
@given(
    family=st.sampled_from(["llama", "gpt2", "gpt_neox", "qwen3", "gemma"]),
    seed=ours.model_seeds,
    strength=st.floats(1e-3, 2.0),
    reduce=st.sampled_from(["mean", "amax", "last", "norm"]),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
def test_any_mixing_that_is_no_rounding_is_found(family, seed, strength, reduce, dtype):
    """By a mean, a maximum, the last row or a norm over all rows, from a thousandth of the rows' own size on."""
    over_rows = {
        "mean": lambda rows: rows.mean(dim=1, keepdim=True),
        "amax": lambda rows: rows.amax(dim=1, keepdim=True),
        "last": lambda rows: rows[:, -1:],
        "norm": lambda rows: rows.norm(dim=1, keepdim=True),
    }[reduce]
    assert row_fault(with_layer(lambda rows: rows + strength * over_rows(rows), family, dtype, seed)) is not None


def test_models_as_transformers_made_them_are_not_asked(monkeypatch):
    asked = []
    monkeypatch.setattr(row_probe, "_asked", lambda *models: asked.append(models))
    for family in ours.FAMILIES:
        assert row_fault(tiny_model(family)) is None
    assert asked == []


def test_a_model_is_asked_once_for_each_state():
    model = with_layer(torch.tanh)
    seen = passes_of(model)
    assert row_fault(model) is None
    num_passes = len(seen)
    assert 8 <= num_passes <= 40
    assert sorted(seen)[-2] <= 24
    assert max(seen) == 129
    assert row_fault(model) is None
    assert len(seen) == num_passes
    layer = model.model.layers[0].mlp
    layer.change = scaled_together  # replaced
    assert "depend on each other" in row_fault(model).what
    assert len(seen) > num_passes
    num_passes = len(seen)
    assert "depend on each other" in row_fault(model).what
    assert len(seen) == num_passes


def test_the_global_random_numbers_stay_where_they_are():
    def drawing(rows):
        return rows + 0 * torch.rand(1)

    model = with_layer(drawing)
    state = torch.random.get_rng_state()
    row_fault(model)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_model_that_fails_says_so_before_anything_runs():
    def fail(rows):
        raise ValueError("no such kernel")

    with pytest.raises(UnsupportedModelError, match=r"a trial of a few passes failed.*no such kernel"):
        generate(with_layer(fail), None, PROMPT, max_new_tokens=4)


def over_all_rows(function):
    """The function, whose first result is moved by what is in all rows."""

    def moved(*args, **given):
        first, *others = result if isinstance(result := function(*args, **given), tuple) else (result,)
        first = first + first.mean(dim=-2, keepdim=True)
        return (first, *others) if others else first

    return moved


LLAMA = sys.modules[type(tiny_model("llama")).__module__]
REPLACED = {
    "method of a class": (LLAMA.LlamaMLP, "forward"),
    "function of a module": (LLAMA, "apply_rotary_pos_emb"),
    "torch's attention": (nn.functional, "scaled_dot_product_attention"),
    "torch's layer": (nn.Linear, "forward"),
}


@pytest.mark.parametrize("wrap", [lambda function: lambda new: new, functools.wraps], ids=["bare", "wraps"])
@pytest.mark.parametrize("place", REPLACED)
def test_functions_that_were_replaced_are_found(place, wrap, monkeypatch):
    owner, name = REPLACED[place]
    theirs = getattr(owner, name)
    model = tiny_model("llama")
    assert row_fault(model) is None
    monkeypatch.setattr(owner, name, wrap(theirs)(over_all_rows(theirs)))
    with pytest.raises(UnsupportedModelError, match=rf"rows depend on.*\.{name} was replaced by "):
        generate(model, None, PROMPT, max_new_tokens=4)
    monkeypatch.setattr(owner, name, wrap(theirs)(lambda *args, **given: theirs(*args, **given)))
    assert row_fault(model) is None
    monkeypatch.undo()
    assert generate(model, None, PROMPT, max_new_tokens=4).token_ids == greedy(model, PROMPT, 4)


def test_an_attention_function_that_was_replaced_is_found(monkeypatch):
    theirs = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def mixing(*args, **given):
        seen, weights = theirs(*args, **given)
        return seen + seen.mean(dim=1, keepdim=True), weights

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", mixing)
    with pytest.raises(UnsupportedModelError, match=r"ALL_ATTENTION_FUNCTIONS\['sdpa'\] was replaced"):
        generate(tiny_model("llama"), None, PROMPT, max_new_tokens=4)


def test_a_forward_that_drops_rows_is_told():
    model = copy.deepcopy(tiny_model("llama"))
    inner = model.forward
    model.forward = lambda *args, **given: inner(*args, **{**given, "logits_to_keep": 1})
    with pytest.raises(UnsupportedModelError, match="logits for each of a pass's 6 rows, got 1"):
        generate(model, None, PROMPT, max_new_tokens=4)


def test_a_hook_that_counts_is_asked_once_and_one_that_steers_again():
    model = copy.deepcopy(tiny_model("llama"))
    strength = {"of last row": 0.0}

    def steer(part, args, out):
        return torch.cat([out[:, :-1], out[:, -1:] + strength["of last row"]], 1)

    model.model.layers[0].register_forward_hook(steer)
    seen = passes_of(model)
    assert row_fault(model) is None
    num_passes = len(seen)
    assert row_fault(model) is None
    assert len(seen) == num_passes
    strength["of last row"] = 0.5
    assert "depend on their place" in row_fault(model).what


def test_a_hook_may_generate_by_another_model():
    other, model = with_layer(torch.tanh), copy.deepcopy(tiny_model("llama"))
    texts = []

    def ask(part, args, out):
        texts.append(generate(other, None, PROMPT, max_new_tokens=2).token_ids)

    model.model.layers[0].register_forward_hook(ask)
    asking = threading.Thread(target=row_fault, args=(model,), daemon=True)
    asking.start()
    asking.join(timeout=120)  # it would wait for ever
    assert not asking.is_alive()
    assert texts[0] == greedy(other, PROMPT, 2)


def test_a_drafter_may_mix_its_rows():
    target = tiny_model("llama")
    result = generate(target, with_layer(scaled_together), PROMPT, policy="fixed(tau=0.0)", max_new_tokens=24)
    assert result.token_ids == greedy(target, PROMPT, 24)


def test_an_audit_tells_mixing_from_rounding():
    model = with_layer(scaled_together)
    _, report = audit_generation(model, perturbed("llama"), PROMPT, policy="fixed(tau=0.0)", max_new_tokens=12)
    assert report.verdict == "bug"
    assert "rows depend on each other" in report.faults[0]
    assert report.rounding.bound < 1e-6  # of passes of one row, in float64
    _, report = audit_generation(with_layer(torch.tanh), perturbed("llama"), PROMPT, max_new_tokens=12)
    assert report.verdict == "identical"
    assert report.row_fault is None


def test_a_part_in_training_mode_is_refused():
    model = copy.deepcopy(tiny_model("llama"))
    model.model.layers[0].mlp = nn.Sequential(model.model.layers[0].mlp, nn.Dropout(0.5).train())
    with pytest.raises(UnsupportedModelError, match=r"training mode in model\.layers\.0\.mlp\.1"):
        generate(model, None, PROMPT, max_new_tokens=4)
