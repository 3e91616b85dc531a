"""What OpenAI's API has and transformers has not: a bias on single tokens, and penalties on tokens said before.

Both are logits processors like those of transformers, so `model.generate(logits_processor=[...])` takes them too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import LogitsProcessor

from dynatree_core.errors import ParameterError
from dynatree_core.plugins.params import as_python

__all__ = ["LogitBias", "RepeatPenalties", "penalties"]


class LogitBias(LogitsProcessor):
    """Adds a number to the logits of some tokens.

    Args:
        bias: token id -> what is added.
        device: where the logits are.
    """

    def __init__(self, bias: Mapping[int, float], device: torch.device | str) -> None:
        self._ids = torch.tensor([*bias.keys()], dtype=torch.int64, device=device)  # [biased]
        self._values = torch.tensor([*bias.values()], dtype=torch.float32, device=device)  # [biased]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The scores [batch, vocab] with the bias."""
        return scores.index_add(1, self._ids, self._values.to(scores.dtype).expand(len(scores), -1))


class RepeatPenalties(LogitsProcessor):
    """Takes `frequency` times their number, and `presence` once, from the logits of tokens in the new text.

    The prompt does not count, as with OpenAI and vLLM; transformers' repetition penalty counts it.

    Args:
        num_prompt: tokens of the prompt, padding included.
        presence: taken from the logit of each token that was said; a negative one is added.
        frequency: taken as often as the token was said.
    """

    def __init__(self, num_prompt: int, presence: float, frequency: float) -> None:
        self._num_prompt, self._presence, self._frequency = num_prompt, presence, frequency

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The scores [batch, vocab] less the penalties, for texts [batch, tokens]."""
        new_ids = input_ids[:, self._num_prompt :]
        counts = torch.zeros_like(scores).scatter_add(1, new_ids, torch.ones_like(new_ids, dtype=scores.dtype))
        return scores - self._frequency * counts - self._presence * (counts > 0)


def penalties(
    logit_bias: Mapping[int, float] | None,
    presence: float,
    frequency: float,
    *,
    num_prompt: int,
    vocab: int,
    device: torch.device,
) -> list[LogitsProcessor]:
    """The processors of those that are asked for.

    Raises:
        ParameterError: a value that is no finite number, or a token outside the vocabulary.
    """
    bias = _checked_bias(logit_bias, vocab)
    presence = _finite("presence_penalty", presence)
    frequency = _finite("frequency_penalty", frequency)
    processors: list[LogitsProcessor] = [LogitBias(bias, device)] if bias else []
    if presence or frequency:
        processors.append(RepeatPenalties(num_prompt, presence, frequency))
    return processors


def _checked_bias(bias: Mapping[int, float] | None, vocab: int) -> dict[int, float]:
    if bias is None:
        return {}
    if not isinstance(bias, Mapping):
        raise ParameterError(f"logit_bias must be a mapping from token ids to numbers, got {bias!r:.60}")
    for token_id in bias:
        if isinstance(token_id, bool) or not isinstance(as_python(token_id), int) or not 0 <= token_id < vocab:
            raise ParameterError(
                f"logit_bias must name token ids, integers from 0 to {vocab - 1} (the target's vocabulary), got "
                f"{token_id!r:.60}"
            )
    return {int(token_id): _finite(f"logit_bias of token {token_id}", value) for token_id, value in bias.items()}


def _finite(name: str, value: object) -> float:
    number = as_python(value)
    if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
        raise ParameterError(f"{name} must be a finite number, got {value!r:.60}")
    return float(number)
