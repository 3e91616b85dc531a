"""`cost_aware`: grow as long as it pays, by measured costs and calibrated acceptance.

An iteration yields E tokens in T seconds. More tree is worth ΔE tokens and costs ΔT seconds, and raises the rate of
the whole as long as ΔE/ΔT > E/T. With λ for the rate of the last iterations that is

    ΔE − λ·ΔT > 0

which is what is maximised here, at each level over depth and width, and over the size of what was drafted at the end.
Maximising E − λ·T with λ the rate that is reached is how a ratio E/T is maximised (Dinkelbach 1967). For the expected
tokens of a tree see `best_first`; the acceptance of a node is the drafter's probability, corrected by what was seen
(AcceptanceEstimator). Sizing trees by the time that they take on the hardware at hand is an idea of Sequoia (Chen et
al. 2024), which does so once and beforehand.

What is expected may be wrong, and a drafter that is sure of noise is believed for a while. So there is an account, in
steps without drafting and by the cost model: it begins with `STAKE`, each iteration adds what it has won, or takes what
it has lost, and adds `MAX_LOSS`. Below zero nothing is drafted. (`governor` keeps one by the clock, for any stack.) The
first trees could spend the stake at once, so they have up to `FIRST_DEPTH` levels, and twice as many each time that one
was accepted to its full depth.

A model as drafter follows the text when it is asked, so the first look in a while has it catch up, and the first look
of all has it read the prompt (`Frontier.num_behind`). That is paid once and serves all looks to come. So it is shared
out over the next `PAYBACK` iterations, or as many as are left: a look has to pay its share, and the account is charged
so much in each of them. What is not charged yet when drafting stops is lost beyond what the account allows.

A look may be free (`Frontier.is_look_free`): where a text is copied, a union knows enough without its model, which then
follows nothing. Such a look costs what the host does. What looks win is learnt of either kind by itself, since what is
won where a text is copied says nothing about what the model would win elsewhere. There is an account for each, too: a
model that is not worth its time, or has a long prompt to read, must not use up what copied text would be drafted with.

Where several sequences share their passes, all of this goes by what a tree is charged there (`Frontier.charged_costs`):
each second that it adds delays every one of them, and counts for each. Rows are dear there, so a look wins less than it
would alone: a model is tried once, and then asked only if that has won more than a usual chain is worth there.
"""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import attrs
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dynatree_core import AcceptanceEstimator, CostModel, Frontier, StepReport, TokenTree, count, fraction, hookimpl

HORIZON = 6  # levels beyond the one that is decided on: one row more is dear, a chain behind it may pay for that
MEMORY = 0.97  # share of what is known that another iteration leaves: it takes some 30 of them to forget
PRIOR_HIT, PRIOR_LOOK = 0.6, 0.5  # before anything is known: chance that a chain goes on, and tokens that a look wins
PRIOR_WEIGHT = 4.0
# the hooks and the bookkeeping of a level, in times that a small tree takes to be laid out and committed (both are work
# of the host, however quick the passes are), and as a share of a step at least, where the costs know of no such work:
# levels of a drafter that costs nothing would be free. Counted on two cores: 2.7 ms beside a rest of 0.8 to 1.0 in a
# sequence alone, 2 ms beside one of 0.5 where four share passes
LEVEL_RESTS, LEVEL_SHARE = 3.5, 0.04
STAKE, MAX_LOSS = 0.75, 0.015  # steps: what drafting may lose, and what an iteration adds to that
FREE_STAKE, FREE_MAX_LOSS = 0.375, 0.0075  # the same for iterations whose looks are all free
FIRST_DEPTH = 4
RESERVE = 8.0  # steps that the account holds at most: as much is lost before a change of the text is answered
PAYBACK = 32  # iterations over which the price of catching up is shared out
IDLE_SHARE = 0.002  # of the way back to the prior, for each iteration without such a look: how soon one is tried again

NOT_FREE_SHARE = 0.05  # the same, to nothing, of what free looks win, for each that turns out to cost something

Numbers = npt.NDArray[np.float32]  # on the host, where torch takes five times as long for so few


def level_seconds(costs: CostModel, width: int, *, is_free: bool = False) -> float:
    """A level over so many nodes: the drafter's pass, unless it did without, and what the host does besides."""
    of_host = max(LEVEL_RESTS * costs.rest_seconds, LEVEL_SHARE * costs.plain_step_seconds())
    return (0.0 if is_free else costs.drafter_level_seconds(width)) + of_host


@functools.lru_cache(maxsize=256)
def _seconds(costs: CostModel, num_rows: int) -> tuple[Numbers, Numbers]:
    """[rows] of the target's pass and of a level over 0, 1, 2, … rows, so many at least."""
    of_host = level_seconds(costs, 0)
    growth = [of_host + seconds for seconds in costs.drafter_level_seconds.table(num_rows)]
    return np.array(costs.target_pass_seconds.table(num_rows), np.float32), np.array(growth, np.float32)


def _less_won(frontier: Frontier) -> float:
    """Tokens that a look at a model wins less than `PRIOR_LOOK` where passes are shared; none less alone."""
    return 0.0 if frontier.num_sequences == 1 else max(PRIOR_LOOK - _usual_chain(frontier.charged_costs), 0.0)


@functools.lru_cache(maxsize=256)
def _usual_chain(costs: CostModel) -> float:
    """Tokens that a chain wins beside others, as long as it is worth most at these prices of rows."""
    best, accepted, plain = 0.0, 0.0, costs.plain_step_seconds()
    for rows in range(1, HORIZON + 1):
        accepted += PRIOR_HIT**rows
        added = costs.target_pass_seconds(1 + rows) - costs.target_pass_seconds(1)
        levels = (rows - 1) * level_seconds(costs, 1)
        best = max(best, accepted - (added + levels) / plain)
    return best


def _payback(frontier: Frontier) -> int:
    """Iterations over which the price of catching up is shared out: as many at most as there are tokens to come."""
    left = frontier.num_tokens_left
    return PAYBACK if left is None else max(min(PAYBACK, left), 1)


@attrs.frozen(eq=False)
class _Level:
    """Children that are wanted for a tree's last level."""

    tree: TokenTree
    acceptance: Tensor  # [children] float32: how likely each path is to be accepted, breadth first
    values: list[float]  # the same on the host, in another order
    mass: float  # their sum

    def is_grown_to(self, tree: TokenTree) -> bool:
        """Whether a tree has all of them and no others: nobody else had a say."""
        return tree.level_sizes == (*self.tree.level_sizes, self.acceptance.numel())


@attrs.frozen(eq=False)
class _Judged:
    """How likely the nodes of a tree are to be accepted."""

    tree: TokenTree
    acceptance: Tensor  # [nodes] float32
    values: list[float] | None  # of the drafted ones on the host, in any order; None: nobody has read them


@attrs.define
class CostAware:
    """Depth, width and size of each tree by what they are expected to win and to cost.

    What is learnt of acceptance is kept in the file `remember`, if one is named, when a generation ends, and the next
    one with that file begins with it. Name one for each pair of a target and a drafter.

    A level is looked at where looks of late have won more than the drafter's pass costs, and while the account of such
    looks is not below zero. Then it gets the children, none perhaps, that win most with up to `HORIZON` levels behind
    them, and at the end the nodes are verified that win most.
    """

    max_nodes: int = count(64)
    max_depth: int = count(16)
    tau: float = fraction(0.0)
    remember: str = attrs.field(default="", validator=attrs.validators.instance_of(str))

    reads_on_host: ClassVar = True

    estimator: AcceptanceEstimator = attrs.field(factory=AcceptanceEstimator, init=False, repr=False)
    tokens: float = attrs.field(default=0.0, init=False, repr=False)  # of late, and the seconds that they took
    seconds: float = attrs.field(default=0.0, init=False, repr=False)
    hits: float = attrs.field(default=0.0, init=False, repr=False)  # accepted nodes with children of which one was too
    trials: float = attrs.field(default=0.0, init=False, repr=False)  # accepted nodes with children
    account: float = attrs.field(default=STAKE, init=False, repr=False)  # steps that drafting may still lose
    free_account: float = attrs.field(default=FREE_STAKE, init=False, repr=False)  # where all looks are free
    depth_limit: int = attrs.field(default=FIRST_DEPTH, init=False, repr=False)
    debt: float = attrs.field(default=0.0, init=False, repr=False)  # steps that catching up took, not charged yet
    instalment: float = attrs.field(default=0.0, init=False, repr=False)  # steps of it that an iteration is charged
    # tokens that a look wins, by path acceptance of its level: one that costs something, as if rows cost little
    # (`_less_won`), and one that is free
    look_value: float = attrs.field(default=PRIOR_LOOK, init=False, repr=False)
    free_look_value: float = attrs.field(default=PRIOR_LOOK, init=False, repr=False)
    has_looked: bool = attrs.field(default=False, init=False, repr=False)  # at a model, in this text
    is_recalled: bool = attrs.field(default=False, init=False, repr=False)
    levels: list[Frontier] = attrs.field(factory=list, init=False, repr=False)  # of this iteration, that it said yes to
    costs: CostModel | None = attrs.field(default=None, init=False, repr=False)
    _last: _Judged | None = attrs.field(default=None, init=False, repr=False)
    _wanted: _Level | None = attrs.field(default=None, init=False, repr=False)  # that branch_factor asked for last

    def __attrs_post_init__(self) -> None:
        if self.remember and not Path(self.remember).parent.is_dir():
            raise ValueError(
                f"CostAware's parameter 'remember' must be a file in a folder that exists, got {self.remember!r}"
            )
        self._recall()

    @hookimpl
    def should_expand(self, frontier: Frontier) -> bool:
        if frontier.depth == 0:
            self.levels, self.costs = [], frontier.charged_costs
            if not self.is_recalled:  # again: each session has a copy, and others may have kept more since
                self._recall()
                self.is_recalled = True
        if frontier.depth >= min(self.max_depth, self.depth_limit) or max(self.account, self.free_account) < 0:
            return False
        costs, mass = frontier.charged_costs, self._mass(frontier.tree)
        rate, behind = self._rate(costs), costs.catch_up_seconds(frontier.num_behind) / _payback(frontier)
        less = _less_won(frontier) if self.has_looked else 0.0
        won = mass * (self.look_value - less)
        pays = won > rate * (level_seconds(costs, frontier.width) + behind) and self.account >= 0
        may_pay = mass * self.free_look_value > rate * level_seconds(costs, frontier.width, is_free=True)
        if not pays and may_pay and self.free_account >= 0:
            pays = frontier.is_look_free  # a search of the text, so only where it decides
            if not pays and frontier.depth == 0:
                self._learn_look(0.0, NOT_FREE_SHARE, is_free=True)
        if pays:
            self.levels.append(frontier)
        return pays

    @hookimpl
    def branch_factor(self, frontier: Frontier) -> Tensor:
        tree, costs, device = frontier.tree, frontier.charged_costs, frontier.tree.device
        at_parent = self._judged(tree).acceptance[tree.last_level]
        given_parent = self.estimator.predict(frontier.top_logprobs, None, frontier.depth + 1)
        own = (at_parent[:, None] * given_parent).flatten()  # [width · k]
        # a child comes with those of lower rank, so it is worth no more than the least of them; of equals these first
        accepted = own.view(frontier.width, -1).cummin(dim=1).values.flatten()
        best = accepted.sort(descending=True, stable=True)
        values, places = (of[: frontier.nodes_left] for of in (best.values, best.indices))
        # all that the host has to know, by one transfer
        best_values, best_own, at_parents = frontier.read(values, own[places], at_parent)
        wins = self._wins(best_values, tree.num_drafted, self._rate(costs), costs, self.max_depth - frontier.depth - 1)
        num_children = int(wins.argmax())
        won = float(wins[num_children]) / max(sum(at_parents), 1e-6)
        is_free = frontier.proposals.is_free
        self.has_looked |= not is_free
        less = 0.0 if is_free else _less_won(frontier)
        self._learn_look(won + less, 0.1, is_free=is_free)
        if num_children == 0:
            return torch.zeros(frontier.width, dtype=torch.int64, device=device)
        # who is worth as much as the last of them may be held down by a sibling, and comes too
        num_wanted = sum(value > 0 and value >= best_values[num_children - 1] for value in best_values)
        is_wanted = torch.zeros_like(own, dtype=torch.bool).index_fill_(0, places[:num_wanted], True)
        chosen = places[:num_wanted].sort().values
        wanted = own[chosen]
        self._wanted = _Level(tree, wanted, best_own[:num_wanted], sum(best_own[:num_wanted]))
        widths = is_wanted.view(frontier.width, -1).sum(dim=1)
        frontier.note_children(widths, num_wanted, places=chosen)
        return widths

    @hookimpl
    def keep_nodes(self, tree: TokenTree) -> Tensor | None:
        if self.costs is None:
            return None
        judged = self._judged(tree)
        values = judged.acceptance[1:].tolist() if judged.values is None else judged.values
        wins = self._wins(sorted(values, reverse=True), 0, self._rate(self.costs), self.costs, 0)
        num_kept = int(wins.argmax())
        if num_kept == tree.num_drafted:
            return None
        best = judged.acceptance[1:].argsort(descending=True, stable=True)
        keep = tree.parent < 0  # the root
        keep[1:].index_fill_(0, best[:num_kept], True)
        return keep

    @hookimpl
    def on_iteration_end(self, report: StepReport) -> None:
        self.estimator.observe(report)
        # another policy may have ended the tree before anybody looked, or have decided the widths afterwards
        asked = [frontier for frontier in self.levels if frontier.is_drafter_asked]
        for is_free in {False, True} - {frontier.proposals.is_free for frontier in asked}:
            self._learn_look(PRIOR_LOOK, IDLE_SHARE, is_free=is_free)
        if self.costs is not None:
            seconds = self.costs.iteration_seconds(report.tree.num_drafted, [])
            for level in asked:
                seconds += level_seconds(level.charged_costs, level.width, is_free=level.proposals.is_free)
                if level.num_behind and not level.proposals.is_free:
                    self.debt += level.catch_up_seconds / self.costs.plain_step_seconds()
                    self.instalment = max(self.instalment, self.debt / _payback(level))
            self.tokens = MEMORY * self.tokens + len(report.token_ids)
            self.seconds = MEMORY * self.seconds + seconds
            won = len(report.token_ids) - seconds / self.costs.plain_step_seconds()
            due = min(self.instalment, self.debt)
            self.debt -= due
            self.instalment = self.instalment if self.debt > 0 else 0.0
            is_free = bool(asked) and all(frontier.proposals.is_free for frontier in asked)
            self.account = min(self.account + (0.0 if is_free else won) - due + MAX_LOSS, RESERVE)
            self.free_account = min(self.free_account + (won if is_free else 0.0) + FREE_MAX_LOSS, RESERVE)
        if report.num_accepted >= self.depth_limit:
            self.depth_limit *= 2
        self._count(report)
        if self.remember and report.verdict.stop_reason is not None:
            self._keep()
        self.levels, self.costs, self._last, self._wanted = [], None, None, None

    def _recall(self) -> None:
        if self.remember and Path(self.remember).exists():
            self.estimator.load(Path(self.remember))

    def _keep(self) -> None:
        try:
            self.estimator.save(Path(self.remember))
        except OSError as error:  # the text is there; what was learnt can be learnt again
            warnings.warn(f"what cost_aware has learnt cannot be kept: {error}", RuntimeWarning, stacklevel=2)

    def _judged(self, tree: TokenTree) -> _Judged:
        """How likely each node is to be accepted."""
        before, wanted = self._last, self._wanted
        if before is not None and before.tree is tree:
            return before
        values: list[float] | None = None
        if tree.num_drafted == 0:
            acceptance, values = tree.cum_logprob.exp(), []  # the root is accepted: 1
        elif before is not None and wanted is not None and wanted.is_grown_to(tree):
            acceptance = torch.cat([before.acceptance, wanted.acceptance])
            values = None if before.values is None else [*before.values, *wanted.values]
        else:
            given_parent = self.estimator.predict(tree.logprob, tree.rank, tree.depth).clamp(min=1e-9)
            given_parent[:1].fill_(1.0)
            acceptance = (tree.ancestor_mask.float() @ given_parent.log()).exp()
        self._last, self._wanted = _Judged(tree, acceptance, values), None
        return self._last

    def _mass(self, tree: TokenTree) -> float:
        """How many nodes of the last level will be accepted, in expectation."""
        if tree.max_depth == 0:
            return 1.0  # the root is
        if self._wanted is not None and self._wanted.is_grown_to(tree):
            return self._wanted.mass
        return float(self._judged(tree).acceptance[tree.last_level].sum())

    def _rate(self, costs: CostModel) -> float:
        """λ: tokens a second of late, as many at least as without drafting."""
        lately = self.tokens / self.seconds if self.seconds > 0 else 0.0
        return max(lately, 1 / costs.plain_step_seconds())

    def _wins(
        self, accepted: Sequence[float], num_before: int, rate: float, costs: CostModel, levels_left: int
    ) -> Numbers:
        """[nodes + 1] float32: tokens that the first 0, 1, 2, … of some nodes win, less what the seconds are worth.

        Args:
            accepted: how likely each is to be accepted, descending.
            num_before: drafted nodes beside them.
            levels_left: levels that may follow; chains of as many as pay are counted in.
        """
        gained = np.array([0.0, *itertools.accumulate(accepted)], np.float32)
        hit = (PRIOR_WEIGHT * PRIOR_HIT + self.hits) / (PRIOR_WEIGHT + self.trials)
        levels = np.arange(min(HORIZON, max(levels_left, 0)) + 1)[:, None]
        per_node = np.array([*itertools.accumulate(hit**level for level in range(len(levels)))], np.float32)
        num_rows = 1 + num_before + len(gained) + HORIZON
        verify, growth = _seconds(costs, 1 << num_rows.bit_length())
        # [levels, nodes + 1]: a row begins one row of the pass later than the one before it
        rows = 1 + num_before + levels + np.arange(len(gained))
        seconds = verify[rows] - verify[1 + num_before] + levels.astype(np.float32) * growth[: len(gained)]
        seconds[:, 0] = 0.0
        wins: Numbers = (gained * per_node[:, None] - np.float32(rate) * seconds).max(axis=0)
        return wins

    def _learn_look(self, tokens: float, share: float, *, is_free: bool) -> None:
        """What a look has won, given that its level is accepted; an iteration without one leads back to the prior."""
        if is_free:
            self.free_look_value += share * (tokens - self.free_look_value)
        else:
            self.look_value += share * (tokens - self.look_value)

    def _count(self, report: StepReport) -> None:
        """How often an accepted node with children has an accepted child."""
        num_accepted, tree = report.num_accepted, report.tree
        last = report.verdict.path[-1] if report.verdict.path else 0
        # the root of a tree has children, a node of its last level none; of others the device has to be asked
        goes_on = num_accepted < tree.max_depth and (last == 0 or bool((tree.parent == last).any()))
        num_trials = num_accepted + (goes_on and report.verdict.stop_reason is None)
        if num_trials:
            self.hits = MEMORY * self.hits + num_accepted
            self.trials = MEMORY * self.trials + num_trials
