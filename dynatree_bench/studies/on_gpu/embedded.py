"""How much faster the default model decodes with its drafter, by category of prompts, and in batches."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

from dynatree_bench.data.workloads import Picks, encode, load_workload
from dynatree_bench.run.experiments import Cell, Method
from dynatree_bench.run.machine import now
from dynatree_bench.run.methods import decode
from dynatree_bench.run.pairs import Pair, load_pair
from dynatree_bench.studies.on_gpu.given import Given
from dynatree_core import generate_batch

NEW_TOKENS = 128
BATCHES = (1, 4, 8)
HF, POLICIES = "hf generate", ("autoregressive", "phase3", "cost_aware")


def measure(given: Given) -> dict[str, Any]:
    """Tokens and seconds of each way and prompt, and of batches; a text that is not that of plain decoding is named."""
    pair = given.pair() if given.is_dry else load_pair(device=given.device, dtype=given.dtype)
    runner, tokens = given.runner(pair.target.model), 12 if given.is_dry else NEW_TOKENS
    methods = [
        Method(HF, kind="hf"),
        *(Method(name, policy=name, options={"runner": runner}) for name in POLICIES[: 2 if given.is_dry else None]),
    ]
    rows, prompts = [], _prompts(pair, given)
    for turn, (category, prompt) in enumerate([prompts[0], *prompts]):
        for method in methods:
            begun = now(pair.target.model.device)
            output = decode(pair, Cell(method, {"max_new_tokens": tokens}), prompt, pair.end_token_ids)
            seconds = now(pair.target.model.device) - begun
            if turn:  # the first one is a warm-up
                said = {"method": method.name, "category": category, "seconds": seconds}
                rows.append({**said, "prompt": turn, "token_ids": list(output.token_ids)})
    return {
        "model": pair.target.name,
        "outputs": [{key: row[key] for key in row if key != "token_ids"} | _told(row, rows) for row in rows],
        "batches": [_batch(pair, [one for _, one in prompts], size, tokens, runner) for size in BATCHES],
    }


def faults(found: Mapping[str, Any], is_dry: bool) -> list[str]:
    """Texts that are not those of plain decoding, by method."""
    differing = Counter(one["method"] for one in found["outputs"] if not one["is_plain"])
    return [f"{number} texts of {method} are not those of plain decoding" for method, number in differing.items()]


def _told(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """How many tokens an output has, and whether they are those of plain decoding, which rounding may change."""
    [plain] = [one for one in rows if one["method"] == "autoregressive" and one["prompt"] == row["prompt"]]
    return {"num_tokens": len(row["token_ids"]), "is_plain": row["token_ids"] == plain["token_ids"]}


def _prompts(pair: Pair, given: Given) -> list[tuple[str, tuple[int, ...]]]:
    """Three of each category."""
    if pair.source is not None:
        return [("synthetic", tuple(pair.source.text(20 * turn, 16))) for turn in range(2)]
    found: dict[str, list[tuple[int, ...]]] = defaultdict(list)
    for prompt in encode(load_workload("built-in", None, Picks()), pair.target):
        found[prompt.category].append(prompt.token_ids)
    return [(category, one) for category, some in found.items() for one in some[:3]]


def _batch(pair: Pair, prompts: list[tuple[int, ...]], size: int, tokens: int, runner: str) -> dict[str, Any]:
    """Tokens a second of so many sequences at once."""
    some = [list(prompts[turn % len(prompts)]) for turn in range(size)]
    begun = now(pair.target.model.device)
    found = generate_batch(
        pair.target.model, pair.drafter, some, max_sequences=size, max_new_tokens=tokens, policy="phase3",
        runner=runner, tokenizer=pair.target.tokenizer, eos_token_id=[], inherit_settings=False,
    )  # fmt: skip
    seconds = now(pair.target.model.device) - begun
    num_tokens = sum(len(one.token_ids) for one in found)
    return {"sequences": size, "num_tokens": num_tokens, "seconds": seconds}
