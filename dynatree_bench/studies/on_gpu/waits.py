"""How often, and in which line, an iteration waits for the device."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch

from dynatree_bench.run.pairs import Pair
from dynatree_bench.studies.on_gpu.given import TREE, Given
from dynatree_core import Session, run
from dynatree_core.drafters.base import Drafter
from dynatree_core.drafters.prompt_lookup import PromptLookupDrafter
from dynatree_core.drafters.union import UnionDrafter

# those of tests/test_device_work.py, which counts the same on a pretended device
STACKS = {
    "autoregressive": "autoregressive",
    "fixed": TREE,
    "phase3": "phase3",
    "best_first": "best_first(nodes=16,depth=5)",
    "sequoia": "sequoia(nodes=16,depth=5,size='full')",
    "cost_aware": "cost_aware(max_nodes=16,max_depth=5)",
}
DRAFTERS = {"autoregressive": ("none",), "phase3": ("model", "union"), "cost_aware": ("model", "union")}
WARM_UP, MEASURED = 6, 8

# inside of which waits are noted: where and how often
Watch = Callable[[], AbstractContextManager[Counter[str]]]


@contextmanager
def watching() -> Iterator[Counter[str]]:
    """What torch says of operations that wait, by the line that asks for them; nothing where there is no CUDA."""
    found: Counter[str] = Counter()
    if not torch.cuda.is_available():
        yield found
        return
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode(before)
    for one in caught:
        if "synchronizing CUDA operation" in str(one.message):
            found[f"{Path(one.filename).parent.name}/{Path(one.filename).name}:{one.lineno}"] += 1


def measure(given: Given, *, pair: Pair | None = None, watch: Watch = watching) -> dict[str, Any]:
    """Waits of an iteration by stack, drafter and line, passes among them."""
    pair = given.pair() if pair is None else pair
    stacks = dict(list(STACKS.items())[:2]) if given.is_dry else STACKS
    rows = []
    for name, policy in stacks.items():
        for drafter in DRAFTERS.get(name, ("model",)):
            found = _waits(given, pair, policy, _made(drafter, pair), watch)
            lines = {line: number / MEASURED for line, number in found.most_common()}
            rows.append({"stack": name, "drafter": drafter, "waits": sum(lines.values()), "lines": lines})
    return {"is_counted": watch is not watching or torch.cuda.is_available(), "stacks": rows}


def _made(name: str, pair: Pair) -> Drafter | None:
    if name == "none":
        return None
    return pair.drafter if name == "model" else UnionDrafter([pair.drafter, PromptLookupDrafter()])


def _waits(given: Given, pair: Pair, policy: str, drafter: Drafter | None, watch: Watch) -> Counter[str]:
    assert pair.source is not None, "the pair is synthetic"
    session = Session(
        pair.target.model, drafter, pair.source.text(0, 100), policy=policy, max_new_tokens=200, eos_token_id=[],
        inherit_settings=False, runner=given.runner(pair.target.model), trust_model=True,
    )  # fmt: skip
    steps = run(session)
    for _ in range(WARM_UP):
        next(steps)
    with watch() as found:
        for _ in range(MEASURED):
            next(steps)
    steps.close()  # type: ignore[attr-defined]
    return found
