"""The `adapter_off` drafter: the target's own weights without its PEFT adapters.

A model with adapters often chooses the tokens that it would choose without them, and this drafter needs no weights
besides the target's. One of its passes takes about as long as a pass of the target.
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

    The target is not changed. Its adapters stay on, also for generations that run in other threads meanwhile.
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
        # never packed: that copies all matrices, and the drafter is to take no memory for weights
        runner = "eager" if plan.runner in ("auto", "packed") else plan.runner
        return ModelDraftState(without_adapters(plan.target), attrs.evolve(plan, runner=runner))
