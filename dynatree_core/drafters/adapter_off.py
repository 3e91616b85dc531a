"""The `adapter_off` drafter: the target's own weights without its PEFT adapters.

A model with adapters often says what it says without them, and without them it needs no weights of its own. A pass of
it takes about as long as a pass of the target.
"""

from __future__ import annotations

from collections.abc import Sequence

import attrs
from torch import nn

from dynatree_core.drafters.base import Drafter, DraftPlan
from dynatree_core.drafters.model import ModelDraftState
from dynatree_core.models.adapters import without_adapters

__all__ = ["AdapterOffDrafter"]


class AdapterOffDrafter(Drafter):
    """Drafts with the target, its PEFT adapters (LoRA and its like) taken off.

    The target is not changed: no adapter is switched, so that generations in other threads see none off.
    """

    def __str__(self) -> str:
        return "adapter_off"

    def models(self, target: nn.Module) -> Sequence[nn.Module]:
        return (target,)

    def start(self, plan: DraftPlan) -> ModelDraftState:
        """Begin one generation.

        Raises:
            ParameterError: the target has no adapters, or they are merged into its weights.
        """
        # the packed runner would lay out a copy of all matrices, and there is to be one copy of the weights
        runner = "eager" if plan.runner in ("auto", "packed") else plan.runner
        return ModelDraftState(without_adapters(plan.target), attrs.evolve(plan, runner=runner))
