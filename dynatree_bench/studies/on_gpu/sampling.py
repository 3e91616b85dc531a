"""Whether a seed gives the text that `generate` samples with it on the device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import GenerationConfig

from dynatree_bench.studies.on_gpu.given import Given
from dynatree_bench.studies.on_gpu.suite import PROMPT, placed
from dynatree_core import Engine
from dynatree_core.drafters.model import ModelDrafter
from dynatree_core.testing.models import perturbed, tiny_model

SEEDS, NEW_TOKENS, TEMPERATURE = range(10), 40, 0.8
FAMILIES = ("llama", "gpt_neox")


def measure(given: Given) -> dict[str, Any]:
    """Texts of tiny float64 models, and those that differ."""
    rows = []
    for family in FAMILIES[:1] if given.is_dry else FAMILIES:
        target: Any = placed(tiny_model(family), given.device)
        engine = Engine(target, ModelDrafter(placed(perturbed(family), given.device)), runner=given.runner(target))
        for seed in SEEDS[:2] if given.is_dry else SEEDS:
            asked = {"do_sample": True, "temperature": TEMPERATURE, "max_new_tokens": NEW_TOKENS, "eos_token_id": []}
            found = engine.submit(PROMPT, policy="phase3", seed=seed, inherit_settings=False, **asked).result()
            rows.append({"family": family, "seed": seed, "is_same": found.token_ids == _sampled(target, seed)})
    return {"texts": rows}


def faults(found: Mapping[str, Any], is_dry: bool) -> list[str]:
    """Texts that are not those of `generate`."""
    wrong = sum(not one["is_same"] for one in found["texts"])
    number = f"{wrong} of {len(found['texts'])}"
    return [f"{number} sampled texts are not those of `generate` with the same seed"] if wrong else []


def _sampled(model: Any, seed: int) -> list[int]:
    input_ids = torch.tensor([PROMPT], device=model.device)
    make: Any = GenerationConfig
    config = make(
        do_sample=True, temperature=TEMPERATURE, top_k=0, top_p=1.0, max_new_tokens=NEW_TOKENS, eos_token_id=None,
        pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(seed)
    output = model.generate(input_ids, attention_mask=torch.ones_like(input_ids), generation_config=config)
    return [int(token) for token in output[0, len(PROMPT) :]]
