"""The table of model families that take a tree mask, and the form in which each wants it. Others are refused.

Each family named here was compared in float64: one pass over a tree against separate passes over each of its
paths (tests/test_architectures.py does it again for every one of them).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from dynatree_core.errors import UnsupportedModelError
from dynatree_core.models.authorship import own_config
from dynatree_core.models.placement import reason_against_place
from dynatree_core.tree.flatten import FlatTrees

__all__ = [
    "EXACT_FAMILIES",
    "AttentionLayout",
    "attention_layout",
    "cache_argument",
    "check_causal_lm",
    "dropped_beyond",
    "forward_parameters",
    "grouped_bias",
    "has_experts",
    "max_positions",
    "model_inside",
    "num_embeddings",
    "num_known_ids",
    "vocab_size",
]

BIAS_ALIGNMENT = 16  # elements, as torch pads the biases of its memory-efficient attention

# as in a configuration's layer_types
_FULL = "full_attention"
_SLIDING = "sliding_attention"

# Which tokens a family's layers attend to: "all"; those within config.sliding_window, if set, in "every" layer;
# or by "layer" as config.layer_types says, with a mask for each type. A setting that a family ignores is ignored here.
# model type -> one of these; all of them pass a 4-D mask through to every layer
EXACT_FAMILIES = {
    "cohere": "all",
    "cohere2": "layer",
    "deepseek_v3": "all",
    "falcon": "all",
    "gemma": "all",
    "gemma2": "layer",
    "gemma3_text": "layer",
    "glm4": "all",
    "gpt2": "all",
    "gpt_neox": "all",
    "gpt_oss": "layer",
    "gptj": "all",
    "granite": "all",
    "llama": "all",
    "ministral3": "every",
    "mistral": "every",
    "mixtral": "every",
    "olmo": "all",
    "olmo2": "all",
    "olmo3": "layer",
    "olmoe": "all",
    "opt": "all",
    "phi": "all",
    "phi3": "every",
    "qwen2": "layer",
    "qwen2_moe": "layer",
    "qwen3": "layer",
    "qwen3_moe": "every",
    "smollm3": "layer",
    "stablelm": "all",
    "starcoder2": "every",
}

# by one of these settings the families above say how many experts a layer has
_NUM_EXPERTS = ("n_routed_experts", "num_experts", "num_local_experts")

# settings that no pass goes by
_NAMES = frozenset({"_name_or_path", "architectures", "bos_token_id", "dtype", "eos_token_id", "id2label"}) | {
    "initializer_range", "label2id", "pad_token_id", "problem_type", "tie_word_embeddings", "torch_dtype",
    "transformers_version", "use_cache",
}  # fmt: skip

_GENERATE = "; decode it with its own generate"
_ALIBI = "its ALiBi position biases follow the order of the cache, not the positions in the tree" + _GENERATE
# model type -> reason for refusal that cannot be read off its configuration
_REASONS = {
    "bloom": _ALIBI,
    "gpt_neo": "its local layers cut the mask by the order of the cache, not by the positions in the tree" + _GENERATE,
}


@attrs.frozen
class AttentionLayout:
    """How one model wants its masks."""

    windows: dict[str, int | None]  # layer type -> how far back it sees, itself counted; None: all the way
    is_mapping: bool  # one mask a layer type in a dict, rather than one mask for all layers
    is_additive: bool  # eager attention adds a float mask to the scores; SDPA takes a boolean one
    group: int | None = None  # for `runners.folded`: heads that share keys, each of which has its own rows in a bias

    def masks(self, flat: FlatTrees, dtype: torch.dtype) -> Tensor | dict[str, Tensor]:
        """The `attention_mask` argument for the model's forward, [lanes, 1, rows, slots] each.

        With a group it is [lanes, 1, group * rows, slots].

        Windows are measured in positions: slots of a tree are not in the order of positions.
        """
        masks = {kind: self._mask(flat, window, dtype) for kind, window in self.windows.items()}
        return masks if self.is_mapping else next(iter(masks.values()))

    def _mask(self, flat: FlatTrees, window: int | None, dtype: torch.dtype) -> Tensor:
        visible = flat.visible
        if window is not None:
            distance = flat.position_ids[:, :, None] - flat.slot_positions[:, None, :]
            visible = visible & (distance < window)
        if self.group is not None:
            return grouped_bias(visible, dtype, self.group)
        if self.is_additive:  # SDPA with a float mask of another dtype than the queries is silently wrong
            visible = torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, torch.finfo(dtype).min)
        return visible[:, None]


def grouped_bias(visible: Tensor, dtype: torch.dtype, group: int) -> Tensor:
    """[lanes, 1, group * rows, slots]: 0 where a row sees a slot; each row once for each head of a group.

    A row of it begins at a multiple of BIAS_ALIGNMENT in memory, without which torch copies it in every layer.
    """
    lanes, rows, slots = visible.shape
    shape = lanes, group, rows, -(-slots // BIAS_ALIGNMENT) * BIAS_ALIGNMENT
    bias = torch.full(shape, torch.finfo(dtype).min, dtype=dtype, device=visible.device)
    bias[..., :slots].masked_fill_(visible[:, None], 0)
    return bias.flatten(1, 2)[:, None, :, :slots]


def attention_layout(model: nn.Module) -> AttentionLayout:
    """How the model wants its masks.

    Raises:
        UnsupportedModelError: the attention implementation takes no tree mask.
    """
    config: Any = model.config
    implementation = config._attn_implementation
    if implementation not in ("sdpa", "eager"):
        raise UnsupportedModelError(
            f"tree attention needs attn_implementation 'sdpa' or 'eager', which take a mask for every pair of tokens, "
            f"got '{implementation}'; load the model with attn_implementation='sdpa'"
        )
    is_additive = implementation == "eager"
    looks_back = EXACT_FAMILIES[config.model_type]
    if looks_back == "layer":
        kinds = sorted(set(config.layer_types))
        windows = {kind: config.sliding_window if kind == _SLIDING else None for kind in kinds}
    else:
        windows = {"all": config.sliding_window if looks_back == "every" else None}
    return AttentionLayout(windows, is_mapping=looks_back == "layer", is_additive=is_additive)


def check_causal_lm(model: nn.Module, role: str) -> None:
    """Refuse a model on which tree decoding is not known to be exact.

    Args:
        role: "target" or "drafter", for the message.

    Raises:
        UnsupportedModelError: with the reason.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "model_type"):
        raise UnsupportedModelError(
            f"the {role} must be a transformers causal language model, got {type(model).__name__}; "
            "load it with AutoModelForCausalLM.from_pretrained"
        )
    reason = _reason_against(model, config)
    if role == "target" and not reason:  # a drafter's errors cost acceptance, not correctness
        reason = _reason_against_parts(model, config)
    if reason:
        raise UnsupportedModelError(
            f"the {role} ({type(model).__name__}, model type '{config.model_type}') "
            f"cannot be decoded with trees: {reason}"
        )


def _reason_against(model: nn.Module, config: Any) -> str | None:
    model_type = config.model_type
    if getattr(config, "is_heterogeneous", False):  # whose fields cannot be asked for, from transformers 5.24 on
        return f"its layers have settings of their own (per_layer_config), which is not known for trees{_GENERATE}"
    kinds = set(getattr(config, "layer_types", None) or ())
    dropping = [name for name, part in model.named_modules() if part.training and _drops(part)]
    if model.training or dropping:
        where = f" in {dropping[0]}" if dropping and not model.training else ""
        return f"it is in training mode{where}, where dropout makes its output random; call model.eval() first"
    if getattr(config, "is_encoder_decoder", False):
        return f"it is an encoder-decoder, and only decoder-only models are supported{_GENERATE}"
    if getattr(model, "_is_stateful", False) or "conv" in kinds:
        return (
            "it carries a state from token to token (recurrent, convolutional or compressed), which can neither branch "
            "at a node nor take rejected tokens back" + _GENERATE
        )
    if getattr(config, "text_config", None) is not None:
        return "it wraps its text model together with others; take that out of it and pass it alone"
    if _sees_later_tokens(model, config):
        return "its tokens see later ones, so a text cannot be decoded from its cache; choose a causal model"
    if any(_mixes_rows(type(part)) for part in model.modules()):
        return (
            "its activations are quantised by what is in all rows of a pass, so what a node says depends on the nodes "
            "beside it; quantise the weights alone"
        )
    if model.get_output_embeddings() is None:  # type: ignore[operator]
        return "it has no language-modelling head; load it with AutoModelForCausalLM.from_pretrained"
    if getattr(config, "alibi", False) or getattr(getattr(config, "attn_config", None), "alibi", False):  # Falcon, MPT
        return _ALIBI
    if kinds - {_FULL, _SLIDING}:
        names = ", ".join(sorted(kinds - {_FULL, _SLIDING}))
        return f"what its layers of type {names} look back to is not known for trees{_GENERATE}"
    if model_type in _REASONS:
        return _REASONS[model_type]
    if model_type not in EXACT_FAMILIES:
        return f"it has not been shown to be exact there; known to be: {', '.join(EXACT_FAMILIES)}"
    listed = getattr(config, "layer_types", None)
    if EXACT_FAMILIES[model_type] == "layer" and len(listed or ()) < config.num_hidden_layers:
        return (
            f"its {config.num_hidden_layers} layers have their masks by config.layer_types, which is {listed}; set it "
            f"to a list that says '{_FULL}' or '{_SLIDING}' for each layer"
        )
    window = getattr(config, "sliding_window", None)
    if window is not None and window < 1 and _has_windows(config):
        return (
            f"its config.sliding_window is {window}, and a token that sees so many does not see itself; set it to None "
            "for layers that see all tokens, or to 1 at least"
        )
    if "position_ids" not in forward_parameters(model):
        return "its forward takes no position_ids, so siblings could not share a position"
    return reason_against_place(model)


def _has_windows(config: Any) -> bool:
    """Whether some layers of a family above go by config.sliding_window."""
    looks_back = EXACT_FAMILIES[config.model_type]
    return looks_back == "every" or (looks_back == "layer" and _SLIDING in config.layer_types)


def _reason_against_parts(model: nn.Module, config: Any) -> str | None:
    """Why the model's passes do not follow from its configuration; None: they do."""
    inner = model_inside(model)
    if inner is not None:
        return f"it hands its passes on to a {type(inner).__name__} whose parts are not its own; give that model"
    for name, part in model.named_modules():
        setting = _own_setting(part, config)
        if setting is not None:
            return (
                f"its part '{name}' has a configuration of its own, which says something else of {setting}, so "
                "masks and caches would not fit each other; set the config of each part to model.config, or change the "
                "model's in place rather than replace it"
            )
    return None


def _own_setting(part: Any, config: Any) -> str | None:
    """A setting in which a part's own configuration decides otherwise than the model's; None: there is none.

    Transformers makes masks by that of the model inside, `model.model`, and caches by that of the whole one. An
    attention's says how it takes masks. Where the model has SDPA, a prefill has none, and eager attention would see
    later tokens; SDPA takes any mask. What other parts compute does not depend on the order of a text.
    """
    own = own_config(part)
    if own is config or own is None:
        return None
    is_model = hasattr(part, "set_attn_implementation")
    is_attention = "is_causal" in vars(part)
    if (is_model or is_attention) and own._attn_implementation not in ("sdpa", config._attn_implementation):
        return "attn_implementation"
    if not is_model:  # a layer, which may be of a model with more or fewer of them
        return None
    theirs, ours = own.to_dict(), config.to_dict()
    names = (theirs.keys() | ours.keys()) - _NAMES
    return next((name for name in sorted(names) if theirs.get(name) != ours.get(name)), None)


def _drops(part: Any) -> bool:
    """Whether a module applies dropout when it is in training mode."""
    shares = (getattr(part, name, 0) for name in ("p", "attention_dropout", "dropout_p"))
    return any(isinstance(share, float) and share > 0 for share in shares)


def _mixes_rows(layer: type) -> bool:
    """Whether a quantised layer looks at all rows: for one scale, or for columns that stand out (LLM.int8)."""
    is_dynamic = layer.__module__.startswith("torch.ao.nn.quantized.dynamic")
    return is_dynamic or (layer.__module__.startswith("bitsandbytes.") and layer.__name__ == "Linear8bitLt")


def _sees_later_tokens(model: nn.Module, config: Any) -> bool:
    # by this field transformers makes masks, also in families that do not have it
    if not getattr(config, "is_causal", True):
        return True
    # where there is no padding, its SDPA has no mask in a prefill, and goes by what each layer says
    if getattr(config, "_attn_implementation", None) == "sdpa" and any(map(_is_not_causal, model.modules())):
        return True
    if type(config) is PreTrainedConfig:  # of a `StoredModel`; the import below takes more than a second
        return bool(getattr(config, "use_bidirectional_attention", None))
    from transformers import MODEL_FOR_MASKED_LM_MAPPING

    is_encoder = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)
    return is_encoder or bool(getattr(config, "use_bidirectional_attention", None))


def _is_not_causal(layer: Any) -> bool:
    own = vars(layer)
    return own.get("is_causal") is False and not own.get("is_cross_attention", False)


def max_positions(model: nn.Module) -> int | None:
    """Positions up to which the model is exact, its context limit; None when its configuration names none.

    Some rotary embeddings change all their frequencies once a text is longer than a limit, so that cached keys no
    longer fit. Dynamic scaling does so beyond `max_position_embeddings`, longrope already beyond the original length.
    Yarn never does; many of its configurations keep the original length as `max_position_embeddings`, so there the
    limit is what it stretches that to.
    """
    config: Any = getattr(model, "config", None)  # a drafter may compute with a module that has none
    limit = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    for parameters in [rope, *(value for value in rope.values() if isinstance(value, dict))]:  # flat, or by layer type
        kind, original = parameters.get("rope_type"), parameters.get("original_max_position_embeddings")
        if kind == "longrope":
            limit = min((length for length in (limit, original) if length), default=None)
        elif kind == "yarn" and limit and original and parameters.get("factor"):
            limit = max(limit, int(original * parameters["factor"]))
    return int(limit) if limit else None


def dropped_beyond(model: nn.Module) -> tuple[str, int] | None:
    """After how many tokens generate() drops keys that the model looks at, with the field that says so; None: never.

    Its cache goes by the configuration alone, also where a family has no such windows.
    """
    config: Any = model.config
    looks_back = EXACT_FAMILIES.get(config.model_type, "layer")
    kinds = getattr(config, "layer_types", None)
    window, chunk = getattr(config, "sliding_window", None), getattr(config, "attention_chunk_size", None)
    if looks_back == "layer" or (kinds and _SLIDING not in kinds):
        return None
    if window is not None:
        return None if looks_back == "every" else ("sliding_window", int(window))
    return None if chunk is None or kinds else ("attention_chunk_size", int(chunk))


def has_experts(model: nn.Module) -> bool:
    """Whether layers are mixtures of experts, each of which multiplies the rows of a pass that have chosen it."""
    return any(getattr(model.config, name, None) for name in _NUM_EXPERTS)


def vocab_size(model: nn.Module) -> int:
    """Number of token ids that the model's head gives a logit to, padding included.

    Where a wrapper of somebody's own, such as a LoRA layer, hides the head's matrix, the configuration says it.
    """
    return _num_rows(model.get_output_embeddings(), model)  # type: ignore[operator]


def num_embeddings(model: nn.Module) -> int:
    """Number of token ids that the model can read."""
    return _num_rows(model.get_input_embeddings(), model)  # type: ignore[operator]


def num_known_ids(model: nn.Module) -> int:
    """Number of token ids that the model can read and say; a head may be padded beyond the embeddings."""
    return min(num_embeddings(model), vocab_size(model))


def _num_rows(table: Any, model: nn.Module) -> int:
    if hasattr(table, "weight"):
        return int(table.weight.shape[0])
    config: Any = model.config
    return int(getattr(table, "num_embeddings", config.vocab_size))


def forward_parameters(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    """The named arguments of the model's forward.

    A forward that hands `**kwargs` on takes what the forward of its base class takes, too: those are looked up along
    the model's classes. A module around a model, which answers for it in all else, takes what that model takes.
    `torch.compile` wraps the whole model, and its own signature says nothing.
    """
    plain: Any = getattr(model, "_orig_mod", model)
    own = [vars(plain)["forward"]] if "forward" in vars(plain) else []
    inherited = [vars(part)["forward"] for part in type(plain).__mro__ if "forward" in vars(part)]
    found: dict[str, inspect.Parameter] = {}
    for forward in (*own, *inherited):
        parameters = inspect.signature(forward).parameters
        if forward is vars(nn.Module)["forward"]:  # none of its own: a wrapper, which hands all to the model inside
            inner = model_inside(plain)
            return found if inner is None else {**forward_parameters(inner), **found}
        found |= {name: parameter for name, parameter in parameters.items() if name not in found}
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            break
    return found


def model_inside(model: nn.Module) -> nn.Module | None:
    """The model that a wrapper delegates missing attributes to; None where the module is no such wrapper."""
    plain: Any = getattr(model, "_orig_mod", model)  # what `torch.compile` wraps is the model itself
    inner = getattr(getattr(plain, "get_output_embeddings", None), "__self__", plain)
    return None if inner is plain or not isinstance(inner, nn.Module) else inner


def cache_argument(model: nn.Module) -> str:
    """The name of the argument by which the model's forward takes a cache.

    That is `cache` from transformers 5.24.0 on, where `past_key_values` warns until it goes in 5.40, and
    `past_key_values` before. The outermost forward that names one of them decides.
    """
    return next((name for name in forward_parameters(model) if name in ("cache", "past_key_values")), "cache")
