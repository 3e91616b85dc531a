"""The third-party policy of docs/examples: installed as anyone would, found by its entry point, tested by its tests."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from packages import ROOT, in_subprocess, install, run_tests_of

SOURCE = ROOT / "docs" / "examples" / "dynatree-rerank"

pytestmark = pytest.mark.slow

USE_IT = """
import sys
from pathlib import Path

import torch
from dynatree_core.testing.models import greedy, perturbed, tiny_model

from dynatree_core import build_stack, generate
from dynatree_core.plugins.registry import POLICIES, load_plugin, plugin_parameters, plugin_table

site = Path(sys.argv[1])
[entry] = plugin_table(POLICIES)["rerank"]
assert (entry.dist.name, entry.value) == ("dynatree-rerank", "dynatree_rerank:Rerank"), entry
policy = load_plugin(POLICIES, "rerank")
assert Path(sys.modules[policy.__module__].__file__).is_relative_to(site)
assert plugin_parameters(policy) == {"nodes": 24}

text = "confidence+dynamic_depth+rerank(nodes=12)"
stack = build_stack(text)
assert str(stack) == text
assert list(stack.policies) == ["confidence", "dynamic_depth", "rerank"]
assert stack.find("rerank").nodes == 12

target, drafter, prompt = tiny_model("llama"), perturbed("llama"), [3, 1, 4, 1, 5, 9, 2, 6]
result = generate(target, drafter, prompt, policy=text, max_new_tokens=40, tau=0.0)
assert result.token_ids == greedy(target, prompt, 40)
assert result.report.policy == text
assert max(step.num_drafted for step in result.report.steps) == 12
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the package was installed into."""
    return install(SOURCE, tmp_path_factory.mktemp("rerank"))


def test_it_is_found_composed_and_lossless(site):
    in_subprocess([sys.executable, "-c", USE_IT, str(site)], site)


def test_its_readme_tells_the_truth(site):
    [snippet] = re.findall(r"^```python\n(.*?)^```", (SOURCE / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    assert in_subprocess([sys.executable, "-c", snippet], site) == "Rerank(nodes=12)\n"


def test_its_own_tests_pass(site):
    run_tests_of(site)
