"""A conversation: what was said, and a session for each answer.

Every answer is a generation of its own whose prompt is the whole conversation, through the tokenizer's chat template.
The prefix cache copies what earlier answers have left of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import attrs

from dynatree_core.cache.prefix_cache import PrefixCache
from dynatree_core.drafters.build import as_drafter
from dynatree_core.engine.session import Session
from dynatree_core.errors import ContextLimitError
from dynatree_core.models.architectures import max_positions
from dynatree_core.models.load import LoadedModel
from dynatree_core.policy.build import build_stack
from dynatree_core.report import GenerationResult
from dynatree_core.text.prompt import chat_ids
from dynatree_core.text.stream import decode_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Conversation"]


@attrs.define(eq=False)
class Conversation:
    """What was said so far, and what the next answer is made with."""

    target: LoadedModel
    tokenizer: PreTrainedTokenizerBase
    drafter: Any  # as `generate` takes it
    drafter_name: str  # as it was asked for
    policy: str
    max_new_tokens: int  # of one answer
    prefix_cache: PrefixCache
    system: str | None = None
    seed: int | None = None  # of the first answer, the next one for the second and so on
    options: Mapping[str, Any] = attrs.field(factory=dict)  # of every session
    messages: list[dict[str, str]] = attrs.field(init=False)
    results: list[GenerationResult] = attrs.field(init=False)  # one for each answer

    def __attrs_post_init__(self) -> None:
        self.reset()

    @property
    def context_limit(self) -> int | None:
        """Tokens that the models have positions for, all turns together; None when there is no limit."""
        drafter = as_drafter(self.drafter)
        limits = [max_positions(self.target.model), drafter.context_limit(self.target.model) if drafter else None]
        return min((limit for limit in limits if limit is not None), default=None)

    def reset(self) -> None:
        """Begin a new conversation. Its rows stay in the prefix cache until others take their place."""
        self.messages = [{"role": "system", "content": self.system}] if self.system is not None else []
        self.results = []

    def ask(self, text: str, on_prefill: Callable[[int, int], None] | None = None) -> Session:
        """A session for the answer to this text, which follows all that was said.

        Raises:
            ContextLimitError: the conversation leaves no room for an answer.
        """
        prompt_ids = chat_ids([*self.messages, {"role": "user", "content": text}], self.tokenizer)
        limit, max_new_tokens = self.context_limit, self.max_new_tokens
        if limit is not None:
            if len(prompt_ids) >= limit:
                raise ContextLimitError(
                    f"a conversation must fit the context of {limit} tokens with room for an answer, got "
                    f"{len(prompt_ids)} tokens"
                )
            max_new_tokens = min(max_new_tokens, limit - len(prompt_ids))
        return Session(
            self.target.model,
            self.drafter,
            prompt_ids,
            policy=self.policy,
            max_new_tokens=max_new_tokens,
            prefix_cache=self.prefix_cache,
            on_prefill=on_prefill,
            seed=None if self.seed is None else self.seed + len(self.results),
            tokenizer=self.tokenizer,
            **self.options,
        )

    def remember(self, text: str, result: GenerationResult) -> None:
        """Add a question and its answer, as far as it came; a question without any answer is forgotten."""
        if result.token_ids:
            answer = decode_text(self.tokenizer, result.token_ids)
            said = [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
            self.messages, self.results = [*self.messages, *said], [*self.results, result]

    def set_policy(self, policy: str) -> None:
        """Take another stack for the next answers.

        Raises:
            DynaTreeError: it cannot be built; the old one stays.
        """
        build_stack(policy)
        self.policy = policy
