"""Whether the tests for GPUs pass, and whether what is decoded on the device is what `generate` decodes."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig

from dynatree_bench.studies.on_gpu.given import TREE, Given
from dynatree_core import Engine, PrefixCache
from dynatree_core.drafters.model import ModelDrafter
from dynatree_core.drafters.prompt_lookup import PromptLookupDrafter
from dynatree_core.drafters.union import UnionDrafter
from dynatree_core.testing.models import perturbed, tiny_model

CHECKOUT = Path(__file__).parents[3]
PYTEST = ("-m", "pytest", "-q", "-x", "-n", "0")
RUNS = (("tests/test_captured.py", "-k", "gpu"), ("-m", "gpu"))
FAMILIES = ("llama", "gpt_neox", "mistral", "gpt2")
STACKS = ("autoregressive", "phase3", TREE, "best_first(nodes=16,depth=5)", "cost_aware(max_nodes=16,max_depth=5)")
PASSED = re.compile(r"(\d+) passed\b")  # in the last lines of pytest
NO_TESTS = 5  # how pytest ends where none was chosen
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]
NEW_TOKENS = 40


def measure(given: Given) -> dict[str, Any]:
    """What pytest says, and how many texts of tiny float64 models on the device are not those of `generate`."""
    has_tests = (CHECKOUT / "tests" / "conftest.py").exists()
    runs = [_pytest(arguments) for arguments in (RUNS[:1] if given.is_dry else RUNS)] if has_tests else []
    families = FAMILIES[:1] if given.is_dry else FAMILIES
    checks = [
        check for family in families for check in checked(family, given, ("eager", given.runner(tiny_model(family))))
    ]
    return {
        "pytest": runs,
        "num_texts": len(checks),
        "wrong": [check["what"] for check in checks if not check["is_same"]],
    }


def _pytest(arguments: tuple[str, ...]) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, *PYTEST, *arguments], cwd=CHECKOUT, capture_output=True, text=True, check=False,
        env={**os.environ, "DYNATREE_TEST_GPU": "1"},
    )  # fmt: skip
    last = [line for line in done.stdout.splitlines() if line.strip()][-5:]
    passed = PASSED.findall("\n".join(last))
    return {
        "arguments": list(arguments),
        "exit_status": done.returncode,
        "num_passed": int(passed[-1]) if passed else 0,
        "last_lines": last,
    }


def faults(found: Mapping[str, Any], is_dry: bool) -> list[str]:
    """Runs of pytest that failed or passed without a test, which only a dry run may, and texts that are wrong."""
    said = []
    for run in found["pytest"]:
        is_passed = run["exit_status"] == 0 and (is_dry or run["num_passed"] > 0)
        if not is_passed and not (is_dry and run["exit_status"] == NO_TESTS):
            what = "failed" if run["exit_status"] not in (0, NO_TESTS) else "ran no test"
            said.append(f"pytest {' '.join(run['arguments'])} {what}: {' '.join(run['last_lines'][-2:])}")
    return [*said, *wrong_texts(found)]


def wrong_texts(found: Mapping[str, Any]) -> list[str]:
    """A line where there are some."""
    number, some = f"{len(found['wrong'])} of {found['num_texts']}", "; ".join(found["wrong"][:5])
    return [f"{number} texts are not those of `generate`: {some}"] if some else []


def checked(
    family: str, given: Given, runners: Iterable[str], dtype: torch.dtype = torch.float64
) -> Iterator[dict[str, Any]]:
    """Every stack, drafter and runner; a second text finds the first one's rows in the prefix cache."""
    target, own = (placed(model, given.device, dtype) for model in (tiny_model(family), perturbed(family)))
    drafter = ModelDrafter(own)
    expected = _generated(target)
    drafters = {
        "model": drafter,
        "prompt_lookup": PromptLookupDrafter(),
        "union": UnionDrafter([drafter, PromptLookupDrafter()]),
    }
    for runner in dict.fromkeys(runners):
        for name, made in drafters.items():
            engine = Engine(target, made, runner=runner, prefix_cache=PrefixCache())
            for stack in STACKS:
                asked = {"policy": stack, "max_new_tokens": NEW_TOKENS, "eos_token_id": [], "inherit_settings": False}
                found = engine.submit(PROMPT, **asked).result()
                yield {"what": f"{family}, {stack}, {name}, {runner}", "is_same": found.token_ids == expected}


def placed(model: nn.Module, device: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The model there. Those of tests are shared and in float64, so one that moves or rounds is a copy."""
    is_there = torch.device(device).type == "cpu" and dtype == torch.float64
    return model if is_there else copy.deepcopy(model).to(device, dtype)


def _generated(model: Any) -> list[int]:
    input_ids = torch.tensor([PROMPT], device=model.device)
    make: Any = GenerationConfig
    config = make(do_sample=False, max_new_tokens=NEW_TOKENS, eos_token_id=None, pad_token_id=0)
    output = model.generate(input_ids, attention_mask=torch.ones_like(input_ids), generation_config=config)
    return [int(token) for token in output[0, len(PROMPT) :]]
