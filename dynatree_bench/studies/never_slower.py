"""Is `governor` ever slower than no drafting at all?

Question: the throughput of policy stacks relative to autoregressive decoding on the same runtime, for each kind of
prompt and each drafter, useless ones among them. What is to be shown is at least 0.97.

Method: every prompt is decoded autoregressively and by every stack with every drafter, one after another in rotating
order, in one process after a warm-up, as many times as --repeats says, of which the median counts. A ratio is the
decoding time of all prompts of a kind without drafting ÷ with it; its interval is that of 95 % of 4,000 resamplings of
the prompts. The useless drafters are a model of two small layers with random weights, and `noise`, which proposes
random tokens at no cost and says that it is sure of them. The machine is watched while it runs, because a busy one says
nothing about speed.

Output: a table per kind of prompt, then the lowest ratio of a stack with `governor` or `cost_aware` in it. Exit code 1
if any output differed from autoregressive decoding, 2 if that ratio is below 0.97, 3 if nothing could be measured.

Command: python -m dynatree_bench.studies.never_slower [--quick] [--drafter NAME|ID|PATH]... [--policy STACK]...
    [--prompts FILE.jsonl] [--per-kind N] [--repeats N] [--max-new-tokens N] [--output FILE.json]
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
import transformers
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from dynatree_bench.data.prompts import chat_ids, in_turns, load_prompts, parsed_arguments
from dynatree_bench.report.statistics import ratio_of_sums
from dynatree_bench.run.machine import LoadMeter, check_writable, idle_or_busy, provenance, runtime
from dynatree_core import (
    Drafter,
    DraftPlan,
    DraftState,
    GenerationResult,
    LoadedModel,
    Proposals,
    TokenTree,
    generate,
    load_model,
    parse_stack,
)
from dynatree_core.cli.exits import end_process
from dynatree_core.cli.model_options import load_drafter, registered_drafter
from dynatree_core.files.writing import write_text

POLICIES = ("phase3", "phase3+governor", "cost_aware", "cost_aware+governor")
STEPPING_ASIDE = {"governor", "cost_aware"}  # policies that notice when drafting does not pay
LEAST = 0.97
# column -> what it stands for
COLUMNS = {
    "tok/it": "committed tokens per iteration",
    "nodes": "drafted nodes per iteration",
    "drafted": "share of the iterations that had a tree",
    "ratio": "decoding time without drafting ÷ with it, all prompts together",
    "95 %": "interval of the ratio",
    "worst": "lowest ratio of a single prompt",
    "same": "outputs equal to autoregressive ones",
}


@attrs.frozen
class Method:
    """A stack and the drafter that it is used with."""

    policy: str
    drafter: str

    @property
    def steps_aside(self) -> bool:
        return any(spec.name in STEPPING_ASIDE for spec in parse_stack(self.policy))


@attrs.frozen
class Pair:
    """One prompt, decoded without drafting and by a method."""

    plain: GenerationResult
    result: GenerationResult

    @property
    def seconds(self) -> tuple[float, float]:
        return self.plain.report.decode_seconds, self.result.report.decode_seconds

    @property
    def is_identical(self) -> bool:
        return self.plain.token_ids == self.result.token_ids


Results = dict[tuple[str, Method], list[Pair]]


@attrs.frozen(slots=False)
class Noise(Drafter):
    """Proposes random tokens and claims that the first of them is all but certain."""

    seed: int = 0

    def __str__(self) -> str:
        return "noise"

    def start(self, plan: DraftPlan) -> NoiseState:
        return NoiseState(plan, self.seed)


class NoiseState(DraftState):
    """A generator of its own, so that a run can be repeated."""

    def __init__(self, plan: DraftPlan, seed: int) -> None:
        self.plan = plan
        self.generator = torch.Generator(plan.device).manual_seed(seed)

    def prefill(self, committed_ids: Tensor) -> None:
        pass

    def propose(self, committed_ids: Tensor, tree: TokenTree, k: int) -> Proposals:
        shape = (tree.level_sizes[-1], k)
        device = self.plan.device
        ids = torch.randint(self.plan.vocab_size, shape, generator=self.generator, device=device)
        probs = torch.full(shape, 0.02 / k, device=device)
        probs[:, 0] = 0.97
        return Proposals(ids, probs.log())

    def commit(self, draft_path: tuple[int, ...]) -> None:
        pass

    def rollback(self) -> None:
        pass


def main() -> int:
    arguments = _parse_arguments()
    if arguments.output is not None:
        check_writable(arguments.output, "python -m dynatree_bench.studies.never_slower")
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    kinds = load_prompts(arguments.prompts, arguments.per_kind)
    target = load_model(arguments.target, device=arguments.device, dtype=arguments.dtype)
    console.print(
        f"{runtime()}, {target.model.device}, {target.model.dtype}, {target.name}, {arguments.max_new_tokens} new "
        "tokens at most"
    )
    drafters = {name: make_drafter(name, target) for name in arguments.drafter}
    methods = [Method(policy, drafter) for drafter in drafters for policy in arguments.policy]
    meter = LoadMeter()
    results = measure(target, drafters, kinds, methods, arguments.max_new_tokens, arguments.repeats)
    others = meter.meanwhile()
    for kind in kinds:
        console.print(_table(kind, {method: results[kind, method] for method in methods}))
    console.print("; ".join(f"{heading}: {meaning}" for heading, meaning in COLUMNS.items()) + "\n")
    console.print(idle_or_busy(others, what="ratios"))
    if arguments.output is not None:
        said = document(results, target, arguments.max_new_tokens, others)
        write_text(arguments.output, json.dumps(said, indent=1) + "\n")
    return _conclude(console, results)


def make_drafter(name: str, target: LoadedModel) -> nn.Module | Drafter:
    """A drafter by name: `noise`, `random` (weights), a registered one, or a model's id or folder."""
    if name == "noise":
        return Noise()
    if name == "random":
        return random_model(target)
    return registered_drafter(name) or load_drafter(name, target).model


def random_model(target: LoadedModel) -> nn.Module:
    """Two small layers with random weights and the target's vocabulary."""
    config = transformers.LlamaConfig(
        vocab_size=target.model.config.vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=8192,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config)
    return model.to(target.model.device, target.model.dtype).eval()


def measure(
    target: LoadedModel,
    drafters: dict[str, nn.Module | Drafter],
    kinds: dict[str, list[str]],
    methods: Sequence[Method],
    max_new_tokens: int,
    repeats: int = 1,
) -> Results:
    """Every prompt without drafting and by every method, interleaved: (kind, method) -> pairs, as the prompts come.

    Of repetitions a pair has those of median time, but an output that differs where there is one.
    """
    results: defaultdict[tuple[str, Method], list[Pair]] = defaultdict(list)
    prompts = [(kind, prompt) for kind, texts in kinds.items() for prompt in texts]
    ways: list[Method | None] = [None, *methods]  # None: no drafting

    def decode(prompt: str, way: Method | None, limit: int) -> GenerationResult:
        policy, drafter = (way.policy, drafters[way.drafter]) if way is not None else ("autoregressive", None)
        return generate(target.model, drafter, chat_ids(target, prompt), policy=policy, max_new_tokens=limit)

    turns = in_turns([prompt for _, prompt in prompts for _ in range(repeats)], ways, decode, max_new_tokens)
    for kind, _ in prompts:
        found = list(itertools.islice(turns, repeats))
        plain = [of_turn[None] for of_turn in found]
        for method in methods:
            drafted = [of_turn[method] for of_turn in found]
            different = [result for result in drafted if any(result.token_ids != one.token_ids for one in plain)]
            results[kind, method].append(Pair(_median(plain), different[0] if different else _median(drafted)))
    return dict(results)


def _median(results: Sequence[GenerationResult]) -> GenerationResult:
    """The one of median decoding time, the faster of two."""
    return sorted(results, key=lambda result: result.report.decode_seconds)[(len(results) - 1) // 2]


def ratio(pairs: Sequence[Pair]) -> float:
    """Decoding time without drafting ÷ with it, all prompts together."""
    plain, seconds = (sum(column) for column in zip(*(pair.seconds for pair in pairs), strict=True))
    return plain / seconds


def interval(pairs: Sequence[Pair]) -> tuple[float, float]:
    """The middle 95 % of the ratio over resamplings of the prompts (bootstrap)."""
    found = ratio_of_sums(*zip(*(pair.seconds for pair in pairs), strict=True))
    return found.low, found.high


def document(
    results: Results, target: LoadedModel, max_new_tokens: int, busy_percent: dict[str, float]
) -> dict[str, Any]:
    """Everything that was measured, for a file."""
    runs = [
        {
            "kind": kind,
            "policy": method.policy,
            "drafter": method.drafter,
            "ratio": ratio(pairs),
            "interval": interval(pairs),
            "plain_seconds": [pair.seconds[0] for pair in pairs],
            "seconds": [pair.seconds[1] for pair in pairs],
            "num_tokens": [pair.result.report.num_new_tokens for pair in pairs],
            "num_iterations": [pair.result.report.num_iterations for pair in pairs],
            "num_identical": sum(pair.is_identical for pair in pairs),
        }
        for (kind, method), pairs in results.items()
    ]
    return {
        **provenance("dynatree_bench.studies.never_slower", target.model.device),
        "target": target.name,
        "dtype": str(target.model.dtype).removeprefix("torch."),
        "max_new_tokens": max_new_tokens,
        "busy_percent": busy_percent,
        "runs": runs,
    }


def _table(kind: str, by_method: dict[Method, list[Pair]]) -> Table:
    num_prompts = len(next(iter(by_method.values())))
    table = Table(title=f"{kind}: {num_prompts} prompts", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("drafter", no_wrap=True)
    table.add_column("policy", no_wrap=True)
    for heading in COLUMNS:
        table.add_column(heading, justify="right", no_wrap=True)
    for method, pairs in by_method.items():
        reports = [pair.result.report for pair in pairs]
        iterations = sum(report.num_iterations for report in reports)
        steps = [step for report in reports for step in report.steps]
        low, high = interval(pairs)
        table.add_row(
            method.drafter,
            method.policy,
            f"{sum(report.num_new_tokens for report in reports) / iterations:.2f}",
            f"{sum(report.num_drafted_nodes for report in reports) / iterations:.1f}",
            f"{sum(step.num_drafted > 0 for step in steps) / len(steps):.2f}",
            f"{ratio(pairs):.3f}",
            f"{low:.3f}–{high:.3f}",
            f"{min(ratio([pair]) for pair in pairs):.3f}",
            f"{sum(pair.is_identical for pair in pairs)}/{len(pairs)}",
        )
    return table


def _conclude(console: Console, results: Results) -> int:
    differing = sum(not pair.is_identical for pairs in results.values() for pair in pairs)
    console.print(f"outputs that differ from autoregressive decoding: {differing} of {sum(map(len, results.values()))}")
    judged = {key: ratio(pairs) for key, pairs in results.items() if key[1].steps_aside}
    if not judged:
        return 1 if differing else 0
    (kind, method), lowest = min(judged.items(), key=lambda item: item[1])
    console.print(
        f"lowest ratio of a stack that steps aside: {lowest:.3f} ({method.policy}, {method.drafter}, {kind}); "
        f"at least {LEAST} is to be shown"
    )
    return 1 if differing else 2 if lowest < LEAST else 0


def _parse_arguments() -> argparse.Namespace:
    description = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m dynatree_bench.studies.never_slower", description=description)
    parser.add_argument("--quick", action="store_true", help="one prompt of each kind, 32 new tokens at most")
    parser.add_argument("--target", help="id or folder of a model (default: the embedded one)")
    parser.add_argument("--device", default="cpu", help="default: cpu")
    parser.add_argument("--dtype", default="auto", help="default: float32 on the CPU, the checkpoint's own on CUDA")
    parser.add_argument("--drafter", action="append", help="may be repeated (default: prompt_lookup, random and noise)")
    parser.add_argument("--policy", action="append", help=f"may be repeated (default: {', '.join(POLICIES)})")
    parser.add_argument("--repeats", type=int, default=1, help="how often each output is made (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="write everything that was measured to this file")
    arguments = parsed_arguments(parser, max_new_tokens=128)
    if arguments.repeats < 1:
        parser.error("--repeats must be at least 1")
    if arguments.quick:
        arguments.per_kind, arguments.max_new_tokens = 1, min(arguments.max_new_tokens, 32)
    arguments.drafter = arguments.drafter or ["prompt_lookup", "random", "noise"]
    arguments.policy = arguments.policy or list(POLICIES)
    return arguments


if __name__ == "__main__":
    end_process(main, error_code=3)  # 1 and 2 are verdicts
