"""A session: the state of one generation. What is checked before anything runs is checked here."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dynatree_core.architectures import check_causal_lm, max_positions, vocab_size
from dynatree_core.cache import TreeCache
from dynatree_core.clock import StageClock
from dynatree_core.drafters.base import Drafter, DraftPlan, DraftState
from dynatree_core.drafters.model import ModelDrafter
from dynatree_core.errors import (
    ContextLimitError,
    DrafterError,
    InputError,
    OutOfMemoryError,
    ParameterError,
    PromptError,
)
from dynatree_core.metrics import summarise
from dynatree_core.plugins import build_drafter, build_stack
from dynatree_core.records import GenerationResult, Limits, Proposals, StepReport, StepStats
from dynatree_core.runner import EagerRunner
from dynatree_core.stack import PolicyStack
from dynatree_core.tree import TokenTree

__all__ = ["Session"]

DEFAULT_TAU = 0.05
DEFAULT_MAX_NODES = 128
# settings of a generation config by which generate() changes greedy decoding -> the value that changes nothing
_SETTINGS_OF_GENERATE: dict[str, object] = {
    "bad_words_ids": None,
    "begin_suppress_tokens": None,
    "exponential_decay_length_penalty": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "guidance_scale": 1,
    "max_time": None,
    "min_length": 0,
    "min_new_tokens": 0,
    "no_repeat_ngram_size": 0,
    "num_beams": 1,
    "repetition_penalty": 1,
    "sequence_bias": None,
    "stop_strings": None,
    "suppress_tokens": None,
    "watermarking_config": None,
}
# no tree of the literature is deeper, and a policy that never stops must stop somewhere
DEFAULT_MAX_DEPTH = 64


class Session:
    """One generation: models, caches, policies, and the tokens committed so far.

    The arguments are those of `dynatree_core.generate`, which is the usual way to make one.
    """

    def __init__(
        self,
        target: nn.Module,
        drafter: nn.Module | Drafter | str | None,
        input_ids: Tensor | Sequence[int],
        *,
        policy: str | object | Sequence[str | object] = "phase3",
        max_new_tokens: int = 128,
        eos_token_id: int | Sequence[int] | None = None,
        tau: float | None = None,
        max_nodes: int | None = None,
        max_depth: int | None = None,
        top_k: int = 16,
        on_error: str = "raise",
    ) -> None:
        check_causal_lm(target, "target")
        if on_error not in ("raise", "fallback"):
            raise ParameterError(f"on_error must be 'raise' or 'fallback', got {on_error!r}")
        self.on_error = on_error
        self.device: torch.device = target.device  # type: ignore[assignment]
        self.vocab_size = vocab_size(target)
        self.prompt_ids = _checked_prompt(input_ids, self.vocab_size)
        self.max_new_tokens = _checked_max_new_tokens(max_new_tokens, len(self.prompt_ids), max_positions(target))
        self.eos_token_ids = _eos_token_ids(target, eos_token_id)
        _warn_of_settings_not_applied(target)
        self.stack: PolicyStack = build_stack(policy)
        self.limits = _limits(self.stack, max_depth, max_nodes, tau, top_k, self.vocab_size)
        self.clock = StageClock(self.device)

        num_tokens = len(self.prompt_ids) + self.max_new_tokens
        self.target = EagerRunner(target, self.clock)
        self.cache = TreeCache(num_tokens + self.limits.max_nodes)
        source = _as_drafter(drafter)
        self.drafter_name = None if source is None else str(source)
        self.draft_state: DraftState | None = None
        if source is not None:
            with self.blame_drafter(InputError):
                self.draft_state = source.start(
                    DraftPlan(self.vocab_size, num_tokens, self.limits.max_nodes, self.device, self.clock)
                )

        self.new_token_ids: list[int] = []
        self._ids = torch.zeros(num_tokens, dtype=torch.int64, device=self.device)
        self._ids[: len(self.prompt_ids)] = torch.tensor(self.prompt_ids)
        self.steps: list[StepStats] = []
        self.last_report: StepReport | None = None

    @property
    def committed_ids(self) -> Tensor:
        """[committed] int64 on the device: prompt and new tokens."""
        return self._ids[: len(self.prompt_ids) + len(self.new_token_ids)]

    @property
    def num_iterations(self) -> int:
        """Decode steps done."""
        return len(self.steps)

    @property
    def num_tokens_left(self) -> int:
        """New tokens that may still be committed."""
        return self.max_new_tokens - len(self.new_token_ids)

    @property
    def depth_limit(self) -> int:
        """How deep the next tree may be; a step commits one token more than its depth, so the end clips it."""
        return min(self.limits.max_depth, self.num_tokens_left - 1) if self.draft_state is not None else 0

    @property
    def stop_reason(self) -> str | None:
        """ "eos", "length", or None while there is more to come."""
        if self.new_token_ids and self.new_token_ids[-1] in self.eos_token_ids:
            return "eos"
        return "length" if self.num_tokens_left <= 0 else None

    def propose(self, tree: TokenTree) -> Proposals:
        """The drafter's proposals for the tree's last level, in the shape that the contract asks for.

        Raises:
            DrafterError: naming the drafter and the fault.
        """
        assert self.draft_state is not None, "a session without a drafter never asks for proposals"
        with self.clock.measure("draft"), self.blame_drafter():
            proposals = self.draft_state.propose(self.committed_ids, tree, self.limits.top_k)
        shape = (tree.level_sizes[-1], self.limits.top_k)
        is_sound = isinstance(proposals, Proposals) and (
            proposals.token_ids.shape == proposals.logprobs.shape == shape
            and proposals.token_ids.dtype == torch.int64
            and proposals.logprobs.dtype == torch.float32
        )
        if not is_sound:
            raise DrafterError(
                f"drafter '{self.drafter_name}' must propose int64 token_ids and float32 logprobs of shape "
                f"{list(shape)}, got {proposals}"
            )
        return proposals

    def record(self, report: StepReport) -> None:
        """Append a step's verified tokens and count it."""
        start = len(self.prompt_ids) + len(self.new_token_ids)
        self._ids[start : start + len(report.token_ids)] = torch.tensor(report.token_ids)
        self.new_token_ids.extend(report.token_ids)
        self.last_report = report
        self.steps.append(
            StepStats(
                num_drafted=report.tree.num_drafted,
                depth=report.tree.max_depth,
                num_accepted=report.num_accepted,
                num_committed=len(report.token_ids),
            )
        )

    def rollback(self) -> None:
        """Forget an iteration that failed; the committed tokens and their cache rows stay."""
        self.cache.rollback()
        if self.draft_state is not None:
            with self.blame_drafter():
                self.draft_state.rollback()

    def stop_drafting(self) -> None:
        """Decode autoregressively for the rest of the session."""
        self.cache.rollback()
        self.draft_state = None
        self.stack = self.stack.silenced()

    @contextmanager
    def blame_drafter(self, *but: type[Exception]) -> Iterator[None]:
        """Turn whatever a drafter raises into a DrafterError that names it, but for these and lack of memory."""
        as_they_are: tuple[type[Exception], ...] = (DrafterError, OutOfMemoryError, *but)
        try:
            yield
        except as_they_are:
            raise
        except Exception as error:
            raise DrafterError(f"drafter '{self.drafter_name}' raised {type(error).__name__}: {error}") from error

    def result(self, stop_reason: str | None = None) -> GenerationResult:
        """What was generated so far; valid between any two steps.

        Args:
            stop_reason: why the generation ended, where its own tokens do not say so.
        """
        reason = self.stop_reason or stop_reason or "interrupted"
        return GenerationResult(list(self.new_token_ids), reason, summarise(self))


def _as_drafter(drafter: nn.Module | Drafter | str | None) -> Drafter | None:
    if drafter is None or isinstance(drafter, Drafter):
        return drafter
    if isinstance(drafter, str):
        return build_drafter(drafter)
    return ModelDrafter(drafter)


def _checked_prompt(input_ids: Tensor | Sequence[int], vocab: int) -> list[int]:
    try:
        ids = torch.as_tensor(input_ids)
    except (TypeError, ValueError, RuntimeError) as error:
        raise PromptError(
            f"a prompt is token ids, [tokens] or [1, tokens] integers, got {input_ids!r:.60}; tokenize the text first"
        ) from error
    if ids.numel() == 0:
        raise PromptError(
            "a prompt must have at least one token, got none; start from the model's BOS token if need be"
        )
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise PromptError(f"a prompt is token ids, that is integers, got {ids.dtype}; tokenize the text first")
    if ids.dim() == 2 and ids.shape[0] == 1:
        ids = ids[0]
    if ids.dim() != 1:
        raise PromptError(f"a prompt is one sequence, [tokens] or [1, tokens], got shape {list(ids.shape)}")
    prompt: list[int] = ids.tolist()
    if min(prompt) < 0 or max(prompt) >= vocab:
        raise PromptError(
            f"prompt tokens must be from 0 to {vocab - 1}, the target's vocabulary, got {min(prompt)} to {max(prompt)}"
        )
    return prompt


def _checked_max_new_tokens(max_new_tokens: int, num_prompt: int, limit: int | None) -> int:
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 0:
        raise ParameterError(f"max_new_tokens must be an integer of at least 0, got {max_new_tokens!r}")
    if limit is not None and num_prompt + max_new_tokens > limit:
        raise ContextLimitError(
            f"prompt and new tokens must fit the target's context of {limit} tokens, got {num_prompt} + "
            f"{max_new_tokens}; shorten the prompt or set max_new_tokens to at most {max(limit - num_prompt, 0)}"
        )
    return max_new_tokens


def _eos_token_ids(target: nn.Module, eos_token_id: int | Sequence[int] | None) -> frozenset[int]:
    """None means the model's own, as in generate(); an empty sequence means never to stop at a token."""
    if eos_token_id is None:
        generation_config = getattr(target, "generation_config", None)
        eos_token_id = generation_config.eos_token_id if generation_config is not None else None
    if eos_token_id is None:
        return frozenset()
    try:
        ids = torch.as_tensor(eos_token_id)
        return frozenset(operator.index(token_id) for token_id in ids.flatten().tolist())
    except (TypeError, ValueError, RuntimeError) as error:
        raise ParameterError(f"eos_token_id must be a token id or several, integers, got {eos_token_id!r}") from error


def _warn_of_settings_not_applied(target: nn.Module) -> None:
    """Say what the model's generation config asks for that generate() applies to greedy decoding and this does not."""
    config = getattr(target, "generation_config", None)
    given = {name: getattr(config, name, None) for name in _SETTINGS_OF_GENERATE}
    not_applied = {name: value for name, value in given.items() if value not in (None, _SETTINGS_OF_GENERATE[name])}
    if not_applied:
        listed = ", ".join(f"{name}={value!r}" for name, value in not_applied.items())
        warnings.warn(
            f"the output is the target's plain greedy text: its generation config asks for {listed}, which generate() "
            "would apply and this does not; set them to None to make both alike",
            RuntimeWarning,
            stacklevel=4,
        )


def _limits(
    stack: PolicyStack,
    max_depth: int | None,
    max_nodes: int | None,
    tau: float | None,
    top_k: int,
    vocab: int,
) -> Limits:
    """The strictest of what the caller and the policies ask for; the default where nobody asks.

    A policy asks by having a parameter called `max_depth`, `max_nodes` or `tau`.
    """
    for name, value, minimum in (
        ("max_depth", max_depth, 0),
        ("max_nodes", max_nodes, 0),
        ("top_k", top_k, 1),
    ):
        is_missing = value is None and name != "top_k"
        if not is_missing and (isinstance(value, bool) or not isinstance(value, int) or value < minimum):
            raise ParameterError(f"{name} must be an integer of at least {minimum}, got {value!r}")
    if tau is not None and (isinstance(tau, bool) or not isinstance(tau, int | float) or not 0 <= tau <= 1):
        raise ParameterError(f"tau must be a probability from 0 to 1, got {tau!r}")
    return Limits(
        max_depth=int(min(_asked(stack, "max_depth", max_depth), default=DEFAULT_MAX_DEPTH)),
        max_nodes=int(min(_asked(stack, "max_nodes", max_nodes), default=DEFAULT_MAX_NODES)),
        tau=max(_asked(stack, "tau", tau), default=DEFAULT_TAU),
        top_k=min(top_k, vocab),
    )


def _asked(stack: PolicyStack, name: str, given: float | None) -> list[float]:
    values = [] if given is None else [given]
    for policy_name, policy in stack.policies.items():
        value = getattr(policy, name, None)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
            raise ParameterError(f"policy '{policy_name}': its {name} must be a number of at least 0, got {value!r}")
        values.append(value)
    return values
