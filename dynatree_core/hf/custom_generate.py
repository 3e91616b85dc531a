"""Tree decoding through transformers' own door: `model.generate(..., custom_generate=dynatree_core.hf.generate)`.

generate() reads its arguments, makes logits processors and stopping criteria of them, and then calls the function here
in place of its own decoding loop. What it keeps from a function is looked up in `kept_back`. `generate_with` has the
arguments of generate() itself, and `FOLDER` is the same for `custom_generate=FOLDER, trust_remote_code=True`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
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

from dynatree_core.cache.transformers_cache import check_kept_as_is, leave_rows, take_rows
from dynatree_core.drafters.base import Drafter
from dynatree_core.engine.engine import ENGINE_OPTIONS, Engine
from dynatree_core.engine.session import Session
from dynatree_core.errors import ParameterError
from dynatree_core.generation import run, run_beside
from dynatree_core.hf.kept_back import WITHOUT_A_WAY, SignatureWithTokenizer, callers_arguments
from dynatree_core.hf.rows import (
    check_rows,
    has_end_token,
    joined,
    looks_at_all_rows,
    pad_id_of,
    processors_of_row,
)
from dynatree_core.models.adapters import adapters_of_rows
from dynatree_core.models.architectures import cache_argument
from dynatree_core.models.placement import computing_device
from dynatree_core.request.defaults import DEFAULT_POLICY
from dynatree_core.request.refused import refused_settings
from dynatree_core.request.sampling import Sampler

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["FOLDER", "generate", "generate_with"]

FOLDER = str(Path(__file__).with_name("folder"))  # by transformers' convention for decoding loops in a folder

_CACHES = ("cache", "past_key_values")  # the argument's name from transformers 5.24.0 on, and before
MAX_BESIDE = 16  # rows of a batch that are decoded at once; the memory of their caches is there for the next ones
# what generate() prepares for its own loop and a session makes for itself
_NOT_NEEDED = {"use_cache", "logits_to_keep", "cache_position", "position_ids", "attention_mask", *_CACHES}


class _Recorder(LogitsProcessor):
    """Changes nothing, and keeps the scores that it sees: one [1, vocab] for each emitted token."""

    def __init__(self) -> None:
        self.scores: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.scores.append(scores.clone())
        return scores


@attrs.frozen(eq=False)
class _Asked:
    """What generate() has made of its arguments, and the options of tree decoding."""

    model: nn.Module
    input_ids: Tensor  # [rows, tokens]
    config: GenerationConfig
    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    drafter: nn.Module | Drafter | str | None
    policy: str | object | Sequence[str | object]
    options: Mapping[str, Any]
    model_kwargs: Mapping[str, Any]

    @property
    def num_rows(self) -> int:
        """Sequences to generate."""
        return self.input_ids.shape[0]

    def of_row(self, name: str, row: int) -> Tensor | None:
        """The mask or the positions of one row, [1, tokens]."""
        values: Tensor | None = self.model_kwargs.get(name)
        return values[row : row + 1] if values is not None and values.shape[0] == self.num_rows else values

    @property
    def cache(self) -> Any:
        """The caller's cache, or the empty one that generate() has made; None where there is none."""
        return next((self.model_kwargs[name] for name in _CACHES if self.model_kwargs.get(name) is not None), None)

    @property
    def is_cache_wanted(self) -> bool:
        """Whether somebody will look at the cache behind the generation."""
        # transformers marks a caller's cache from the version on in which it renamed the argument
        is_marked = cache_argument(self.model) == "cache"
        is_callers = getattr(self.cache, "_is_user_defined", not is_marked)
        return self.cache is not None and bool(is_callers or self.config.return_dict_in_generate)


def generate(
    model: nn.Module,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList | None = None,
    stopping_criteria: StoppingCriteriaList | None = None,
    generation_config: GenerationConfig | None = None,
    drafter: nn.Module | Drafter | str | None = "prompt_lookup",
    policy: str | object | Sequence[str | object] = DEFAULT_POLICY,
    streamer: Any = None,
    options: Mapping[str, Any] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **model_kwargs: Any,
) -> Tensor | GenerateDecoderOnlyOutput:
    """For `model.generate(**inputs, custom_generate=generate, drafter=..., policy=...)`; not to be called otherwise.

    Several sequences, by a batch of prompts or `num_return_sequences`, are generated beside each other, by passes that
    they share, with the tokens that generate() gives them (`dynatree_core.hf.rows`).

    Args:
        model: the target.
        input_ids: the prompts, [rows, tokens], padded at their left.
        logits_processor: made by generate(), warpers of sampling included.
        stopping_criteria: made by generate().
        generation_config: made by generate().
        drafter: as in `dynatree_core.generate`.
        policy: as in `dynatree_core.generate`.
        streamer: one of transformers', which gets the tokens of each decode step when they are committed, and its end
            also where an error ends the generation. generate() keeps its own to itself: it is looked up in the caller.
        options: of `dynatree_core.generate`, such as {"tau": 0.1, "max_nodes": 64, "on_error": "fallback"}.
        tokenizer: the target's, which generate() needs for stop strings; drafters that look at text get it too.
        model_kwargs: attention mask, positions, cache, and what generate() prepares for its own loop.

    Returns:
        Prompts and new tokens, [rows, tokens]; a `GenerateDecoderOnlyOutput` with `return_dict_in_generate`, with one
        [1, vocab] a new token in `scores` and `logits` where they are asked for, and the cache filled.

    Raises:
        ParameterError: a way of decoding that is not tree decoding, or a cache that cannot be taken over.
        DynaTreeError: what failed while running.
    """
    callers = callers_arguments(model)
    is_shown_prompt = streamer is None  # generate() has shown it to its own streamer
    streamer = callers.get("streamer") if streamer is None else streamer
    with _ended(streamer) as streamer:
        for name, advice in WITHOUT_A_WAY.items():
            if callers.get(name):
                kind = type(callers[name]).__name__
                raise ParameterError(f"generate() hands {name} on to no custom loop, got one ({kind}); {advice}")
        asked = _Asked(
            model,
            input_ids,
            generation_config or GenerationConfig(),  # type: ignore[no-untyped-call]
            LogitsProcessorList(logits_processor or ()),
            StoppingCriteriaList(stopping_criteria or ()),
            drafter,
            policy,
            _with_tokenizer(options, tokenizer),
            model_kwargs,
        )
        _check(asked, streamer)
        if streamer is not None and not is_shown_prompt:
            streamer.put(input_ids.cpu())
        if asked.num_rows == 1:
            return _one_row(asked, streamer)
        sequences = (_rows_in_step if looks_at_all_rows(asked.criteria) else _rows_beside)(asked)
        return _several(asked, sequences.to(input_ids.device))


# generate() reads the function's signature, and this one hands it back the tokenizer
generate.__signature__ = SignatureWithTokenizer.from_callable(generate)  # type: ignore[attr-defined]


def _with_tokenizer(options: Mapping[str, Any] | None, tokenizer: PreTrainedTokenizerBase | None) -> Mapping[str, Any]:
    return {**({} if tokenizer is None else {"tokenizer": tokenizer}), **(options or {})}


def _one_row(asked: _Asked, streamer: Any) -> Tensor | GenerateDecoderOnlyOutput:
    config = asked.config
    raw, processed = _Recorder(), _Recorder()
    processors = [
        *([raw] if config.output_logits else []),
        *asked.processors,
        *([processed] if config.output_scores else []),
    ]
    criteria: Sequence[Any] = asked.criteria
    if config.return_dict_in_generate and config.output_scores:
        criteria = [_with_scores(criterion, processed.scores) for criterion in asked.criteria]
    session = _session(asked, 0, processors, criteria)
    if asked.cache is not None and asked.cache.get_seq_length() > 0:
        _begin_with(session, asked)
    for report in run(session):
        if streamer is not None:
            for token_id in report.token_ids:
                streamer.put(torch.tensor([token_id]))
    if asked.is_cache_wanted and session.cache.has_all_rows:
        leave_rows(asked.cache, session.cache, session.num_padding)
    sequences = session.text.to(asked.input_ids.device)
    if not config.return_dict_in_generate:
        return sequences
    fields: dict[str, Any] = {"sequences": sequences}
    if config.output_scores:
        fields["scores"] = tuple(scores.clone() for scores in processed.scores)  # recorded in inference mode
    if config.output_logits:
        fields["logits"] = tuple(scores.clone() for scores in raw.scores)
    if session.cache.has_all_rows:
        fields[cache_argument(asked.model)] = asked.cache
    return GenerateDecoderOnlyOutput(**fields)


def _rows_beside(asked: _Asked) -> Tensor:
    """All rows in the same iterations; with sampling each draws what generate() draws for it in the batch."""
    engine = _engine(asked)
    rows: list[Tensor] = []
    samplers: list[Sampler] = []
    began: Tensor | None = None  # where the random generator stands: every row begins there
    for first in range(0, asked.num_rows, MAX_BESIDE):
        numbers = range(first, min(first + MAX_BESIDE, asked.num_rows))
        sessions = [
            _session(asked, row, processors_of_row(asked.processors, row), asked.criteria, engine) for row in numbers
        ]
        for row, session in zip(numbers, sessions, strict=True):
            if session.sampler is not None:
                began = session.sampler.state() if began is None else began
                session.sampler.draw_for(row, asked.num_rows)
                session.sampler.apart(began)
                samplers.append(session.sampler)
        run_beside(sessions)
        rows += [session.text[0] for session in sessions]
        for session in sessions:
            session.release()
    if samplers:  # a batch leaves the generator where the longest row does
        _, longest = max(zip(rows, samplers, strict=True), key=lambda pair: pair[0].numel())
        longest.rejoin(longest.state())
    return joined(rows, pad_id_of(asked.config))


def _rows_in_step(asked: _Asked) -> Tensor:
    """All rows together, token by token, with criteria that are asked about the batch as generate() asks them.

    A row's tokens depend on no other row, so only the end is found in step: a row is decoded as far as it is needed.
    """
    with ExitStack() as stack:
        rows = []  # per row: its tokens, one after the other
        for row in range(asked.num_rows):
            session = _session(asked, row, processors_of_row(asked.processors, row), [])
            rows.append(stack.enter_context(closing(token for report in run(session) for token in report.token_ids)))
        text, pad_id = asked.input_ids, pad_id_of(asked.config)
        is_open = torch.ones(asked.num_rows, dtype=torch.bool, device=text.device)
        has_end = has_end_token(asked.criteria)
        while is_open.any():
            goes_on = is_open.tolist() if has_end else [True] * asked.num_rows
            tokens = [next(row) if goes else pad_id for row, goes in zip(rows, goes_on, strict=True)]
            text = torch.cat([text, text.new_tensor(tokens)[:, None]], dim=1)  # [rows, tokens]
            shown = text.clone()
            is_open &= ~asked.criteria(shown, None)
            if not torch.equal(shown, text):
                raise ParameterError(
                    "a stopping criterion of several sequences must leave their text as it is, got one that writes "
                    "into it; write into a copy of input_ids"
                )
    return text


def _several(asked: _Asked, sequences: Any) -> Tensor | GenerateDecoderOnlyOutput:
    if asked.config.return_dict_in_generate and asked.cache is not None:
        warnings.warn(
            "the result of several sequences has no cache, since each of them had one of its own; give one prompt a "
            "call, or use_cache=False",
            RuntimeWarning,
            stacklevel=4,
        )
    return GenerateDecoderOnlyOutput(sequences=sequences) if asked.config.return_dict_in_generate else sequences


def _engine(asked: _Asked) -> Engine:
    of_engine = {name: value for name, value in asked.options.items() if name in ENGINE_OPTIONS}
    return Engine(asked.model, asked.drafter, **of_engine)


def _session(
    asked: _Asked, row: int, processors: list[Any], criteria: Sequence[Any], engine: Engine | None = None
) -> Session:
    return Session.on(
        _engine(asked) if engine is None else engine,
        asked.input_ids[row : row + 1],
        policy=asked.policy,
        # the caller's criterion may have taken the place of the config's
        max_length=asked.criteria.max_length or asked.config.max_length,
        eos_token_id=[],  # it is among the criteria
        attention_mask=asked.of_row("attention_mask", row),
        position_ids=asked.of_row("position_ids", row),
        logits_processor=processors,
        stopping_criteria=criteria,
        generation_config=_only_sampling(asked.config.do_sample),
        inherit_settings=False,  # generate() has made processors and criteria of them
        **{name: value for name, value in asked.options.items() if name not in ENGINE_OPTIONS},
    )


def _begin_with(session: Session, asked: _Asked) -> None:
    """Take over the rows of the caller's cache."""
    beside = [name for name in ("cache", "exact", "prefix_cache") if asked.options.get(name) is not None]
    if beside or session.num_padding or not session.cache.has_all_rows:
        raise ParameterError(
            f"a cache that holds rows cannot be taken over beside {', '.join(beside) or 'padding'}; leave one of them "
            "out"
        )
    model: Any = asked.model
    dtype = None if torch.is_autocast_enabled(computing_device(model).type) else model.dtype
    take_rows(asked.cache, session.cache, asked.input_ids.shape[1], dtype)


def generate_with(
    model: Any,
    inputs: Tensor | None = None,
    *,
    drafter: nn.Module | Drafter | str | None = "prompt_lookup",
    policy: str | object | Sequence[str | object] = DEFAULT_POLICY,
    streamer: Any = None,
    options: Mapping[str, Any] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    stop_strings: str | list[str] | None = None,
    stopping_criteria: Sequence[StoppingCriteria] | None = None,
    **settings: Any,
) -> Tensor | GenerateDecoderOnlyOutput:
    """`model.generate` with trees: its arguments and its result, with `tokenizer` and `stop_strings` too.

    Args:
        model: the target.
        inputs: the prompts, [rows, tokens], unless they are among the settings as `input_ids`.
        drafter: as in `dynatree_core.generate`.
        policy: as in `dynatree_core.generate`.
        streamer: one of transformers', which gets the prompt, then the tokens of each step when they are committed.
        options: as in `generate`.
        tokenizer: the target's, needed with stop strings and by drafters that look at text.
        stop_strings: texts behind which the output ends; None: those of the generation config, if it has any.
        stopping_criteria: more of them.
        settings: whatever else generate() takes.

    Raises:
        ParameterError: stop strings without a tokenizer, or what `generate` refuses.
    """
    with _ended(streamer, only_after_errors=True) as streamer:
        criteria = StoppingCriteriaList(stopping_criteria or ())
        configs = [one for one in (settings.get("generation_config"), model.generation_config) if one is not None]
        for config in configs:
            stop_strings = config.stop_strings if stop_strings is None else stop_strings
        if stop_strings is not None:
            if tokenizer is None:
                raise ParameterError("stop_strings need the target's tokenizer, got none; give it as tokenizer=...")
            criteria.append(StopStringCriteria(tokenizer, stop_strings))
        if settings.get("cache_implementation") == "paged":
            raise ParameterError(
                "cache_implementation must be one of generate()'s own loops, got 'paged', continuous batching without "
                "trees; leave it out, or decode without custom_generate"
            )
        for config in (settings, vars(settings.get("generation_config") or model.generation_config)):
            if config.get("token_healing"):
                raise ParameterError(
                    "token_healing changes the prompt before the first token, which is not done here; give the prompt "
                    "that model.heal_tokens(inputs, tokenizer) makes, and leave the setting out"
                )
        options = _with_tokenizer(options, tokenizer)
        decode = partial(generate, drafter=drafter, policy=policy, streamer=streamer, options=options)
        # a folder with this as custom_generate puts it, as a partial, on the model in the place of generate
        is_folders = isinstance(getattr(model, "__dict__", {}).get("generate"), partial)
        transformers_generate = partial(type(model).generate, model) if is_folders else model.generate
        # their criterion is made above; where there are none nothing is said, since generate() warns of settings beside
        # a config
        unasked = {"stop_strings": None} if any(config.stop_strings is not None for config in configs) else {}
        return transformers_generate(  # type: ignore[no-any-return]
            inputs, custom_generate=decode, stopping_criteria=criteria, **unasked, **settings
        )


class _EndedOnce:
    """A streamer that is ended once, however often it is told."""

    def __init__(self, streamer: Any) -> None:
        self._streamer = streamer
        self._is_ended = False

    def put(self, value: Tensor) -> None:
        self._streamer.put(value)

    def end(self) -> None:
        if not self._is_ended:
            self._is_ended = True
            self._streamer.end()


@contextmanager
def _ended(streamer: Any, *, only_after_errors: bool = False) -> Iterator[_EndedOnce | None]:
    """End a streamer however the block ends: who waits for its tokens would wait for ever."""
    once = streamer if streamer is None or isinstance(streamer, _EndedOnce) else _EndedOnce(streamer)
    is_done = False
    try:
        yield once
        is_done = True
    finally:
        if once is not None and not (is_done and only_after_errors):
            once.end()


def _with_scores(criterion: StoppingCriteria, scores: list[Tensor]) -> Callable[[Tensor, Any], Any]:
    """The criterion, which is told the scores of all new tokens so far, as by generate() where it keeps them."""

    def with_scores(input_ids: Tensor, _: Any) -> Any:
        return criterion(input_ids, tuple(scores))

    with_scores.__name__ = type(criterion).__name__  # as errors name it
    return with_scores


def _only_sampling(do_sample: bool | None) -> GenerationConfig:
    """Settings that say how to choose, and nothing about logits: top_k=0 is none, where None would be the default."""
    settings: dict[str, Any] = {"do_sample": True, "top_k": 0} if do_sample else {}
    return GenerationConfig(**settings)  # type: ignore[no-untyped-call]


def _check(asked: _Asked, streamer: Any) -> None:
    for name, value, setting in refused_settings(asked.config):
        if setting.is_in_loop:
            raise ParameterError(
                f"tree decoding has no {name}, got {value!r}: {setting.reason}; leave it out, or decode without "
                "custom_generate"
            )
    unknown = [name for name, value in asked.model_kwargs.items() if name not in _NOT_NEEDED and value is not None]
    if unknown:
        raise ParameterError(f"tree decoding cannot hand {', '.join(unknown)} on to the model; leave it out")
    adapters = adapters_of_rows(asked.model)
    if adapters is not None and len(adapters) != 1:
        raise ParameterError(
            f"adapter_names must name one adapter, since rows are decoded one after the other, got "
            f"{', '.join(adapters)}; give the prompts of each adapter a call of their own, with the model loaded anew, "
            "since PEFT keeps to these names after an error"
        )
    num_tokens = asked.input_ids.shape[1]
    described = [asked.model_kwargs[name] for name in ("attention_mask", "position_ids") if name in asked.model_kwargs]
    lengths = {value.shape[-1] for value in described if value is not None}
    lengths |= {getattr(asked.config, "_mask_length", num_tokens)}  # where generate() has dropped a mask of ones
    if lengths != {num_tokens}:
        raise ParameterError(
            f"input_ids must be the whole text, what a cache holds of it included, got {num_tokens} tokens and a mask "
            f"or positions for {max(lengths)}"
        )
    if asked.cache is not None:
        check_kept_as_is(asked.cache)
        if asked.config.use_cache is False and _is_callers_cache(asked):
            raise ParameterError(
                "a cache is used and filled here, got one beside use_cache=False; leave one of them out"
            )
    if asked.num_rows > 1:
        check_rows(asked.config, asked.processors, asked.criteria, streamer, is_cache_callers=_is_callers_cache(asked))
        if isinstance(asked.drafter, Drafter) and looks_at_all_rows(asked.criteria):
            raise ParameterError(
                "several sequences with stopping criteria of one's own are decoded together, and each needs a drafter "
                f"of its own, got one {type(asked.drafter).__name__}; give its name or the small model"
            )


def _is_callers_cache(asked: _Asked) -> bool:
    return asked.cache is not None and (
        bool(getattr(asked.cache, "_is_user_defined", False)) or asked.cache.get_seq_length() > 0
    )
