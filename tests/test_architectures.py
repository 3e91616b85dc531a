"""Every family that is called exact, is: one pass over a tree against a separate pass over each path."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaModel,
)

from dynatree_core import generate
from dynatree_core.cache.tree_cache import TreeCache
from dynatree_core.clock import StageClock
from dynatree_core.errors import ContextLimitError, UnsupportedModelError
from dynatree_core.models.architectures import EXACT_FAMILIES, attention_layout, check_causal_lm, max_positions
from dynatree_core.runners.eager import EagerRunner
from dynatree_core.runners.passes import PREFILL_CHUNK, Passes
from dynatree_core.testing import strategies as ours
from dynatree_core.testing.models import (
    CONFIGS,
    CONTEXT,
    REFUSED,
    ROPES,
    VARIANTS,
    VOCAB,
    greedy,
    perturbed,
    tiny_model,
    tiny_variant,
)
from dynatree_core.tree.flatten import flatten
from dynatree_core.tree.token_tree import TokenTree


def test_every_exact_family_is_tested():
    assert set(EXACT_FAMILIES) == set(CONFIGS)


def bushy_tree(device: torch.device | str = "cpu") -> TokenTree:
    """Three levels of 3, 5 and 4 nodes with irregular parents, and below them two branches longer than the windows."""
    tree = TokenTree.root(torch.tensor([5], device=device))
    for parents, tokens in [
        ([0, 0, 0], [7, 2, 30]),
        ([1, 1, 2, 3, 3], [9, 7, 11, 1, 2]),
        ([4, 6, 8, 8], [3, 4, 5, 6]),
        *(([node, node + 1], [node, 36 - node]) for node in range(11, 25, 2)),
    ]:
        parent, token_ids = torch.tensor(parents, device=device), torch.tensor(tokens, device=device)
        tree = tree.grow(parent, token_ids, torch.full((len(parents),), -0.7, device=device))
    return tree


def check_a_tree_path_by_path(model: Any) -> None:
    """One pass over a tree says of each node what a pass over the text up to there says, without cache or mask."""
    # transformers' eager attention rounds its softmax to float32, whatever the model's dtype
    tolerance = 1e-4 if model.config._attn_implementation == "eager" else 1e-10
    prefix = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]  # longer than the sliding windows
    tree = bushy_tree()
    passes, cache = Passes(EagerRunner(model), StageClock(torch.device("cpu"))), TreeCache(64)
    with torch.inference_mode():
        passes.prefill(torch.tensor(prefix), cache)
        logits = passes.forward(flatten([tree], [cache.length]), cache, stage="verify").logits[0]
        for node in range(tree.num_nodes):
            path = tree.token_ids[tree.ancestor_mask[node]].tolist()
            alone = model(input_ids=torch.tensor([prefix + path])).logits[0, -1]
            torch.testing.assert_close(logits[node], alone, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("attention", [None, "eager"])  # None: SDPA, where the family has it
@pytest.mark.parametrize("name", [*EXACT_FAMILIES, *VARIANTS])
def test_one_tree_pass_equals_a_pass_per_path(name, attention):
    check_a_tree_path_by_path(tiny_variant(name, attention=attention))


@pytest.mark.parametrize("family", ours.FAMILIES)
@settings(max_examples=25)
@given(tree=ours.trees(), prefix=st.lists(ours.token_ids, max_size=12))
def test_one_tree_pass_equals_a_pass_per_path_for_random_trees(family, tree, prefix):
    model = tiny_model(family)
    passes, cache = Passes(EagerRunner(model), StageClock(torch.device("cpu"))), TreeCache(64)
    with torch.inference_mode():
        passes.prefill(torch.tensor(prefix, dtype=torch.int64), cache)
        logits = passes.forward(flatten([tree], [cache.length]), cache, stage="verify").logits[0]
        for node in range(tree.num_nodes):
            path = tree.token_ids[tree.ancestor_mask[node]].tolist()
            alone = model(input_ids=torch.tensor([prefix + path])).logits[0, -1]
            torch.testing.assert_close(logits[node], alone, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("family", EXACT_FAMILIES)
def test_generation_equals_greedy(family):
    target = tiny_model(family)
    prompt = [1, 2, 3, 4, 5, 6, 7]
    expected = greedy(target, prompt, 30)
    for drafter in (target, perturbed(family), "prompt_lookup"):
        assert generate(target, drafter, prompt, policy="phase1", max_new_tokens=30).token_ids == expected


def with_a_window() -> list[str]:
    """The models above of which some layers see 6 tokens only."""
    return [name for name in (*EXACT_FAMILIES, *VARIANTS) if 6 in attention_layout(tiny_variant(name)).windows.values()]


def test_every_family_that_may_have_a_window_is_tested_with_one():
    families = {VARIANTS.get(name, (name, {}))[0] for name in with_a_window()}
    assert families == {family for family, looks_back in EXACT_FAMILIES.items() if looks_back != "all"}


@pytest.mark.parametrize("name", with_a_window())
def test_paths_longer_than_the_window(name):
    target, prompt = tiny_variant(name), list(range(20))
    result = generate(target, target, prompt, policy="fixed(depth=8,tau=0.0)", max_new_tokens=30)
    assert result.token_ids == greedy(target, prompt, 30)
    assert max(step.depth for step in result.report.steps) > 6


def test_the_soft_caps_of_gemma_2_are_at_work():
    """In eager attention, which is what newer versions of transformers choose; its SDPA has no soft cap."""
    capped = tiny_model("gemma2", attention="eager")
    free = tiny_model("gemma2", attention="eager", attn_logit_softcapping=None)
    text = torch.arange(20)[None]
    with torch.inference_mode():
        assert (capped(text).logits - free(text).logits).abs().max() > 0.1
        assert capped(text).logits.abs().max() < 3 < free.lm_head(free.model(text).last_hidden_state).abs().max()


@pytest.mark.parametrize(
    "fields", [{"sliding_window": 6}, {"sliding_window": 6, "layer_types": ("sliding_attention",) * 2}]
)
@pytest.mark.parametrize("family", [family for family, looks in EXACT_FAMILIES.items() if looks == "all"])
def test_a_window_that_a_family_ignores_is_one_to_generate(family, fields):
    """Its cache drops keys beyond the window, and so it says of a longer text what the model alone would not."""
    target = copy.deepcopy(tiny_model(family, **fields))
    prompt = list(range(5))
    assert generate(target, target, prompt, max_new_tokens=2).token_ids == greedy(target, prompt, 2)
    for max_new_tokens in (3, 20):
        with pytest.raises(ContextLimitError, match=r"keeps the last 6 tokens .* model.config.sliding_window to None"):
            generate(target, target, prompt, max_new_tokens=max_new_tokens)
    assert generate(target, target, prompt * 3, max_new_tokens=1).token_ids == greedy(target, prompt * 3, 1)
    target.config.sliding_window = target.config.layer_types = None
    result = generate(target, target, prompt * 4, policy="fixed(depth=8,tau=0.0)", max_new_tokens=20)
    assert result.token_ids == greedy(target, prompt * 4, 20)


@pytest.mark.parametrize("name", ["mistral", "mixtral, window", "qwen2, window", "gemma3_text"])
def test_a_window_of_no_token_is_refused(name):
    """generate() fails on most of them, and says with each cache and attention something else on the others."""
    target: Any = copy.deepcopy(tiny_variant(name))
    target.config.sliding_window = 0
    with pytest.raises(UnsupportedModelError, match=r"config.sliding_window is 0, .* set it to None"):
        generate(target, target, [1, 2, 3], max_new_tokens=3)
    target.config.layer_types = ["full_attention"] * 2
    if name in ("qwen2, window", "gemma3_text"):  # whose layers have windows by their types
        check_causal_lm(target, "target")


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_chunks_that_a_family_ignores_are_some_to_generate(family):
    target = tiny_model(family, attention_chunk_size=6, sliding_window=None)
    with pytest.raises(ContextLimitError, match=r"model\.config\.attention_chunk_size to None"):
        generate(target, target, list(range(5)), max_new_tokens=9)


@pytest.mark.parametrize("family", EXACT_FAMILIES)
def test_generation_reaches_the_end_of_the_context(family):
    """The deepest node of the last tree stands at the last position that the model has."""
    target = tiny_model(family)
    prompt = [(7 * i + i // 5) % VOCAB for i in range(CONTEXT - 30)]
    result = generate(target, target, prompt, policy="linear(depth=9)", max_new_tokens=30)
    assert result.token_ids == greedy(target, prompt, 30)


@pytest.mark.parametrize("scaling", ROPES)
def test_rotary_scaling(scaling):
    """Exact up to the limit, and refused beyond it, also where a longer text would change no frequency."""
    target = tiny_model.__wrapped__("llama", rope_parameters={"rope_type": scaling, **ROPES[scaling]})
    limit = {"yarn": CONTEXT * 5 // 4, "longrope": 60}.get(scaling, CONTEXT)
    assert max_positions(target) == limit
    check_a_tree_path_by_path(target)
    prompt = list(range(20))
    expected = greedy(target, prompt, limit - 20)
    result = generate(target, target, prompt, policy="linear(depth=9)", max_new_tokens=limit - 20)
    assert result.token_ids == expected
    with pytest.raises(ContextLimitError, match=f"context of {limit} tokens"):
        generate(target, target, prompt, max_new_tokens=limit - 19)

    text = torch.tensor([prompt + expected])
    with torch.inference_mode():
        up_to_the_limit = target(text).logits
        beyond = target(torch.cat([text, text[:, :1]], dim=1)).logits[:, :limit]
    is_stable = torch.allclose(up_to_the_limit, beyond)
    assert is_stable == (scaling not in ("dynamic", "longrope"))


@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
def test_the_limit_is_found_in_old_configurations_too(key):
    """Checkpoints have `rope_scaling`, older ones with `type`, and Phi-3 the original length beside it."""
    kind = "rope_type" if key == "rope_parameters" else "type"
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    phi3 = AutoConfig.for_model(
        "phi3", **{**CONFIGS["phi3"], key: {kind: "longrope", **factors}, "original_max_position_embeddings": 60}
    )
    assert max_positions(AutoModelForCausalLM.from_config(phi3)) == 60
    yarn = {kind: "yarn", "factor": 4.0, "original_max_position_embeddings": CONTEXT}
    qwen2 = AutoConfig.for_model("qwen2", **{**CONFIGS["qwen2"], key: yarn})
    assert max_positions(AutoModelForCausalLM.from_config(qwen2)) == 4 * CONTEXT


def without_weights(model_type: str, **settings: Any) -> nn.Module:
    """A model on no device: nothing can be computed with it."""
    config = AutoConfig.for_model(model_type, **settings)
    build: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with torch.device("meta"):
        model: nn.Module = build.from_config(config).eval()
    return model


@pytest.mark.parametrize(
    ("reason", "model_type"), [(reason, model_type) for reason, configs in REFUSED.items() for model_type in configs]
)
def test_what_cannot_be_exact_is_refused_before_anything_runs(reason, model_type):
    model = without_weights(model_type, **REFUSED[reason][model_type])
    for target, drafter in [(model, None), (tiny_model("llama"), model)]:
        with pytest.raises(UnsupportedModelError, match=f"'{model_type}'.* cannot be decoded with trees: {reason}"):
            generate(target, drafter, [1, 2, 3])


def said_to_be_causal(answer: bool) -> nn.Module:
    model: Any = copy.deepcopy(tiny_model("llama"))
    model.config.is_causal = answer
    return model


def with_a_layer_that_sees_all() -> nn.Module:
    model: Any = copy.deepcopy(tiny_model("llama"))
    model.model.layers[0].self_attn.is_causal = False
    return model


@pytest.mark.parametrize("make", [lambda: said_to_be_causal(False), with_a_layer_that_sees_all])
def test_a_model_that_was_told_to_look_ahead_is_refused(make):
    """As is done to make text embeddings of a decoder: masks are made by these, and by no field of Llama's."""
    prompt = [3, 1, 4, 1, 5, 9]
    assert greedy(make(), prompt, 12) != greedy(tiny_model("llama"), prompt, 12)
    with pytest.raises(UnsupportedModelError, match="its tokens see later ones"):
        generate(make(), None, prompt, max_new_tokens=12)


def with_a_window_inside() -> nn.Module:
    model: Any = copy.deepcopy(tiny_model("mistral", sliding_window=None))
    model.config = copy.deepcopy(model.config)  # so that the model inside keeps the old one, by which it makes masks
    model.model.config.sliding_window = 4
    return model


def with_eager_attention_in_a_layer() -> nn.Module:
    model: Any = copy.deepcopy(tiny_model("llama", attention="eager"))
    model.model.layers[0] = copy.deepcopy(model.model.layers[0])
    model.set_attn_implementation("sdpa")  # which the copied layer does not hear of
    return model


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (with_a_window_inside, "'model' has a configuration of its own, which says something else of sliding_window"),
        (with_eager_attention_in_a_layer, r"'model.layers.0.self_attn' .* something else of attn_implementation"),
    ],
)
def test_a_part_with_a_configuration_that_says_something_else_is_refused(make, reason):
    model, prompt = make(), [3, 1, 4, 1, 5, 9]
    with pytest.raises(UnsupportedModelError, match=reason):
        generate(model, None, prompt, max_new_tokens=12)
    for part in model.modules():
        if "config" in vars(part):
            part.config = model.config
    assert generate(model, None, prompt, max_new_tokens=12).token_ids == greedy(model, prompt, 12)


def test_layers_of_another_model_and_names_in_a_configuration_are_fine():
    model: Any = copy.deepcopy(tiny_model("llama"))
    model.model.layers[0] = copy.deepcopy(tiny_model("llama", seed=1, num_hidden_layers=3)).model.layers[0]
    model.config = copy.deepcopy(model.config)
    model.config.pad_token_id = 3
    model.config.tie_word_embeddings = not model.config.tie_word_embeddings
    config: Any = type(model.config)(**model.config.to_dict())  # of no model, so without an attention
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    prompt = [3, 1, 4, 1, 5, 9]
    assert generate(model, None, prompt, max_new_tokens=12).token_ids == greedy(model, prompt, 12)


def test_layers_that_may_look_ahead_and_do_not_are_fine():
    prompt = [3, 1, 4, 1, 5, 9]
    cross: Any = tiny_model("gpt2", add_cross_attention=True)  # whose layers look at another text, where there is one
    for model in (said_to_be_causal(True), cross):
        assert generate(model, model, prompt, max_new_tokens=12).token_ids == greedy(model, prompt, 12)
    eager: Any = copy.deepcopy(tiny_model("llama", attention="eager"))
    eager.model.layers[0].self_attn.is_causal = False  # which has a mask in any case
    assert generate(eager, eager, prompt, max_new_tokens=12).token_ids == greedy(eager, prompt, 12)


@pytest.mark.skipif(not hasattr(AutoConfig.for_model("llama"), "per_layer_config"), reason="transformers before 5.24")
def test_layers_with_settings_of_their_own_are_refused():
    model: Any = copy.deepcopy(tiny_model("llama"))
    model.config.per_layer_config = {1: {"intermediate_size": 24}}
    with pytest.raises(UnsupportedModelError, match=r"its layers have settings of their own \(per_layer_config\)"):
        generate(model, None, [1, 2, 3])


def test_layers_of_an_unknown_type_are_refused():
    """Such a mask would be ignored, or be that of a layer that sees everything."""
    target = tiny_model("qwen3")
    config = AutoConfig.for_model("qwen3", **CONFIGS["qwen3"])
    config.layer_types = ["full_attention", "chunked_attention"]
    model = type(target)(config).eval()
    with pytest.raises(UnsupportedModelError, match="layers of type chunked_attention"):
        check_causal_lm(model, "target")


@pytest.mark.parametrize("listed", [None, ["full_attention"]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_layers_without_a_type_are_refused(listed, dtype):
    model: Any = copy.deepcopy(tiny_model("qwen2")).to(dtype)
    model.config.layer_types = listed
    with pytest.raises(UnsupportedModelError, match=r"its 2 layers have their masks by config.layer_types, which is"):
        generate(model, None, [1, 2, 3])
    model.config.layer_types = ["full_attention"] * 2
    assert generate(model, model, [1, 2, 3], max_new_tokens=5).token_ids == greedy(model, [1, 2, 3], 5)


@pytest.mark.parametrize(
    ("module", "name"),
    [("torch.ao.nn.quantized.dynamic.modules.linear", "Linear"), ("bitsandbytes.nn.modules", "Linear8bitLt")],
)
def test_rows_that_depend_on_each_other_are_refused(module, name):
    model = copy.deepcopy(tiny_model("llama"))
    model.model.layers[0].mlp.up_proj.__class__ = type(name, (nn.Linear,), {"__module__": module})
    with pytest.raises(UnsupportedModelError, match="what a node says depends on the nodes beside it"):
        generate(model, None, [1, 2, 3])


def test_a_layer_without_values_is_refused():
    model = copy.deepcopy(tiny_model("llama"))
    model.model.layers[1].to("meta")
    with pytest.raises(UnsupportedModelError, match="is on the meta device and nothing brings it"):
        generate(model, None, [1, 2, 3])


def test_refusals_say_what_to_do():
    headless = LlamaModel(tiny_model("llama").config).eval()
    with pytest.raises(UnsupportedModelError, match="language-modelling head"):
        check_causal_lm(headless, "target")
    training = AutoModelForCausalLM.from_config(tiny_model("llama").config).train()
    with pytest.raises(UnsupportedModelError, match=r"model\.eval\(\)"):
        check_causal_lm(training, "drafter")
    with pytest.raises(UnsupportedModelError, match="transformers causal language model, got Linear"):
        check_causal_lm(torch.nn.Linear(2, 2), "target")


def text_model_of(wrapper: Gemma3ForConditionalGeneration) -> nn.Module:
    """The text model of a multimodal Gemma 3, on the same weights."""
    with torch.device("meta"):  # allocates nothing; its own layers are replaced at once
        text_model = AutoModelForCausalLM.from_config(wrapper.config.text_config)
    text_model.model, text_model.lm_head = wrapper.model.language_model, wrapper.lm_head
    text_model.generation_config = wrapper.generation_config
    return text_model.eval()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_text_model_of_a_wrapper_can_be_taken_out(attention):
    torch.manual_seed(0)
    config = Gemma3Config(**REFUSED["it wraps its text model"]["gemma3"])
    wrapper = AutoModelForCausalLM.from_config(config, attn_implementation=attention).double().eval()
    assert isinstance(wrapper, Gemma3ForConditionalGeneration)
    target, prompt = text_model_of(wrapper), list(range(20))
    assert target.config._attn_implementation == attention
    check_a_tree_path_by_path(target)
    result = generate(target, "prompt_lookup", prompt, max_new_tokens=30)
    assert result.token_ids == greedy(wrapper, prompt, 30)


@pytest.mark.parametrize("family", ["gpt_oss", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe"])
def test_a_router_that_is_configured_for_training_is_no_obstacle(family):
    target = tiny_model.__wrapped__(family, output_router_logits=True)
    expected = greedy(tiny_model(family), [1, 2, 3], 12)
    assert generate(target, target, [1, 2, 3], max_new_tokens=12).token_ids == expected


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text"])
def test_prompts_of_several_prefill_chunks(family):
    target = tiny_model.__wrapped__(family, max_position_embeddings=700)
    prompt = [(7 * i + i // 5) % VOCAB for i in range(PREFILL_CHUNK * 2 + 3)]
    result = generate(target, target, prompt, policy="phase1", max_new_tokens=12)
    assert result.token_ids == greedy(target, prompt, 12)


class Adapted(nn.Module):
    """A layer with something of low rank beside it, as people write it; it has no matrix of its own to look at."""

    def __init__(self, base: nn.Module, rows: int, columns: int) -> None:
        super().__init__()
        self.base = base
        self.beside = nn.Parameter(torch.randn(rows, columns, dtype=torch.float64) / 8)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        beside = self.beside[rows] if rows.dtype == torch.int64 else rows @ self.beside
        return self.base(rows) + beside


def test_a_head_and_embeddings_that_somebody_has_wrapped():
    target = tiny_model.__wrapped__("llama")
    hidden, vocab = target.config.hidden_size, target.config.vocab_size
    target.lm_head = Adapted(target.lm_head, hidden, vocab)
    target.model.embed_tokens = Adapted(target.model.embed_tokens, vocab, hidden)
    expected = greedy(target, [1, 2, 3], 12)
    for drafter in (None, target):
        assert generate(target, drafter, [1, 2, 3], max_new_tokens=12).token_ids == expected


def test_a_compiled_model_is_the_model():
    target = tiny_model.__wrapped__("llama")
    expected = greedy(target, [1, 2, 3], 12)
    compiled = torch.compile(target, backend="eager", dynamic=True)
    assert generate(compiled, None, [1, 2, 3], max_new_tokens=12).token_ids == expected
