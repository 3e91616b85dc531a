"""`governor`: drafting only as long as it is faster than autoregressive decoding. Compose it: `phase3+governor`.

It keeps an account in seconds. With s the time of a step without drafting, an iteration that drafted and committed n
tokens in t seconds has won n·s − t, which may be negative. The account begins with `stake`·s, gets what drafting wins,
and a share `max_loss` of the time of each step without drafting; drafting is on as long as the account is not below
what the next such iteration is expected to lose. The account is the stake, plus the shares, less what drafting has lost
(or less than that, since it is bounded). So after P steps without drafting all drafting together has lost at most

    stake·s + max_loss·P·s + what one iteration lost beyond expectation

whatever the drafter and the text are. For a known acceptance theorem 3.8 of Leviathan et al. 2023 says whether drafting
pays; here it is unknown and changes with the text, so what counts is what was measured. Clocks scatter, and the first
steps of a generation may be slow. So that an s that is too long does not make useless trees look free, a tree is taken
to cost a tenth of s at least.

Where several sequences share their passes, the time that an iteration takes beyond s delays all of them. So what a tree
took of it, by its share of the drafted nodes, counts as often as there are sequences. Then s is that of steps with as
many sequences in which nobody drafted. Beside sequences that always draft there are none: then s is that of steps in
which this one did not, beside others that did, and all that an iteration takes beyond it is this tree's. The first tree
beside others is expected to lose `FIRST_LOSS` for each of them: all of them would try one, and each trial holds up the
others.

A model as drafter follows the text when it is asked, so the first look in a while has it catch up, and the first of all
has it read the prompt (`Frontier.num_behind`). That is paid once and serves all trees to come. It is begun where it is
expected to take no more than a `LOAN`th of the plain steps that are left, and the account is charged in `PAYBACK`
instalments. What is not charged yet when drafting stops is lost beyond the bound. Where it is not begun, a tree grows
only as long as looks are free (`Frontier.is_look_free`), as they are in a union while a text is copied.
"""

from __future__ import annotations

import statistics
from collections import defaultdict, deque
from typing import ClassVar

import attrs

from dynatree_core import Frontier, StepReport, count, fraction, hookimpl

RESERVE = 8  # steps that the account holds at most: as much is lost before a change of the text is answered
LEAST_COST = 0.1  # of a step: what a tree takes, however long a step without one was measured
MIN_PLAIN = 2  # the first steps are without drafting, to know what drafting has to beat
FEW = 8  # tokens that the drafter catches up with beside what it does in any iteration
TOKEN_SHARE = 0.015  # of a step: what catching up with a token is expected to take, before it was measured
LOAN, PAYBACK = 0.1, 32
PATIENCE = 16  # iterations beside sequences that draft, before steps beside those are what drafting has to beat
FIRST_LOSS = 0.25  # of a step, for each other sequence: what a tree is expected to lose before one was tried


@attrs.define
class _Seen:
    """What was measured of late with some number of sequences."""

    plain: deque[float] = attrs.field(factory=lambda: deque(maxlen=5))  # seconds of a step in which nobody drafted
    beside: deque[float] = attrs.field(factory=lambda: deque(maxlen=5))  # of one in which only others did
    wins: deque[float] = attrs.field(factory=lambda: deque(maxlen=8))  # seconds that an iteration with drafting won


@attrs.define
class Governor:
    """Turn drafting off where it loses time, and try it again at a bounded cost.

    Each step without drafting lets drafting lose `max_loss` of its time. Off, it is tried again with trees of
    `probe_depth` levels; as often as such a tree is accepted to its full depth, the depth doubles, until it is off
    again. While it is on, one step goes without after every `refresh` others, to measure what that takes by now.
    """

    max_loss: float = fraction(0.015)
    stake: int = count(1, minimum=0)
    probe_depth: int = count(2)
    refresh: int = count(32, minimum=2)

    is_capturable: ClassVar = True  # whether it drafts it knows before there is a tree, unless a long text is behind

    account: float = attrs.field(default=0.0, init=False, repr=False)  # seconds
    seen: dict[int, _Seen] = attrs.field(factory=lambda: defaultdict(_Seen), init=False, repr=False)
    load: int = attrs.field(default=1, init=False, repr=False)  # sequences that share the pass, this one among them
    num_since_plain: int = attrs.field(default=0, init=False, repr=False)
    num_since_off: int = attrs.field(default=0, init=False, repr=False)  # iterations since this one did not draft
    depth_limit: int = attrs.field(default=0, init=False, repr=False)
    is_staked: bool = attrs.field(default=False, init=False, repr=False)  # whether the account has begun
    is_drafting: bool = attrs.field(default=False, init=False, repr=False)  # in the iteration that is under way
    behind: list[Frontier] = attrs.field(factory=list, init=False, repr=False)  # its levels with a text to follow first
    token_seconds: float | None = attrs.field(default=None, init=False, repr=False)  # of catching up with a token
    debt: float = attrs.field(default=0.0, init=False, repr=False)  # seconds that catching up took, not charged yet
    instalment: float = attrs.field(default=0.0, init=False, repr=False)  # seconds of it that an iteration is charged

    @hookimpl(tryfirst=True)
    def should_expand(self, frontier: Frontier) -> bool:
        if frontier.depth == 0:
            self.load, self.behind = frontier.num_sequences, []
            self.is_drafting = self._may_draft()  # if no look is worth its text then, asking so is charged, too
        if not self.is_drafting or frontier.depth >= max(self.depth_limit, self.probe_depth):
            return False
        if frontier.num_behind >= FEW:
            self.behind.append(frontier)
        return self._may_look(frontier)

    @hookimpl
    def on_iteration_end(self, report: StepReport) -> None:
        # a step whose draft made the target overflow is done again without one, by its sequence alone; nobody asks then
        is_as_asked = report.num_sequences == self.load
        self.load = report.num_sequences
        self.num_since_plain += 1  # of all that share the passes, so that they go without in the same step
        self.num_since_off += 1
        if self.is_drafting and is_as_asked:
            self._note_drafted(report)
        else:
            self._note_off(report)
        due = min(self.instalment, self.debt)
        self.account -= due
        self.debt -= due
        self.instalment = self.instalment if self.debt > 0 else 0.0
        self.is_drafting, self.behind = False, []  # where nobody asks, there is no tree

    @property
    def _is_crowded(self) -> bool:
        """Whether the others have drafted in each iteration for long, so that there is no step without any tree."""
        is_known = len(self.seen[self.load].plain) >= MIN_PLAIN
        return self.num_since_plain >= PATIENCE + (self.refresh if is_known else 0)

    @property
    def _steps(self) -> deque[float]:
        """Seconds of the steps that drafting has to beat."""
        seen = self.seen[self.load]
        return seen.beside if self._is_crowded else seen.plain

    def _may_draft(self) -> bool:
        num_since = self.num_since_off if self._is_crowded else self.num_since_plain
        is_known = len(self._steps) >= MIN_PLAIN and num_since < self.refresh
        return is_known and self.account >= self._expected_loss()

    def _may_look(self, frontier: Frontier) -> bool:
        """Whether the text that the drafter follows first is short enough, if it follows any."""
        if frontier.num_behind < FEW or frontier.num_tokens_left is None:
            return True
        step = self._step_seconds()
        of_token = TOKEN_SHARE * step if self.token_seconds is None else self.token_seconds
        is_short = frontier.num_behind * of_token * self.load <= LOAN * step * frontier.num_tokens_left
        return is_short or frontier.is_look_free

    def _expected_loss(self) -> float:
        """Seconds that the next iteration with drafting will lose, going by the last ones."""
        wins = self.seen[self.load].wins
        if wins:
            return max(-statistics.fmean(wins), 0.0)
        return FIRST_LOSS * (self.load - 1) * self._step_seconds()

    def _note_off(self, report: StepReport) -> None:
        """An iteration in which this sequence did not draft."""
        self.num_since_off = 0
        if report.is_plain:
            self.num_since_plain = 0
            self._note_step(self.seen[self.load].plain, report.seconds)
            return
        beside = self.seen[self.load].beside
        if self._is_crowded:
            self._note_step(beside, report.seconds)
            return
        beside.append(report.seconds)
        if self._steps:
            self._add(self.max_loss * self._step_seconds())

    def _note_step(self, steps: deque[float], seconds: float) -> None:
        """A step that drafting has to beat."""
        steps.append(seconds)
        if not self.is_staked:
            self.account = self.stake * self._step_seconds()
            self.is_staked = len(self._steps) >= MIN_PLAIN
        else:
            self._add(self.max_loss * seconds)

    def _note_drafted(self, report: StepReport) -> None:
        num_tokens, num_drafted, step = len(report.token_ids), report.tree.num_drafted, self._step_seconds()
        least = LEAST_COST if num_drafted else 0.0  # the drafter may have had nothing to say
        drafted_beside = report.rows_beside - (report.num_sequences - 1)
        own = num_drafted / (num_drafted + drafted_beside) if drafted_beside > 0 and not self._is_crowded else 1.0
        added = (report.seconds - step) * own * report.num_sequences  # it delays all that share the pass
        win = min((num_tokens - 1) * step - added, (num_tokens - 1 - least) * step)
        if self._is_crowded and drafted_beside == 0:  # the others have stopped, so what it has to beat is shorter
            self.num_since_off, win = self.refresh, min(win, 0.0)
        caught_up = self._caught_up
        if win < 0 and caught_up is not None:
            self._borrow(-win, caught_up)
            return
        self.seen[self.load].wins.append(win)
        limit = max(self.depth_limit, self.probe_depth)
        self.depth_limit = 2 * limit if report.num_accepted >= limit else limit
        self._add(win)
        if self.account < self._expected_loss():
            self.depth_limit = self.probe_depth

    @property
    def _caught_up(self) -> Frontier | None:
        """The level of this iteration whose look had the drafter catch up; None: it had not."""
        return next((one for one in self.behind if one.is_drafter_asked and not one.proposals.is_free), None)

    def _borrow(self, seconds: float, caught_up: Frontier) -> None:
        """What an iteration lost in which the drafter had to catch up, to be charged bit by bit."""
        left = caught_up.num_tokens_left
        self.token_seconds = seconds / (caught_up.num_behind * self.load)
        self.debt += seconds
        self.instalment = max(self.instalment, self.debt / (PAYBACK if left is None else max(min(PAYBACK, left), 1)))

    def _add(self, seconds: float) -> None:
        most = max(RESERVE * self._step_seconds(), self._expected_loss())
        self.account = min(self.account + seconds, most)

    def _step_seconds(self) -> float:
        """What a step without drafting takes: the median of the last, the lower one of two."""
        return statistics.median_low(self._steps)
