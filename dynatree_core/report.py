"""What a generation returns: its tokens and its metrics."""

from __future__ import annotations

import attrs

__all__ = ["GenerationReport", "GenerationResult", "StepStats", "TokenLogprob"]


@attrs.frozen
class TokenLogprob:
    """What the target thought of a new token, before it was chosen: log-softmax of the logits at its place, in float32.

    These are the model's own logits: logits processors, penalties, temperature and the like have not changed them.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]  # token id and log-probability of the most probable ones, as many as were asked


@attrs.frozen
class StepStats:
    """The numbers of one decode step that the metrics are made from."""

    num_drafted: int  # drafted nodes that were verified
    depth: int  # depth of the verified tree
    num_accepted: int  # committed tokens that had been drafted
    num_committed: int  # num_accepted, plus the bonus token unless generation stopped before it


@attrs.frozen
class GenerationReport:
    """The metrics of one generation. Times are wall-clock seconds; a ratio of nothing is None."""

    policy: str  # the stack in its canonical spelling
    drafter: str | None
    runner: str  # how the target's forward passes were computed
    num_prompt_tokens: int
    num_reused_tokens: int  # of the prompt, copied from the prefix cache instead of prefilled
    num_new_tokens: int
    num_iterations: int  # target forward passes after the prefill
    num_drafted_nodes: int
    num_accepted_tokens: int  # committed tokens that had been drafted
    tokens_per_iteration: float | None  # committed tokens ÷ iterations
    path_acceptance: float | None  # accepted ÷ depth of the tree, averaged over iterations that drafted
    node_acceptance: float | None  # accepted ÷ drafted nodes
    tokens_per_second: float | None  # new tokens ÷ decode_seconds, the prefill apart
    repetition: float | None  # share of generated 4-grams that occurred earlier in the same output
    prefill_seconds: float
    decode_seconds: float  # draft + verify + rest
    draft_seconds: float  # inside the drafter
    verify_seconds: float  # inside the target's forward passes
    rest_seconds: float  # policies, tree, masks, verification, caches
    overhead_seconds: float  # decode time outside the forward passes of both models
    steps: tuple[StepStats, ...] = attrs.field(repr=False)


@attrs.frozen
class GenerationResult:
    """What a generation returns."""

    token_ids: list[int]  # the new tokens, the prompt not among them
    stop_reason: str  # "eos", "length", "stop_string", "time", "criterion", "interrupted" or "error"
    report: GenerationReport
    logprobs: list[TokenLogprob] | None = None  # of each new token; None: not asked for
