"""The `distilled` drafter: a student that was taught by its target (`dynatree distill`), and shares its embeddings.

DynaTree carries one for the embedded default model; for any other target it is made by one command.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from dynatree_core import ops
from dynatree_core.drafters.base import Drafter, DraftPlan, OwnWeights
from dynatree_core.drafters.model import ModelDraftState
from dynatree_core.errors import ModelLoadError, ParameterError
from dynatree_core.files.folders import expanded
from dynatree_core.models.student import WEIGHTS, is_student, load_student
from dynatree_core.plugins.spec import PluginSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["EMBEDDED_STUDENT", "DistilledDrafter"]

EMBEDDED_STUDENT = Path(__file__).parent / "smollm2_135m_instruct"  # made for the embedded default model

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}

_loading = threading.Lock()  # two threads that begin at once load a student once


class DistilledDrafter(Drafter):
    """Drafts with a student of the target.

    Args:
        path: the student's folder; None: that of the embedded default model.
        dtype: in which it computes, whatever the target's; "auto": bfloat16 on a GPU, float32 on a CPU where the
            `native` runner can be used, else bfloat16 if the CPU has instructions for it. It changes what is drafted a
            little, and never what is generated.
    """

    def __init__(self, path: str | None = None, dtype: str = "auto") -> None:
        if dtype != "auto" and dtype not in _DTYPES:
            raise ParameterError(f"dtype must be one of auto, {', '.join(_DTYPES)}, got {dtype!r}")
        self.path = path
        self.dtype = dtype
        self.folder = EMBEDDED_STUDENT if path is None else expanded(path)
        if not is_student(self.folder):
            raise ModelLoadError(
                f"a distilled drafter needs a folder made by `dynatree distill`, got '{self.folder}' without a student"
            )

    def __str__(self) -> str:
        given = {"path": self.path, "dtype": None if self.dtype == "auto" else self.dtype}
        return str(PluginSpec("distilled", None, {name: value for name, value in given.items() if value is not None}))

    def models(self, target: nn.Module) -> Sequence[nn.Module]:
        return (target,)  # a student computes with the target's embeddings, and its context is as long

    def own_weights(self, device: torch.device) -> Sequence[OwnWeights]:
        return (OwnWeights(str(self), self.folder, self._dtype_on(device)),)

    def start(self, plan: DraftPlan) -> ModelDraftState:
        weights, dtype = self.folder / WEIGHTS, self._dtype_on(plan.device)
        written = weights.stat().st_mtime_ns if weights.exists() else None
        # a target that was given more or fewer tokens is another one, which may be refused
        key = ("distilled", weights.resolve(), written, dtype, plan.device, plan.vocab_size)
        with _loading, torch.inference_mode(False):  # a later generation may run in another mode than this one
            if key not in plan.store:
                plan.store[key] = load_student(self.folder, cast("PreTrainedModel", plan.target), dtype)
        return ModelDraftState(plan.store[key], plan)

    def _dtype_on(self, device: torch.device) -> torch.dtype:
        if self.dtype != "auto":
            return _DTYPES[self.dtype]
        # of the embedded student a level takes `native` 1.8 ms, and torch 2.8 ms in bfloat16 on two cores with AMX. A
        # text is read more slowly, 256 tokens in 23 ms in place of 9, which is made up for by 14 levels
        is_native = device.type == "cpu" and ops.reason_unavailable() is None
        return torch.float32 if is_native else fast_dtype(device)


def fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU and on CPUs that multiply in it, float32 on others, which would convert every number."""
    if device.type != "cpu":
        return torch.bfloat16
    ask = getattr(torch.cpu, "get_capabilities", None)  # torch 2.10 and later
    known = ask() if ask is not None else {}
    return torch.bfloat16 if known.get("avx512_bf16") or known.get("amx_bf16") else torch.float32
