"""Students of tiny models, and a drafter of each registered kind."""

from __future__ import annotations

import torch
from torch import nn

from dynatree_core.drafters.base import Drafter
from dynatree_core.drafters.model import ModelDrafter
from dynatree_core.drafters.prompt_lookup import PromptLookupDrafter
from dynatree_core.drafters.union import UnionDrafter
from dynatree_core.models.student import new_student
from dynatree_core.testing.models import VOCAB, perturbed

HEAD_IDS = torch.arange(0, VOCAB, 2)  # every other token


def tiny_student(target: nn.Module) -> nn.Module:
    """Both layers of the target, and half of its tokens."""
    return new_student(target, [0, 1], HEAD_IDS, dtype=torch.float64).eval()


def drafter_of_each_kind(target: nn.Module) -> dict[str, Drafter]:
    """By their registered names; `distilled` loads from a folder what is made here."""
    model, lookup = ModelDrafter(perturbed(target.config.model_type)), PromptLookupDrafter()
    return {
        "distilled": ModelDrafter(tiny_student(target)),
        "model": model,
        "prompt_lookup": lookup,
        "union": UnionDrafter([model, lookup]),
    }
