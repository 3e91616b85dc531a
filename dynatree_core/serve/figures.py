"""What an answer says of how it was made: `usage`, with the figures of drafting."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dynatree_core.engine.handle import Handle
from dynatree_core.report import GenerationReport, StepStats

__all__ = ["position_counts", "usage"]


def usage(handles: Sequence[Handle], *, num_prompts: int = 1) -> dict[str, Any]:
    """The usage of one request, all its choices together.

    Args:
        handles: of the choices, all done; those of one prompt follow each other.
        num_prompts: how many prompts they answer.
    """
    reports = [handle.partial.report for handle in handles]
    num_choices = max(1, len(reports) // num_prompts)
    num_prompt = sum(report.num_prompt_tokens for report in reports[::num_choices])
    num_new = sum(report.num_new_tokens for report in reports)
    num_reused = sum(report.num_reused_tokens for report in reports[::num_choices])
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_new,
        "total_tokens": num_prompt + num_new,
        "prompt_tokens_details": {"cached_tokens": num_reused},
        "dynatree": _figures(reports) | _times(handles),
    }


def _figures(reports: Sequence[GenerationReport]) -> dict[str, Any]:
    steps = [step for report in reports for step in report.steps]
    num_new = sum(report.num_new_tokens for report in reports)
    reached, accepted = position_counts(steps)
    return {
        "policy": reports[0].policy,
        "drafter": reports[0].drafter,
        "iterations": len(steps),
        "drafted_tokens": sum(step.num_drafted for step in steps),
        "accepted_tokens": sum(step.num_accepted for step in steps),
        "tokens_per_iteration": num_new / len(steps) if steps else None,
        "position_acceptance": [yes / all_ for yes, all_ in zip(accepted, reached, strict=True)],
    }


def position_counts(steps: Sequence[StepStats]) -> tuple[list[int], list[int]]:
    """For each depth of a tree from 1: iterations whose tree was so deep, and those that accepted a token there."""
    depths = range(1, max((step.depth for step in steps), default=0) + 1)
    reached = [sum(step.depth >= depth for step in steps) for depth in depths]
    return reached, [sum(step.num_accepted >= depth for step in steps) for depth in depths]


def _times(handles: Sequence[Handle]) -> dict[str, float | None]:
    """Seconds from when the request was submitted; of several choices the first that came, and the last that ended."""
    begin = min(handle.submitted_at for handle in handles)
    started = [handle.started_at for handle in handles if handle.started_at is not None]
    first = [handle.first_token_at for handle in handles if handle.first_token_at is not None]
    ended = [handle.ended_at for handle in handles if handle.ended_at is not None]
    return {
        "waiting_seconds": min(started) - begin if started else None,
        "first_token_seconds": min(first) - begin if first else None,
        "seconds": max(ended) - begin if ended else None,
    }
