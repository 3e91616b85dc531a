"""Tiny random models: real transformers architectures, a few thousand weights, float64."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

VOCAB = 37
CONTEXT = 160

_ROTARY = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_GROUPED = {**_ROTARY, "num_key_value_heads": 2}

# model type -> configuration; every one of architectures.EXACT_FAMILIES is here
CONFIGS: dict[str, dict[str, Any]] = {
    "falcon": {
        **_ROTARY, "ffn_hidden_size": 48, "alibi": False, "new_decoder_architecture": True, "num_kv_heads": 2,
    },
    "gemma2": {**_GROUPED, "head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8},
    "gemma3_text": {
        **_GROUPED, "head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "gpt2": {
        "vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT,
        "bos_token_id": None, "eos_token_id": None,
    },
    "gpt_neox": {**_ROTARY, "rotary_pct": 0.5},
    "llama": _GROUPED,
    "mistral": {**_GROUPED, "sliding_window": 6},
    "mixtral": {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2},
    "olmo2": _GROUPED,
    "olmoe": {**_GROUPED, "num_experts": 4, "num_experts_per_tok": 2},
    "opt": {**_ROTARY, "ffn_dim": 48, "word_embed_proj_dim": 32, "do_layer_norm_before": True},
    "phi3": {**_GROUPED, "sliding_window": 6},
    "qwen2": _GROUPED,
    "qwen3": {**_GROUPED, "head_dim": 8},
    "smollm3": {**_GROUPED, "no_rope_layers": [1, 0]},
    "stablelm": _GROUPED,
}  # fmt: skip


@functools.cache
def tiny_model(model_type: str, seed: int = 0, *, attention: str | None = None, **overrides: Any) -> nn.Module:
    """A random model, the same for the same arguments. Its distributions are neither flat nor certain.

    With `attention=None` transformers chooses: SDPA where the family has it.
    """
    torch.manual_seed(seed)
    overrides = {key: list(value) if isinstance(value, tuple) else value for key, value in overrides.items()}
    config = AutoConfig.for_model(model_type, **{**CONFIGS[model_type], **overrides})
    # the other ways to run a mixture of experts take no float64
    build: Any = AutoModelForCausalLM.from_config
    model = build(config, attn_implementation=attention, experts_implementation="eager").double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.35)
    model.config.name_or_path = f"tiny_model({model_type!r}, {seed})"  # how failures name it
    tiny: nn.Module = model
    return tiny


@functools.cache
def perturbed(model_type: str, seed: int = 0, noise: float = 0.05) -> nn.Module:
    """A copy of `tiny_model` with noise on its weights: a drafter that is right most of the time."""
    model: Any = copy.deepcopy(tiny_model(model_type, seed))
    torch.manual_seed(seed + 1000)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * noise)
    model.config.name_or_path = f"perturbed({model_type!r}, {seed}, {noise})"
    noisy: nn.Module = model
    return noisy


def greedy(
    model: Any, prompt: list[int], max_new_tokens: int, eos: list[int] | None = None, **settings: Any
) -> list[int]:
    """What transformers' own greedy decoding says; `settings` are those of its `generate`."""
    if max_new_tokens == 0:
        return []
    input_ids = torch.tensor([prompt], device=model.device)
    settings = {
        "attention_mask": torch.ones_like(input_ids), "eos_token_id": eos or None, "pad_token_id": 0, **settings
    }  # fmt: skip
    output = model.generate(input_ids, do_sample=False, max_new_tokens=max_new_tokens, **settings)
    new_token_ids: list[int] = output[0, len(prompt) :].tolist()
    return new_token_ids
