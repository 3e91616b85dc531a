"""Several sequences in one call of generate(), decoded one after the other with the tokens that a batch gives them.

A batch decodes its rows independently of each other, but for three things: who ended early is padded, a random number
is drawn for each row in each step, and processors and criteria see all rows at once. Of these only such are taken as
judge each row by itself.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    EosTokenCriteria,
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    ExponentialDecayLengthPenalty,
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    GenerationConfig,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    MaxLengthCriteria,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    StopStringCriteria,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from dynatree_core.errors import ParameterError

__all__ = ["check_rows", "joined", "processors_of_row"]

_ROW_BY_ROW = (
    EpsilonLogitsWarper, EtaLogitsWarper, ExponentialDecayLengthPenalty, ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor, InfNanRemoveLogitsProcessor, LogitNormalization, MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor, MinPLogitsWarper, NoBadWordsLogitsProcessor, NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor, SequenceBiasLogitsProcessor, SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor, TemperatureLogitsWarper, TopHLogitsWarper, TopKLogitsWarper, TopPLogitsWarper,
    TypicalLogitsWarper,
    EosTokenCriteria, MaxLengthCriteria, StopStringCriteria,
)  # fmt: skip


def check_rows(
    config: GenerationConfig,
    processors: Sequence[Any],
    criteria: Sequence[Any],
    streamer: Any,
    *,
    is_cache_callers: bool,
) -> None:
    """Refuse what cannot be done one row after the other as a batch does it.

    Raises:
        ParameterError: naming it.
    """
    fault = None
    others = sorted({type(part).__name__ for part in (*processors, *criteria) if type(part) not in _ROW_BY_ROW})
    has_end = any(isinstance(criterion, EosTokenCriteria) for criterion in criteria)
    if others:
        fault = f"{', '.join(others)}, which may look at other rows, count calls or measure the time of all"
    elif config.return_dict_in_generate and (config.output_scores or config.output_logits):
        fault = "output_scores or output_logits, which go on behind the end of a row"
    elif streamer is not None:
        fault = "a streamer"
    elif is_cache_callers:
        fault = "a cache of the caller's"
    elif not has_end and any(isinstance(criterion, StopStringCriteria) for criterion in criteria):
        fault = "stop strings without an end token, behind which generate() goes on until all rows have one"
    if fault:
        raise ParameterError(
            f"several sequences are decoded one after the other, which cannot be done with {fault}; give one prompt a "
            "call"
        )


def processors_of_row(processors: Sequence[Any], row: int) -> list[Any]:
    """Processors for one row of a batch, of which generate() has told some how long the padding of each row is."""
    return [_of_row(processor, row) for processor in processors]


def _of_row(processor: Any, row: int) -> Any:
    ignored = getattr(processor, "prompt_ignore_length", None)
    if not isinstance(ignored, Tensor):
        return processor
    own = copy.copy(processor)
    own.prompt_ignore_length = ignored[row : row + 1]
    return own


def joined(rows: Sequence[Tensor], config: Any) -> Tensor:
    """Rows of different lengths as one tensor [rows, tokens], padded behind their ends as generate() does."""
    pad_id = getattr(config, "_pad_token_tensor", None)
    pad_id = config.pad_token_id if pad_id is None else int(pad_id)
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=pad_id or 0)
