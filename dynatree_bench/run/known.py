"""Decoding a text that is known: a stand-in for the target says it, so only the drafter computes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs
import torch
from torch import nn

from dynatree_core import Drafter, DraftPlan, DraftState, Engine, Session
from dynatree_core.models.architectures import vocab_size
from dynatree_core.models.kept import kept_of
from dynatree_core.trace.replaying import KnownTarget


@attrs.frozen
class Text:
    """A prompt and what the target makes of it."""

    kind: str
    prompt_ids: tuple[int, ...]
    new_ids: tuple[int, ...]
    max_new_tokens: int  # as many as there are, or more where an end token came before
    end_ids: tuple[int, ...] = ()  # that end the text


@attrs.frozen
class OfTarget(Drafter):
    """A drafter that is told of the real target while a stand-in verifies."""

    drafter: Drafter
    target: nn.Module

    def __str__(self) -> str:
        return str(self.drafter)

    def models(self, target: nn.Module) -> Sequence[nn.Module]:
        return self.drafter.models(self.target)

    def context_limit(self, target: nn.Module) -> int | None:
        return self.drafter.context_limit(self.target)

    def runs_on(self, target: nn.Module) -> torch.device | None:
        return self.drafter.runs_on(self.target)

    def start(self, plan: DraftPlan) -> DraftState:
        return self.drafter.start(attrs.evolve(plan, target=self.target, store=kept_of(self.target)))


def known_session(target: nn.Module, drafter: Drafter, text: Text, policy: str, **of_engine: Any) -> Session:
    """A session whose target says what is known.

    Args:
        target: the model that has made the text.
        drafter: as of any session.
        text: the text.
        policy: as of any session.
        of_engine: arguments of `Engine`, such as its costs and its clock.
    """
    room = text.max_new_tokens - len(text.new_ids)
    stand_in = KnownTarget([*text.prompt_ids, *text.new_ids], vocab_size(target), room)
    # trusted: it says what comes next in one text, whatever stands in other rows
    engine = Engine(stand_in, OfTarget(drafter, target), trust_model=True, **of_engine)
    return Session.on(
        engine,
        list(text.prompt_ids),
        policy=policy,
        max_new_tokens=text.max_new_tokens,
        eos_token_id=list(text.end_ids),
    )
