"""Models in the bits that they were published in: packed, kept in one file, decoded without transformers' modules."""

from __future__ import annotations

import copy
import gc
import json
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
import transformers
from packaging.version import Version
from students import HEAD_IDS
from test_native import FITTING, PROMPT, TEXT, logits_of, needs_library, single, twin_of
from tiny_folder import tiny_tokenizer
from transformers import AutoModelForCausalLM

from dynatree_core import generate, generate_batch, load_model, ops
from dynatree_core.cli.imports import importing
from dynatree_core.cli.loading import load_target
from dynatree_core.errors import ModelLoadError, ParameterError
from dynatree_core.files.tensors import ALIGNMENT, load_tensors, mapped_tensors, save_aligned
from dynatree_core.models.architectures import vocab_size
from dynatree_core.models.blueprint import Mixture, NoBlueprintError, Rope, blueprint_of, family_of, ropes_of_config
from dynatree_core.models.stored import (
    StoredModel,
    _changed,
    load_packed,
    pack_narrowest,
    packer,
    plain_config,
    read_checkpoint,
    save_packed,
)
from dynatree_core.models.student import load_student, new_student, save_student
from dynatree_core.ops.selection import selected
from dynatree_core.runners.choice import runner_for
from dynatree_core.runners.eager import EagerRunner
from dynatree_core.runners.native import Twin
from dynatree_core.testing.models import greedy

BITS = {"int8": 127, "int4": 15}  # steps from a group's middle to its largest weight, or over all its range


def published(folder: Path, name: str, dtype: torch.dtype = torch.bfloat16, **settings: Any) -> Any:
    """A tiny model in a folder, as somebody publishes one; loaded in single precision."""
    model: Any = copy.deepcopy(single(name)).to(dtype)
    for setting, value in settings.items():
        setattr(model.config, setting, value)
    model.tie_weights()
    model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def stored(folder: Path, model: Any, weights: str = "stored") -> StoredModel:
    blueprint = read_checkpoint(folder, model.config, weights)
    return StoredModel(model.config, model.generation_config, blueprint, weights=weights, in_float32=lambda: model)


# ---- one file -------------------------------------------------------------------------------------------------


def test_a_file_of_tensors_is_aligned_and_one_that_anybody_reads(tmp_path: Path) -> None:
    tensors = {
        "odd": torch.arange(7, dtype=torch.uint8),
        "halves": torch.randn(3, 5).bfloat16(),
        "none": torch.empty(0),
        "whole": torch.randn(33),
    }
    save_aligned(tensors, tmp_path / "file.safetensors", {"about": "it"})
    mapped, metadata = mapped_tensors(tmp_path / "file.safetensors", advice="")
    assert metadata == {"about": "it"}
    assert mapped.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(mapped[name], tensor)
        assert mapped[name].data_ptr() % ALIGNMENT == 0
    assert torch.equal(load_tensors(tmp_path / "file.safetensors", advice="")["whole"], tensors["whole"])
    (tmp_path / "file.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ModelLoadError, match=r"must hold tensors as they were written, got .*; make it again"):
        mapped_tensors(tmp_path / "file.safetensors", advice="make it again")


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "phi, normed keys", "gpt2", "qwen2_moe", "gpt_oss"])
def test_a_packed_model_comes_back_from_its_file(name: str, tmp_path: Path) -> None:
    model: Any = single(name)
    with torch.no_grad():
        blueprint = blueprint_of(model).packed(pack_narrowest)
    save_packed(blueprint, model.config, {"eos_token_id": 5}, tmp_path)
    found = load_packed(tmp_path, "stored", advice="")
    assert torch.equal(logits_of(Twin(found.blueprint), [TEXT]), logits_of(twin_of(name), [TEXT]))
    assert found.generation_config.eos_token_id == 5
    assert found.config.model_type == model.config.model_type
    ropes = {id(layer.rope) for layer in found.blueprint.layers}
    assert len(ropes) == len({id(layer.rope) for layer in blueprint.layers}), "what is one stays one"
    with pytest.raises(ParameterError, match="is for the native runner alone, got another one"):
        found.in_transformers()


def test_a_damaged_description_is_an_error(tmp_path: Path) -> None:
    model: Any = single("llama")
    with torch.no_grad():
        save_packed(blueprint_of(model).packed(pack_narrowest), model.config, {}, tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelLoadError, match=r"must hold a model as it was packed, got JSONDecodeError .*; mend it"):
        load_packed(tmp_path, "stored", advice="mend it")


# ---- checkpoints ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FITTING)
def test_a_published_model_has_the_numbers_that_transformers_loads(name: str, tmp_path: Path) -> None:
    model = published(tmp_path, name)
    if model.config.model_type == "gptj":
        with pytest.raises(NoBlueprintError, match="rotary embedding is not described"):
            read_checkpoint(tmp_path, model.config, "stored")
        return
    if (
        model.config.model_type == "gemma2"
    ):  # a published one caps its scores, which 5.17.0 loads with SDPA, without caps
        model.set_attn_implementation("eager")
    found = stored(tmp_path, model)
    with torch.no_grad():
        twin = Twin(blueprint_of(model).packed(pack_narrowest))
    assert torch.equal(logits_of(Twin(found.blueprint), [TEXT]), logits_of(twin, [TEXT]))
    assert {layer.qkv.kind for layer in found.blueprint.layers} == {"bfloat16"}
    assert vocab_size(found) == vocab_size(model)
    torch.testing.assert_close(logits_of(EagerRunner(found), [TEXT]), logits_of(EagerRunner(model), [TEXT]))


@pytest.mark.parametrize("name", FITTING)
def test_rotary_embeddings_follow_from_the_configuration(name: str) -> None:
    model: Any = single(name)
    if model.config.model_type == "gptj":
        return  # its own are a table in the model
    found = ropes_of_config(model.config)
    ropes = {layer.rope for layer in blueprint_of(model).layers} - {None}
    for rope in ropes:
        assert any(isinstance(one, Rope) and torch.equal(one.inv_freq, rope.inv_freq) for one in found.values())
        assert any(isinstance(one, Rope) and one.scaling == rope.scaling for one in found.values())


@pytest.mark.parametrize("name", FITTING)
def test_heads_are_turned_in_part_where_the_family_reads_that_setting(name: str) -> None:
    model: Any = single(name)
    config = copy.deepcopy(model.config)
    described = getattr(config, "rope_parameters", None)
    if not described or config.model_type == "gptj" or any(isinstance(part, dict) for part in described.values()):
        assert not family_of(config).turns_part  # without such a setting, or with one for each layer type
        return
    described |= {"rope_type": "default", "partial_rotary_factor": 0.5}
    rotary = type(model.get_submodule(f"{family_of(config).base}.rotary_emb"))(config)
    rope = ropes_of_config(config)["all"]
    assert rope is not None
    assert torch.equal(rope.inv_freq, rotary.inv_freq)


def test_embeddings_that_are_the_head_are_kept_once(tmp_path: Path) -> None:
    model = published(tmp_path, "llama", tie_word_embeddings=True)
    found = stored(tmp_path, model)
    assert found.blueprint.embedding is found.blueprint.head
    assert torch.equal(
        found.get_input_embeddings()(torch.tensor([[3, 5]]))[0], model.get_input_embeddings().weight[[3, 5]]
    )
    other = published(tmp_path / "untied", "llama")
    other.config.tie_word_embeddings = True  # says so, but its files have both, with numbers of their own
    untied = stored(tmp_path / "untied", other)
    assert untied.num_bytes > found.num_bytes
    assert untied.blueprint.embedding is not untied.blueprint.head


def test_files_that_are_not_as_transformers_writes_them_are_left_to_it(tmp_path: Path) -> None:
    model = published(tmp_path, "llama", torch.float64)
    with pytest.raises(NoBlueprintError, match=r"files have tensors of torch.float64"):
        read_checkpoint(tmp_path, model.config, "stored")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(NoBlueprintError, match="folder has no safetensors"):
        read_checkpoint(tmp_path, model.config, "stored")
    other = published(tmp_path / "other", "llama")
    other.config.quantization_config = {"bits": 4}
    with pytest.raises(NoBlueprintError, match="quantised in a way of their own"):
        read_checkpoint(tmp_path / "other", other.config, "stored")


@pytest.mark.parametrize(
    ("name", "shape", "reason"),
    [
        (
            "model.layers.0.self_attn.q_proj.bias",
            (32,),
            "have '{}', which a LlamaForCausalLM of",
        ),  # llama asks for none
        ("model.norm.weight", (), "lack '{}'"),
        (
            "model.layers.1.mlp.up_proj.weight",
            (8, 32),
            r"have '{}' of the shape \(8, 32\), which should be \(\d+, 32\)",
        ),
    ],
)
def test_files_with_other_parameters_than_the_model_has_are_left_to_transformers(
    name: str, shape: tuple[int, ...], reason: str, tmp_path: Path
) -> None:
    model = published(tmp_path, "llama")
    tensors = load_tensors(tmp_path / "model.safetensors", advice="")
    tensors.pop(name, None)
    if shape:
        tensors[name] = torch.ones(shape)
    save_aligned(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(NoBlueprintError, match=f"files {reason.format(name)}"):
        read_checkpoint(tmp_path, model.config, "stored")
    if "bias" in name:  # which transformers leaves out
        assert not isinstance(load_model(str(tmp_path), device="cpu", weights="stored").model, StoredModel)


def test_a_configuration_that_no_model_can_be_made_of_is_left_to_transformers(tmp_path: Path) -> None:
    model = published(tmp_path, "llama")
    model.config.pad_token_id = model.config.vocab_size  # no row of the embeddings
    with pytest.raises(NoBlueprintError, match="configuration no LlamaForCausalLM can be made of"):
        read_checkpoint(tmp_path, model.config, "stored")


def test_an_adapter_in_the_folder_is_left_to_transformers(tmp_path: Path) -> None:
    model = published(tmp_path, "llama")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(NoBlueprintError, match="folder has an adapter"):
        read_checkpoint(tmp_path, model.config, "stored")


def test_one_file_counts_before_an_index_of_several(tmp_path: Path) -> None:
    model = published(tmp_path, "llama")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"lm_head.weight": "other.safetensors"}}')
    assert len(read_checkpoint(tmp_path, model.config, "stored").layers) == model.config.num_hidden_layers


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "qwen2_moe", "qwen3_moe"])
def test_experts_are_read_one_by_one_and_kept_once(family: str, tmp_path: Path) -> None:
    model = published(tmp_path, family)
    names = mapped_tensors(tmp_path / "model.safetensors", advice="")[0].keys()
    assert sum(".experts." in name for name in names) == 2 * 4 * 3, "as checkpoints have them: a matrix for each part"
    found = stored(tmp_path, model)
    for layer, one in zip(found.blueprint.layers, model.model.layers, strict=True):
        assert isinstance(layer.mlp, Mixture)
        experts = one.mlp.experts
        wanted = 2 * (experts.gate_up_proj.numel() + experts.down_proj.numel())  # bytes: in 16 bits, as they are there
        blocks = layer.mlp.experts[:4]
        assert sum(block.up.num_bytes + block.down.num_bytes for block in blocks) == wanted
    assert found.num_bytes == sum({id(one): one.num_bytes for one in found.blueprint.matrices()}.values()) + (
        model.model.embed_tokens.weight.numel() * 2
    )


@pytest.mark.parametrize("weights", BITS)
def test_routers_keep_their_bits(weights: str, tmp_path: Path) -> None:
    model = published(tmp_path / "model", "qwen2_moe")
    found = stored(tmp_path / "model", model, weights)
    with torch.no_grad():
        packed = blueprint_of(model).packed(pack_narrowest)
    save_packed(packed, model.config, {}, tmp_path)
    for blueprint in (found.blueprint, load_packed(tmp_path, weights, advice="").blueprint):
        for layer in blueprint.layers:
            assert isinstance(layer.mlp, Mixture)
            assert layer.mlp.router.kind == "bfloat16"
            assert {block.up.kind for block in layer.mlp.experts} == {packer(weights)((torch.ones(1, 32),), None).kind}
    logits, oracle = logits_of(Twin(found.blueprint), [TEXT]), logits_of(EagerRunner(found), [TEXT])
    torch.testing.assert_close(logits, oracle, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("family", "wanted"), [("gemma2", "eager"), ("llama", "sdpa")])
def test_a_model_with_soft_caps_has_them_in_transformers_too(family: str, wanted: str, tmp_path: Path) -> None:
    model = published(tmp_path, family)
    found = stored(tmp_path, model)
    model.config._attn_implementation = "sdpa"  # which has none: so 5.17.0 loads both
    assert found.in_transformers().config._attn_implementation == wanted


@pytest.mark.parametrize("weights", BITS)
def test_weights_of_fewer_bits_are_the_same_model_in_transformers(weights: str, tmp_path: Path) -> None:
    model = published(tmp_path, "llama")
    plain = model.lm_head.weight.detach().clone()
    found = stored(tmp_path, model, weights)
    logits, oracle = logits_of(Twin(found.blueprint), [TEXT]), logits_of(EagerRunner(found), [TEXT])
    torch.testing.assert_close(logits, oracle, rtol=0, atol=1e-4)
    error = (model.lm_head.weight - plain).abs().amax() / plain.abs().amax()
    assert 0 < error < 1 / BITS[weights], "rounded, to the nearest code"
    assert found.blueprint.layers[0].qkv.num_bytes < 10 * found.blueprint.layers[0].qkv.unpacked().numel() / 8


def test_a_configuration_without_a_family_has_the_settings_and_no_more() -> None:
    config = plain_config({"model_type": "llama", "hidden_size": 8})
    assert (config.model_type, config.hidden_size) == ("llama", 8)
    assert not hasattr(config, "rms_norm_eps")


# ---- rows of a packed matrix ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8", "int4"])
def test_rows_of_a_packed_matrix_keep_their_codes(kind: str) -> None:
    weight = torch.randn(50, 64)
    bias = torch.randn(50)
    packed = packer(kind)((weight,), bias) if kind in BITS else ops.pack(weight.to(getattr(torch, kind)), bias)
    rows = torch.tensor([49, 3, 17, 3, *range(20)])
    found = selected(packed, rows)
    assert found.num_outputs == len(rows)
    assert torch.equal(found.unpacked(), packed.unpacked()[rows])
    expected = ops.linear(weight[:2], packed)[:, rows]
    torch.testing.assert_close(ops.linear(weight[:2], found), expected, rtol=0, atol=1e-5)


# ---- decoding -------------------------------------------------------------------------------------------------


@needs_library
def test_a_stored_model_decodes_and_says_what_transformers_says(tmp_path: Path) -> None:
    model = published(tmp_path, "llama")
    found = stored(tmp_path, model)
    expected = greedy(model, PROMPT, 24)
    assert runner_for(found, "auto") == "native"
    for runner in ("auto", "native", "eager"):
        result = generate(found, "prompt_lookup", PROMPT, policy="linear(depth=3)", max_new_tokens=24, runner=runner)
        assert result.token_ids == expected
        assert result.report.runner == ("native" if runner == "auto" else runner)
    exact = generate(found, "prompt_lookup", PROMPT, policy="linear(depth=3)", max_new_tokens=24, exact="fixed_width")
    assert (exact.token_ids, exact.report.runner) == (expected, "native")
    with pytest.raises(ParameterError, match="got weights that are kept without modules"):
        generate(found, None, PROMPT, cache="sinks=1,window=8", max_new_tokens=4)


@needs_library
def test_a_student_of_a_stored_model_drafts_in_its_own_bits(tmp_path: Path) -> None:
    model = published(tmp_path / "target", "llama")
    student = new_student(model, [0, 1], HEAD_IDS).eval()
    save_student(student, tmp_path / "student", torch.bfloat16, {"target": "tiny"})
    found: Any = load_student(tmp_path / "student", stored(tmp_path / "target", model), torch.float32)  # type: ignore[arg-type]
    assert isinstance(found, StoredModel)
    oracle = load_student(tmp_path / "student", model, torch.float32)
    torch.testing.assert_close(
        logits_of(Twin(found.blueprint), [TEXT]), logits_of(EagerRunner(oracle), [TEXT]), rtol=0, atol=1e-4
    )
    assert found.blueprint.layers[0].qkv.kind == found.blueprint.head.kind == "bfloat16"
    drafter = f"distilled(path={str(tmp_path / 'student')!r})"
    result = generate(stored(tmp_path / "target", model), drafter, PROMPT, policy="fixed(depth=3)", max_new_tokens=16)
    assert result.token_ids == greedy(model, PROMPT, 16)
    assert sum(step.num_accepted for step in result.report.steps) > 0


@needs_library
def test_load_model_takes_weights_by_name(tmp_path: Path) -> None:
    published(tmp_path / "tiny", "llama")
    tiny_tokenizer().save_pretrained(tmp_path / "tiny")
    folder = str(tmp_path / "tiny")
    plain = load_model(folder, device="cpu", weights="fp32").model
    assert not isinstance(plain, StoredModel)
    for weights in ("stored", "int8"):
        found: Any = load_model(folder, device="cpu", weights=weights)
        assert isinstance(found.model, StoredModel)
        assert found.model.weights == weights
        assert found.tokenizer is not None
    assert not isinstance(load_model(folder, device="cpu", dtype="float64", weights="stored").model, StoredModel)
    with pytest.raises(ParameterError, match=r"weights='int8' cannot be had .*: they are computed in float32 on a CPU"):
        load_model(folder, device="cpu", dtype="float64", weights="int8")
    with pytest.raises(ParameterError, match="weights must be one of stored, fp32, int8, int4, got 'int2'"):
        load_model(folder, device="cpu", weights="int2")


@needs_library
def test_a_command_loads_what_its_runner_and_its_cache_can_compute(tmp_path: Path) -> None:
    published(tmp_path, "llama")
    asked: dict[str, Any] = {"weights": "stored", "activations": "full"}
    for settings, is_stored in (
        ({}, True),
        ({"runner": "native", "tau": 0.5}, True),
        ({"runner": "eager"}, False),
        ({"cache": "sinks=1,window=8"}, False),
        ({"weights": "int8", "runner": "eager"}, True),  # which is refused by name, rather than computed in 32 bits
        ({"weights": "int8", "activations": "int8", "runner": "eager"}, True),
    ):
        found = load_target(str(tmp_path), "cpu", "auto", **asked | settings)
        assert isinstance(found.model, StoredModel) == is_stored
        is_rounded = "weights" in settings
        assert (found.rounded is not None) == is_rounded
        if is_rounded and isinstance(found.model, StoredModel):
            assert found.rounded == found.model.set_up


def rounding(folder: Path, **settings: Any) -> StoredModel:
    """A model as the default one is published: 4 bits, and 8 in the head that is the embedding too; rows in 8 bits."""
    model = published(folder, "llama", **settings)
    with torch.no_grad():
        blueprint = blueprint_of(model).packed(packer("int4"))
        head = ops.quantise(model.lm_head.weight, 8)
    return StoredModel(
        model.config,
        model.generation_config,
        attrs.evolve(blueprint, head=head, embedding=head),
        weights="stored",
        in_float32=lambda: model,
        activations="int8",
    )


@needs_library
def test_rows_in_8_bits_have_the_same_logits_in_passes_of_any_size(tmp_path: Path) -> None:
    found = rounding(tmp_path)
    assert found.blueprint.embedding is found.blueprint.head, "held once"
    twin = Twin(found.blueprint)
    whole = logits_of(twin, [TEXT])
    for size in (1, 2, 3, 5, 7):
        assert torch.equal(logits_of(twin, [TEXT[at : at + size] for at in range(0, len(TEXT), size)]), whole)
    full = Twin(_changed(found.blueprint, lambda matrix: ops.with_activations(matrix, "full")))
    difference = (logits_of(full, [TEXT]) - whole).abs().max() / whole.abs().max()
    assert 0 < difference < 0.1, "rounded, and to the nearest"


@needs_library
@pytest.mark.parametrize("policy", ["linear(depth=3)", "fixed(depth=4)", "best_first", "cost_aware"])
def test_trees_of_rows_in_8_bits_give_what_plain_decoding_of_them_gives(policy: str, tmp_path: Path) -> None:
    found = rounding(tmp_path)
    expected = generate(found, None, PROMPT, policy="autoregressive", max_new_tokens=24)
    assert expected.report.runner == "native"
    for drafter in ("prompt_lookup", found):
        result = generate(found, drafter, PROMPT, policy=policy, max_new_tokens=24)
        assert result.token_ids == expected.token_ids
    prompts = [PROMPT, PROMPT[:3], PROMPT[1:]]
    alone = [generate(found, None, one, policy="autoregressive", max_new_tokens=12).token_ids for one in prompts]
    batch = generate_batch(found, "prompt_lookup", prompts, policy=policy, max_new_tokens=12)
    assert [result.token_ids for result in batch] == alone


@needs_library
def test_a_student_of_a_target_with_rows_in_8_bits_has_its_head_so(tmp_path: Path) -> None:
    model = published(tmp_path / "target", "llama")
    target: Any = rounding(tmp_path / "target")
    save_student(new_student(model, [0, 1], HEAD_IDS).eval(), tmp_path / "student", torch.bfloat16, {"target": "tiny"})
    found: Any = load_student(tmp_path / "student", target, torch.float32)
    matrices = found.blueprint.matrices()
    head = found.blueprint.head
    assert (head.kind, head.activations, head.num_outputs) == ("q8_0", "int8", len(HEAD_IDS))
    assert {matrix.activations for matrix in matrices if matrix is not head} == {"full"}, "in its own bits"
    twin = Twin(found.blueprint)
    whole = logits_of(twin, [TEXT])
    for size in (1, 2, 3, 5, 7):
        assert torch.equal(logits_of(twin, [TEXT[at : at + size] for at in range(0, len(TEXT), size)]), whole)
    full = Twin(attrs.evolve(found.blueprint, head=ops.with_activations(head, "full")))
    assert 0 < (logits_of(full, [TEXT]) - whole).abs().max() / whole.abs().max() < 0.1, "rounded, and to the nearest"
    drafter = f"distilled(path={str(tmp_path / 'student')!r})"
    prompts = [PROMPT, PROMPT[:3], PROMPT[1:]]
    expected = [generate(target, None, one, policy="autoregressive", max_new_tokens=16).token_ids for one in prompts]
    for policy in ("linear(depth=3)", "fixed(depth=3)", "cost_aware"):
        alone = [generate(target, drafter, one, policy=policy, max_new_tokens=16) for one in prompts]
        batch = generate_batch(target, drafter, prompts, policy=policy, max_new_tokens=16)
        assert [one.token_ids for one in alone] == [one.token_ids for one in batch] == expected
        if policy != "cost_aware":  # which may find that drafting does not pay
            assert sum(step.num_accepted for one in alone for step in one.report.steps) > 0


@needs_library
def test_rows_in_8_bits_are_for_the_native_runner_and_weights_of_few_bits(tmp_path: Path) -> None:
    found = rounding(tmp_path / "few")
    assert found.set_up == "weights stored, activations int8"
    for runner in ("eager", "packed"):
        with pytest.raises(ParameterError, match="computed by the native runner alone, got another runner"):
            generate(found, None, PROMPT, runner=runner, max_new_tokens=4)
    with pytest.raises(ParameterError, match="got weights that are kept without modules"):
        generate(found, None, PROMPT, cache="sinks=1,window=8", max_new_tokens=4)
    published(tmp_path / "tiny", "llama")
    folder = str(tmp_path / "tiny")
    for weights in ("int8", "int4"):
        loaded: Any = load_model(folder, device="cpu", weights=weights, activations="int8").model
        assert loaded.set_up == f"weights {weights}, activations int8"
        assert load_model(folder, device="cpu", weights=weights).model.set_up == f"weights {weights}"
    for weights, words in (
        ("stored", r"multiply weights of q8_0, .*, got bfloat16; round them too"),
        ("fp32", "multiply weights of 4 or 8 bits, got weights='fp32'"),
        (None, "multiply weights of 4 or 8 bits, got weights=None"),
    ):
        with pytest.raises(ParameterError, match=words):
            load_model(folder, device="cpu", weights=weights, activations="int8")
    with pytest.raises(ParameterError, match=r"activations='int8' cannot be had .*: they are computed in float32"):
        load_model(folder, device="cpu", dtype="float64", weights="int8", activations="int8")
    with pytest.raises(ParameterError, match="activations must be one of full, int8, got 'int4'"):
        load_model(folder, device="cpu", weights="int8", activations="int4")  # type: ignore[arg-type]


NEEDLESS = (  # modules that `dynatree generate` has no use for with the embedded model, each with all below it
    "transformers.models", "transformers.modeling_utils", "transformers.generation.utils", "torch._dynamo",
    "torch._inductor", "torchvision", "torchao", "accelerate", "peft", "gguf", "datasets", "pandas", "pyarrow", "scipy",
    "sympy", "networkx", "matplotlib", "fastapi", "starlette", "uvicorn", "openai", "ray", "llama_cpp", "llguidance",
    "cryptography", "IPython", "dynatree_bench", "dynatree_core.serve", "dynatree_core.hf", "dynatree_core.testing",
    "dynatree_core.trace.replaying", "dynatree_core.models.conversion", "dynatree_core.runners.packed",
    "dynatree_core.runners.cudagraph", "dynatree_core.runners.folded",
)  # fmt: skip


@needs_library
def test_the_command_starts_without_needless_modules_and_collections() -> None:
    """What a terminal waits for at a start: imports, and collections of garbage among their objects."""
    code = (
        "import gc, json, sys; from dynatree_core.cli.group import main\n"
        "try: main(['generate', '--max-new-tokens', '3', '--json', 'hi'])\n"
        "except SystemExit as ended: assert not ended.code\n"
        "print(json.dumps([[*sys.modules], gc.get_stats()[2]['collections'], gc.isenabled(), gc.get_freeze_count()]))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    answer, start = map(json.loads, ended.stdout.splitlines())
    modules, num_collections, is_collecting, num_frozen = start
    # releases before 5.23 make modules of old names, 218 in 5.17.0, for whoever imports transformers
    has_old_names = Version(transformers.__version__) < Version("5.23")
    needless = [one for one in NEEDLESS if one != "transformers.models" or not has_old_names]
    found = [name for name in modules if name.startswith(tuple(f"{one}." for one in needless)) or name in needless]
    assert not found
    assert num_collections == 0, "of all objects"
    assert is_collecting
    assert num_frozen > 100_000, "torch's, which stay"
    assert (answer["runner"], len(answer["token_ids"])) == ("native", 3)


@pytest.mark.parametrize("is_collecting", [True, False])
def test_importing_leaves_the_collector_as_it_was(is_collecting: bool) -> None:
    (gc.enable if is_collecting else gc.disable)()
    try:
        frozen = gc.get_freeze_count()
        with suppress(ImportError), importing():
            assert not gc.isenabled()
            raise ImportError
        assert gc.isenabled() == is_collecting
        assert gc.get_freeze_count() == frozen, "somebody's program, which had torch before"
    finally:
        gc.enable()
