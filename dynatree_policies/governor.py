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
many sequences in which nobody drafted. The first tree beside others is expected to lose `FIRST_LOSS` for each of them:
all of them would try one, and each trial holds up the others.
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
FIRST_LOSS = 0.25  # of a step, for each other sequence: what a tree is expected to lose before one was tried


@attrs.define
class _Seen:
    """What was measured of late with some number of sequences."""

    plain: deque[float] = attrs.field(factory=lambda: deque(maxlen=5))  # seconds of a step in which nobody drafted
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

    is_capturable: ClassVar = True  # whether it drafts it knows before there is a tree

    account: float = attrs.field(default=0.0, init=False, repr=False)  # seconds
    seen: dict[int, _Seen] = attrs.field(factory=lambda: defaultdict(_Seen), init=False, repr=False)
    load: int = attrs.field(default=1, init=False, repr=False)  # sequences that share the pass, this one among them
    num_since_plain: int = attrs.field(default=0, init=False, repr=False)
    depth_limit: int = attrs.field(default=0, init=False, repr=False)
    is_staked: bool = attrs.field(default=False, init=False, repr=False)  # whether the account has begun
    is_drafting: bool = attrs.field(default=False, init=False, repr=False)  # in the iteration that is under way

    @hookimpl(tryfirst=True)
    def should_expand(self, frontier: Frontier) -> bool:
        if frontier.depth == 0:
            self.load = frontier.num_sequences
            self.is_drafting = self._may_draft()
        return self.is_drafting and frontier.depth < max(self.depth_limit, self.probe_depth)

    @hookimpl
    def on_iteration_end(self, report: StepReport) -> None:
        # a step whose draft made the target overflow is done again without one, by its sequence alone; nobody asks then
        is_as_asked = report.num_sequences == self.load
        self.load = report.num_sequences
        self.num_since_plain += 1  # of all that share the passes, so that they go without in the same step
        if self.is_drafting and is_as_asked:
            self._note_drafted(report)
        elif report.is_plain:
            self._note_plain(report.seconds)
        elif self._plain:
            self._add(self.max_loss * self._step_seconds())
        self.is_drafting = False  # where nobody asks, there is no tree

    @property
    def _plain(self) -> deque[float]:
        return self.seen[self.load].plain

    def _may_draft(self) -> bool:
        is_known = len(self._plain) >= MIN_PLAIN and self.num_since_plain < self.refresh
        return is_known and self.account >= self._expected_loss()

    def _expected_loss(self) -> float:
        """Seconds that the next iteration with drafting will lose, going by the last ones."""
        wins = self.seen[self.load].wins
        if wins:
            return max(-statistics.fmean(wins), 0.0)
        return FIRST_LOSS * (self.load - 1) * self._step_seconds()

    def _note_plain(self, seconds: float) -> None:
        is_first = not self.is_staked and len(self._plain) < MIN_PLAIN
        self._plain.append(seconds)
        self.num_since_plain = 0
        if is_first:
            self.account = self.stake * self._step_seconds()
            self.is_staked = len(self._plain) >= MIN_PLAIN
        else:
            self._add(self.max_loss * seconds)

    def _note_drafted(self, report: StepReport) -> None:
        num_tokens, num_drafted, step = len(report.token_ids), report.tree.num_drafted, self._step_seconds()
        least = LEAST_COST if num_drafted else 0.0  # the drafter may have had nothing to say
        drafted_beside = report.rows_beside - (report.num_sequences - 1)
        own = num_drafted / (num_drafted + drafted_beside) if drafted_beside > 0 else 1.0
        added = (report.seconds - step) * own * report.num_sequences  # it delays all that share the pass
        win = min((num_tokens - 1) * step - added, (num_tokens - 1 - least) * step)
        self.seen[self.load].wins.append(win)
        limit = max(self.depth_limit, self.probe_depth)
        self.depth_limit = 2 * limit if report.num_accepted >= limit else limit
        self._add(win)
        if self.account < self._expected_loss():
            self.depth_limit = self.probe_depth

    def _add(self, seconds: float) -> None:
        most = max(RESERVE * self._step_seconds(), self._expected_loss())
        self.account = min(self.account + seconds, most)

    def _step_seconds(self) -> float:
        """What a step without drafting takes: the median of the last, the lower one of two."""
        return statistics.median_low(self._plain)
