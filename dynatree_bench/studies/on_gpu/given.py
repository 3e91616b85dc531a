"""What a step of the study of GPUs is given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs
import torch

from dynatree_bench.run.pairs import Models, Pair, load_synthetic
from dynatree_bench.studies.study import Asked
from dynatree_core.runners import cudagraph

PAIR, LARGE_PAIR, DRY_PAIR = "pythia-2.8b+70m", "llama-8b+1b", "tiny"  # random weights of these shapes
# 16 nodes in 5 levels at most, as an iteration is counted on a pretended device (tests/test_device_work.py)
TREE = "fixed(depth=5,branch=2,max_nodes=16,tau=0.02)"


@attrs.frozen
class Given:
    """How a step is to run."""

    device: str  # as torch names it
    is_dry: bool  # tiny sizes, whose numbers mean nothing
    seed: int
    folder: str  # where a step leaves what is no number, such as a trace

    @property
    def dtype(self) -> str:
        """Of the models."""
        return "float32" if torch.device(self.device).type == "cpu" else "bfloat16"

    def pair(self, acceptance: float = 0.75) -> Pair:
        """The random models of most steps, and their text."""
        shape = DRY_PAIR if self.is_dry else PAIR
        return load_synthetic(f"{shape}:{acceptance}", device=self.device, dtype=self.dtype, seed=self.seed)

    def asked(self, shape: str) -> Asked:
        """How the study `roofline` is asked for random models of a shape."""
        models = Models(device=self.device, dtype=self.dtype, synthetic=None if self.is_dry else shape)
        rounds, tokens = (1, (12,)) if self.is_dry else (3, (128,))
        return Asked(
            models, Path(self.folder), is_quick=self.is_dry, repeats=rounds, max_new_tokens=tokens, seed=self.seed
        )

    def runner(self, model: Any) -> str:
        """The fastest that there is for a model on a GPU; on a CPU the plain one, since a dry run measures nothing."""
        return cudagraph.CudaGraphRunner.name if cudagraph.can_capture(model) else "eager"
