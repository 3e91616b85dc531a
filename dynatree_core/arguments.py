"""What a caller gives a session, checked before anything runs: prompt, lengths, end tokens, limits."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dynatree_core.errors import ContextLimitError, ParameterError, PromptError
from dynatree_core.records import Limits
from dynatree_core.stack import PolicyStack

__all__ = [
    "checked_max_new_tokens",
    "checked_prompt",
    "end_token_ids",
    "fixed_width",
    "resolved_limits",
    "warn_of_settings_not_applied",
]

DEFAULT_TAU = 0.05
DEFAULT_MAX_NODES = 128
# with exact="fixed_width": matrix products of up to 16 rows cost about the same on many CPUs and GPUs
DEFAULT_FIXED_ROWS = 16
# no tree of the literature is deeper, and a policy that never stops must stop somewhere
DEFAULT_MAX_DEPTH = 64
# settings of a generation config by which generate() changes greedy decoding -> the value that changes nothing
_SETTINGS_OF_GENERATE: dict[str, object] = {
    "bad_words_ids": None,
    "begin_suppress_tokens": None,
    "exponential_decay_length_penalty": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "guidance_scale": 1,
    "max_time": None,
    "min_length": 0,
    "min_new_tokens": 0,
    "no_repeat_ngram_size": 0,
    "num_beams": 1,
    "repetition_penalty": 1,
    "sequence_bias": None,
    "stop_strings": None,
    "suppress_tokens": None,
    "watermarking_config": None,
}


def checked_prompt(input_ids: Tensor | Sequence[int], vocab: int) -> list[int]:
    """The prompt as a list of ids.

    Raises:
        PromptError: it is empty, not one sequence of integers, or outside the vocabulary.
    """
    try:
        ids = torch.as_tensor(input_ids)
    except (TypeError, ValueError, RuntimeError) as error:
        raise PromptError(
            f"a prompt is token ids, [tokens] or [1, tokens] integers, got {input_ids!r:.60}; tokenize the text first"
        ) from error
    if ids.numel() == 0:
        raise PromptError(
            "a prompt must have at least one token, got none; start from the model's BOS token if need be"
        )
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise PromptError(f"a prompt is token ids, that is integers, got {ids.dtype}; tokenize the text first")
    if ids.dim() == 2 and ids.shape[0] == 1:
        ids = ids[0]
    if ids.dim() != 1:
        raise PromptError(f"a prompt is one sequence, [tokens] or [1, tokens], got shape {list(ids.shape)}")
    prompt: list[int] = ids.tolist()
    if min(prompt) < 0 or max(prompt) >= vocab:
        raise PromptError(
            f"prompt tokens must be from 0 to {vocab - 1}, the target's vocabulary, got {min(prompt)} to {max(prompt)}"
        )
    return prompt


def checked_max_new_tokens(max_new_tokens: int, num_prompt: int, limit: int | None) -> int:
    """The number of new tokens; with the prompt they must fit the target's `limit`, if it has one.

    Raises:
        ParameterError: not an integer of at least 0.
        ContextLimitError: prompt and new tokens are longer than the limit.
    """
    _check_count("max_new_tokens", max_new_tokens, 0)
    if limit is not None and num_prompt + max_new_tokens > limit:
        raise ContextLimitError(
            f"prompt and new tokens must fit the target's context of {limit} tokens, got {num_prompt} + "
            f"{max_new_tokens}; shorten the prompt or set max_new_tokens to at most {max(limit - num_prompt, 0)}"
        )
    return max_new_tokens


def end_token_ids(target: nn.Module, eos_token_id: int | Sequence[int] | None) -> frozenset[int]:
    """None means the model's own, as in generate(); an empty sequence means never to stop at a token."""
    if eos_token_id is None:
        generation_config = getattr(target, "generation_config", None)
        eos_token_id = generation_config.eos_token_id if generation_config is not None else None
    if eos_token_id is None:
        return frozenset()
    try:
        ids = torch.as_tensor(eos_token_id)
        return frozenset(operator.index(token_id) for token_id in ids.flatten().tolist())
    except (TypeError, ValueError, RuntimeError) as error:
        raise ParameterError(f"eos_token_id must be a token id or several, integers, got {eos_token_id!r}") from error


def warn_of_settings_not_applied(target: nn.Module) -> None:
    """Say what the model's generation config asks for that generate() applies to greedy decoding and this does not."""
    config = getattr(target, "generation_config", None)
    given = {name: getattr(config, name, None) for name in _SETTINGS_OF_GENERATE}
    not_applied = {name: value for name, value in given.items() if value not in (None, _SETTINGS_OF_GENERATE[name])}
    if not_applied:
        listed = ", ".join(f"{name}={value!r}" for name, value in not_applied.items())
        warnings.warn(
            f"the output is the target's plain greedy text: its generation config asks for {listed}, which generate() "
            "would apply and this does not; set them to None to make both alike",
            RuntimeWarning,
            stacklevel=4,
        )


def fixed_width(exact: str | None, max_nodes: int | None) -> tuple[int, int | None]:
    """Rows that every verification pass has at least, and the largest tree that fits them.

    Raises:
        ParameterError: `exact` is neither None nor "fixed_width".
    """
    if exact is None:
        return 0, max_nodes
    if exact != "fixed_width":
        raise ParameterError(f"exact must be None or 'fixed_width', got {exact!r}")
    if max_nodes is not None:
        _check_count("max_nodes", max_nodes, 0)
    num_rows = DEFAULT_FIXED_ROWS if max_nodes is None else max_nodes + 1
    return num_rows, num_rows - 1


def resolved_limits(
    stack: PolicyStack,
    max_depth: int | None,
    max_nodes: int | None,
    tau: float | None,
    top_k: int,
    vocab: int,
) -> Limits:
    """The strictest of what the caller and the policies ask for; the default where nobody asks.

    A policy asks by having a parameter called `max_depth`, `max_nodes` or `tau`.
    """
    if max_depth is not None:
        _check_count("max_depth", max_depth, 0)
    if max_nodes is not None:
        _check_count("max_nodes", max_nodes, 0)
    _check_count("top_k", top_k, 1)
    if tau is not None and (isinstance(tau, bool) or not isinstance(tau, int | float) or not 0 <= tau <= 1):
        raise ParameterError(f"tau must be a probability from 0 to 1, got {tau!r}")
    return Limits(
        max_depth=int(min(_asked(stack, "max_depth", max_depth), default=DEFAULT_MAX_DEPTH)),
        max_nodes=int(min(_asked(stack, "max_nodes", max_nodes), default=DEFAULT_MAX_NODES)),
        tau=max(_asked(stack, "tau", tau), default=DEFAULT_TAU),
        top_k=min(top_k, vocab),
    )


def _asked(stack: PolicyStack, name: str, given: float | None) -> list[float]:
    values = [] if given is None else [given]
    for policy_name, policy in stack.policies.items():
        value = getattr(policy, name, None)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
            raise ParameterError(f"policy '{policy_name}': its {name} must be a number of at least 0, got {value!r}")
        values.append(value)
    return values


def _check_count(name: str, value: object, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ParameterError(f"{name} must be an integer of at least {minimum}, got {value!r}")
