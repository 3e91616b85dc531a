"""What would policies be worth here? Their trees over texts that are known, at the prices of this machine's passes.

Question: how many tokens an iteration of a policy commits, and how much faster than autoregressive decoding it is by
what its passes take, without the scatter of a clock. So two policies that differ by 2 % can be told apart in minutes,
on a machine that does something else besides.

Method: the target decodes each prompt once, greedily. Then every policy decodes it again with the real drafter, and
with the known text in place of the target's passes: the same trees and the same accepted nodes as in a real run. A pass
of the target costs what the cost model says of its rows, one of a model that drafts what it says of a level with as
many nodes, and nothing else costs anything. What the host does besides is left out, so the ratios are upper bounds: on
a CPU a level takes up to a millisecond. The prices are those in the cache folder, or measured now.

Output: a table of policies; by category the speed against autoregressive decoding. A policy with the axes {depth},
{branch} and {tau} in its braces, such as "fixed(depth={depth},branch={branch},tau={tau})", is a grid of 54. Two more
rows come of it: what a search would find (for each text the one that is the best of the category's other texts), and
the best of each category, chosen afterwards, which no search can know. Then each policy's speed relative to what was
searched for, with the 95 % interval of resampled texts. A search takes two texts of each category at least.
"""

from __future__ import annotations

import itertools
import string
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import attrs
from torch import nn

from dynatree_bench.report.statistics import PooledRatio, ratio_of_sums
from dynatree_bench.report.tables import Table, shown, simple
from dynatree_bench.run.known import KnownTarget, Text, known_session
from dynatree_bench.run.pairs import Pair
from dynatree_bench.run.progress import bar
from dynatree_bench.studies.study import Asked, Study
from dynatree_core import CostModel, Drafter, generate, run
from dynatree_core.engine.costs import measured_costs
from dynatree_core.runners.around import EachPass, RunnerAround
from dynatree_core.runners.base import Rows, Runner
from dynatree_core.runners.choice import made_runner

POLICIES = ("phase1", "phase3", "cost_aware")
GRID = {"depth": (2, 3, 4, 5, 6, 8), "branch": (1, 2, 3), "tau": (0.02, 0.05, 0.1)}
SEARCHED, BEST = "fixed tree, searched", "best fixed tree"


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


@attrs.define
class Prices:
    """What has been spent."""

    costs: CostModel
    seconds: float = 0.0
    num_passes: int = 0  # of models that draft

    def runner(self, model: nn.Module, name: str) -> Runner:
        """A model's runner whose passes cost something."""
        charge = self._verification if isinstance(model, KnownTarget) else self._level
        return RunnerAround(made_runner(model, name), charged(charge))

    def _verification(self, rows: int) -> None:
        self.seconds += self.costs.iteration_seconds(rows - 1, [])

    def _level(self, rows: int) -> None:
        self.seconds += self.costs.drafter_level_seconds(rows)
        self.num_passes += 1


def charged(charge: Callable[[int], None]) -> EachPass:
    """Around each pass but those of a prompt: call this with its number of rows."""

    @contextmanager
    def each_pass(parts: Sequence[Rows], is_prompt: bool) -> Iterator[None]:
        if not is_prompt:
            charge(sum(part.flat.num_rows for part in parts))
        yield

    return each_pass


def rehearse(target: nn.Module, drafter: Drafter, text: Text, policy: str, costs: CostModel) -> Rehearsal:
    """Decode a known text with a policy, which hears the priced seconds.

    Raises:
        RuntimeError: what was decoded is another text; then something here is wrong.
    """
    prices = Prices(costs)
    session = known_session(
        target, drafter, text, policy, costs=costs, now=lambda: prices.seconds, make_runner=prices.runner
    )
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


def measure(asked: Asked) -> dict[str, Any]:
    """{"costs", "policies": policy -> numbers, "grid": policies of it, "searched", "relative_to_searched"}"""
    pair = attrs.evolve(asked.models, device="cpu").load(seed=asked.seed)
    templates = asked.policies or POLICIES
    grid = [policy for template in templates if is_grid(template) for policy in filled_in(template)]
    policies = list(dict.fromkeys([*(one for one in templates if not is_grid(one)), *grid]))
    drafters = dict(pair.drafters) or {str(pair.drafter): pair.drafter}
    texts = known_texts(asked, pair)
    costs = {name: measured_costs(pair.target.model, drafter) for name, drafter in drafters.items()}
    results: dict[str, list[Rehearsal]] = {}
    with bar("rehearsing", len(texts) * len(policies) * len(drafters)) as advance:
        for (name, drafter), policy, text in itertools.product(drafters.items(), policies, texts):
            found = results.setdefault(policy if len(drafters) == 1 else f"{policy} with {name}", [])
            found.append(rehearse(pair.target.model, drafter, text, policy, costs[name]))
            advance()
    in_grid = [name for name in results if name.partition(" with ")[0] in grid]
    by_search = searched(results, in_grid) if in_grid else []
    is_whole = bool(by_search) and len(by_search) == len(texts)
    beside = (
        relatives({name: found for name, found in results.items() if name not in in_grid}, by_search)
        if is_whole
        else {}
    )
    said = {
        **pair.said(),
        "drafter": "; ".join(drafters),
        "max_new_tokens": asked.new_tokens(full=128, quick=16),
        "num_texts": {kind: len(found) for kind, found in by_kind(next(iter(results.values()))).items()},
    }
    return {
        "provenance": said,
        "costs": {name: attrs.asdict(one) for name, one in costs.items()},
        "policies": {name: summary(found) for name, found in results.items()},
        "grid": in_grid,
        "searched": summary(by_search) if is_whole else None,
        "relative_to_searched": {
            name: {kind: attrs.asdict(one) for kind, one in of_kind.items()} for name, of_kind in beside.items()
        },
    }


def is_grid(policy: str) -> bool:
    """Whether a policy is a template over GRID."""
    return any(field for _, field, _, _ in string.Formatter().parse(policy))


def filled_in(template: str) -> list[str]:
    """A policy at each point of the grid's axes that it names."""
    points = itertools.product(*GRID.values())
    return list(dict.fromkeys(template.format(**dict(zip(GRID, point, strict=True))) for point in points))


def known_texts(asked: Asked, pair: Pair) -> list[Text]:
    """What the target makes of each prompt."""
    limit = asked.new_tokens(full=128, quick=16)
    prompts = [(kind, ids) for kind, of_kind in asked.prompts(pair, full=None).items() for ids in of_kind]
    texts = []
    with bar("decoding", len(prompts)) as advance:
        for kind, ids in prompts:
            plain = generate(pair.target.model, None, list(ids), policy="autoregressive", max_new_tokens=limit)
            is_ended = plain.stop_reason == "eos"
            ends = tuple(plain.token_ids[-1:]) if is_ended else ()
            room = limit if is_ended else len(plain.token_ids)
            texts.append(Text(kind, tuple(ids), tuple(plain.token_ids), room, ends))
            advance()
    return texts


def summary(found: Sequence[Rehearsal]) -> dict[str, Any]:
    """A policy's numbers."""
    num_iterations = sum(one.num_iterations for one in found)
    return {
        "ratio": ratio(found),
        "by_kind": ratios(found),
        "tokens_per_iteration": sum(one.num_tokens for one in found) / num_iterations,
        "nodes_per_iteration": sum(one.num_nodes for one in found) / num_iterations,
        "passes_per_iteration": sum(one.num_passes for one in found) / num_iterations,
        "seconds": [one.seconds for one in found],
    }


def tables(found: Mapping[str, Any]) -> Sequence[Table | None]:
    policies, beside = found["policies"], found["relative_to_searched"]
    # a file of an earlier version has the grid behind the others
    grid = found.get("grid", [policy for policy in policies if beside and policy not in beside])
    kinds = list(next(iter(policies.values()))["by_kind"])
    counts = ("tokens_per_iteration", "nodes_per_iteration", "passes_per_iteration")

    def row(name: str, one: Mapping[str, Any]) -> tuple[Any, ...]:
        return (name, one["ratio"], *(one["by_kind"][kind] for kind in kinds), *(one.get(count) for count in counts))

    rows = [row(name, one) for name, one in policies.items() if name not in grid]
    if found.get("searched"):
        rows.append(row(SEARCHED, found["searched"]))
    if grid:
        best = {kind: max(grid, key=lambda name: policies[name]["by_kind"][kind]) for kind in kinds}
        overall = max(grid, key=lambda name: policies[name]["ratio"])
        by_kind = {kind: policies[name]["by_kind"][kind] for kind, name in best.items()}
        rows.append(row(BEST, {"ratio": policies[overall]["ratio"], "by_kind": by_kind}))
        rows.append(("which is", overall, *best.values(), None, None, None))
    ranges = [(name, *(shown(PooledRatio(**one)) for one in of_kind.values())) for name, of_kind in beside.items()]
    note = f"{SEARCHED}: each text with the tree that is the best of its category's other texts."
    header = ("policy", "all", *kinds, "tok/it", "nodes", "passes")
    return [
        simple("policies", "Priced speed against autoregressive decoding", "", header, rows),
        simple("beside", f"Speed relative to {SEARCHED}", note, ("policy", "all", *kinds), ranges),
    ]


def sentences(found: Mapping[str, Any]) -> Sequence[str]:
    is_missing = found.get("grid") and not found["searched"]
    return [f"no '{SEARCHED}': it takes two prompts of each category at least"] if is_missing else []


STUDY = Study(
    ("target", "drafters", "dtype", "policies", "workloads", "num_prompts", "picks", "max_new_tokens", "is_chat"),
    measure, tables, sentences=sentences,
)  # fmt: skip
