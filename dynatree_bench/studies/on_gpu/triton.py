"""Whether the `triton` runner decodes what `generate` does, and how fast: apart, since no GPU has run its kernels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from dynatree_bench.studies import roofline
from dynatree_bench.studies.on_gpu import suite
from dynatree_bench.studies.on_gpu.given import PAIR, Given
from dynatree_core.runners.triton import TritonRunner


def measure(given: Given) -> dict[str, Any]:
    """As `roofline` with this runner alone, and texts of tiny float32 models: it computes no float64.

    A dry run has the plain runner in its place.
    """
    runner = "eager" if given.is_dry else TritonRunner.name
    families = suite.FAMILIES[:1] if given.is_dry else suite.FAMILIES
    checks = [check for one in families for check in suite.checked(one, given, (runner,), torch.float32)]
    texts = {"num_texts": len(checks), "wrong": [check["what"] for check in checks if not check["is_same"]]}
    return {**roofline.measure(given.asked(PAIR), runners=(runner,)), **texts}


def faults(found: Mapping[str, Any], is_dry: bool) -> list[str]:
    """Texts that are not those of `generate`."""
    return suite.wrong_texts(found)
