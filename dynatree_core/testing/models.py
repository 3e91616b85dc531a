"""Tiny random models: real transformers architectures, a few thousand weights, float64."""

from __future__ import annotations

import copy
import functools
import warnings
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

_HEADS = {**_GROUPED, "head_dim": 8}
_WINDOW = 6  # tokens; shorter than the tests' texts, so that sliding windows matter
_ALTERNATING = {"sliding_window": _WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_UNTIED = {"tie_word_embeddings": False}  # with a tied head, random weights repeat the last token for ever
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": CONTEXT // 2}

# model type -> configuration; every one of architectures.EXACT_FAMILIES is here
CONFIGS: dict[str, dict[str, Any]] = {
    "cohere": {**_GROUPED, **_UNTIED, "logit_scale": 1.0, "use_qk_norm": True},
    "cohere2": {**_GROUPED, **_UNTIED, **_ALTERNATING, "logit_scale": 1.0},
    "deepseek_v3": {
        **_ROTARY, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
        "v_head_dim": 12, "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
        "n_shared_experts": 1, "moe_intermediate_size": 24, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1,
        "rope_parameters": {**_YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
    },
    "falcon": {
        **_ROTARY, "ffn_hidden_size": 48, "alibi": False, "new_decoder_architecture": True, "num_kv_heads": 2,
    },
    "gemma": {**_HEADS, **_UNTIED},
    "gemma2": {
        **_HEADS, **_UNTIED, **_ALTERNATING, "query_pre_attn_scalar": 8,
        "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0,
    },
    "gemma3_text": {
        **_HEADS, **_UNTIED, **_ALTERNATING, "query_pre_attn_scalar": 8,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10.0},
            "full_attention": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 8.0},
        },
    },
    "glm4": {
        **_HEADS,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    },
    "gpt2": {
        "vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT,
        "bos_token_id": None, "eos_token_id": None,
    },
    "gpt_neox": {**_ROTARY, "rotary_pct": 0.5},
    "gpt_oss": {
        **_HEADS, **_ALTERNATING, "num_local_experts": 4, "num_experts_per_tok": 2,
        "rope_parameters": {**_YARN, "truncate": False},
    },
    "gptj": {
        "vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT, "rotary_dim": 4,
        "bos_token_id": None, "eos_token_id": None,
    },
    "granite": {
        **_GROUPED, "attention_multiplier": 0.3, "embedding_multiplier": 2.0, "residual_multiplier": 0.7,
        "logits_scaling": 2.0,
    },
    "llama": _GROUPED,
    "ministral3": {**_HEADS, "rope_parameters": {**_YARN, "llama_4_scaling_beta": 0.5}},
    "mistral": {**_GROUPED, "sliding_window": _WINDOW},
    "mixtral": {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2},
    "olmo": {**_GROUPED, "clip_qkv": 1.0},
    "olmo2": _GROUPED,
    "olmo3": {**_GROUPED, **_ALTERNATING},
    "olmoe": {**_GROUPED, "num_experts": 4, "num_experts_per_tok": 2},
    "opt": {**_ROTARY, "ffn_dim": 48, "word_embed_proj_dim": 32, "do_layer_norm_before": True},
    "phi": {**_GROUPED, "partial_rotary_factor": 0.5},
    "phi3": {**_GROUPED, "sliding_window": _WINDOW},
    "qwen2": _GROUPED,
    "qwen2_moe": {**_GROUPED, **_EXPERTS, "shared_expert_intermediate_size": 24},
    "qwen3": _HEADS,
    "qwen3_moe": {**_HEADS, **_EXPERTS},
    "smollm3": {**_GROUPED, "no_rope_layers": [1, 0]},
    "stablelm": _GROUPED,
    "starcoder2": {**_GROUPED, "sliding_window": _WINDOW},
}  # fmt: skip

_SWITCHED_ON = {**_ALTERNATING, "use_sliding_window": True}

# other settings that checkpoints of a family have: name -> (model type, what differs from its tiny configuration)
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "falcon, one key head": ("falcon", {"new_decoder_architecture": False, "multi_query": True}),
    "falcon, sequential": (
        "falcon",
        {
            "new_decoder_architecture": False, "multi_query": False, "num_kv_heads": 4, "parallel_attn": False,
            "bias": True,
        },
    ),
    "gemma2, every layer full": ("gemma2", {"layer_types": ["full_attention"] * 2}),
    "gpt2, scaled by layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    "gpt2, not scaled": ("gpt2", {"scale_attn_weights": False}),
    "gpt_neox, sequential": ("gpt_neox", {"use_parallel_residual": False, "attention_bias": False}),
    "ministral3, window": ("ministral3", {"sliding_window": _WINDOW}),
    "mistral, no window": ("mistral", {"sliding_window": None, "head_dim": 16}),
    "mixtral, window": ("mixtral", {"sliding_window": _WINDOW}),
    "olmo3, yarn": (
        "olmo3",
        {
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}, "full_attention": _YARN,
            },
        },
    ),
    "opt, norm after": ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 16}),
    "phi, normed keys": ("phi", {"qk_layernorm": True}),
    "phi3, no window": ("phi3", {"sliding_window": None, "partial_rotary_factor": 0.5}),
    "qwen2, window": ("qwen2", {"use_sliding_window": True, "sliding_window": _WINDOW, "max_window_layers": 1}),
    "qwen2, window switched off": ("qwen2", {"use_sliding_window": False, "sliding_window": _WINDOW}),
    "qwen2_moe, window": ("qwen2_moe", _SWITCHED_ON),
    "qwen3, window": ("qwen3", _SWITCHED_ON),
    "qwen3_moe, window": ("qwen3_moe", {"use_sliding_window": True, "sliding_window": _WINDOW}),
    "smollm3, window": ("smollm3", _SWITCHED_ON),
    "stablelm, parallel": (
        "stablelm", {"use_parallel_residual": True, "qk_layernorm": True, "num_key_value_heads": 4},
    ),
}  # fmt: skip


# rotary scaling of a Llama: rope_type -> rope_parameters
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_theta": 100.0},
    "linear": {"rope_theta": 10000.0, "factor": 4.0},
    "dynamic": {"rope_theta": 10000.0, "factor": 4.0},
    "yarn": {"rope_theta": 10000.0, "factor": 1.25, "original_max_position_embeddings": CONTEXT},
    "llama3": {
        "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 40,
    },
    "longrope": {
        "rope_theta": 10000.0, "original_max_position_embeddings": 60,
        "short_factor": [1.0, 1.5, 2.0, 3.0], "long_factor": [4.0, 5.0, 6.0, 7.0],
    },
}  # fmt: skip

_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 4, "mamba_n_groups": 1}
_LINEAR = {"layer_types": ["linear_attention", "full_attention"]}

# models that must be refused: begin of the reason -> model type -> configuration
REFUSED: dict[str, dict[str, dict[str, Any]]] = {
    "it carries a state from token to token": {
        "bamba": {**_GROUPED, **_MAMBA, "attn_layer_indices": [1]},
        "falcon_h1": {**_GROUPED, **_MAMBA, "mamba_d_ssm": 64},
        "falcon_mamba": {**_ROTARY, "state_size": 4},
        "granitemoehybrid": {**_GROUPED, **_MAMBA},
        "jamba": {**_GROUPED, "attn_layer_period": 2, "attn_layer_offset": 1},
        "kimi_linear": {**_ROTARY, **_LINEAR},
        "lfm2": {**_GROUPED, "layer_types": ["conv", "full_attention"]},
        "mamba": {**_ROTARY, "state_size": 4},
        "mamba2": {**_ROTARY, "state_size": 4, "num_heads": 4, "head_dim": 16, "n_groups": 1},
        "nemotron_h": _GROUPED,
        "qwen3_5_text": {**_HEADS, **_LINEAR},
        "qwen3_next": {**_HEADS, **_LINEAR},
        "recurrent_gemma": _GROUPED,
        "rwkv": {**_ROTARY, "attention_hidden_size": 32},
        "zamba2": {**_GROUPED, "layer_types": ["linear_attention", "hybrid"], "num_mem_blocks": 1},
    },
    "its ALiBi position biases": {
        "bloom": {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 1, "n_head": 4},
        "falcon": {**_ROTARY, "ffn_hidden_size": 48, "alibi": True},
        "mpt": {"vocab_size": VOCAB, "d_model": 32, "n_layers": 1, "n_heads": 4},
    },
    "its local layers cut the mask by the order of the cache": {
        "gpt_neo": {
            "vocab_size": VOCAB, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "window_size": _WINDOW,
            "attention_types": [[["global", "local"], 1]],
        },
    },
    "what its layers of type": {"llama4_text": _HEADS},
    "it is an encoder-decoder": {
        "bart": {"vocab_size": VOCAB, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1},
        "t5": {"vocab_size": VOCAB, "d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 1},
    },
    "its tokens see later ones": {
        "bert": _ROTARY,
        "gemma3_text": {**CONFIGS["gemma3_text"], "use_bidirectional_attention": True},
    },
    "it wraps its text model": {
        "gemma3": {
            "text_config": CONFIGS["gemma3_text"],
            "vision_config": {
                "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            },
            "mm_tokens_per_image": 4, "image_token_index": 36, "boi_token_index": 35, "eoi_token_index": 34,
        },
    },
    "it has not been shown to be exact": {"ctrl": {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 1, "n_head": 4}},
}  # fmt: skip


@functools.cache
def tiny_model(model_type: str, seed: int = 0, *, attention: str | None = None, **overrides: Any) -> nn.Module:
    """A random model; equal arguments give equal weights, whatever torch's default dtype and device are by then. Its
    next-token distributions are neither flat nor peaked.

    With `attention=None` transformers chooses: SDPA where the family has it.
    """
    torch.manual_seed(seed)
    overrides = {key: list(value) if isinstance(value, tuple) else value for key, value in overrides.items()}
    config = AutoConfig.for_model(model_type, **{**CONFIGS[model_type], **overrides})
    # the other ways to run a mixture of experts take no float64
    build: Any = AutoModelForCausalLM.from_config
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)  # what is drawn meanwhile decides what is drawn next
    try:
        with torch.device("cpu"):
            model = build(config, attn_implementation=attention, experts_implementation="eager").double().eval()
    finally:
        torch.set_default_dtype(usual)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.35)
    model.config.name_or_path = f"tiny_model({model_type!r}, {seed})"  # so that a failing test names it
    tiny: nn.Module = model
    return tiny


@functools.cache
def tiny_variant(name: str, *, attention: str | None = None) -> nn.Module:
    """The tiny model of one of VARIANTS, or of a model type as it is."""
    model_type, overrides = VARIANTS.get(name, (name, {}))
    return tiny_model.__wrapped__(model_type, attention=attention, **overrides)


@functools.cache
def perturbed(model_type: str, seed: int = 0, noise: float = 0.05) -> nn.Module:
    """`tiny_model` with noise added to its weights: as a drafter it agrees with the original most of the time."""
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
    """The tokens that transformers' `generate` decodes greedily; `settings` are its arguments."""
    return reference(model, prompt, max_new_tokens, eos, **settings)


def reference(
    model: Any,
    prompt: list[int],
    max_new_tokens: int,
    eos: list[int] | None = None,
    *,
    do_sample: bool = False,
    seed: int = 0,
    **settings: Any,
) -> list[int]:
    """What transformers' own `generate` says, greedily or, with this seed of torch's generator, by sampling."""
    if max_new_tokens == 0:
        return []
    input_ids = torch.tensor([prompt], device=model.device)
    settings = {
        "attention_mask": torch.ones_like(input_ids), "eos_token_id": eos or None, "pad_token_id": 0, **settings
    }  # fmt: skip
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="Unfeasible length constraints"
        )  # of a minimum length above the maximum, which some tests ask for
        torch.manual_seed(seed)
        output = model.generate(input_ids, do_sample=do_sample, max_new_tokens=max_new_tokens, **settings)
    new_token_ids: list[int] = output[0, len(prompt) :].tolist()
    return new_token_ids
