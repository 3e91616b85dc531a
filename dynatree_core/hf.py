"""Tree decoding through transformers' own door: `model.generate(..., custom_generate=dynatree_core.hf.generate)`.

generate() reads its arguments, makes logits processors and stopping criteria of them, and then calls the function here
in place of its own decoding loop. What it keeps to itself (streamer, tokenizer, stop strings) goes through
`generate_with`, which has its signature.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation.utils import GenerateDecoderOnlyOutput

from dynatree_core.drafters.base import Drafter
from dynatree_core.errors import ParameterError
from dynatree_core.generation import run
from dynatree_core.session import Session

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["generate", "generate_with"]

# ways of decoding that are not tree decoding -> the value that asks for none of it
_REFUSED = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "guidance_scale": 1,
    "penalty_alpha": None,
    "dola_layers": None,
    "output_attentions": False,
    "output_hidden_states": False,
}
# what generate() prepares for its own loop and a session makes for itself
_CACHES = ("cache", "past_key_values")  # the argument's name from transformers 5.24.0 on, and before
_NOT_NEEDED = {"use_cache", "logits_to_keep", "cache_position", "position_ids", "attention_mask"}


class _Recorder(LogitsProcessor):
    """Changes nothing, and keeps the scores that it sees: one [1, vocab] for each emitted token."""

    def __init__(self) -> None:
        self.scores: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.scores.append(scores.clone())
        return scores


def generate(
    model: nn.Module,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList | None = None,
    stopping_criteria: StoppingCriteriaList | None = None,
    generation_config: GenerationConfig | None = None,
    drafter: nn.Module | Drafter | str | None = "prompt_lookup",
    policy: str | object | Sequence[str | object] = "phase3",
    streamer: Any = None,
    options: Mapping[str, Any] | None = None,
    **model_kwargs: Any,
) -> Tensor | GenerateDecoderOnlyOutput:
    """For `model.generate(**inputs, custom_generate=generate, drafter=..., policy=...)`; not to be called otherwise.

    Args:
        model: the target.
        input_ids: the prompt, [1, tokens].
        logits_processor: made by generate(), warpers of sampling included.
        stopping_criteria: made by generate().
        generation_config: made by generate().
        drafter: as in `dynatree_core.generate`.
        policy: as in `dynatree_core.generate`.
        streamer: one of transformers', which gets the tokens of each decode step when they are committed.
        options: of `dynatree_core.generate`, such as {"tau": 0.1, "max_nodes": 64, "on_error": "fallback"}.
        model_kwargs: attention mask, positions, and what generate() prepares for its own loop.

    Returns:
        Prompt and new tokens, [1, tokens]; a `GenerateDecoderOnlyOutput` with `return_dict_in_generate`, with one
        [1, vocab] a new token in `scores` and `logits` where they are asked for.

    Raises:
        ParameterError: several sequences, or a way of decoding that is not tree decoding.
        DynaTreeError: what failed while running.
    """
    config = generation_config or GenerationConfig()  # type: ignore[no-untyped-call]
    _check(input_ids, config, model_kwargs)
    raw, processed = _Recorder(), _Recorder()
    processors = [
        *([raw] if config.output_logits else []),
        *(logits_processor or []),
        *([processed] if config.output_scores else []),
    ]
    criteria = StoppingCriteriaList(stopping_criteria or ())
    max_length = criteria.max_length or config.max_length  # the caller's may have taken the place of the config's
    if config.return_dict_in_generate and config.output_scores:
        criteria = StoppingCriteriaList([_with_scores(criterion, processed.scores) for criterion in criteria])
    session = Session(
        model,
        drafter,
        input_ids,
        policy=policy,
        max_length=max_length,
        eos_token_id=[],  # it is among the criteria
        attention_mask=model_kwargs.get("attention_mask"),
        position_ids=model_kwargs.get("position_ids"),
        logits_processor=processors,
        stopping_criteria=criteria,
        generation_config=_only_sampling(config.do_sample),
        inherit_settings=False,  # generate() has made processors and criteria of them
        **(options or {}),
    )
    if streamer is not None:
        streamer.put(input_ids.cpu())
    for report in run(session):
        if streamer is not None:
            for token_id in report.token_ids:
                streamer.put(torch.tensor([token_id]))
    if streamer is not None:
        streamer.end()
    sequences = torch.cat([input_ids, input_ids.new_tensor([session.new_token_ids])], dim=1)
    if not config.return_dict_in_generate:
        return sequences
    fields: dict[str, Any] = {"sequences": sequences}
    if config.output_scores:
        fields["scores"] = tuple(scores.clone() for scores in processed.scores)  # recorded in inference mode
    if config.output_logits:
        fields["logits"] = tuple(scores.clone() for scores in raw.scores)
    return GenerateDecoderOnlyOutput(**fields)


def generate_with(
    model: Any,
    inputs: Tensor | None = None,
    *,
    drafter: nn.Module | Drafter | str | None = "prompt_lookup",
    policy: str | object | Sequence[str | object] = "phase3",
    streamer: Any = None,
    options: Mapping[str, Any] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    stop_strings: str | list[str] | None = None,
    stopping_criteria: Sequence[StoppingCriteria] | None = None,
    **settings: Any,
) -> Tensor | GenerateDecoderOnlyOutput:
    """`model.generate` with trees: its arguments and its result, with `streamer`, `tokenizer` and `stop_strings` too.

    Args:
        model: the target.
        inputs: the prompt, [1, tokens], unless it is among the settings as `input_ids`.
        drafter: as in `dynatree_core.generate`.
        policy: as in `dynatree_core.generate`.
        streamer: one of transformers', which gets the prompt, then the tokens of each step when they are committed.
        options: as in `generate`.
        tokenizer: the target's, needed with stop strings.
        stop_strings: texts behind which the output ends; None: those of the generation config, if it has any.
        stopping_criteria: more of them.
        settings: whatever else generate() takes.

    Raises:
        ParameterError: stop strings without a tokenizer, or what `generate` refuses.
    """
    criteria = StoppingCriteriaList(stopping_criteria or ())
    for config in (settings.get("generation_config"), model.generation_config):
        if stop_strings is None and config is not None:
            stop_strings = config.stop_strings
    if stop_strings is not None:
        if tokenizer is None:
            raise ParameterError("stop_strings need the target's tokenizer, got none; give it as tokenizer=...")
        criteria.append(StopStringCriteria(tokenizer, stop_strings))
    for config in (settings, vars(settings.get("generation_config") or model.generation_config)):
        if config.get("token_healing"):
            raise ParameterError(
                "token_healing changes the prompt before the first token, which is not done here; give the prompt that "
                "model.heal_tokens(inputs, tokenizer) makes, and leave the setting out"
            )
    decode = partial(generate, drafter=drafter, policy=policy, streamer=streamer, options=options)
    # generate() does not hand its tokenizer on, so it is asked for no stop strings
    return model.generate(  # type: ignore[no-any-return]
        inputs, custom_generate=decode, stopping_criteria=criteria, stop_strings=None, **settings
    )


def _with_scores(criterion: StoppingCriteria, scores: list[Tensor]) -> Any:
    """The criterion, which is told the scores of all new tokens so far, as by generate() where it keeps them."""
    return lambda input_ids, _: criterion(input_ids, tuple(scores))


def _only_sampling(do_sample: bool | None) -> GenerationConfig:
    """Settings that say how to choose, and nothing about logits: top_k=0 is none, where None would be the default."""
    settings: dict[str, Any] = {"do_sample": True, "top_k": 0} if do_sample else {}
    return GenerationConfig(**settings)  # type: ignore[no-untyped-call]


def _check(input_ids: Tensor, config: GenerationConfig, model_kwargs: dict[str, Any]) -> None:
    for name, neutral in _REFUSED.items():
        value = getattr(config, name, None)
        if value not in (None, neutral):
            raise ParameterError(
                f"tree decoding has no {name}, got {value!r}; leave it out, or decode without custom_generate"
            )
    if input_ids.shape[0] != 1:
        raise ParameterError(
            f"tree decoding takes one sequence at a time, got {input_ids.shape[0]}; give one prompt a call"
        )
    unknown = [
        name
        for name, value in model_kwargs.items()
        if name not in _NOT_NEEDED and name not in _CACHES and value is not None
    ]
    if unknown:
        raise ParameterError(f"tree decoding cannot hand {', '.join(unknown)} on to the model; leave it out")
    caches = [model_kwargs[name] for name in _CACHES if model_kwargs.get(name) is not None]
    if any(cache.get_seq_length() > 0 for cache in caches):
        raise ParameterError("tree decoding begins with a cache of its own, got one with rows; leave it out")
