"""The metrics of a generation, defined in one place (docs/metrics.md explains them)."""

from __future__ import annotations

from collections.abc import Sequence

from dynatree_core.clock import StageClock
from dynatree_core.report import GenerationReport, StepStats

__all__ = ["repetition", "summarise"]


def summarise(
    *,
    policy: str,
    drafter: str | None,
    runner: str,
    num_prompt_tokens: int,
    num_reused_tokens: int,
    token_ids: Sequence[int],
    steps: Sequence[StepStats],
    clock: StageClock,
) -> GenerationReport:
    """The report of a generation so far; the arguments are what its fields of the same names are made from."""
    num_new = len(token_ids)
    num_drafted = sum(step.num_drafted for step in steps)
    num_accepted = sum(step.num_accepted for step in steps)
    path_shares = [step.num_accepted / step.depth for step in steps if step.depth]
    decode, draft, verify = (clock.seconds(stage) for stage in ("decode", "draft", "verify"))
    return GenerationReport(
        policy=policy,
        drafter=drafter,
        runner=runner,
        num_prompt_tokens=num_prompt_tokens,
        num_reused_tokens=num_reused_tokens,
        num_new_tokens=num_new,
        num_iterations=len(steps),
        num_drafted_nodes=num_drafted,
        num_accepted_tokens=num_accepted,
        tokens_per_iteration=num_new / len(steps) if steps else None,
        path_acceptance=sum(path_shares) / len(path_shares) if path_shares else None,
        node_acceptance=num_accepted / num_drafted if num_drafted else None,
        tokens_per_second=num_new / decode if decode else None,
        repetition=repetition(token_ids),
        prefill_seconds=clock.seconds("prefill"),
        decode_seconds=decode,
        draft_seconds=draft,
        verify_seconds=verify,
        rest_seconds=decode - draft - verify,
        overhead_seconds=decode - verify - clock.seconds("draft_forward"),
        steps=tuple(steps),
    )


def repetition(token_ids: Sequence[int], *, n: int = 4) -> float | None:
    """Share of n-grams that occurred earlier in the same sequence, in [0, 1]; None when there is no n-gram."""
    ngrams = [tuple(token_ids[i : i + n]) for i in range(len(token_ids) - n + 1)]
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else None
