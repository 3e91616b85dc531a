"""Generate and stream: the public way to run a session to its end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import attrs
from torch import Tensor, nn

from dynatree_core.drafters.base import Drafter
from dynatree_core.engine.decode import decode_step, prefill
from dynatree_core.engine.session import Session
from dynatree_core.errors import DrafterError, DynaTreeError, NonFiniteLogitsError, PolicyError
from dynatree_core.report import GenerationResult
from dynatree_core.runners.passes import is_out_of_memory, out_of_memory
from dynatree_core.tree.verdict import StepReport

__all__ = ["generate", "run", "stream"]


def generate(
    target: nn.Module,
    drafter: nn.Module | Drafter | str | None,
    input_ids: Tensor | Sequence[int] | Mapping[str, Tensor],
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
        on_prefill: called after each chunk of the prompt, by the target and then by a model that drafts, with the
            tokens done and all of them.
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
    session = Session(target, drafter, input_ids, **options)
    for _ in run(session):
        pass
    return session.result()


def stream(
    target: nn.Module,
    drafter: nn.Module | Drafter | str | None,
    input_ids: Tensor | Sequence[int] | Mapping[str, Tensor],
    **options: Any,
) -> Iterator[StepReport]:
    """Like `generate`, but yields a report per decode step as its tokens are committed.

    `report.token_ids` are the step's tokens. To have the metrics at the end as well, make a `Session` and
    iterate over `run(session)`; `session.result()` is valid at any time. Arguments are checked at once.
    """
    return run(Session(target, drafter, input_ids, **options))


def run(session: Session) -> Iterator[StepReport]:
    """Drive a session to its end, one decode step at a time.

    A caller that stops listening may call it again later: the session goes on where it was.

    Raises:
        DynaTreeError: its `partial` holds what was committed.
    """
    try:
        yield from _steps(session)
    except DynaTreeError as error:
        error.partial = session.result("error")
        session.report_fault(error, "ended")
        raise
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        named = out_of_memory("the generation", error)
        named.partial = session.result("error")
        session.report_fault(named, "ended")
        raise named from error


def _steps(session: Session) -> Iterator[StepReport]:
    try:
        if session.stop_reason is None:
            _prefill(session)
        while session.stop_reason is None:
            yield _step(session)
    finally:
        session.keep_prefix()


def _prefill(session: Session) -> None:
    try:
        session.rollback()  # what a step that was broken off has left behind
        prefill(session)
        return
    except DrafterError as error:
        session.fall_back(error)
    prefill(session)  # the target's part, if it was not reached


def _step(session: Session) -> StepReport:
    """One decode step, and what happens when a policy, the drafter or a draft fails in it."""
    steps_before = session.num_iterations
    try:
        try:
            return decode_step(session)
        except NonFiniteLogitsError as error:
            if session.depth_limit == 0 or session.is_observers(error):
                raise
            session.report_fault(error, "root alone")
        return _step_without_draft(session)
    except (PolicyError, DrafterError) as error:
        session.fall_back(error)
    if session.num_iterations > steps_before and session.last_report is not None:
        return session.last_report  # it failed after the step was committed
    return decode_step(session)


def _step_without_draft(session: Session) -> StepReport:
    """The step again, with the root alone.

    A wrong draft may overflow where the target's own text never goes. In an early layer its keys and values are not
    numbers then, and they are in all rows of the pass, masked or not.
    """
    session.rollback()
    session.cache.wipe()
    sequence, limits = session.sequence, session.sequence.limits
    sequence.limits = attrs.evolve(limits, max_depth=0)
    try:
        return decode_step(session)
    finally:
        sequence.limits = limits
