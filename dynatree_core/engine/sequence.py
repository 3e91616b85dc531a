"""The sequence: what one generation has become so far. Nothing here belongs to a model."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import attrs
import torch
from torch import Tensor

from dynatree_core.drafters.base import DraftState
from dynatree_core.errors import ParameterError
from dynatree_core.policy.stack import PolicyStack
from dynatree_core.report import StepStats, TokenLogprob
from dynatree_core.request.limits import Limits
from dynatree_core.request.request import Request
from dynatree_core.request.sampling import Sampler
from dynatree_core.tree.verdict import StepReport

__all__ = ["Pending", "Sequence"]


@attrs.define(eq=False)
class Pending:
    """Token choices, random states and stop reasons already decided in an interrupted step, reused on retry.

    So each token is chosen and judged once: processors and criteria may remember their calls, and random numbers must
    not be drawn twice.
    """

    choices: list[int] = attrs.field(factory=list)  # the tokens, where processors or chance choose them
    draws: list[Tensor] = attrs.field(factory=list)  # the random generator's state before each of them
    reasons: list[str | None] = attrs.field(factory=list)  # why the generation ends with each of them, or None

    def behind(self, num_committed: int) -> Pending:
        """What is left when so many tokens are committed: more than nothing if the tree was deeper before the break."""
        return Pending(self.choices[num_committed:], self.draws[num_committed:], self.reasons[num_committed:])


@attrs.frozen(eq=False)
class _Progress:
    """How far a sequence is. Replaced whole, by one assignment: a step is recorded completely or not at all."""

    num_new: int = 0  # new tokens
    num_steps: int = 0
    last_report: StepReport | None = None
    pending: Pending = attrs.field(factory=Pending)


class Sequence:
    """The state of one generation: its tokens, its policies, its drafter's state, and what was counted.

    Recording a step costs what the step has committed, however long the text is.

    Args:
        request: what is asked.
        device: where the tokens are.
        trees_device: where trees grow.
    """

    def __init__(self, request: Request, device: torch.device, trees_device: torch.device) -> None:
        self.request = request
        self.stack: PolicyStack = request.stack
        self.limits: Limits = request.limits
        self.draft_state: DraftState | None = None  # None: nothing is drafted
        self.sampler = Sampler(device, request.seed) if request.do_sample else None  # None: greedy
        # padding, prompt, committed tokens, and room for those to come
        num_given = len(request.given_ids)
        self._ids = torch.zeros(num_given + request.max_new_tokens, dtype=torch.int64, device=device)
        self._ids[:num_given] = torch.tensor(request.given_ids)
        self._tree_ids = self._ids if trees_device == device else self._ids.to(trees_device)
        # where the tokens of a step wait until a GPU fetches them; before the next step is recorded it has, since the
        # host has read the verdict in between
        is_fetched, most = device.type == "cuda", 1 + request.limits.max_depth
        self._sent = torch.empty(most, dtype=torch.int64, device="cpu", pin_memory=True) if is_fetched else None
        # what processors and criteria are shown: they may write into it, as into generate()'s text
        is_shown = request.logits_processors or request.stopping_criteria
        self._shown = self._ids.clone() if is_shown else self._ids
        self._num_shown = num_given
        # behind what `_progress` counts may stand what a broken step has left
        self._new_ids: list[int] = []
        self._logprobs: list[TokenLogprob] = []  # of each new token, where they are asked for
        self._steps: list[StepStats] = []
        self._progress = _Progress()

    @property
    def new_token_ids(self) -> list[int]:
        """The new tokens, a copy."""
        return self._new_ids[: self.num_new]

    def new_ids_from(self, start: int) -> list[int]:
        """The new tokens behind the first `start` of them."""
        return self._new_ids[start : self.num_new]

    @property
    def logprobs(self) -> list[TokenLogprob] | None:
        """What the target thought of each new token, a copy; None: not asked for."""
        return None if self.request.num_logprobs is None else self._logprobs[: self.num_new]

    def logprobs_from(self, start: int) -> list[TokenLogprob]:
        """Those of the new tokens behind the first `start` of them, where they are asked for."""
        return self._logprobs[start : self.num_new]

    @property
    def steps(self) -> list[StepStats]:
        """The numbers of each decode step, a copy."""
        return self._steps[: self.num_steps]

    @property
    def num_new(self) -> int:
        """New tokens so far."""
        return self._progress.num_new

    @property
    def num_steps(self) -> int:
        """Decode steps done."""
        return self._progress.num_steps

    @property
    def pending(self) -> Pending:
        """What is known of the tokens behind the committed ones."""
        return self._progress.pending

    @property
    def last_report(self) -> StepReport | None:
        return self._progress.last_report

    @property
    def num_tokens_left(self) -> int:
        """New tokens that may still be committed."""
        return self.request.max_new_tokens - self.num_new

    @property
    def num_committed(self) -> int:
        """Tokens of padding, prompt and output so far."""
        return len(self.request.given_ids) + self.num_new

    @property
    def committed_ids(self) -> Tensor:
        """[committed] int64 on the device: prompt and new tokens."""
        return self._ids[self.request.num_padding : self.num_committed]

    @property
    def tree_ids(self) -> Tensor:
        """[committed] int64: the same where trees grow."""
        return self._tree_ids[self.request.num_padding : self.num_committed]

    @property
    def stop_reason(self) -> str | None:
        """ "eos", "length", "stop_string", "time", "criterion", or None while there is more to come."""
        decided = self.last_report and self.last_report.verdict.stop_reason
        return decided or ("length" if self.num_tokens_left <= 0 else None)

    @property
    def text(self) -> Tensor:
        """[1, tokens] int64 on the device: what generate() would return, a copy.

        Padding, prompt and committed tokens, as processors and criteria have left them.
        """
        end, num_shown = self.num_committed, min(self._num_shown, self.num_committed)
        return torch.cat([self._shown[:num_shown], self._ids[num_shown:end]])[None]

    @property
    def output_ids(self) -> list[int]:
        """The new tokens, as processors and criteria have left them."""
        if self._shown is self._ids or self.num_new == 0:
            return self.new_token_ids
        shown: list[int] = self.text[0, -self.num_new :].tolist()
        return shown

    def text_with(self, token_ids: SequenceOf[int]) -> Tensor:
        """[1, tokens] int64 on the device: what generate() would show to processors and criteria.

        Padding, prompt, committed tokens, and behind them these, which are the target's choice already. What was shown
        before is not written again, so what a processor has written into it stays.
        """
        end = self.num_committed + len(token_ids)
        if end > self._num_shown:
            num_missing = end - self._num_shown
            committed = self._new_ids[max(self.num_new - num_missing, 0) : self.num_new]
            behind = [*committed, *token_ids][-num_missing:]
            self._shown[self._num_shown : end] = torch.tensor(behind, dtype=torch.int64)
            self._num_shown = end
        return self._shown[None, :end]

    def reason_to_stop(self, token_ids: SequenceOf[int]) -> str | None:
        """Why the generation ends with the last of these tokens, which follow the committed ones, or None.

        To be asked for each token in order. Each is judged once, also in a step that is broken off and done again: a
        criterion may count.
        """
        reasons = self.pending.reasons
        if len(token_ids) > len(reasons):
            reasons.append(self._judge(token_ids))
        return reasons[len(token_ids) - 1]

    def _judge(self, token_ids: SequenceOf[int]) -> str | None:
        fulfilled = []
        if self.request.stopping_criteria:
            text = self.text_with(token_ids)
            last_id = int(text[0, -1])
            fulfilled = [criterion.reason for criterion in self.request.stopping_criteria if criterion(text)]
            if not fulfilled and int(text[0, -1]) != last_id:  # generate() would go on from it
                raise ParameterError(
                    "a stopping criterion must leave the last token as it is, since the target has gone on "
                    f"from it already, got {int(text[0, -1])} in the place of {last_id}; write into a copy of input_ids"
                )
        if token_ids[-1] in self.request.eos_token_ids:
            return "eos"
        if len(token_ids) >= self.num_tokens_left:
            return "length"
        return fulfilled[0] if fulfilled else None

    def record(self, report: StepReport) -> None:
        """Append a step's verified tokens and count it."""
        self._append(report.token_ids)
        step = StepStats(
            num_drafted=report.tree.num_drafted,
            depth=report.tree.max_depth,
            num_accepted=report.num_accepted,
            num_committed=len(report.token_ids),
        )
        self._new_ids[self.num_new :] = report.token_ids
        self._logprobs[self.num_new :] = report.verdict.logprobs or ()
        self._steps[self.num_steps :] = [step]
        self._progress = _Progress(
            self.num_new + len(report.token_ids),
            self.num_steps + 1,
            report,
            self.pending.behind(len(report.token_ids)),
        )

    def _append(self, token_ids: SequenceOf[int]) -> None:
        """Write tokens behind the committed ones. The host waits for no copy."""
        if self._tree_ids is not self._ids:
            self._tree_ids[self.num_committed :][: len(token_ids)] = torch.tensor(token_ids)
        if self._sent is None or len(token_ids) == 1:
            for place, token_id in enumerate(token_ids, start=self.num_committed):
                self._ids[place].fill_(token_id)  # an argument of its kernel
            return
        sent = self._sent[: len(token_ids)].copy_(torch.tensor(token_ids))
        self._ids[self.num_committed :][: len(token_ids)].copy_(sent, non_blocking=True)

    def replace_last_report(self, report: StepReport) -> None:
        """Put the last step's report, with its time, in the place of the one that it was recorded with."""
        self._progress = attrs.evolve(self._progress, last_report=report)

    def restore_draws(self) -> None:
        """Take back random numbers that a broken step has drawn for a token that it did not get to choose."""
        if self.sampler is not None:
            for state in self.pending.draws[len(self.pending.choices) :]:
                self.sampler.restore(state)
