"""Several sequences in one call of generate(), each decoded by itself with the tokens that a batch gives it.

A batch decodes its rows independently of each other, but for three things: who ended early is padded, a random number
is drawn for each row in each step, and processors and criteria see all rows at once. Of the processors only such are
taken as judge each row by itself. Criteria that do not are shown the whole batch after each token, as by generate().
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import EosTokenCriteria, GenerationConfig, MaxLengthCriteria, StopStringCriteria

from dynatree_core.errors import ParameterError
from dynatree_core.request.processors import PROCESSORS

__all__ = ["check_rows", "has_end_token", "joined", "looks_at_all_rows", "pad_id_of", "processors_of_row"]

# all of transformers' own that settings ask for judge each row by itself
_ROW_BY_ROW = (*PROCESSORS, EosTokenCriteria, MaxLengthCriteria, StopStringCriteria)


def check_rows(
    config: GenerationConfig,
    processors: Sequence[Any],
    criteria: Sequence[Any],
    streamer: Any,
    *,
    is_cache_callers: bool,
) -> None:
    """Refuse what cannot be done for each row by itself as a batch does it.

    Raises:
        ParameterError: naming it.
    """
    fault = None
    others = sorted({type(part).__name__ for part in processors if type(part) not in _ROW_BY_ROW})
    if others:
        fault = f"{', '.join(others)}, which may look at other rows or count calls"
    elif config.do_sample and looks_at_all_rows(criteria):
        fault = "sampling beside criteria that may look at other rows"
    elif config.return_dict_in_generate and (config.output_scores or config.output_logits):
        fault = "output_scores or output_logits, which go on behind the end of a row"
    elif streamer is not None:
        fault = "a streamer"
    elif is_cache_callers:
        fault = "a cache of the caller's"
    if fault:
        raise ParameterError(
            f"several sequences are decoded each by itself, which cannot be done with {fault}; give one prompt a call"
        )


def has_end_token(criteria: Sequence[Any]) -> bool:
    """Whether generate() pads a row behind its end. Otherwise the row goes on until all have ended."""
    return any(isinstance(criterion, EosTokenCriteria) for criterion in criteria)


def looks_at_all_rows(criteria: Sequence[Any]) -> bool:
    """Whether the end of a row may depend on other rows."""
    kinds = [type(criterion) for criterion in criteria]
    return not set(kinds) <= set(_ROW_BY_ROW) or (StopStringCriteria in kinds and not has_end_token(criteria))


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


def pad_id_of(config: Any) -> int:
    """What generate() puts behind the end of a row."""
    pad_id = getattr(config, "_pad_token_tensor", None)
    return int(config.pad_token_id or 0) if pad_id is None else int(pad_id)


def joined(rows: Sequence[Tensor], pad_id: int) -> Tensor:
    """Rows of different lengths as one tensor [rows, tokens], padded behind their ends."""
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=pad_id)
