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

Where several sequences share their passes, the time that an iteration takes beyond s delays all of them, and counts as
often as there are.
"""

from __future__ import annotations

import statistics
from collections import deque

import attrs

from dynatree_core import Frontier, StepReport, count, fraction, hookimpl

RESERVE = 8  # steps that the account holds at most: as much is lost before a change of the text is answered
LEAST_COST = 0.1  # of a step: what a tree takes, however long a step without one was measured
MIN_PLAIN = 2  # the first steps are without drafting, to know what drafting has to beat


@attrs.define
class Governor:
    """Turn drafting off where it loses time, and try it again at a bounded cost.

    Each step without drafting lets drafting lose `max_loss` of its time. Off, it is tried again with trees of
    `probe_depth` levels; as often as such a tree is accepted to its full depth, the depth doubles, until it is off
    again. While it is on, one step goes without after every `refresh` that draft, to measure what that takes by now.
    """

    max_loss: float = fraction(0.015)
    stake: int = count(1, minimum=0)
    probe_depth: int = count(2)
    refresh: int = count(32, minimum=2)

    account: float = attrs.field(default=0.0, init=False, repr=False)  # seconds
    plain: deque[float] = attrs.field(factory=lambda: deque(maxlen=5), init=False, repr=False)  # seconds a step
    wins: deque[float] = attrs.field(factory=lambda: deque(maxlen=8), init=False, repr=False)  # seconds an iteration
    num_since_plain: int = attrs.field(default=0, init=False, repr=False)
    depth_limit: int = attrs.field(default=0, init=False, repr=False)
    is_drafting: bool = attrs.field(default=False, init=False, repr=False)  # in the iteration that is under way

    @hookimpl(tryfirst=True)
    def should_expand(self, frontier: Frontier) -> bool:
        if frontier.depth == 0:
            self.is_drafting = self._may_draft()
        return self.is_drafting and frontier.depth < max(self.depth_limit, self.probe_depth)

    @hookimpl
    def on_iteration_end(self, report: StepReport) -> None:
        if self.is_drafting:
            self._note_drafted(report)
        else:
            self._note_plain(report.seconds)
        self.is_drafting = False  # where nobody asks, there is no tree

    def _may_draft(self) -> bool:
        is_known = len(self.plain) >= MIN_PLAIN and self.num_since_plain < self.refresh
        return is_known and self.account >= self._expected_loss()

    def _expected_loss(self) -> float:
        """Seconds that the next iteration with drafting will lose, going by the last ones."""
        return max(-statistics.fmean(self.wins), 0.0) if self.wins else 0.0

    def _note_plain(self, seconds: float) -> None:
        is_first = len(self.plain) < MIN_PLAIN
        self.plain.append(seconds)
        self.num_since_plain = 0
        if is_first:
            self.account = self.stake * self._step_seconds()
        else:
            self._add(self.max_loss * seconds)

    def _note_drafted(self, report: StepReport) -> None:
        num_tokens, step = len(report.token_ids), self._step_seconds()
        least = LEAST_COST if report.tree.num_drafted else 0.0  # the drafter may have had nothing to say
        added = (report.seconds - step) * report.num_sequences  # it delays all that share the pass
        win = min((num_tokens - 1) * step - added, (num_tokens - 1 - least) * step)
        self.wins.append(win)
        self.num_since_plain += 1
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
        return statistics.median_low(self.plain)
