"""The logits processors of a generation, made from its settings and put in the order of transformers' generate().

They are called once for each emitted token, with the text up to there (see verify.py).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    ExponentialDecayLengthPenalty,
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    GenerationConfig,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    LogitsProcessor,
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from dynatree_core.errors import ParameterError
from dynatree_core.plugins.params import as_python
from dynatree_core.request.arguments import check_token_ids, merged

__all__ = ["PROCESSORS", "logits_processors"]

# made from settings; each of them treats a row of scores independently of other rows
PROCESSORS = (
    EpsilonLogitsWarper, EtaLogitsWarper, ExponentialDecayLengthPenalty, ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor, InfNanRemoveLogitsProcessor, LogitNormalization, MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor, MinPLogitsWarper, NoBadWordsLogitsProcessor, NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor, SequenceBiasLogitsProcessor, SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor, TemperatureLogitsWarper, TopHLogitsWarper, TopKLogitsWarper, TopPLogitsWarper,
    TypicalLogitsWarper,
)  # fmt: skip


def logits_processors(
    config: GenerationConfig,
    added: list[LogitsProcessor],
    own: list[LogitsProcessor],
    *,
    eos_token_ids: frozenset[int],
    num_prompt: int,
    num_padding: int,
    max_length: int,
    vocab: int,
    device: torch.device,
) -> LogitsProcessorList:
    """The processors that the settings ask for, the caller's own, then those of sampling, as `generate` has them.

    Args:
        config: the settings.
        added: processors of options that `generate` does not have; they come first.
        own: the caller's processors; one of them takes the place of one of the same class that the settings ask for.
        eos_token_ids: tokens that end the generation.
        num_prompt: tokens of the prompt, padding included.
        num_padding: padding tokens at its left, on which there is no repetition penalty.
        max_length: tokens of prompt and output at most.
        vocab: size of the vocabulary.
        device: where the logits are.

    Raises:
        ParameterError: a setting has a value that its processor refuses, or a token that the vocabulary lacks.
    """
    eos = torch.tensor(sorted(eos_token_ids), device=device) if eos_token_ids else None
    try:
        asked = [*added, *_from_settings(config, eos, num_prompt, num_padding, max_length, str(device))]
        for name, token_ids in _tokens_of(asked, num_prompt):
            check_token_ids(name, token_ids, vocab)
        last = _for_sampling(config, str(device)) if config.do_sample else []
        if config.watermarking_config is not None:
            last.append(config.watermarking_config.construct_processor(vocab, str(device)))
        if config.renormalize_logits:
            last.append(LogitNormalization())
    except (TypeError, ValueError) as error:
        raise ParameterError(f"a setting of the generation cannot be used: {error}") from error
    return LogitsProcessorList([*merged(asked, own), *last])


def _from_settings(
    config: GenerationConfig,
    eos: torch.Tensor | None,
    num_prompt: int,
    num_padding: int,
    max_length: int,
    device: str,
) -> list[LogitsProcessor]:
    processors: list[LogitsProcessor] = []
    if config.sequence_bias is not None:
        processors.append(SequenceBiasLogitsProcessor(config.sequence_bias))
    if config.repetition_penalty not in (None, 1):
        processors.append(RepetitionPenaltyLogitsProcessor(config.repetition_penalty, num_padding or None))
    if config.no_repeat_ngram_size:
        processors.append(NoRepeatNGramLogitsProcessor(config.no_repeat_ngram_size))
    if config.bad_words_ids is not None:
        processors.append(NoBadWordsLogitsProcessor(config.bad_words_ids, eos))
    if config.min_length and config.min_new_tokens is None and eos is not None:  # which takes precedence
        processors.append(MinLengthLogitsProcessor(config.min_length, eos, device=device))
    if config.min_new_tokens and eos is not None:
        processors.append(MinNewTokensLengthLogitsProcessor(num_prompt, config.min_new_tokens, eos, device=device))
    if config.forced_bos_token_id is not None:
        processors.append(ForcedBOSTokenLogitsProcessor(config.forced_bos_token_id))
    if config.forced_eos_token_id is not None:
        processors.append(ForcedEOSTokenLogitsProcessor(max_length, config.forced_eos_token_id, device=device))
    if config.remove_invalid_values:
        processors.append(InfNanRemoveLogitsProcessor())
    if config.exponential_decay_length_penalty is not None:
        if eos is None:
            raise ValueError("exponential_decay_length_penalty needs an end token, got none")
        _, factor = config.exponential_decay_length_penalty
        if not isinstance(as_python(factor), int | float):
            raise ValueError(f"exponential_decay_length_penalty needs a place and a factor, got {factor!r:.60} for it")
        processors.append(ExponentialDecayLengthPenalty(config.exponential_decay_length_penalty, eos, num_prompt))
    if config.suppress_tokens is not None:
        processors.append(SuppressTokensLogitsProcessor(config.suppress_tokens, device=device))
    if config.begin_suppress_tokens is not None:
        # with a forced first token, generate() suppresses at the second
        begin = num_prompt + (num_prompt == 1 and config.forced_bos_token_id is not None)
        processors.append(SuppressTokensAtBeginLogitsProcessor(config.begin_suppress_tokens, begin, device=device))
    return processors


def _tokens_of(processors: Sequence[LogitsProcessor], num_prompt: int) -> Iterator[tuple[str, object]]:
    """Tokens that these look up in the scores, where one that is not there ends the generation, and who names them.

    What is suppressed is not among them: there, tokens that do not exist have no effect.
    """
    for one in processors:
        if isinstance(one, NoBadWordsLogitsProcessor):
            yield "bad_words_ids", [*itertools.chain(*one.sequence_bias)]
        elif isinstance(one, SequenceBiasLogitsProcessor):
            yield "sequence_bias", [*itertools.chain(*one.sequence_bias)]
        elif isinstance(one, ForcedBOSTokenLogitsProcessor) and num_prompt == 1:  # behind others it does nothing
            yield "forced_bos_token_id", one.bos_token_id
        elif isinstance(one, ForcedEOSTokenLogitsProcessor):
            yield "forced_eos_token_id", one.eos_token_id
        elif isinstance(one, ExponentialDecayLengthPenalty):
            yield "eos_token_id, which exponential_decay_length_penalty favours,", one.eos_token_id


def _for_sampling(config: GenerationConfig, device: str) -> list[LogitsProcessor]:
    """The processors that change the distribution tokens are sampled from."""
    processors: list[LogitsProcessor] = []
    if config.temperature not in (None, 1):
        processors.append(TemperatureLogitsWarper(config.temperature))
    if config.top_h is not None:
        processors.append(TopHLogitsWarper(config.top_h))
    if config.top_k not in (None, 0):
        processors.append(TopKLogitsWarper(config.top_k))
    if config.top_p is not None and config.top_p < 1:
        processors.append(TopPLogitsWarper(config.top_p))
    if config.min_p is not None:
        processors.append(MinPLogitsWarper(config.min_p))
    if config.typical_p is not None and config.typical_p < 1:
        processors.append(TypicalLogitsWarper(config.typical_p))
    if config.epsilon_cutoff:
        processors.append(EpsilonLogitsWarper(config.epsilon_cutoff))
    if config.eta_cutoff:
        processors.append(EtaLogitsWarper(config.eta_cutoff, device=device))
    return processors
