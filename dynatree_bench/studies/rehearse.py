"""What would policies be worth here? Their trees over texts that are known, at the prices of this machine's passes.

Question: how many tokens an iteration of a policy commits, and how much faster than autoregressive decoding it is by
what its passes take, without the scatter of a clock. So two policies that differ by 2 % can be told apart in minutes,
on a machine that does something else besides.

Method: the target decodes each prompt once, greedily. Then every policy decodes it again with the real drafter, and
with the known text in place of the target's passes: the same trees and the same accepted nodes as in a real run. A pass
of the target costs what the cost model says of its rows, one of a model that drafts what it says of a level with as
many nodes, and nothing else costs anything. What the host does besides is left out, so the ratios are upper bounds: on
a CPU a level takes up to a millisecond. The prices are those in the cache folder, or measured now.

Output: a table of policies; by category the speed against autoregressive decoding. With --grid also two rows of fixed
trees: what a search would find (for each text the tree that is the best of the category's other texts), and the best of
each category, chosen afterwards, which no search can know. Then each policy's speed relative to what was searched for,
with the 95 % interval of resampled texts. A search takes two texts of each category at least. Exit code 0.

Command: python -m dynatree_bench.studies.rehearse [--drafter NAME] [--policy STACK]... [--grid] [--prompts FILE.jsonl]
    [--per-kind N] [--max-new-tokens N] [--target ID|PATH] [--dtype DTYPE] [--output FILE.json]
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from dynatree_bench.data.prompts import chat_ids, load_prompts, parsed_arguments
from dynatree_bench.report.statistics import PooledRatio, ratio_of_sums
from dynatree_bench.run.machine import check_writable, provenance
from dynatree_bench.studies.never_slower import make_drafter
from dynatree_core import CostModel, Drafter, DraftPlan, DraftState, Session, generate, load_model, run
from dynatree_core.cli.exits import end_process
from dynatree_core.clock import StageClock
from dynatree_core.costs import measured_costs
from dynatree_core.drafters.model import ModelDrafter, ModelDraftState
from dynatree_core.drafters.union import UnionDrafter, UnionState
from dynatree_core.files.writing import write_text
from dynatree_core.models.architectures import vocab_size
from dynatree_core.runners.runner import ModelRunner
from dynatree_core.tree.flatten import FlatTrees

POLICIES = ("phase1", "phase3", "cost_aware")
GRID = tuple(
    f"fixed(depth={depth},branch={branch},tau={tau})"
    for depth, branch, tau in itertools.product((2, 3, 4, 5, 6, 8), (1, 2, 3), (0.02, 0.05, 0.1))
)
SEARCHED, BEST = "fixed tree, searched", "best fixed tree"


@attrs.frozen
class Text:
    """A prompt and what the target makes of it."""

    kind: str
    prompt_ids: tuple[int, ...]
    new_ids: tuple[int, ...]
    max_new_tokens: int  # as many as there are, or more where an end token came before
    end_ids: tuple[int, ...] = ()  # that end the text


@attrs.frozen
class Rehearsal:
    """One text with one policy."""

    kind: str
    num_tokens: int
    num_iterations: int
    num_nodes: int  # drafted and verified
    num_passes: int  # of a model that drafts
    seconds: float  # at the prices of the cost model
    plain_seconds: float  # without drafting


class KnownTarget(LlamaForCausalLM):
    """Stands in for a target whose output is known: at each position of the text it says the token that came next.

    That is right for rows on the text's path. Any other has an ancestor that is rejected, so its own do not matter.
    """

    def __init__(self, token_ids: Sequence[int], vocab: int, room: int) -> None:
        tiny = {"hidden_size": 2, "intermediate_size": 2, "num_hidden_layers": 1, "num_attention_heads": 1}
        super().__init__(LlamaConfig(vocab_size=vocab, max_position_embeddings=len(token_ids) + room, **tiny))
        self.next_ids = torch.tensor([*token_ids[1:], *[0] * (room + 1)])
        self.eval()

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, cache: Any, logits_to_keep: int = 0, **_: Any
    ) -> CausalLMOutputWithPast:
        rows = input_ids.shape[1]
        cache.update(torch.zeros(1, 1, rows, 1), torch.zeros(1, 1, rows, 1), 0)
        said = self.next_ids[position_ids[0, -logits_to_keep:]]
        return CausalLMOutputWithPast(
            logits=torch.zeros(1, said.numel(), self.config.vocab_size).scatter_(2, said[None, :, None], 1.0)
        )


@attrs.frozen
class OfTarget(Drafter):
    """A drafter that is told of the real target while a stand-in verifies."""

    drafter: Drafter
    target: nn.Module

    def __str__(self) -> str:
        return str(self.drafter)

    def start(self, plan: DraftPlan) -> DraftState:
        return self.drafter.start(attrs.evolve(plan, target=self.target))


@attrs.define
class Prices:
    """What has been spent."""

    costs: CostModel
    seconds: float = 0.0
    num_passes: int = 0  # of models that draft

    def charge(self, runner: ModelRunner) -> None:
        """Have each pass of a runner cost something; those of a prompt are free."""
        forward = runner.forward

        def priced(flat: FlatTrees, *arguments: Any, stage: str, **options: Any) -> Tensor:
            if stage == "verify":
                self.seconds += self.costs.iteration_seconds(flat.num_rows - 1, [])
            elif stage == "draft_forward":
                self.seconds += self.costs.drafter_level_seconds(flat.num_rows)
                self.num_passes += 1
            return forward(flat, *arguments, stage=stage, **options)

        runner.forward = priced  # type: ignore[method-assign]


def told_of(drafter: Drafter, target: nn.Module) -> Drafter:
    """The drafter, each part of which sees the real target."""
    if isinstance(drafter, UnionDrafter):
        return UnionDrafter([told_of(part, target) for part in drafter.drafters])
    return OfTarget(drafter, target)


def known_session(target: nn.Module, drafter: Drafter, text: Text, policy: str) -> Session:
    """A session whose target says what is known.

    Args:
        target: the model that has made the text.
        drafter: as of any session.
        text: the text.
        policy: as of any session.
    """
    room = text.max_new_tokens - len(text.new_ids)
    stand_in = KnownTarget([*text.prompt_ids, *text.new_ids], vocab_size(target), room)
    return Session(
        stand_in,
        told_of(drafter, target),
        list(text.prompt_ids),
        policy=policy,
        max_new_tokens=text.max_new_tokens,
        eos_token_id=list(text.end_ids),
        trust_model=True,  # it says what comes next in one text, whatever stands in other rows
    )


def rehearse(target: nn.Module, drafter: Drafter, text: Text, policy: str, costs: CostModel) -> Rehearsal:
    """Decode a known text with a policy, which hears the priced seconds.

    Raises:
        RuntimeError: what was decoded is another text; then something here is wrong.
    """
    session, prices = known_session(target, drafter, text, policy), Prices(costs)
    prices.charge(session.target)
    for runner in _runners(session.draft_state):
        prices.charge(runner)
    session.clock, session.measure_costs = StageClock(session.device, now=lambda: prices.seconds), lambda: costs
    for _ in run(session):
        pass
    if tuple(session.new_token_ids) != text.new_ids:
        raise RuntimeError(f"{policy} decoded {session.new_token_ids} of the known text {list(text.new_ids)}")
    report = session.result().report
    return Rehearsal(
        text.kind,
        report.num_new_tokens,
        report.num_iterations,
        report.num_drafted_nodes,
        prices.num_passes,
        prices.seconds,
        report.num_new_tokens * costs.plain_step_seconds(),
    )


def _runners(state: DraftState | None) -> list[ModelRunner]:
    """Of the models that draft."""
    if isinstance(state, UnionState):
        return [runner for part in state.states for runner in _runners(part)]
    return [state.runner] if isinstance(state, ModelDraftState) else []


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


def ratios(found: Iterable[Rehearsal]) -> dict[str, float]:
    """The ratio of each kind of text."""
    return {kind: ratio(of_kind) for kind, of_kind in by_kind(found).items()}


def best_of(results: dict[str, list[Rehearsal]], policies: Sequence[str]) -> dict[str, str]:
    """The policy that is the fastest of some, for each kind of text."""
    found = {policy: ratios(results[policy]) for policy in policies}
    return {kind: max(policies, key=lambda policy: found[policy][kind]) for kind in found[policies[0]]}


def searched(results: dict[str, list[Rehearsal]], policies: Sequence[str]) -> list[Rehearsal]:
    """Each text by the policy that is the fastest over the other texts of its kind; texts without another are left out.

    So a policy is judged on texts that it was not chosen by.
    """
    found, kinds = [], [one.kind for one in results[policies[0]]]
    for place, kind in enumerate(kinds):
        others = [at for at in range(len(kinds)) if kinds[at] == kind and at != place]
        if others:
            speeds = {policy: ratio(results[policy][at] for at in others) for policy in policies}
            found.append(results[max(speeds, key=speeds.__getitem__)][place])
    return found


def relative(found: Sequence[Rehearsal], others: Sequence[Rehearsal]) -> PooledRatio:
    """How much faster some are than others of the same texts."""
    return ratio_of_sums([one.seconds for one in others], [one.seconds for one in found])


def relatives(results: dict[str, list[Rehearsal]], others: Sequence[Rehearsal]) -> dict[str, dict[str, PooledRatio]]:
    """Policies beside others of the same texts: policy -> "all" or kind -> ratio."""
    of_kind = by_kind(others)
    return {
        policy: {"all": relative(mine, others)}
        | {kind: relative(some, of_kind[kind]) for kind, some in by_kind(mine).items()}
        for policy, mine in results.items()
    }


def main() -> int:
    arguments = _parse_arguments()
    if arguments.output is not None:
        check_writable(arguments.output, "python -m dynatree_bench.studies.rehearse")
    console = Console(width=None if sys.stdout.isatty() else 130, highlight=False)
    loaded = load_model(arguments.target, device="cpu", dtype=arguments.dtype)
    target, made = loaded.model, make_drafter(arguments.drafter, loaded)
    drafter = made if isinstance(made, Drafter) else ModelDrafter(made)
    kinds = load_prompts(arguments.prompts, arguments.per_kind)
    prompts = [(kind, prompt) for kind, of_kind in kinds.items() for prompt in of_kind]
    grid = list(GRID) if arguments.grid else []
    policies = list(dict.fromkeys([*(arguments.policy or POLICIES), *grid]))
    costs = measured_costs(target, drafter)
    results: dict[str, list[Rehearsal]] = {policy: [] for policy in policies}
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("decoding", total=len(prompts) * (1 + len(policies)))
        for kind, prompt in prompts:
            ids = chat_ids(loaded, prompt)
            plain = generate(target, None, ids, policy="autoregressive", max_new_tokens=arguments.max_new_tokens)
            progress.advance(task)
            is_ended = plain.stop_reason == "eos"
            text = Text(
                kind,
                tuple(ids),
                tuple(plain.token_ids),
                arguments.max_new_tokens if is_ended else len(plain.token_ids),
                tuple(plain.token_ids[-1:]) if is_ended else (),
            )
            for policy in policies:
                results[policy].append(rehearse(target, drafter, text, policy, costs))
                progress.advance(task)
    shown = [policy for policy in policies if policy not in grid or policy in (arguments.policy or ())]
    by_search = searched(results, grid) if grid else []
    console.print(_table(results, shown, grid, by_search))
    beside: dict[str, dict[str, PooledRatio]] = {}
    if len(by_search) == len(prompts):
        beside = relatives({policy: results[policy] for policy in shown}, by_search)
        console.print(_relatives_table(beside))
    elif grid:
        console.print(f"no '{SEARCHED}': it takes two prompts of each kind at least")
    if arguments.output is not None:
        found = document(results, costs, arguments) | {
            "relative_to_searched": {
                policy: {kind: attrs.asdict(one) for kind, one in of_kind.items()} for policy, of_kind in beside.items()
            }
        }
        write_text(arguments.output, json.dumps(found, indent=1) + "\n")
    return 0


def document(results: dict[str, list[Rehearsal]], costs: CostModel, arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything that was found, for a file."""
    return {
        **provenance("dynatree_bench.studies.rehearse", torch.device("cpu")),
        "target": arguments.target or "the embedded default model",
        "dtype": arguments.dtype,
        "drafter": arguments.drafter,
        "max_new_tokens": arguments.max_new_tokens,
        "num_texts": {kind: len(found) for kind, found in by_kind(next(iter(results.values()))).items()},
        "costs": attrs.asdict(costs),
        "policies": {
            policy: {
                "ratio": ratio(found),
                "by_kind": ratios(found),
                "tokens_per_iteration": _mean(found, "num_tokens"),
                "nodes_per_iteration": _mean(found, "num_nodes"),
                "passes_per_iteration": _mean(found, "num_passes"),
                "seconds": [one.seconds for one in found],
            }
            for policy, found in results.items()
        },
    }


def _mean(found: Sequence[Rehearsal], name: str) -> float:
    """Of something, for an iteration."""
    return sum(getattr(one, name) for one in found) / sum(one.num_iterations for one in found)


def _table(
    results: dict[str, list[Rehearsal]], shown: Sequence[str], grid: Sequence[str], by_search: Sequence[Rehearsal]
) -> Table:
    kinds = list(by_kind(next(iter(results.values()))))
    table = Table(
        title="priced speed against autoregressive decoding",
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("policy", no_wrap=True)
    for heading in ("all", *kinds, "tok/it", "nodes", "passes"):
        table.add_column(heading, justify="right", no_wrap=True)
    for policy in shown:
        found = results[policy]
        speeds = [ratio(found), *ratios(found).values()]
        counts = [_mean(found, name) for name in ("num_tokens", "num_nodes", "num_passes")]
        table.add_row(policy, *(f"{number:.2f}" for number in (*speeds, *counts)))
    if grid:
        if len(by_search) == len(results[grid[0]]):
            speeds = [ratio(by_search), *ratios(by_search).values()]
            table.add_row(SEARCHED, *(f"{speed:.2f}" for speed in speeds), "", "", "")
        best = best_of(results, grid)
        overall = max(grid, key=lambda policy: ratio(results[policy]))
        speeds = [ratio(results[overall]), *(ratios(results[best[kind]])[kind] for kind in kinds)]
        table.add_row(BEST, *(f"{speed:.2f}" for speed in speeds), "", "", "")
        names = [name.removeprefix("fixed(").removesuffix(")") for name in (overall, *best.values())]
        table.add_row("  which is", *(name.replace(",", "\n") for name in names), "", "", "")
    return table


def _relatives_table(found: dict[str, dict[str, PooledRatio]]) -> Table:
    table = Table(
        title=f"speed relative to {SEARCHED}: each text with the tree that is the best of its kind's other texts",
        title_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("policy", no_wrap=True)
    for heading in next(iter(found.values())):
        table.add_column(heading, justify="right")
    for policy, of_kind in found.items():
        table.add_row(policy, *(f"{one.value:.2f}\n[{one.low:.2f}, {one.high:.2f}]" for one in of_kind.values()))
    return table


def _parse_arguments() -> argparse.Namespace:
    description = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m dynatree_bench.studies.rehearse", description=description)
    parser.add_argument("--target", help="id or folder of a model (default: the embedded one)")
    parser.add_argument("--dtype", default="auto", help="default: float32")
    parser.add_argument("--drafter", default="distilled+prompt_lookup", help="default: %(default)s")
    parser.add_argument("--policy", action="append", help=f"may be repeated (default: {', '.join(POLICIES)})")
    parser.add_argument("--grid", action="store_true", help=f"also {len(GRID)} fixed trees, and the best of each kind")
    parser.add_argument("--output", type=Path, help="write everything that was found to this file")
    return parsed_arguments(parser, max_new_tokens=128)


if __name__ == "__main__":
    end_process(main)
