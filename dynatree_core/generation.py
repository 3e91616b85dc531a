"""Generate and stream, one prompt or many: the public way to run sequences to their ends."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor, nn

from dynatree_core.drafters.base import Drafter
from dynatree_core.engine.engine import ENGINE_OPTIONS, Engine
from dynatree_core.engine.handle import Handle
from dynatree_core.engine.lane import Lane
from dynatree_core.engine.observer import Observer, observers_of
from dynatree_core.engine.recovery import ended_by, filled, step, steps
from dynatree_core.engine.session import Session
from dynatree_core.errors import BatchError, DynaTreeError, InputError, ParameterError, PromptError
from dynatree_core.report import GenerationResult
from dynatree_core.request.request import Request
from dynatree_core.trace.record import Trace, tracing
from dynatree_core.tree.verdict import StepReport

__all__ = ["generate", "generate_batch", "run", "run_beside", "stream", "stream_batch"]

Result = TypeVar("Result")
# token ids, [tokens] or [1, tokens], or what a tokenizer returns
Prompt = Tensor | Sequence[int] | Mapping[str, Tensor]
Prompts = Sequence[Prompt] | Tensor | Mapping[str, Tensor]  # of several, or what a tokenizer returns for several texts


def generate(
    target: nn.Module,
    drafter: nn.Module | Drafter | str | None,
    input_ids: Prompt,
    *,
    trace: Trace | str | os.PathLike[str] | None = None,
    **options: Any,
) -> GenerationResult:
    """Generate by tree speculative decoding.

    The tokens are those of `target.generate(input_ids, do_sample=False)`, whatever drafter and policy are; with
    `do_sample=True` they are those of its sampling.

    Args:
        target: a transformers causal language model in eval mode.
        drafter: a transformers model with the target's vocabulary, a registered drafter's name such as
            "prompt_lookup", a Drafter, or None to draft nothing (autoregressive decoding).
        input_ids: the prompt, [tokens] or [1, tokens] integers, or what a tokenizer returns: a mapping with
            "input_ids" and "attention_mask".
        trace: a file in which every iteration is recorded, or a `dynatree_core.trace.Trace`, which several generations
            share; see docs/trace.md.

    Keyword Args:
        policy: a stack's string such as "confidence(high=0.8)+history", a policy object, a stack of `build_stack`, or a
            list of these; "phase3" by default. Objects and stacks are copied, so they stay as they are.
        max_new_tokens: tokens to generate at most; 128 by default, 0 returns nothing.
        max_length: instead, tokens of prompt and output at most.
        eos_token_id: one id or several that end the generation and are part of it. None (default): those of
            the target's generation config. An empty list: none.
        attention_mask: [tokens] or [1, tokens], 0 for padding at the prompt's left.
        position_ids: [tokens] or [1, tokens], the prompt's positions where they are not 0, 1, 2, …
        generation_config: settings of `transformers.GenerationConfig`, for what is not named in the call.
        inherit_settings: whether the target's own generation config fills what is still open, as in `generate`.
        logits_processor: a list of `transformers.LogitsProcessor`.
        stopping_criteria: a list of `transformers.StoppingCriteria`.
        tokenizer: the target's, needed with stop_strings and by drafters that look at text.
        do_sample: draw tokens instead of taking the best; with temperature, top_k, top_p, min_p and others, as in
            `generate`. False by default, whatever the target's generation config says.
        seed: of a random generator for this generation. None: torch's global one is used, as by `generate`; with
            the same seed either way the text is that of `generate(do_sample=True)`.
        logprobs: 0 or more: the result has the log-probability of each new token, by the model's own logits, and those
            of so many most probable tokens at its place. None (default): it has none; see docs/generation.md.
        logit_bias: a mapping from token ids to what is added to their logits.
        presence_penalty: taken from the logits of tokens that the new text has. 0 by default.
        frequency_penalty: likewise, as many times as the new text has them.
        grammar: a `Grammar` that the new text must follow: JSON of a schema, or a regular expression; needs `tokenizer`
            and the extra `grammar`. A text that reaches its length before its end breaks off.
        repetition_penalty, no_repeat_ngram_size, bad_words_ids, stop_strings, max_time and others: settings of
            `generate`; docs/generation.md has the list.
        tau: drafted nodes whose path probability is below it are cut.
        max_nodes: drafted nodes of a tree at most.
        max_depth: depth of a tree at most. For these three the strictest of this argument and of what policies
            with a parameter of that name ask for holds; where nobody asks: 0.05, 128 and 64.
        max_branch: children of a node that a policy may ask for, 16 by default; asking for more is a PolicyError.
        cache: None (default) keeps all tokens. "sinks=4,window=1024": a token sees the first 4 tokens and the last
            1024, at their places inside the cache (StreamingLLM), so prompt and output may be of any length.
            Autoregressive decoding with the same option gives the same output; see docs/generation.md.
        exact: None (default), or "fixed_width" for half precision: every verification pass has one shape, with
            max_nodes + 1 rows (16, unless max_nodes is given), and a tree is cut to its first chain. Autoregressive
            decoding (policy="autoregressive") with the same option then rounds alike; see docs/audit.md.
        runner: how forward passes are computed: "eager", "packed", "cudagraph", or "auto" (default), which chooses
            by device; see docs/runners.md.
        prefix_cache: a `PrefixCache` that several generations share: what this prompt has in common with the beginning
            of an earlier one and its output is not computed again.
        on_prefill: called after each chunk of the target's prompt, with the tokens done and all of them.
        observer: an `Observer`, or a list of them, that hears what happens in each iteration; see docs/watching.md.
        on_error: "raise" (default), or "fallback" to go on autoregressively, with a warning, after a policy or a
            drafter failed.
        costs: a `CostModel` that policies are given; None (default): what iterations take is measured where one asks.
        now: a function that gives seconds, for the times in reports; None (default): the machine's clock.
        trust_model: whether to take a target as it is that has code of somebody's own. By default one is asked, once
            and by some 30 short passes, whether its rows are independent of each other, and refused if they are not;
            see docs/models.md.

    Returns:
        New tokens, stop reason ("eos", "length", "stop_string", "time" or "criterion") and metrics.

    Raises:
        InputError: an argument that cannot be used; nothing was run.
        DynaTreeError: what failed while running; its `partial` holds the result up to there.
    """
    with tracing(trace, options.get("tokenizer")) as new_observer:
        session = Session(target, drafter, input_ids, **_also_observed(options, new_observer))
        for _ in run(session):
            pass
    return session.result()


def stream(
    target: nn.Module,
    drafter: nn.Module | Drafter | str | None,
    input_ids: Prompt,
    *,
    trace: Trace | str | os.PathLike[str] | None = None,
    **options: Any,
) -> Iterator[StepReport]:
    """Like `generate`, but yields a report per decode step as its tokens are committed.

    `report.token_ids` are the step's tokens. To have the metrics at the end as well, make a `Session` and
    iterate over `run(session)`; `session.result()` is valid at any time. Arguments are checked at once.
    """
    with contextlib.ExitStack() as opened:
        new_observer = opened.enter_context(tracing(trace, options.get("tokenizer")))
        session = Session(target, drafter, input_ids, **_also_observed(options, new_observer))
        return _closing(run(session), opened.pop_all())


def run(session: Session) -> Iterator[StepReport]:
    """Drive a session to its end, one decode step at a time.

    A caller that stops listening may call it again later: the session goes on where it was.

    Raises:
        DynaTreeError: its `partial` holds what was committed.
    """
    reason = "error"  # of its end, where the tokens do not say so
    try:
        with _ending(session):
            yield from _steps(session)
    except (KeyboardInterrupt, GeneratorExit):  # Ctrl-C, or a caller that has stopped listening
        reason = "interrupted"
        raise
    finally:
        with _ending(session):  # telling of the end takes memory too
            session.report_end(reason)


def run_beside(sessions: Sequence[Session]) -> None:
    """Drive sessions of one engine to their ends, in the same iterations and by the same passes.

    Raises:
        Exception: what one of them fails with; a `DynaTreeError` has what that one has committed as its `partial`. The
            others stay where they are.
    """
    reason = "error"
    try:
        for session in sessions:
            if session.stop_reason is None:
                with _ending(session):
                    for _ in filled(session):
                        pass
        while going := [session for session in sessions if session.stop_reason is None]:
            for lane, outcome in steps(going).items():
                if isinstance(outcome, Exception):
                    with _ending(lane):
                        raise outcome
        reason = "interrupted"
    finally:
        for session in sessions:
            session.keep_prefix()
            with _ending(session):
                session.report_end(reason)


@contextlib.contextmanager
def _ending(lane: Lane) -> Iterator[None]:
    """What the block raises ends this sequence: it gets its name and what was committed."""
    try:
        yield
    except (DynaTreeError, RuntimeError, MemoryError) as error:
        ended = ended_by(lane, error)
        if ended is error:
            raise
        raise ended from error


def _steps(session: Session) -> Iterator[StepReport]:
    try:
        if session.stop_reason is None:
            for _ in filled(session):
                pass
        while session.stop_reason is None:
            yield step(session)
    finally:
        session.keep_prefix()


def _also_observed(options: Mapping[str, Any], new_observer: Callable[[], Observer] | None) -> dict[str, Any]:
    """The options, with one more observer besides those that the caller has given."""
    if new_observer is None:
        return dict(options)
    return {**options, "observer": [*observers_of(options.get("observer")), new_observer()]}


def _closing(reports: Iterator[Result], opened: contextlib.ExitStack) -> Iterator[Result]:
    with opened:
        yield from reports


def generate_batch(
    target: nn.Module,
    drafter: nn.Module | Drafter | str | None,
    prompts: Prompts,
    *,
    each: Sequence[Mapping[str, Any]] | None = None,
    max_sequences: int = 8,
    trace: Trace | str | os.PathLike[str] | None = None,
    **options: Any,
) -> list[GenerationResult]:
    """Generate from many prompts, several at once; each output is that of `generate` with the same prompt alone.

    Args:
        target: as for `generate`.
        drafter: as for `generate`.
        prompts: prompts as `generate` takes them, or what a tokenizer returns for several: [prompts, tokens] integers,
            padded at the left, with their "attention_mask".
        each: for each prompt, the options in which it differs from the others.
        max_sequences: sequences that run at once.
        trace: as for `generate`: one file for all, in which each prompt is a sequence.
        options: those of `generate`, for all prompts. Processors and stopping criteria among them are copied for each
            prompt. With `do_sample=True` every prompt has the same `seed`, unless `each` says otherwise; without one
            each is drawn from torch's global generator.

    Returns:
        Results in the order of the prompts.

    Raises:
        InputError: something that cannot be used, with the place of the prompt; nothing was run.
        BatchError: some sequences failed, all others went on to their ends; it has the results.
    """
    handles, reports = _submitted(target, drafter, prompts, each, max_sequences, trace, options)
    for _ in reports:
        pass
    return [handle.result() for handle in handles]


def stream_batch(
    target: nn.Module,
    drafter: nn.Module | Drafter | str | None,
    prompts: Prompts,
    *,
    each: Sequence[Mapping[str, Any]] | None = None,
    max_sequences: int = 8,
    trace: Trace | str | os.PathLike[str] | None = None,
    **options: Any,
) -> Iterator[tuple[int, StepReport]]:
    """Like `generate_batch`, but yields the place of the prompt and a report as soon as tokens are committed.

    Arguments are checked at once. A `BatchError` comes when all that can go on have ended.
    """
    _, reports = _submitted(target, drafter, prompts, each, max_sequences, trace, options)
    return reports


def _reports(engine: Engine, handles: Sequence[Handle]) -> Iterator[tuple[int, StepReport]]:
    while not all(handle.is_done for handle in handles):
        for event in engine.step():
            if event.report is not None:
                yield event.handle.number, event.report
    _raise_faults(handles)


def _submitted(
    target: nn.Module,
    drafter: nn.Module | Drafter | str | None,
    prompts: Prompts,
    each: Sequence[Mapping[str, Any]] | None,
    max_sequences: int,
    trace: Trace | str | os.PathLike[str] | None,
    options: Mapping[str, Any],
) -> tuple[list[Handle], Iterator[tuple[int, StepReport]]]:
    """The prompts in the waiting line of an engine of their own, and their reports, which drive it to their end."""
    listed = _prompts(prompts)
    of_engine = {name: value for name, value in options.items() if name in ENGINE_OPTIONS}
    common = {name: value for name, value in options.items() if name not in ENGINE_OPTIONS}
    with contextlib.ExitStack() as opened:
        new_observer = opened.enter_context(tracing(trace, options.get("tokenizer")))
        engine = Engine(target, drafter, max_sequences=max_sequences, max_waiting=len(listed), **of_engine)
        requests = _requests(engine, listed, each, common, new_observer)
        handles = [engine.submit(request) for request in requests]
        return handles, _closing(_reports(engine, handles), opened.pop_all())


def _requests(
    engine: Engine,
    prompts: Sequence[Prompt],
    each: Sequence[Mapping[str, Any]] | None,
    common: Mapping[str, Any],
    new_observer: Callable[[], Observer] | None,
) -> list[Request]:
    """A request for each prompt, with the options that all have and its own."""
    wanted = f"each must have a mapping of options for each of the {len(prompts)} prompts"
    if isinstance(each, Mapping | str) or not isinstance(each, Iterable | None):
        raise ParameterError(f"{wanted}, got {_kind(each)}; give a list of mappings")
    own_options = [{}] * len(prompts) if each is None else list(each)
    if len(own_options) != len(prompts):
        raise ParameterError(f"{wanted}, got {len(own_options)}")
    requests = []
    for place, (prompt, own) in enumerate(zip(prompts, own_options, strict=True)):
        try:
            if not isinstance(own, Mapping):
                raise ParameterError(f"its options must be a mapping, got {_kind(own)}; give {{}} for none")
            of_engine_too = [name for name in own if name in ENGINE_OPTIONS]
            if of_engine_too:
                raise ParameterError(
                    f"{', '.join(of_engine_too)} must be the same for all prompts, got a value of its own; give it to "
                    "generate_batch"
                )
            own = _also_observed({**_copied(common), **own}, new_observer)
            requests.append(engine.request(prompt, **own))
        except InputError as error:
            raise type(error)(f"prompt {place}: {error}") from error
    return requests


def _prompts(prompts: Prompts) -> list[Prompt]:
    """One prompt each, of those of a tokenizer too."""
    if isinstance(prompts, Mapping):
        ids = prompts.get("input_ids")
        if not isinstance(ids, Tensor) or ids.dim() != 2:
            raise PromptError(
                f"prompts of a tokenizer must have input_ids [prompts, tokens], got {_kind(ids)}; ask it for "
                "return_tensors='pt' and padding, or give a list of prompts"
            )
        given = {name: value for name, value in prompts.items() if value is not None}
        return [{name: value[row : row + 1] for name, value in given.items()} for row in range(ids.shape[0])]
    if isinstance(prompts, str) or not isinstance(prompts, Sequence | Tensor):
        raise PromptError(f"prompts must be a list of prompts, got {_kind(prompts)}; give [prompt] for one")
    return [*prompts]


def _kind(value: object) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


# what remembers its calls, so that no two sequences may have the same
_REMEMBERING = ("logits_processor", "stopping_criteria")


def _copied(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options for one more prompt."""
    found = dict(options)
    for name in _REMEMBERING:
        if found.get(name):
            try:
                found[name] = copy.deepcopy(found[name])
            except (TypeError, RuntimeError) as error:
                raise ParameterError(
                    f"{name} for all prompts must be copyable, since each prompt has its own, but {error}; give each "
                    "prompt one by `each`"
                ) from error
    return found


def _raise_faults(handles: Sequence[Handle]) -> None:
    errors = {place: handle.error for place, handle in enumerate(handles) if handle.error is not None}
    if errors:
        first = next(iter(errors))
        raise BatchError(
            f"{len(errors)} of {len(handles)} sequences failed, the first of them prompt {first}: {errors[first]}; the "
            "error has the results of all",
            errors,
            [handle.partial for handle in handles],
        ) from errors[first]
