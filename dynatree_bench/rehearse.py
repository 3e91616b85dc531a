"""What would policies be worth here? Their trees over texts that are known, at the prices of this machine's passes.

Question: how many tokens an iteration of a policy commits, and how much faster than autoregressive decoding it is by
what its passes take, without the scatter of a clock. So two policies that differ by 2 % can be told apart in minutes,
on a machine that does something else besides.

Method: the target decodes each prompt once, greedily. Then every policy decodes it again with the real drafter, and
with the known text in place of the target's passes: the same trees and the same accepted nodes as in a real run. A pass
of the target costs what the cost model says of its rows, a level about which the drafter asked a model what it says of
the level's nodes, and any other level nothing. What the host does besides is left out, so the ratios are upper bounds:
on a CPU a level takes up to a millisecond. The prices are those in the cache folder, or measured now.

Output: a table of policies; by category the speed against autoregressive decoding. With --grid also the fixed tree that
is the best of each category, chosen afterwards. Exit code 0.

Command: python -m dynatree_bench.rehearse [--drafter NAME] [--policy STACK]... [--grid] [--prompts FILE.jsonl]
    [--per-kind N] [--max-new-tokens N] [--output FILE.json]
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path

import attrs
import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

from dynatree_bench.never_slower import make_drafter
from dynatree_bench.prompts import chat_ids, load_prompts
from dynatree_core import CostModel, Drafter, Proposals, Session, TokenTree, generate, load_model, run
from dynatree_core.cache import TreeCache
from dynatree_core.clock import StageClock
from dynatree_core.costs import measured_costs
from dynatree_core.drafters.model import ModelDrafter
from dynatree_core.records import FlatTrees

POLICIES = ("phase1", "phase3", "cost_aware")
GRID = tuple(
    f"fixed(depth={depth},branch={branch},tau={tau})"
    for depth, branch, tau in itertools.product((2, 3, 4, 5, 6, 8), (1, 2, 3), (0.02, 0.05, 0.1))
)
BEST = "best fixed tree of the grid"


@attrs.frozen
class Text:
    """A prompt and what the target makes of it."""

    kind: str
    prompt_ids: tuple[int, ...]
    new_ids: tuple[int, ...]


@attrs.frozen
class Rehearsal:
    """One text with one policy."""

    kind: str
    num_tokens: int
    num_iterations: int
    num_nodes: int  # drafted and verified
    num_levels: int  # that a model was asked about
    seconds: float  # at the prices of the cost model
    plain_seconds: float  # without drafting


class _PricedClock(StageClock):
    """Shows what passes are said to take, and nothing else."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.now = 0.0

    def _now(self) -> float:
        return self.now


class _KnownTarget:
    """In place of a session's target: its logits choose, after each row, what stands there in the known text.

    That is right for rows on the text's path. Any other has an ancestor that is rejected, so its own do not matter.
    """

    name = "known text"

    def __init__(self, token_ids: Tensor, vocab_size: int, clock: _PricedClock, costs: CostModel) -> None:
        self.token_ids, self.vocab_size = token_ids, vocab_size
        self.clock, self.costs = clock, costs

    def prefill(self, token_ids: Tensor, cache: TreeCache) -> None:
        self._append(token_ids.numel(), cache)
        cache.commit([range(token_ids.numel())])

    def forward(self, flat: FlatTrees, cache: TreeCache, *, stage: str) -> Tensor:
        """Logits [1, rows, vocab], at the price of an iteration's pass and of what is around it."""
        cache.prepare(flat)
        self._append(flat.num_rows, cache)
        self.clock.now += self.costs.tree_seconds(flat.num_rows - 1, [])
        next_ids = self.token_ids[flat.position_ids[0] + 1]
        return nn.functional.one_hot(next_ids, self.vocab_size)[None].float()

    def _append(self, rows: int, cache: TreeCache) -> None:
        nothing = self.token_ids.new_zeros(1, 1, rows, 1)
        cache.update(nothing, nothing, 0)


class RehearsedSession(Session):
    """A generation whose target is a known text, and whose time is what passes are said to take.

    Args:
        target: the model that has made the text.
        drafter: as of any session.
        text: the text.
        policy: as of any session.
        costs: the prices.
    """

    def __init__(
        self, target: nn.Module, drafter: nn.Module | Drafter, text: Text, policy: str, costs: CostModel
    ) -> None:
        super().__init__(
            target,
            drafter,
            list(text.prompt_ids),
            policy=policy,
            max_new_tokens=len(text.new_ids),
            eos_token_id=[],
            inherit_settings=False,
        )
        self.drafters_clock = self.clock
        self.priced_clock = self.clock = _PricedClock(self.device)
        all_ids = torch.tensor([*text.prompt_ids, *text.new_ids], device=self.device)
        self.target = _KnownTarget(all_ids, self.vocab_size, self.priced_clock, costs)  # type: ignore[assignment]
        self.costs = costs
        self.num_levels = 0  # about which a model was asked

    def propose(self, tree: TokenTree) -> Proposals:
        before = self.drafters_clock.seconds("draft_forward")
        proposals = super().propose(tree)
        if self.drafters_clock.seconds("draft_forward") > before:
            self.num_levels += 1
            self.priced_clock.now += self.costs.draft(tree.level_sizes[-1])
        return proposals


def rehearse(target: nn.Module, drafter: nn.Module | Drafter, text: Text, policy: str, costs: CostModel) -> Rehearsal:
    """Decode a known text with a policy.

    Raises:
        RuntimeError: what was decoded is another text; then something here is wrong.
    """
    session = RehearsedSession(target, drafter, text, policy, costs)
    for _ in run(session):
        pass
    report = session.result().report
    if tuple(session.new_token_ids) != text.new_ids:
        raise RuntimeError(f"{policy} decoded {session.new_token_ids} of the known text {list(text.new_ids)}")
    return Rehearsal(
        text.kind,
        len(text.new_ids),
        report.num_iterations,
        report.num_drafted_nodes,
        session.num_levels,
        session.priced_clock.now,
        len(text.new_ids) * costs.plain_seconds(),
    )


def ratio(found: Iterable[Rehearsal]) -> float:
    """Priced time without drafting ÷ with it, all texts together."""
    plain, seconds = map(sum, zip(*((one.plain_seconds, one.seconds) for one in found), strict=True))
    return plain / seconds


def by_kind(found: Iterable[Rehearsal]) -> dict[str, list[Rehearsal]]:
    """The texts of each kind."""
    kinds: defaultdict[str, list[Rehearsal]] = defaultdict(list)
    for one in found:
        kinds[one.kind].append(one)
    return dict(kinds)


def best_of(results: dict[str, list[Rehearsal]], policies: Sequence[str]) -> dict[str, str]:
    """The policy that is the fastest of some, for each kind of text."""
    kinds = by_kind(results[policies[0]])
    return {kind: max(policies, key=lambda policy: ratio(by_kind(results[policy])[kind])) for kind in kinds}


def main() -> int:
    arguments = _parse_arguments()
    console = Console(width=None if sys.stdout.isatty() else 130, highlight=False)
    loaded = load_model(arguments.target, device=arguments.device, dtype=arguments.dtype)
    target, drafter = loaded.model, make_drafter(arguments.drafter, loaded)
    kinds = load_prompts(arguments.prompts, arguments.per_kind)
    prompts = [(kind, prompt) for kind, of_kind in kinds.items() for prompt in of_kind]
    grid = list(GRID) if arguments.grid else []
    policies = list(dict.fromkeys([*(arguments.policy or POLICIES), *grid]))
    costs = measured_costs(target, drafter if isinstance(drafter, Drafter) else ModelDrafter(drafter))
    results: dict[str, list[Rehearsal]] = {policy: [] for policy in policies}
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("decoding", total=len(prompts) * (1 + len(policies)))
        for kind, prompt in prompts:
            ids = chat_ids(loaded, prompt)
            plain = generate(target, None, ids, policy="autoregressive", max_new_tokens=arguments.max_new_tokens)
            progress.advance(task)
            text = Text(kind, tuple(ids), tuple(plain.token_ids))
            for policy in policies:
                results[policy].append(rehearse(target, drafter, text, policy, costs))
                progress.advance(task)
    shown = [policy for policy in policies if policy not in grid or policy in (arguments.policy or ())]
    console.print(_table(results, shown, grid))
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(document(results, costs), indent=1) + "\n", encoding="utf-8")
    return 0


def document(results: dict[str, list[Rehearsal]], costs: CostModel) -> dict[str, object]:
    """Everything that was found, for a file."""
    return {
        "command": ["python", "-m", "dynatree_bench.rehearse", *sys.argv[1:]],
        "versions": {name: version(name) for name in ("dynatree", "torch", "transformers")},
        "costs": attrs.asdict(costs),
        "policies": {
            policy: {
                "ratio": ratio(found),
                "by_kind": {kind: ratio(of_kind) for kind, of_kind in by_kind(found).items()},
                "tokens_per_iteration": _mean(found, "num_tokens"),
                "nodes_per_iteration": _mean(found, "num_nodes"),
                "asked_levels_per_iteration": _mean(found, "num_levels"),
            }
            for policy, found in results.items()
        },
    }


def _mean(found: Sequence[Rehearsal], name: str) -> float:
    """Of something, for an iteration."""
    return sum(getattr(one, name) for one in found) / sum(one.num_iterations for one in found)


def _table(results: dict[str, list[Rehearsal]], shown: Sequence[str], grid: Sequence[str]) -> Table:
    kinds = list(by_kind(next(iter(results.values()))))
    table = Table(title="priced speed against autoregressive decoding", title_justify="left", box=SIMPLE_HEAD)
    table.add_column("policy")
    for heading in ("all", *kinds, "tok/it", "nodes", "asked levels"):
        table.add_column(heading, justify="right", no_wrap=True)
    for policy in shown:
        found = results[policy]
        speeds = [ratio(found), *(ratio(by_kind(found)[kind]) for kind in kinds)]
        counts = [_mean(found, name) for name in ("num_tokens", "num_nodes", "num_levels")]
        table.add_row(policy, *(f"{number:.2f}" for number in (*speeds, *counts)))
    if grid:
        best = best_of(results, grid)
        overall = max(grid, key=lambda policy: ratio(results[policy]))
        speeds = [ratio(results[overall]), *(ratio(by_kind(results[best[kind]])[kind]) for kind in kinds)]
        table.add_row(BEST, *(f"{speed:.2f}" for speed in speeds), "", "", "")
        names = [name.removeprefix("fixed(").removesuffix(")") for name in (overall, *best.values())]
        table.add_row("  which is", *(name.replace(",", "\n") for name in names), "", "", "")
    return table


def _parse_arguments() -> argparse.Namespace:
    description = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m dynatree_bench.rehearse", description=description)
    parser.add_argument("--target", help="id or folder of a model (default: the embedded one)")
    parser.add_argument("--device", default="cpu", help="default: cpu")
    parser.add_argument("--dtype", default="auto", help="default: float32 on the CPU, the checkpoint's own on CUDA")
    parser.add_argument("--drafter", default="distilled+prompt_lookup", help="default: %(default)s")
    parser.add_argument("--policy", action="append", help=f"may be repeated (default: {', '.join(POLICIES)})")
    parser.add_argument("--grid", action="store_true", help=f"also {len(GRID)} fixed trees, and the best of each kind")
    parser.add_argument(
        "--prompts", type=Path, help='JSON lines with "prompt" and "category" (default: built-in prompts)'
    )
    parser.add_argument("--per-kind", type=int, default=5, help="prompts of each kind (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="default: %(default)s")
    parser.add_argument("--output", type=Path, help="write everything that was found to this file")
    arguments = parser.parse_args()
    if min(arguments.per_kind, arguments.max_new_tokens) < 1:
        parser.error("--per-kind and --max-new-tokens must be at least 1")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
