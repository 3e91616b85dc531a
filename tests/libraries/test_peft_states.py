"""Adapters in every state that PEFT and transformers bring them into: decoded as by generate, and drafted for."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers.integrations import peft as integration

from dynatree_core import PrefixCache, generate, hf
from dynatree_core.models.state import state_of
from dynatree_core.testing.models import perturbed, tiny_model

peft = pytest.importorskip("peft", reason="peft is not installed; `make test` brings it")
from peft_models import ADAPTERS, ASKED, PROJECTIONS, PROMPT, shake, tokens, wrapped  # noqa: E402

# PEFT calls what torch and transformers will take away
pytestmark = [pytest.mark.filterwarnings("default::FutureWarning", "default::DeprecationWarning")]

OPTIONS = {"policy": "fixed(depth=3,branch=2,tau=0.0)", "max_new_tokens": 16}


def check(model, *targets):
    """Generations with this model, and with others around or inside it, are what it generates."""
    expected = tokens(model.generate(**ASKED))
    for target in targets or (model,):
        for drafter in (perturbed("llama"), "adapter_off", "adapter_off+prompt_lookup"):
            assert generate(target, drafter, PROMPT, **OPTIONS).token_ids == expected
        assert tokens(hf.generate_with(target, **ASKED, policy="fixed", drafter="adapter_off")) == expected
    return expected


def lora(**settings):
    return peft.LoraConfig(task_type="CAUSAL_LM", target_modules=PROJECTIONS, **settings)


def plain():
    return tokens(tiny_model("llama").generate(**ASKED))


def test_adapters_that_transformers_has_added(monkeypatch, tmp_path):
    # transformers 5.24 asks for a PEFT that is not released; what it does works with the one there is
    monkeypatch.setattr(integration, "check_peft_version", lambda min_version: None)
    torch.manual_seed(0)
    model = copy.deepcopy(tiny_model("llama")).float()
    for name in ("a", "b"):
        model.add_adapter(lora(), adapter_name=name)
        shake(model)
    model.double().eval()
    seen = [check(model)]
    for active in ("a", ["a", "b"]):
        model.set_adapter(active)
        seen.append(check(model))
    model.disable_adapters()
    assert check(model) == plain()
    model.enable_adapters()
    assert check(model) == seen[-1]
    assert len(set(map(tuple, [*seen, plain()]))) == 4

    model.set_adapter("a")
    model.save_pretrained(tmp_path)
    loaded = copy.deepcopy(tiny_model("llama")).float()
    loaded.load_adapter(tmp_path)
    assert check(loaded.double().eval()) == seen[1]


def test_adapters_of_several_kinds():
    torch.manual_seed(0)
    base = copy.deepcopy(tiny_model("llama")).float()
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=PROJECTIONS), adapter_name="a", mixed=True)
    model.add_adapter("b", peft.LoHaConfig(target_modules=PROJECTIONS))
    seen = []
    for active in (["a", "b"], "a", "b"):
        model.set_adapter(active)
        shake(model)
        seen.append(check(model.double().eval(), model, model.base_model.model))
    assert len(set(map(tuple, [*seen, plain()]))) == 4
    with model.disable_adapter():
        assert check(model) == plain()
    assert generate(tiny_model("llama"), model, PROMPT, **OPTIONS).token_ids == plain()  # as a drafter


def test_several_active_adapters_and_those_made_of_others():
    model = wrapped(lora(), "x")
    model.add_adapter("y", lora())
    model.base_model.set_adapter(["x", "y"])
    shake(model)
    seen = [check(model.double().eval(), model, model.get_base_model())]
    model.add_weighted_adapter(["x", "y"], [0.5, 0.7], "z")
    model.set_adapter("z")
    seen.append(check(model.double().eval()))
    model.delete_adapter("x")
    assert check(model) == seen[-1]
    assert len(set(map(tuple, [*seen, plain()]))) == 3


@pytest.mark.parametrize("has_cache", [False, True])
def test_an_adapter_that_is_hot_swapped(has_cache, tmp_path):
    from peft.utils.hotswap import hotswap_adapter

    model, other = wrapped(lora()), wrapped(lora())
    shake(other)
    other.save_pretrained(tmp_path)
    options = {**OPTIONS, **({"prefix_cache": PrefixCache()} if has_cache else {})}
    before = tokens(model.generate(**ASKED))
    for drafter in ("adapter_off", None):
        assert generate(model, drafter, PROMPT, **options).token_ids == before
    hotswap_adapter(model, tmp_path, "default")  # through `.data`, which torch does not count
    after = tokens(model.generate(**ASKED))
    assert after == tokens(other.generate(**ASKED)) != before
    for drafter in ("adapter_off", None):
        result = generate(model, drafter, PROMPT, **options)
        assert result.token_ids == after
    assert (result.report.num_reused_tokens > 0) == has_cache  # rows of the swapped adapter


@pytest.mark.parametrize("kind", ["LoRA", "DoRA", "LoHa", "IA3", "layer norms"])
def test_the_state_of_a_model_has_the_numbers_of_its_adapters(kind):
    model = wrapped(ADAPTERS[kind]()).get_base_model()
    known = state_of(model, reads_weights=False)
    assert state_of(model, reads_weights=False) == known
    own = [p for n, p in model.named_parameters() if p.requires_grad]
    assert own
    for parameter in own:
        parameter.data.mul_(2).add_(1)
        changed = state_of(model, reads_weights=False)
        assert changed != known
        known = changed


@pytest.mark.parametrize("half", ["adapter", "base"])
def test_adapters_in_another_dtype_than_the_base(half):
    model = wrapped(ADAPTERS["rsLoRA on the embeddings"]()).float()
    for name, parameter in model.named_parameters():
        if ("lora_" in name) == (half == "adapter"):
            parameter.data = parameter.data.bfloat16()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32, torch.bfloat16}
    if half == "adapter":
        check(model, model, model.get_base_model())
    else:  # bfloat16 rounds otherwise in trees: plain steps are generate's
        result = generate(model, "adapter_off", PROMPT, policy="autoregressive", max_new_tokens=16)
        assert result.token_ids == tokens(model.generate(**ASKED))


@pytest.mark.parametrize("library", ["quanto", "torchao"])
def test_adapters_on_a_quantised_base(library):
    base = copy.deepcopy(tiny_model("llama")).float()
    if library == "quanto":
        quanto = pytest.importorskip("optimum.quanto", reason="quanto is not installed; `make test` brings it")
        quanto.quantize(base, weights=quanto.qint8)
        quanto.freeze(base)
    else:
        ao = pytest.importorskip("torchao.quantization", reason="torchao is not installed; `make test` brings it")
        ao.quantize_(base, ao.Int8WeightOnlyConfig())
    torch.manual_seed(0)
    model = peft.get_peft_model(base, lora())
    shake(model)
    model.eval()
    expected = check(model, model, model.get_base_model())
    with model.disable_adapter():
        assert check(model) != expected


def test_merged_adapters_that_are_disabled():
    """PEFT takes them out of the weights in the next pass, whoever makes it."""
    model = wrapped(lora())
    expected = tokens(model.generate(**ASKED))
    model.merge_adapter()
    with model.disable_adapter():
        assert generate(model, perturbed("llama"), PROMPT, **OPTIONS).token_ids == plain()
    assert check(model) == expected


def test_adapters_on_the_parameters_of_experts():
    torch.manual_seed(0)
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], target_parameters=experts)
    model = peft.get_peft_model(copy.deepcopy(tiny_model("mixtral")).float(), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.double().eval()
    expected = tokens(model.generate(**ASKED))
    assert expected != tokens(tiny_model("mixtral").generate(**ASKED))
    for drafter in ("prompt_lookup", "adapter_off"):
        assert generate(model, drafter, PROMPT, **OPTIONS).token_ids == expected
