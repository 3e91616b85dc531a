"""The distance to the best possible: what a tree that knows the target's text would have had accepted.

A policy grows trees whose nodes have the drafter's first choices as children, in order. Whoever knew the text would
expand the right child only, and give each node on the way just as many children as it takes to have the right one among
them: a token of rank r costs r + 1 nodes. From where the policy's tree starts, and with as many nodes, such an *oracle
tree* reaches the longest piece of the text whose costs sum to no more than that. It ends before a token that is
not among the drafter's proposals, and with the text: as the policy's tree, it can have no more accepted than there were
tokens left, one fewer where the length ended the generation, since a bonus token always follows.

The oracle tree of the same *cost* may have any number of nodes and levels, if drafting and verifying them takes no
longer than the policy's tree does.

The ranks are those that the drafter gives after the true text, of a union the best that it may give. Where a drafter
says the same of a text that is drafted, no tree that policies grow has more accepted than the oracle tree, but for one
whose `keep_nodes` keeps a node without its earlier siblings. Prompt lookup may say something else: drafted tokens are
less evidence to it, and it follows the occurrences that it found at the root.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Iterator

import attrs
import numpy as np

from dynatree_bench.run.records import OutputRecord, Steps
from dynatree_core.engine.costs import isotonic


@attrs.frozen
class CostTable:
    """Seconds of drafting a level and of verifying a number of rows."""

    level_seconds: float
    rows: tuple[float, ...]  # ascending, the root's row counted
    verify_seconds: tuple[float, ...]  # at these numbers of rows, not descending

    def seconds(self, depth: int, num_nodes: int) -> float:
        """The time of an iteration: between the table's rows by the straight line, beyond them by the last one."""
        rows = num_nodes + 1
        if rows <= self.rows[-1] or len(self.rows) == 1:
            verify = float(np.interp(rows, self.rows, self.verify_seconds))
        else:
            slope = (self.verify_seconds[-1] - self.verify_seconds[-2]) / (self.rows[-1] - self.rows[-2])
            verify = self.verify_seconds[-1] + slope * (rows - self.rows[-1])
        return self.level_seconds * depth + verify


@attrs.frozen
class OracleScore:
    """A policy beside the oracle tree, over the iterations of some outputs that drafted anything."""

    num_iterations: int
    num_nodes: int  # drafted
    accepted: int  # by the policy's trees
    oracle_accepted: int

    @property
    def share(self) -> float | None:
        """What the policy's trees had accepted of what the oracle's would have; None where that is nothing."""
        return self.accepted / self.oracle_accepted if self.oracle_accepted else None

    @property
    def oracle_tokens(self) -> float:
        """Tokens of an iteration with the oracle tree, its bonus token included."""
        return 1 + self.oracle_accepted / self.num_iterations


def oracle_accepted(ranks: Iterable[int], num_nodes: int) -> int:
    """How many of the next tokens the best tree of so many nodes reaches.

    Args:
        ranks: of the target's next tokens among the drafter's proposals, −1 for one that is none of them.
        num_nodes: drafted nodes.
    """
    costs = itertools.accumulate(rank + 1 for rank in itertools.takewhile(lambda rank: rank >= 0, ranks))
    return sum(1 for _ in itertools.takewhile(lambda cost: cost <= num_nodes, costs))


def oracle_accepted_at_cost(ranks: Iterable[int], seconds: float, costs: CostTable) -> int:
    """How many of the next tokens the best tree reaches whose iteration takes no longer; 0 where none is so short."""
    depth = num_nodes = 0
    for rank in itertools.takewhile(lambda rank: rank >= 0, ranks):
        num_nodes += rank + 1
        if costs.seconds(depth + 1, num_nodes) > seconds * (1 + 1e-9):  # rounding; what costs the same is no longer
            break  # times do not fall with depth and nodes
        depth += 1
    return depth


def score(records: Iterable[OutputRecord], costs: CostTable | None = None) -> OracleScore | None:
    """How near a policy came to the oracle tree.

    Args:
        records: outputs of the policy; those without steps or replay are passed over.
        costs: None: the oracle tree has as many nodes as the policy's; else it may take as long.

    Returns:
        None where no iteration drafted anything.
    """
    num_iterations = num_nodes = accepted = possible = 0
    for record in records:
        for depth, drafted, num_accepted, ranks in _iterations(record):
            num_iterations += 1
            num_nodes += drafted
            accepted += num_accepted
            if costs is None:
                possible += oracle_accepted(ranks, drafted)
            else:
                possible += oracle_accepted_at_cost(ranks, costs.seconds(depth, drafted), costs)
    return OracleScore(num_iterations, num_nodes, accepted, possible) if num_iterations else None


def oracle_tokens_per_iteration(records: Iterable[OutputRecord], num_nodes: int) -> float | None:
    """Tokens of an iteration if the outputs with a replay had been decoded by oracle trees of so many nodes alone."""
    num_tokens = num_iterations = 0
    for record in records:
        if record.replay is None:
            continue
        start, end = 0, len(record.token_ids)
        while start < end:
            last = end - (record.stop_reason == "length")
            start += oracle_accepted(record.replay.rank[start:last], num_nodes) + 1
            num_iterations += 1
        num_tokens += end
    return num_tokens / num_iterations if num_iterations else None


def _iterations(record: OutputRecord) -> Iterator[tuple[int, int, int, tuple[int, ...]]]:
    """(depth, drafted nodes, accepted, ranks of what may be accepted) of each iteration that drafted anything."""
    if record.steps is None or record.replay is None:
        return
    end = len(record.token_ids) - (record.stop_reason == "length")  # the last one is a bonus token
    start = 0
    for drafted, depth, accepted, committed in record.steps.rows():
        if drafted:
            yield depth, drafted, accepted, record.replay.rank[start:end]
        start += committed


def cost_table(records: Iterable[OutputRecord]) -> CostTable | None:
    """What levels and rows cost, estimated from the mean iteration of each method; None where nothing was timed.

    A method gives one entry, its mean number of rows with its mean time of verification. Times that fall with the
    number of rows, which is noise, are averaged with their neighbours until none does.

    Args:
        records: outputs of methods with one runner, since passes of different runners have different prices.
    """
    groups: dict[str, list[tuple[Steps, float, float]]] = {}
    for record in records:
        if record.steps is not None and record.verify_seconds is not None and record.draft_seconds is not None:
            timed = (record.steps, record.verify_seconds, record.draft_seconds)
            groups.setdefault(f"{record.method} {record.axes}", []).append(timed)
    if not groups:
        return None
    points: dict[float, list[float]] = {}
    for group in groups.values():
        iterations = sum(len(steps.depth) for steps, _, _ in group)
        rows = 1 + sum(sum(steps.num_drafted) for steps, _, _ in group) / iterations
        points.setdefault(rows, []).append(sum(verify for _, verify, _ in group) / iterations)
    everything = [timed for group in groups.values() for timed in group]
    num_levels = sum(sum(steps.depth) for steps, _, _ in everything)
    draft_seconds = sum(draft for _, _, draft in everything)
    rows_ascending = sorted(points)
    verify_seconds = isotonic([statistics.fmean(points[rows]) for rows in rows_ascending])
    level_seconds = draft_seconds / num_levels if num_levels else 0.0
    return CostTable(level_seconds, tuple(rows_ascending), tuple(verify_seconds))
