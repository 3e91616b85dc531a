"""Every family that is called exact, is: one pass over a tree against a separate pass over each path."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BloomConfig,
    LlamaModel,
    MambaConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from dynatree_core import generate
from dynatree_core.architectures import EXACT_FAMILIES, check_causal_lm, max_positions
from dynatree_core.cache import TreeCache
from dynatree_core.clock import StageClock
from dynatree_core.errors import ContextLimitError, UnsupportedModelError
from dynatree_core.flatten import flatten
from dynatree_core.runner import PREFILL_CHUNK, EagerRunner
from dynatree_core.testing import strategies as ours
from dynatree_core.testing.models import CONFIGS, CONTEXT, VOCAB, greedy, perturbed, tiny_model
from dynatree_core.tree import TokenTree


def test_every_exact_family_is_tested():
    assert set(EXACT_FAMILIES) == set(CONFIGS)


def bushy_tree(device: torch.device | str = "cpu") -> TokenTree:
    """Three levels of 3, 5 and 4 nodes with irregular parents."""
    tree = TokenTree.root(torch.tensor([5], device=device))
    for parents, tokens in [
        ([0, 0, 0], [7, 2, 30]),
        ([1, 1, 2, 3, 3], [9, 7, 11, 1, 2]),
        ([4, 6, 8, 8], [3, 4, 5, 6]),
    ]:
        parent, token_ids = torch.tensor(parents, device=device), torch.tensor(tokens, device=device)
        tree = tree.grow(parent, token_ids, torch.full((len(parents),), -0.7, device=device))
    return tree


@pytest.mark.parametrize("attention", [None, "eager"])  # None: SDPA, but for Gemma 2, which has none
@pytest.mark.parametrize("family", EXACT_FAMILIES)
def test_one_tree_pass_equals_a_pass_per_path(family, attention):
    model = tiny_model(family, attention=attention)
    # transformers' eager attention rounds its softmax to float32, whatever the model's dtype
    tolerance = 1e-4 if model.config._attn_implementation == "eager" else 1e-10
    prefix = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]  # longer than the sliding windows
    tree = bushy_tree()
    runner, cache = EagerRunner(model, StageClock(torch.device("cpu"))), TreeCache(64)
    with torch.inference_mode():
        runner.prefill(torch.tensor(prefix), cache)
        logits = runner.forward(flatten([tree], [cache.length]), cache, stage="verify")[0]
        for node in range(tree.num_nodes):
            path = tree.token_ids[tree.ancestor_mask[node]].tolist()
            alone = model(input_ids=torch.tensor([prefix + path])).logits[0, -1]
            torch.testing.assert_close(logits[node], alone, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("family", ours.FAMILIES)
@settings(max_examples=25)
@given(tree=ours.trees(), prefix=st.lists(ours.token_ids, max_size=12))
def test_one_tree_pass_equals_a_pass_per_path_for_random_trees(family, tree, prefix):
    model = tiny_model(family)
    runner, cache = EagerRunner(model, StageClock(torch.device("cpu"))), TreeCache(64)
    with torch.inference_mode():
        runner.prefill(torch.tensor(prefix, dtype=torch.int64), cache)
        logits = runner.forward(flatten([tree], [cache.length]), cache, stage="verify")[0]
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


@pytest.mark.parametrize("family", [family for family, looks in EXACT_FAMILIES.items() if looks == "all"])
def test_a_window_that_a_family_ignores_is_ignored(family):
    """The reference is recomputation: `generate` drops keys beyond such a window."""
    target = tiny_model(family, sliding_window=6, layer_types=("sliding_attention",) * 2)
    prompt = list(range(20))
    result = generate(target, target, prompt, policy="fixed(depth=8,tau=0.0)", max_new_tokens=20)
    text = list(prompt)
    for _ in range(20):
        text.append(int(target(torch.tensor([text]), use_cache=False).logits[0, -1].float().argmax()))
    assert result.token_ids == text[20:]


@pytest.mark.parametrize("family", EXACT_FAMILIES)
def test_generation_reaches_the_end_of_the_context(family):
    """The deepest node of the last tree stands at the last position that the model has."""
    target = tiny_model(family)
    prompt = list(range(20))
    result = generate(target, target, prompt, policy="linear(depth=9)", max_new_tokens=CONTEXT - 20)
    assert result.token_ids == greedy(target, prompt, CONTEXT - 20)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=1, n_head=4), "known to be"),
        (MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=1, state_size=4), "known to be"),
        (
            BertConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=1, num_attention_heads=4),
            "known to be",
        ),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_what_is_not_known_to_be_exact_is_refused(config, reason):
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(UnsupportedModelError, match=reason):
        check_causal_lm(model, "target")


def test_refusals_say_why():
    falcon = AutoModelForCausalLM.from_config(tiny_model("falcon", alibi=True).config).eval()
    with pytest.raises(UnsupportedModelError, match="ALiBi"):
        check_causal_lm(falcon, "target")
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=VOCAB, d_model=16, d_kv=4, d_ff=16, num_layers=1)).eval()
    with pytest.raises(UnsupportedModelError, match="encoder-decoder"):
        check_causal_lm(t5, "target")
    headless = LlamaModel(tiny_model("llama").config).eval()
    with pytest.raises(UnsupportedModelError, match="language-modelling head"):
        check_causal_lm(headless, "target")
    training = AutoModelForCausalLM.from_config(tiny_model("llama").config).train()
    with pytest.raises(UnsupportedModelError, match=r"model\.eval\(\)"):
        check_causal_lm(training, "drafter")
    with pytest.raises(UnsupportedModelError, match="transformers causal language model, got Linear"):
        check_causal_lm(torch.nn.Linear(2, 2), "target")


def test_longrope_ends_at_the_original_length():
    """Beyond it the frequencies of all positions change, and cached keys no longer fit; up to it nothing does."""
    rope = {
        "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 60,
        "short_factor": [1.0] * 4, "long_factor": [4.0] * 4,
    }  # fmt: skip
    target = tiny_model.__wrapped__("llama", rope_parameters=rope)
    assert max_positions(target) == 60
    prompt = list(range(20))
    assert generate(target, target, prompt, policy="fixed", max_new_tokens=40).token_ids == greedy(target, prompt, 40)
    with pytest.raises(ContextLimitError, match="context of 60 tokens"):
        generate(target, target, prompt, max_new_tokens=41)


def test_tokens_that_see_later_ones_are_refused():
    target = tiny_model.__wrapped__("gemma3_text", use_bidirectional_attention=True)
    with pytest.raises(UnsupportedModelError, match="see later ones"):
        check_causal_lm(target, "target")


@pytest.mark.parametrize("family", ["mixtral", "olmoe"])
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
