"""What an answer says of how it was made: `usage`, with the figures of drafting, and vLLM's `metrics`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dynatree_core.engine.handle import Handle
from dynatree_core.report import GenerationReport, StepStats

__all__ = ["figures", "position_counts", "usage", "usage_so_far"]


def figures(handles: Sequence[Handle], *, num_prompts: int = 1) -> dict[str, Any]:
    """What a whole answer and a stream's last chunk have beside the choices.

    Args:
        handles: of the choices, all done; those of one prompt follow each other.
        num_prompts: how many prompts they answer.
    """
    return {"usage": usage(handles, num_prompts=num_prompts), "metrics": _metrics(handles)}


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
        **usage_so_far(num_prompt, num_new),
        "prompt_tokens_details": {"cached_tokens": num_reused},
        "dynatree": _figures(reports) | _times(handles),
    }


def usage_so_far(num_prompt: int, num_new: int) -> dict[str, int]:
    """The numbers of OpenAI's API, from the tokens of all prompts and of all choices."""
    return {"prompt_tokens": num_prompt, "completion_tokens": num_new, "total_tokens": num_prompt + num_new}


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


def _metrics(handles: Sequence[Handle]) -> dict[str, Any] | None:
    """One sequence in the words of vLLM's `metrics`, which benchmark clients read; None of several, as there.

    Times are milliseconds. Source: vLLM's docs/features/per_request_metrics.md and
    docs/features/speculative_decoding/acceptance_metrics.md.
    """
    if len(handles) > 1:
        return None
    [handle] = handles
    times, started = handle.token_times, handle.started_at
    generating = times[-1] - times[0] if times else None
    computing = times[-1] - started if times and started is not None else None
    return {
        "time_to_first_token_ms": _milliseconds(times[0] - started if times and started is not None else None),
        "generation_time_ms": _milliseconds(generating),
        "queue_time_ms": _milliseconds(started - handle.submitted_at if started is not None else None),
        "mean_itl_ms": _milliseconds(generating / (len(times) - 1) if generating is not None and times[1:] else None),
        "tokens_per_second": len(times) / computing if computing else None,
        "speculative_decoding": _acceptance([step for step in handle.partial.report.steps if step.depth]),
    }


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else 1000 * seconds


def _acceptance(steps: Sequence[StepStats]) -> dict[str, Any] | None:
    """How drafts were taken, from the iterations that have drafted; None: there are none.

    The most tokens that an iteration could take are the depth of the deepest tree.
    """
    if not steps:
        return None
    deepest = max(step.depth for step in steps)
    taken = [step.num_accepted for step in steps]
    num_drafted = sum(step.num_drafted for step in steps)
    return {
        "mean_acceptance_length": 1 + sum(taken) / len(steps),
        "draft_acceptance_rate": sum(taken) / num_drafted,
        "acceptance_histogram": [taken.count(number) for number in range(deepest + 1)],
        "num_spec_steps": len(steps),
        "num_accepted_draft_tokens": sum(taken),
        "num_draft_tokens": num_drafted,
        "num_spec_tokens": deepest,
    }
