"""A session: an engine with one sequence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from dynatree_core.drafters.base import Drafter
from dynatree_core.engine.engine import ENGINE_OPTIONS, Engine
from dynatree_core.engine.lane import Lane

__all__ = ["Session"]


class Session(Lane):
    """One generation: a lane of an engine of its own. It adds ways to make one, and nothing else.

    The arguments are those of `dynatree_core.generate`, which is the usual way to make one.

    Raises:
        InputError: an argument that cannot be used; nothing was run.
    """

    def __init__(
        self,
        target: nn.Module,
        drafter: nn.Module | Drafter | str | None,
        input_ids: Tensor | Sequence[int] | Mapping[str, Tensor],
        **options: Any,
    ) -> None:
        of_engine = {name: options.pop(name) for name in ENGINE_OPTIONS if name in options}
        engine = Engine(target, drafter, **of_engine)
        super().__init__(engine, engine.request(input_ids, **options))

    @classmethod
    def on(cls, engine: Engine, input_ids: Tensor | Sequence[int] | Mapping[str, Tensor], **options: Any) -> Session:
        """A generation on an engine that serves others before and after it, one at a time."""
        session = cls.__new__(cls)
        Lane.__init__(session, engine, engine.request(input_ids, **options))
        return session
