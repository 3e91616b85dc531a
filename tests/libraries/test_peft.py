"""PEFT's methods: learned prompts are refused, adapters decoded as by generate, however they are reached."""

from __future__ import annotations

import contextlib
import sys

import pytest
from transformers import AutoModelForCausalLM

from dynatree_core import PrefixCache, generate, hf
from dynatree_core.errors import ParameterError, UnsupportedModelError
from dynatree_core.hf.export import Chosen, write_folder
from dynatree_core.testing.models import perturbed, tiny_model

peft = pytest.importorskip("peft", reason="peft is not installed; `make test` brings it")

# PEFT calls what torch and transformers will take away
pytestmark = [pytest.mark.filterwarnings("default::FutureWarning", "default::DeprecationWarning")]

from peft_models import ADAPTERS, ASKED, PROMPT, TREES, shake, tokens, wrapped  # noqa: E402

PROMPTS = {
    "prompt tuning": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "prefix tuning": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "P-tuning": lambda: peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "multitask prompt tuning": lambda: peft.MultitaskPromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=4, num_tasks=2
    ),
    "CPT": lambda: peft.CPTConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=4, cpt_token_ids=[1, 2, 3, 4], cpt_mask=[1] * 4,
        cpt_tokens_type_mask=[1, 2, 3, 4],
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", PROMPTS)
def test_learned_prompts_are_refused(kind):
    model = wrapped(PROMPTS[kind]())
    for call in (
        lambda: model.generate(**ASKED, **TREES),
        lambda: generate(model, "prompt_lookup", PROMPT, max_new_tokens=8),
        lambda: generate(tiny_model("llama"), model, PROMPT, max_new_tokens=8),
    ):
        with pytest.raises(UnsupportedModelError, match=r"learned prompt|prepare_inputs_for_generation of its own"):
            call()
    base = model.get_base_model()
    assert generate(base, None, PROMPT, max_new_tokens=8).token_ids == tokens(base.generate(**ASKED))[:8]
    with model.disable_adapter():
        assert generate(model, None, PROMPT, max_new_tokens=8).token_ids == tokens(base.generate(**ASKED))[:8]


@pytest.fixture
def from_folder(tmp_path, monkeypatch):
    """The target as transformers loads it from a folder with trees: its `generate` is ours."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    tiny_model("llama").save_pretrained(tmp_path / "target")
    write_folder(tmp_path / "trees", tmp_path / "target", "tiny", Chosen("prompt_lookup", "fixed(depth=3)"))
    return AutoModelForCausalLM.from_pretrained(tmp_path / "trees", trust_remote_code=True).eval()


def test_adapters_and_the_folder(from_folder):
    plain = tokens(tiny_model("llama").generate(**ASKED))
    model = peft.get_peft_model(from_folder, ADAPTERS["LoRA"]())
    shake(model)
    model.double().eval()
    expected = tokens(type(from_folder).generate(from_folder, **ASKED))
    assert expected != plain
    folder = {"custom_generate": hf.FOLDER, "trust_remote_code": True}
    assert tokens(model.generate(**ASKED)) == tokens(model.generate(**ASKED, **folder)) == expected
    with model.disable_adapter():
        assert tokens(model.generate(**ASKED)) == tokens(model.generate(**ASKED, **folder)) == plain


def test_learned_prompts_are_refused_by_the_folder(from_folder):
    model = peft.get_peft_model(from_folder, PROMPTS["prompt tuning"]()).eval()
    with pytest.raises(UnsupportedModelError, match=r"learned prompt|prepare_inputs_for_generation of its own"):
        model.generate(**ASKED)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_are_decoded_as_by_generate(kind):
    model = wrapped(ADAPTERS[kind]())
    plain = tokens(tiny_model("llama").generate(**ASKED))
    expected = tokens(model.generate(**ASKED))
    assert expected != plain
    drafter = perturbed("llama")
    assert tokens(model.generate(**ASKED, **TREES, drafter=drafter)) == expected
    assert tokens(hf.generate_with(model, **ASKED, policy="fixed", drafter=drafter)) == expected
    for target in (model, model.get_base_model()):
        assert generate(target, drafter, PROMPT, policy="fixed(tau=0.0)", max_new_tokens=16).token_ids == expected
    assert generate(tiny_model("llama"), model, PROMPT, max_new_tokens=16).token_ids == plain  # as a drafter
    with model.disable_adapter():
        assert generate(model, drafter, PROMPT, max_new_tokens=16).token_ids == tokens(model.generate(**ASKED))


def test_an_adapter_that_is_merged():
    model = wrapped(ADAPTERS["LoRA"]())
    expected = tokens(model.generate(**ASKED))
    model.merge_adapter()
    assert generate(model, perturbed("llama"), PROMPT, max_new_tokens=16).token_ids == expected
    model.unmerge_adapter()
    merged = model.merge_and_unload()
    assert generate(merged, perturbed("llama"), PROMPT, max_new_tokens=16).token_ids == expected


def test_activated_lora_is_refused():
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], alora_invocation_tokens=[9, 2])
    model = wrapped(config)
    for policy in ("autoregressive", "fixed"):
        for call in (
            lambda policy=policy: model.generate(**ASKED, custom_generate=hf.generate, policy=policy),
            lambda policy=policy: generate(model, None, PROMPT, policy=policy, max_new_tokens=8),
        ):
            with pytest.raises(UnsupportedModelError, match="activated LoRA"):
                call()


def test_adapters_chosen_by_the_call_share_a_prefix_cache():
    model = wrapped(ADAPTERS["LoRA"](), "a")
    model.add_adapter("b", ADAPTERS["LoRA"]())
    shake(model)
    model.double().eval()
    cache = PrefixCache()
    trees = {"custom_generate": hf.generate, "options": {"prefix_cache": cache}}
    seen = set()
    for more, within in (
        ({"adapter_names": ["a"]}, contextlib.nullcontext),
        ({"adapter_names": ["b"]}, contextlib.nullcontext),
        ({"adapter_names": ["__base__"]}, contextlib.nullcontext),
        ({}, model.disable_adapter),
    ):
        with within():
            expected = tokens(model.generate(**ASKED, **more))
            for _ in range(2):
                assert tokens(model.generate(**ASKED, **more, **trees)) == expected
        seen.add(tuple(expected))
    for name in ("b", "a", "b"):
        model.set_adapter(name)
        result = generate(model, None, PROMPT, max_new_tokens=16, prefix_cache=cache)
        assert result.token_ids == tokens(model.generate(**ASKED))
    assert result.report.num_reused_tokens > 0
    assert len(seen) == 3


@pytest.mark.parametrize("names", [["a", "b"], ["a", "a"], ["__base__", "a"]])
def test_adapters_of_several_rows_are_refused(names):
    """PEFT gives each row of a batch its own; rows that are decoded one after the other would all get the first."""
    model = wrapped(ADAPTERS["LoRA"](), "a")
    model.add_adapter("b", ADAPTERS["LoRA"]())
    model.double().eval()
    two = {**ASKED, "input_ids": PROMPT.repeat(2, 1), "attention_mask": ASKED["attention_mask"].repeat(2, 1)}
    assert model.generate(**two, **TREES).tolist() == model.generate(**two).tolist()
    for prompts in (two, ASKED):
        with pytest.raises(
            ParameterError, match=f"adapter_names must name one adapter.*, got {', '.join(names)}; give"
        ):
            model.generate(**prompts, adapter_names=names, **TREES)
