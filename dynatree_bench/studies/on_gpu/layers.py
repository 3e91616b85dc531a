"""Where the time of a step and of a tree's iteration goes, by each runner."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs

from dynatree_bench.run.profile import profile
from dynatree_bench.studies.on_gpu.given import TREE, Given

PROMPT_TOKENS, NUM_ITERATIONS, NUM_OPERATORS = 128, 20, 15


def measure(given: Given) -> dict[str, Any]:
    """Milliseconds of an iteration by stage and operator, and what a tree's iteration is of a plain step."""
    pair = given.pair()
    assert pair.source is not None, "the pair is synthetic"
    model, rows = pair.target.model, []
    for runner in dict.fromkeys(("eager", given.runner(model))):
        for policy in ("autoregressive", TREE):
            trace = Path(given.folder) / f"profile-{runner}-{policy.partition('(')[0]}.json.gz"
            found = profile(
                model, None if policy == "autoregressive" else pair.drafter, pair.source.text(0, PROMPT_TOKENS),
                num_iterations=4 if given.is_dry else NUM_ITERATIONS, trace=trace, policy=policy, runner=runner,
                inherit_settings=False,
            )  # fmt: skip
            said = {**attrs.asdict(found), "operators": [attrs.asdict(one) for one in found.operators[:NUM_OPERATORS]]}
            rows.append({"policy": policy, "asked": runner, "ms": sum(found.stages.values()), **said})
    return {"profiles": rows}
