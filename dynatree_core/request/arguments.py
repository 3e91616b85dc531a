"""The arguments of a generation, checked before anything runs: prompt, lengths, end tokens, settings, limits."""

from __future__ import annotations

import copy
import math
import operator
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from dynatree_core.errors import ContextLimitError, ParameterError, PolicyError, PromptError, nearest_match
from dynatree_core.plugins.params import as_python
from dynatree_core.policy.stack import PolicyStack
from dynatree_core.request.limits import Limits
from dynatree_core.request.refused import refused_settings

__all__ = [
    "check_callable",
    "check_flag",
    "check_token_ids",
    "checked_count",
    "checked_list",
    "checked_logprobs",
    "checked_positions",
    "checked_prompt",
    "checked_seed",
    "end_token_ids",
    "fixed_width",
    "guessed_mask",
    "merged",
    "new_token_limit",
    "num_padding",
    "refuse_other_inputs",
    "resolved_limits",
    "settings_of",
]

Element = TypeVar("Element")

DEFAULT_MAX_NEW_TOKENS = 128
DEFAULT_TOP_K = 50  # generate()'s own, where neither the caller nor the model sets one
DEFAULT_TAU = 0.05
DEFAULT_MAX_NODES = 128
# with exact="fixed_width": matrix products of up to 16 rows cost about the same on many CPUs and GPUs
DEFAULT_FIXED_ROWS = 16
# deeper than any published tree; it bounds policies that would never stop
DEFAULT_MAX_DEPTH = 64
# settings of a generation config that are applied here as generate() applies them
HONOURED_SETTINGS = (
    "bad_words_ids",
    "begin_suppress_tokens",
    "exponential_decay_length_penalty",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "max_time",
    "min_length",
    "min_new_tokens",
    "no_repeat_ngram_size",
    "remove_invalid_values",
    "renormalize_logits",
    "repetition_penalty",
    "sequence_bias",
    "stop_strings",
    "suppress_tokens",
    "watermarking_config",
)
# settings of sampling, applied likewise
SAMPLING_SETTINGS = (
    "do_sample",
    "epsilon_cutoff",
    "eta_cutoff",
    "min_p",
    "temperature",
    "top_h",
    "top_k",
    "top_p",
    "typical_p",
)
_COUNTS = ("min_length", "min_new_tokens", "no_repeat_ngram_size", "top_k")  # of these
# generate()'s caches that round keys and values or keep them off the device
_OTHER_CACHES = ("quantized", "offloaded", "offloaded_static", "offloaded_hybrid", "offloaded_hybrid_chunked", "paged")


def checked_prompt(input_ids: Tensor | Sequence[int], vocab: int, *, what: str = "prompt") -> list[int]:
    """The prompt as a list of ids, or an output that is checked alike; `what` names it where an id is out of range.

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
            f"{what} tokens must be from 0 to {vocab - 1}, the target's vocabulary, got {min(prompt)} to {max(prompt)}"
        )
    return prompt


def refuse_other_inputs(given: Mapping[str, object], taken: Collection[str]) -> None:
    """Refuse inputs that generate() would pass to the model and tree decoding does not, such as token types.

    Entries that the model's forward does not take are ignored: some tokenizers return them.

    Raises:
        PromptError: there are such inputs; it names them.
    """
    known = ("input_ids", "attention_mask", "position_ids")
    others = [name for name, value in given.items() if name not in known and name in taken and value is not None]
    if others:
        raise PromptError(
            f"a prompt's mapping may hold {', '.join(known)}, got {', '.join(others)} too, which is not handed on to "
            "the model; leave it out"
        )


def guessed_mask(prompt: Sequence[int], pad_id: object, end_ids: Collection[int]) -> list[int] | None:
    """The mask that generate() infers where none is given: 0 at pad tokens, unless the pad token is an end token."""
    pad_id = as_python(pad_id)
    if not isinstance(pad_id, int) or pad_id in end_ids or pad_id not in prompt:
        return None
    return [int(token_id != pad_id) for token_id in prompt]


def num_padding(attention_mask: Tensor | Sequence[int] | None, num_prompt: int) -> int:
    """How many tokens at the prompt's left are padding, by its mask ([tokens] or [1, tokens], 0 for padding).

    Raises:
        PromptError: a mask of another length, without any token, or with padding elsewhere: what follows a padding
            token is not what the model would say.
    """
    if attention_mask is None:
        return 0
    mask = _tensor("attention_mask", attention_mask)
    if not _is_per_token(mask, num_prompt):
        raise PromptError(
            f"an attention mask must have a value for each of the prompt's {num_prompt} tokens, got shape "
            f"{list(mask.shape)}"
        )
    is_token = mask.flatten() != 0
    padding = num_prompt - int(is_token.sum())
    if padding == num_prompt or not bool(is_token[padding:].all()):
        raise PromptError(
            "a prompt may be padded at its left only, and needs one token that is none, got the mask "
            f"{mask.flatten().tolist()!s:.60}; set the tokenizer's padding_side to 'left', or give attention_mask "
            "where a pad token is text"
        )
    return padding


def checked_seed(seed: int | None) -> int | None:
    """The seed.

    Raises:
        ParameterError: neither None nor an integer of at least 0.
    """
    if seed is not None:
        seed = checked_count("seed", seed, 0)
        if seed >= 2**63:
            raise ParameterError(f"seed must be below 2**63, got {seed}")
    return seed


def checked_logprobs(num_top: int | None, vocab: int) -> int | None:
    """How many of the most probable tokens are told with each token's log-probability, or None.

    Raises:
        ParameterError: not an integer from 0 to the size of the vocabulary.
    """
    if num_top is None:
        return None
    num_top = checked_count("logprobs", num_top, 0)
    if num_top > vocab:
        raise ParameterError(f"logprobs must be at most {vocab}, the target's vocabulary, got {num_top}")
    return num_top


def checked_list(name: str, given: Iterable[Element] | None, kind: type[Element]) -> list[Element]:
    """A caller's own processors or criteria.

    Raises:
        ParameterError: not a list of them.
    """
    found = [] if given is None else list(given) if isinstance(given, Iterable) else [given]
    if isinstance(given, kind) or not all(callable(element) for element in found):
        raise ParameterError(f"{name} must be a list of {kind.__name__}, got {given!r:.60}")
    return found


def merged(asked: Sequence[Element], own: Sequence[Element]) -> list[Element]:
    """Processors or criteria made from settings and the caller's own, merged as generate() merges them.

    A caller's one replaces the one of the same class that settings made; the caller's others come last.
    """
    found = [next((mine for mine in own if type(mine) is type(one)), one) for one in asked]
    for mine in own:
        if not any(mine is one for one in found):
            found.append(mine)
    return found


def checked_positions(position_ids: Tensor | Sequence[int] | None, num_prompt: int) -> list[int] | None:
    """The prompt's positions, [tokens] or [1, tokens] integers, as a list; None where none are given.

    Raises:
        PromptError: of another length or kind, or negative.
    """
    if position_ids is None:
        return None
    ids = _tensor("position_ids", position_ids)
    if not _is_per_token(ids, num_prompt) or ids.is_floating_point() or ids.dtype == torch.bool:
        raise PromptError(
            f"position_ids must be an integer for each of the prompt's {num_prompt} tokens, got {ids.dtype} of shape "
            f"{list(ids.shape)}"
        )
    positions: list[int] = ids.flatten().tolist()
    if min(positions) < 0:
        raise PromptError(f"position_ids must be at least 0, got {min(positions)}")
    return positions


def new_token_limit(
    max_new_tokens: int | None, max_length: int | None, num_prompt: int, num_positions: int, limit: int | None
) -> int:
    """How many new tokens there may be.

    Args:
        max_new_tokens: the caller's number of them; 128 where neither this nor `max_length` is given.
        max_length: tokens of prompt and output together, as in generate().
        num_prompt: tokens of the prompt, padding included.
        num_positions: positions that the prompt takes up.
        limit: positions that the target has, if it has a limit.

    Raises:
        ParameterError: not an integer of at least 0, both given, or `max_length` shorter than the prompt.
        ContextLimitError: prompt and new tokens do not fit the limit.
    """
    if max_new_tokens is not None and max_length is not None:
        raise ParameterError(
            f"max_new_tokens and max_length say the same thing in two ways, got {max_new_tokens!r} and {max_length!r}; "
            "give one of them"
        )
    if max_length is not None:
        max_length = checked_count("max_length", max_length, 0)
        if max_length < num_prompt:
            raise ParameterError(
                f"max_length counts the prompt too, so it must be at least {num_prompt}, got {max_length}; raise it, "
                "shorten the prompt, or give max_new_tokens instead"
            )
        max_new_tokens = max_length - num_prompt
    elif max_new_tokens is None:
        max_new_tokens = DEFAULT_MAX_NEW_TOKENS
    max_new_tokens = checked_count("max_new_tokens", max_new_tokens, 0)
    if limit is not None and num_positions + max_new_tokens > limit:
        raise ContextLimitError(
            f"prompt and new tokens must fit the target's context of {limit} tokens, got {num_positions} + "
            f"{max_new_tokens}; {_shorter(limit, num_positions)}"
        )
    return max_new_tokens


def _shorter(limit: int, num_positions: int) -> str:
    """The advice for a generation that is too long: fewer new tokens, or a shorter prompt where none would fit."""
    if num_positions < limit:
        return f"shorten the prompt or set max_new_tokens to at most {limit - num_positions}"
    return (
        f"shorten the prompt to at most {limit - 1} tokens, or keep only the first and last of a text, such as by "
        "cache='sinks=4,window=64'"
    )


def end_token_ids(config: GenerationConfig, eos_token_id: int | Sequence[int] | None) -> frozenset[int]:
    """None means those of the configuration, as in generate(); an empty sequence means never to stop at a token."""
    if eos_token_id is None:
        eos_token_id = config.eos_token_id
    return frozenset() if eos_token_id is None else frozenset(_token_ids("eos_token_id", eos_token_id))


def check_flag(name: str, value: object) -> None:
    """Refuse what is no truth value: "False" and "no" would count as True.

    Raises:
        ParameterError: naming the option.
    """
    if not isinstance(value, bool):
        raise ParameterError(f"{name} must be True or False, got {value!r:.60}")


def check_token_ids(name: str, given: object, vocab: int) -> None:
    """Refuse tokens that are not in the target's vocabulary.

    Raises:
        ParameterError: naming the option.
    """
    ids = _token_ids(name, given)
    if ids and not 0 <= min(ids) <= max(ids) < vocab:
        wrong = next(token_id for token_id in ids if not 0 <= token_id < vocab)
        raise ParameterError(f"{name} must be from 0 to {vocab - 1}, the target's vocabulary, got {wrong}")


def _token_ids(name: str, given: object) -> list[int]:
    try:
        ids = torch.as_tensor(given)
        if ids.dtype == torch.bool:
            raise TypeError("truth values")
        return [operator.index(token_id) for token_id in ids.flatten().tolist()]
    except (TypeError, ValueError, RuntimeError) as error:
        raise ParameterError(f"{name} must be a token id or several, integers, got {given!r:.60}") from error


def settings_of(
    target: nn.Module | None,
    generation_config: GenerationConfig | None,
    settings: Mapping[str, object],
    options: Iterable[str],
) -> GenerationConfig:
    """generate()'s settings: what the caller names, else what the given configuration says, else the target's own.

    The target's own configuration does not turn on sampling, though many have do_sample=True: the call or the given
    configuration must. Settings that are asked for and not applied here are warned of.

    Args:
        target: its generation config fills settings that nobody has set; None: they keep their defaults.
        generation_config: the given one.
        settings: what the caller names.
        options: the other options there are, for the hint in an error message.

    Raises:
        ParameterError: a setting that does not exist, or is not applied here, or has a value that it cannot have.
    """
    if generation_config is not None and not isinstance(generation_config, GenerationConfig):
        raise ParameterError(f"generation_config must be transformers' GenerationConfig, got {generation_config!r:.60}")
    known = (*HONOURED_SETTINGS, *SAMPLING_SETTINGS)
    config = copy.deepcopy(generation_config) or GenerationConfig()  # type: ignore[no-untyped-call]
    for name in settings:
        if name not in known:
            fault = "is not applied here" if hasattr(config, name) else "does not exist"
            raise ParameterError(
                f"the option '{name}' {fault}{nearest_match(name, [*options, *known])}; generate()'s settings that "
                f"are applied: {', '.join(known)}"
            )
    do_sample = settings.get("do_sample", generation_config.do_sample if generation_config is not None else False)
    if do_sample is not None:
        check_flag("do_sample", do_sample)
    for name, value in vars(getattr(target, "generation_config", None) or config).items():
        if getattr(config, name, None) is None:
            setattr(config, name, copy.deepcopy(value))
    if config.top_k is None:  # before the caller's settings, in which None turns top_k off
        config.top_k = DEFAULT_TOP_K
    try:
        config.update(**settings)  # type: ignore[no-untyped-call]
    except (TypeError, ValueError, AttributeError) as error:
        raise ParameterError(f"the settings of this generation cannot be used: {error}") from error
    for name in _COUNTS:
        if getattr(config, name) is True:  # which torch does not take for 1, as transformers' own checks do
            raise ParameterError(f"{name} must be an integer, got True; None turns it off")
    config.do_sample = bool(do_sample)
    if config.cache_implementation in _OTHER_CACHES:
        raise ParameterError(
            "the cache keeps keys and values as they are on the model's device, got cache_implementation="
            f"{config.cache_implementation!r}, with which generate() says something else or needs less memory; set it "
            "to None"
        )
    not_applied = [
        (f"{name}={value!r}", setting.reason)
        for name, value, setting in refused_settings(config)
        if not name.startswith("output_")  # they change outputs other than tokens
    ]
    if not_applied:
        listed, reasons = (", ".join(words) for words in zip(*not_applied, strict=True))
        warnings.warn(
            f"the generation config asks for {listed}, which generate() would apply and this does not: {reasons}; set "
            "them to None to make both alike",
            RuntimeWarning,
            stacklevel=4,
        )
    return config


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
        max_nodes = checked_count("max_nodes", max_nodes, 0)
    num_rows = DEFAULT_FIXED_ROWS if max_nodes is None else max_nodes + 1
    return num_rows, num_rows - 1


def resolved_limits(
    stack: PolicyStack,
    max_depth: int | None,
    max_nodes: int | None,
    tau: float | None,
    max_branch: int,
    vocab: int,
) -> Limits:
    """The strictest of what the caller and the policies ask for; the default where nobody asks.

    A policy asks by having a parameter called `max_depth`, `max_nodes` or `tau`.
    """
    if max_depth is not None:
        max_depth = checked_count("max_depth", max_depth, 0)
    if max_nodes is not None:
        max_nodes = checked_count("max_nodes", max_nodes, 0)
    max_branch = checked_count("max_branch", max_branch, 1)
    tau = as_python(tau)
    if tau is not None and (isinstance(tau, bool) or not isinstance(tau, int | float) or not 0 <= tau <= 1):
        raise ParameterError(f"tau must be a probability from 0 to 1, got {tau!r}")
    return Limits(
        max_depth=min(_asked(stack, "max_depth", max_depth), default=DEFAULT_MAX_DEPTH),
        max_nodes=min(_asked(stack, "max_nodes", max_nodes), default=DEFAULT_MAX_NODES),
        tau=max(_asked(stack, "tau", tau), default=DEFAULT_TAU),
        max_branch=min(max_branch, vocab),
    )


def _asked(stack: PolicyStack, name: str, given: float | None) -> list[Any]:
    values = [] if given is None else [given]
    is_count = name != "tau"
    wanted = "an integer of at least 0" if is_count else "a number from 0 to 1"
    for policy_name, policy in stack.policies.items():
        try:
            value = as_python(getattr(policy, name, None))
        except Exception as error:  # a property of its own
            raise PolicyError(f"policy '{policy_name}': its {name} raised {type(error).__name__}: {error}") from error
        if value is None:
            continue
        is_number = isinstance(value, int if is_count else int | float) and not isinstance(value, bool)
        if not is_number or not 0 <= value <= (math.inf if is_count else 1):
            raise ParameterError(f"policy '{policy_name}': its {name} must be {wanted}, got {value!r}")
        values.append(value)
    return values


def check_callable(name: str, given: object) -> None:
    """Refuse what cannot be called; None is none.

    Raises:
        ParameterError: naming the option.
    """
    if given is not None and not callable(given):
        raise ParameterError(f"{name} must be something to call, such as a function, got {given!r:.60}")


def checked_count(name: str, value: object, minimum: int) -> int:
    """An integer, whoever's."""
    number = as_python(value)
    if isinstance(number, bool) or not isinstance(number, int) or number < minimum:
        raise ParameterError(f"{name} must be an integer of at least {minimum}, got {value!r}")
    return number


def _tensor(name: str, value: object) -> Tensor:
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise PromptError(f"{name} must be numbers, [tokens] or [1, tokens], got {value!r:.60}") from error


def _is_per_token(values: Tensor, num_prompt: int) -> bool:
    return values.numel() == num_prompt and (values.dim() < 2 or values.shape == (1, num_prompt))
