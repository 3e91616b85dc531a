"""PEFT wrappers are taken off; models whose generation methods are not transformers' own are refused.

generate() lets a model prepare the inputs of its passes (`prepare_inputs_for_generation` and its like). Passes over
trees do not call these methods, so a model is accepted only where they are transformers' own and add nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from dynatree_core.errors import UnsupportedModelError
from dynatree_core.models.adapters import inside_peft_wrapper, is_peft_wrapper
from dynatree_core.models.architectures import check_causal_lm, model_inside
from dynatree_core.models.authorship import function_of, is_others

__all__ = ["plain_model", "refuse_own_generate"]

# methods by which a model changes the inputs, the kept state or the logits of generate()'s passes
_GENERATION_METHODS = (
    "prepare_inputs_for_generation",
    "create_masks_for_generate",
    "_prepare_attention_mask_for_generation",
    "_prepare_position_ids_for_generation",
    "_prepare_cache_for_generation",
    "_prefill",
    "_sample",
    "_update_model_kwargs_for_generation",
    "_get_logits_processor",
    "_get_stopping_criteria",
    "_merge_criteria_processor_list",
    "_has_unfinished_sequences",
    "_optimize_model_for_decode",
)
# methods by which it changes what generate() begins with, which has called them before it calls another loop
_BEFORE_THE_LOOP = (
    "generate",
    "_prepare_generation_config",
    "_prepare_model_inputs",
    "_maybe_initialize_input_ids_for_generation",
    "_prepare_special_tokens",
    "_prepare_generated_length",
    "_expand_inputs_for_generation",
)


def refuse_own_generate(model: Any) -> None:
    """Refuse a target whose generate() is not transformers', or prepares otherwise, unless it has called.

    A generate() from the model's folder (`custom_generate`) is a partial that transformers puts on the model.

    Raises:
        UnsupportedModelError: what its generate() does is not done here.
    """
    plain = getattr(model, "_orig_mod", model)
    if isinstance(getattr(plain, "generate", None), functools.partial):
        return
    name = _own_method(plain, _BEFORE_THE_LOOP)
    if name is not None:
        raise UnsupportedModelError(
            f"the target ({type(plain).__name__}) has a {name} of its own, which is not called here; call it with "
            "custom_generate=dynatree_core.hf.generate, or, if it changes nothing, give trust_model=True"
        )


def plain_model(model: nn.Module, role: str, *, is_trusted: bool = False) -> nn.Module:
    """The model whose forward is given trees: the model itself, or the one inside a PEFT wrapper.

    Args:
        model: what the caller gave.
        role: "target" or "drafter", for the message.
        is_trusted: whether other generation methods than transformers' are accepted, as changing nothing.

    Raises:
        UnsupportedModelError: a model that tree decoding is not known to be exact on, an adapter that is a learned
            prompt or counts tokens from the text's end, or a generation method of somebody's own.
    """
    plain = _unwrapped(model, role)
    check_causal_lm(plain, role)
    method = None if is_trusted else _own_method(model_inside(plain) or plain, _GENERATION_METHODS)
    if method is not None:
        raise UnsupportedModelError(
            f"the {role} ({type(plain).__name__}) has a {method} of its own, by which generate() decides what its "
            "passes are given or return, and which tree decoding does not call; decode it with its own generate, "
            "remove the method, or, if it changes nothing, give trust_model=True"
        )
    return plain


def _unwrapped(model: Any, role: str) -> nn.Module:
    """The model inside PEFT's wrapper, whose layers hold the adapters."""
    if not is_peft_wrapper(model):
        _refuse_counting_adapters(model, role)
        return model  # type: ignore[no-any-return]
    active = [model.active_adapter] if isinstance(model.active_adapter, str) else model.active_adapter
    # an adapter that was deleted may still be named as the active one
    prompts = [model.peft_config[name] for name in active if name in model.peft_config]
    config = next((config for config in prompts if config.is_prompt_learning), None)
    if config is not None and "forward" not in vars(model):  # disable_adapter() puts the base model's forward there
        raise UnsupportedModelError(
            f"the {role}'s adapter ({type(config).__name__}) is a learned prompt, which PEFT puts before the text in "
            "its own forward and generate, and tree decoding does not; use the model's own generate, or decode without "
            "the adapter by giving get_base_model()"
        )
    base = inside_peft_wrapper(model)
    _refuse_counting_adapters(base, role)
    return base


def _refuse_counting_adapters(model: Any, role: str) -> None:
    """Refuse activated LoRA, which starts at a token of the prompt and finds it by counting from each pass's end."""
    if not isinstance(model, nn.Module):
        return
    for part in model.modules():
        variants = getattr(part, "lora_variant", None)
        if not isinstance(variants, Mapping):  # checked first, since looking up a missing attribute of a module is slow
            continue
        is_on = not getattr(part, "disable_adapters", False) and not getattr(part, "merged", False)
        if is_on and any(map(_counts_tokens, variants.values())):
            raise UnsupportedModelError(
                f"the {role} has an activated LoRA adapter (alora_invocation_tokens), which counts its tokens from the "
                "end of a pass, where a tree has other branches; use the model's own generate, or another adapter"
            )


def _counts_tokens(variant: object) -> bool:
    return type(variant).__name__.startswith("ALora")


def _own_method(model: Any, names: Sequence[str]) -> str | None:
    """The first of these methods that is not transformers' own."""
    model = getattr(model, "_orig_mod", model)  # inside torch.compile's wrapper
    for name in names:
        method = getattr(model, name, None)
        if method is None:
            continue
        if is_others(method) or not _is_inherited(model, name, method):
            return name
    return None


def _is_inherited(model: Any, name: str, method: Any) -> bool:
    """Whether a method is the one that a class of the model defines under this name, not a replacement."""
    theirs = (vars(part)[name] for part in type(model).__mro__ if name in vars(part))
    return any(function_of(method) is function_of(one) for one in theirs)
