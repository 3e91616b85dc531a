"""A session: the state of one generation, and what the stages do to it."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, TypeVar

import attrs
import torch
from torch import Tensor, nn
from transformers import EosTokenCriteria, GenerationConfig, LogitsProcessor, StoppingCriteria

from dynatree_core.cache.prefix_cache import PrefixCache, PrefixReuse
from dynatree_core.cache.sink_cache import SinkCache, SinkWindow, refuse_beside
from dynatree_core.cache.tree_cache import TreeCache
from dynatree_core.clock import StageClock
from dynatree_core.cost_model import CostModel
from dynatree_core.costs import measured_costs
from dynatree_core.drafters.base import Drafter, DraftPlan, DraftState
from dynatree_core.drafters.build import as_drafter
from dynatree_core.engine.kept import kept_of
from dynatree_core.engine.metrics import summarise
from dynatree_core.engine.row_probe import refuse_dependent_rows
from dynatree_core.errors import (
    DrafterError,
    DynaTreeError,
    ForwardPassError,
    InputError,
    OutOfMemoryError,
    ParameterError,
)
from dynatree_core.models.architectures import forward_parameters, max_positions, vocab_size
from dynatree_core.models.state import can_infer
from dynatree_core.models.wrappers import plain_model, refuse_own_generate
from dynatree_core.plugins.foreign import others_code, raised
from dynatree_core.policy.build import build_stack
from dynatree_core.policy.stack import PolicyStack
from dynatree_core.report import GenerationResult, StepStats
from dynatree_core.request.arguments import (
    checked_list,
    checked_positions,
    checked_prompt,
    checked_seed,
    end_token_ids,
    fixed_width,
    guessed_mask,
    new_token_limit,
    num_padding,
    refuse_other_inputs,
    resolved_limits,
    settings_of,
)
from dynatree_core.request.processors import logits_processors
from dynatree_core.request.sampling import Sampler
from dynatree_core.request.stopping import stopping_criteria as criteria_of
from dynatree_core.runners.runner import ModelRunner, drafters_runner, is_out_of_memory
from dynatree_core.tree.frontier import Proposals
from dynatree_core.tree.token_tree import TokenTree
from dynatree_core.tree.verdict import StepReport

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Pending", "Session", "timed", "without_tracking"]

Result = TypeVar("Result")


@attrs.define(eq=False)
class Pending:
    """What is known of the tokens behind the committed ones, before they are committed.

    A step that is broken off leaves it for the next one, so that each token is chosen and judged once: processors and
    criteria may remember their calls, and random numbers must not be drawn twice.
    """

    choices: list[int] = attrs.field(factory=list)  # the tokens, where processors or chance choose them
    draws: list[Tensor] = attrs.field(factory=list)  # the random generator's state before each of them
    reasons: list[str | None] = attrs.field(factory=list)  # why the generation ends with each of them, or None

    def behind(self, num_committed: int) -> Pending:
        """What is left when so many tokens are committed: more than nothing if the tree was deeper before the break."""
        return Pending(self.choices[num_committed:], self.draws[num_committed:], self.reasons[num_committed:])


class Session:
    """One generation: models, caches, policies, and the tokens committed so far.

    The arguments are those of `dynatree_core.generate`, which is the usual way to make one.
    """

    def __init__(
        self,
        target: nn.Module,
        drafter: nn.Module | Drafter | str | None,
        input_ids: Tensor | Sequence[int] | Mapping[str, Tensor],
        *,
        policy: str | object | Sequence[str | object] = "phase3",
        max_new_tokens: int | None = None,
        max_length: int | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        attention_mask: Tensor | Sequence[int] | None = None,
        position_ids: Tensor | Sequence[int] | None = None,
        generation_config: GenerationConfig | None = None,
        inherit_settings: bool = True,
        logits_processor: Sequence[LogitsProcessor] | None = None,
        stopping_criteria: Sequence[StoppingCriteria] | None = None,
        seed: int | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        tau: float | None = None,
        max_nodes: int | None = None,
        max_depth: int | None = None,
        max_branch: int = 16,
        cache: str | None = None,
        exact: str | None = None,
        runner: str = "auto",
        prefix_cache: PrefixCache | None = None,
        on_prefill: Callable[[int, int], None] | None = None,
        on_error: str = "raise",
        trust_model: bool = False,
        **settings: object,
    ) -> None:
        given_target, target = target, plain_model(target, "target", is_trusted=trust_model)
        if inherit_settings and not trust_model:  # or it is the target's generate that has called
            refuse_own_generate(target)
        if on_error not in ("raise", "fallback"):
            raise ParameterError(f"on_error must be 'raise' or 'fallback', got {on_error!r}")
        if not isinstance(prefix_cache, PrefixCache | None):
            raise ParameterError(f"prefix_cache must be a PrefixCache, got {prefix_cache!r:.60}")
        self.on_error = on_error
        self._callers_errors: list[BaseException] = []  # raised by what the caller has given, so nobody else's fault
        if on_prefill is not None:
            on_prefill = _noting(on_prefill, self._callers_errors)
        self.device: torch.device = target.device  # type: ignore[assignment]
        self.vocab_size = vocab_size(target)
        if isinstance(input_ids, Mapping):  # what a tokenizer returns
            attention_mask = input_ids.get("attention_mask") if attention_mask is None else attention_mask
            position_ids = input_ids.get("position_ids") if position_ids is None else position_ids
            refuse_other_inputs(input_ids, forward_parameters(target))
            input_ids = input_ids.get("input_ids", ())
        given_ids = checked_prompt(input_ids, self.vocab_size)
        config = settings_of(
            given_target if inherit_settings else None,
            generation_config,
            settings,
            inspect.signature(Session).parameters,
        )
        self.eos_token_ids = end_token_ids(config, eos_token_id)
        if attention_mask is None and isinstance(input_ids, Tensor):  # what generate() takes too; a list is all text
            attention_mask = guessed_mask(given_ids, config.pad_token_id, self.eos_token_ids)
        self.num_padding = num_padding(attention_mask, len(given_ids))
        self.prompt_ids = given_ids[self.num_padding :]
        positions = checked_positions(position_ids, len(given_ids))
        if positions is not None and positions[self.num_padding :] == [*range(len(self.prompt_ids))]:
            positions = None  # those that it has anyway
        kept = SinkWindow.parse(cache)
        if kept is not None:
            refuse_beside(kept, exact, positions)
        if max_new_tokens is None and max_length is None and generation_config is not None:
            max_new_tokens = generation_config.max_new_tokens
            max_length = generation_config.max_length if max_new_tokens is None else None
        self.max_new_tokens = new_token_limit(
            max_new_tokens,
            max_length,
            len(given_ids),
            len(self.prompt_ids) if positions is None else max(positions) + 1,
            max_positions(target) if kept is None else None,
        )
        self.logits_processors = logits_processors(
            config,
            checked_list("logits_processor", logits_processor, LogitsProcessor),
            eos_token_ids=self.eos_token_ids,
            num_prompt=len(given_ids),
            num_padding=self.num_padding,
            max_length=len(given_ids) + self.max_new_tokens,
            vocab=self.vocab_size,
            device=self.device,
        )
        self.sampler = Sampler(self.device, checked_seed(seed)) if config.do_sample else None  # None: greedy
        own_criteria = checked_list("stopping_criteria", stopping_criteria, StoppingCriteria)
        self.stopping_criteria = criteria_of(config, own_criteria, tokenizer)
        if any(type(criterion) is EosTokenCriteria for criterion in own_criteria):
            self.eos_token_ids = frozenset()  # the caller's own says where texts end
        self.stack: PolicyStack = build_stack(policy)
        pass_rows, max_nodes = fixed_width(exact, max_nodes)
        self.limits = resolved_limits(self.stack, max_depth, max_nodes, tau, max_branch, self.vocab_size)
        self.clock = StageClock(self.device)
        if not trust_model:
            refuse_dependent_rows(target, given_target)

        num_tokens = len(self.prompt_ids) + self.max_new_tokens
        if exact is not None and runner == "auto":
            runner = "eager"  # whose products round each row alike wherever it stands, as was measured (docs/audit.md)
        own_positions = positions and positions[self.num_padding :]
        self.target = ModelRunner(target, self.clock, own_positions, on_prefill, runner)
        self.is_fixed_width = exact is not None
        self.cache: TreeCache | SinkCache = (
            TreeCache(num_tokens + max(self.limits.max_nodes, pass_rows), is_zeroed=self.is_fixed_width)
            if kept is None
            else SinkCache(target, kept, self.limits.max_nodes)
        )
        # of every verification pass at least, so that all passes round alike
        self.pass_shape = {"min_rows": pass_rows, "min_slots": self.cache.capacity} if self.is_fixed_width else {}
        # rows at other positions or in a cache that moves are others, and passes of another shape may round otherwise
        is_reusable = positions is None and exact is None
        self.prefix: PrefixReuse | None = None
        if prefix_cache is not None and is_reusable and isinstance(self.cache, TreeCache):
            self.prefix = PrefixReuse(prefix_cache)
            self.prefix.add(target, self.cache)
        self.num_reused_tokens = 0  # of the prompt, whose rows came from the prefix cache
        source = as_drafter(drafter)
        models = [target]
        self.drafter_name = None if source is None else str(source)
        # what iterations take here; reports and frontiers keep it, so it must not hold the session
        self.measure_costs = _costs_of(target, source, runner, self.clock, self.drafter_name, tokenizer)
        self.draft_state: DraftState | None = None
        if source is not None:
            plan = DraftPlan(
                self.vocab_size,
                num_tokens,
                self.limits.max_nodes,
                self.device,
                self.clock,
                target,
                kept,
                prefix=self.prefix,
                runner=drafters_runner(runner),
                on_prefill=on_prefill,
                tokenizer=tokenizer,
                store=kept_of(target),
            )
            try:
                with self.blame_drafter(InputError):
                    self.draft_state = source.begin(plan)
                    models += source.models(target)
            except DrafterError as error:
                self.fall_back(error)
        self._can_infer = all(map(can_infer, dict.fromkeys(models)))  # asked once: it looks at every weight

        self.new_token_ids: list[int] = []
        self.pending = Pending()
        # padding, prompt, committed tokens, and room for those to come
        self._ids = torch.zeros(len(given_ids) + self.max_new_tokens, dtype=torch.int64, device=self.device)
        self._ids[: len(given_ids)] = torch.tensor(given_ids)
        # what processors and criteria are shown: they may write into it, as into generate()'s text
        self._shown = self._ids.clone() if self.logits_processors or self.stopping_criteria else self._ids
        self._num_shown = len(given_ids)
        self.steps: list[StepStats] = []
        self.last_report: StepReport | None = None

    @property
    def committed_ids(self) -> Tensor:
        """[committed] int64 on the device: prompt and new tokens."""
        return self._ids[self.num_padding : self.num_padding + len(self.prompt_ids) + len(self.new_token_ids)]

    @property
    def num_iterations(self) -> int:
        """Decode steps done."""
        return len(self.steps)

    @property
    def num_tokens_left(self) -> int:
        """New tokens that may still be committed."""
        return self.max_new_tokens - len(self.new_token_ids)

    @property
    def depth_limit(self) -> int:
        """How deep the next tree may be.

        A step commits one token more than the depth, so the end clips it, and so does a point that no pass may cross
        in a cache that moves.
        """
        if self.draft_state is None:
            return 0
        return min(self.limits.max_depth, self.num_tokens_left - 1, self.cache.max_places - 1)

    @property
    def stop_reason(self) -> str | None:
        """ "eos", "length", "stop_string", "time", "criterion", or None while there is more to come."""
        decided = self.last_report and self.last_report.verdict.stop_reason
        return decided or ("length" if self.num_tokens_left <= 0 else None)

    @property
    def num_committed(self) -> int:
        """Tokens of padding, prompt and output so far."""
        return self.num_padding + len(self.prompt_ids) + len(self.new_token_ids)

    @property
    def text(self) -> Tensor:
        """[1, tokens] int64 on the device: what generate() would return, a copy.

        Padding, prompt and committed tokens, as processors and criteria have left them.
        """
        end, num_shown = self.num_committed, min(self._num_shown, self.num_committed)
        return torch.cat([self._shown[:num_shown], self._ids[num_shown:end]])[None]

    def text_with(self, token_ids: Sequence[int]) -> Tensor:
        """[1, tokens] int64 on the device: what generate() would show to processors and criteria.

        Padding, prompt, committed tokens, and behind them these, which are the target's choice already. What was shown
        before is not written again, so what a processor has written into it stays.
        """
        end = self.num_committed + len(token_ids)
        if end > self._num_shown:
            num_missing = end - self._num_shown
            behind = [*self.new_token_ids[-num_missing:], *token_ids][-num_missing:]
            self._shown[self._num_shown : end] = torch.tensor(behind, dtype=torch.int64)
            self._num_shown = end
        return self._shown[None, :end]

    def reason_to_stop(self, token_ids: Sequence[int]) -> str | None:
        """Why the generation ends with the last of these tokens, which follow the committed ones, or None.

        To be asked for each token in order. Each is judged once, also in a step that is broken off and done again: a
        criterion may count.
        """
        reasons = self.pending.reasons
        if len(token_ids) > len(reasons):
            reasons.append(self._judge(token_ids))
        return reasons[len(token_ids) - 1]

    def _judge(self, token_ids: Sequence[int]) -> str | None:
        fulfilled = []
        if self.stopping_criteria:
            text = self.text_with(token_ids)
            last_id = int(text[0, -1])
            fulfilled = [criterion.reason for criterion in self.stopping_criteria if criterion(text)]
            if not fulfilled and int(text[0, -1]) != last_id:  # generate() would go on from it
                raise ParameterError(
                    "a stopping criterion must leave the last token as it is, since the target has gone on "
                    f"from it already, got {int(text[0, -1])} in the place of {last_id}; write into a copy of input_ids"
                )
        if token_ids[-1] in self.eos_token_ids:
            return "eos"
        if len(token_ids) >= self.num_tokens_left:
            return "length"
        return fulfilled[0] if fulfilled else None

    def propose(self, tree: TokenTree) -> Proposals:
        """The drafter's proposals for the tree's last level, in the shape that the contract asks for.

        Raises:
            DrafterError: naming the drafter and the fault.
        """
        assert self.draft_state is not None, "a session without a drafter never asks for proposals"
        with self.clock.measure("draft"), self.blame_drafter():
            proposals = self.draft_state.propose(self.committed_ids, tree, self.limits.max_branch)
        shape = (tree.level_sizes[-1], self.limits.max_branch)
        is_sound = isinstance(proposals, Proposals) and (
            proposals.token_ids.shape == proposals.logprobs.shape == shape
            and proposals.token_ids.dtype == torch.int64
            and proposals.logprobs.dtype == torch.float32
        )
        if not is_sound:
            raise DrafterError(
                f"drafter '{self.drafter_name}' must propose int64 token_ids and float32 logprobs of shape "
                f"{list(shape)}, got {proposals}"
            )
        return proposals

    def record(self, report: StepReport) -> None:
        """Append a step's verified tokens and count it."""
        end = self.num_committed + len(report.token_ids)
        self._ids[self.num_committed : end] = torch.tensor(report.token_ids, dtype=torch.int64)
        step = StepStats(
            num_drafted=report.tree.num_drafted,
            depth=report.tree.max_depth,
            num_accepted=report.num_accepted,
            num_committed=len(report.token_ids),
        )
        tokens, steps = [*self.new_token_ids, *report.token_ids], [*self.steps, step]
        pending = self.pending.behind(len(report.token_ids))
        # nothing but assignments, between which no signal arrives: a step is recorded whole or not at all
        self.new_token_ids, self.steps, self.last_report, self.pending = tokens, steps, report, pending

    def reuse_prefix(self) -> None:
        """Copy what the prefix cache knows of the prompt into the target's cache, which is filled from the start."""
        if self.prefix is not None:
            assert isinstance(self.cache, TreeCache), "a cache that moves has no part in it"
            self.num_reused_tokens += self.prefix.fill(self.cache, self.committed_ids[:-1])

    def keep_prefix(self) -> None:
        """Leave the rows of all committed tokens in the prefix cache, where there is memory for it.

        To be called at any time; `run` calls it whenever it ends. Committed rows are right however a step ended.
        """
        if self.prefix is None:
            return
        try:
            self.prefix.keep(self.committed_ids)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise

    def without_gradients(self) -> AbstractContextManager[None]:
        """A context for the session's passes: torch's inference mode, where the models' weights can be used in it."""
        return torch.inference_mode() if self._can_infer else torch.no_grad()

    def rollback(self) -> None:
        """Forget an iteration that failed; the committed tokens and their cache rows stay."""
        self.cache.rollback()
        if self.sampler is not None:
            for state in self.pending.draws[len(self.pending.choices) :]:  # drawn, but the token did not get here
                self.sampler.restore(state)
        if self.draft_state is not None:
            with self.blame_drafter():
                self.draft_state.rollback()

    def fall_back(self, error: DynaTreeError) -> None:
        """After an error of a drafter or a policy: decode autoregressively from here on, or raise it, as asked."""
        if self.on_error == "raise":
            raise error
        warnings.warn(f"drafting is off for the rest of this generation: {error}", RuntimeWarning, stacklevel=4)
        self.cache.rollback()
        self.draft_state = None
        if self.prefix is not None and isinstance(self.cache, TreeCache):
            self.prefix.hold_only(self.cache)  # the drafter may have found no memory
        self.stack = self.stack.silenced()

    def blame_drafter(self, *but: type[Exception]) -> AbstractContextManager[None]:
        """Turn whatever a drafter raises into a DrafterError that names it, but for these and the caller's own."""
        return _blame_drafter(self.drafter_name, *but, callers_errors=self._callers_errors)

    def result(self, stop_reason: str | None = None) -> GenerationResult:
        """What was generated so far; valid between any two steps.

        Args:
            stop_reason: why the generation ended, where its own tokens do not say so.
        """
        reason = self.stop_reason or stop_reason or "interrupted"
        token_ids = list(self.new_token_ids)
        if self._shown is not self._ids and token_ids:
            token_ids = self.text[0, -len(token_ids) :].tolist()
        report = summarise(
            policy=str(self.stack),
            drafter=self.drafter_name,
            runner=self.target.name,
            num_prompt_tokens=len(self.prompt_ids),
            num_reused_tokens=self.num_reused_tokens,
            token_ids=self.new_token_ids,
            steps=self.steps,
            clock=self.clock,
        )
        return GenerationResult(token_ids, reason, report)


def _noting(callback: Callable[[int, int], None], errors: list[BaseException]) -> Callable[[int, int], None]:
    """The callback, which leaves in the list what it raises."""

    def noted(done: int, total: int) -> None:
        try:
            callback(done, total)
        except BaseException as error:  # an exit too: it is no fault of the drafter
            errors.append(error)
            raise

    return noted


def _blame_drafter(
    name: str | None, *but: type[Exception], callers_errors: Sequence[BaseException] = ()
) -> AbstractContextManager[None]:
    def blame(error: BaseException) -> BaseException:
        if any(error is one for one in callers_errors):
            return error
        return DrafterError(f"drafter '{name}' raised {raised(error)}")

    return others_code(blame, DrafterError, *but)


def _costs_of(
    target: nn.Module,
    drafter: Drafter | None,
    runner: str,
    clock: StageClock,
    drafter_name: str | None,
    tokenizer: PreTrainedTokenizerBase | None,
) -> Callable[[], CostModel]:
    """What gives the costs of iterations: measured at the first call, if nobody has before on this machine.

    That time counts nowhere.
    """

    @functools.cache
    def measure() -> CostModel:
        with clock.leave_out(), _blame_drafter(drafter_name, ForwardPassError, OutOfMemoryError):
            return measured_costs(target, drafter, runner=runner, tokenizer=tokenizer, known=kept_of(target))

    return measure


def without_tracking(function: Callable[[Session], Result]) -> Callable[[Session], Result]:
    """Decorate a function of a session: its passes are not recorded for gradients."""

    @functools.wraps(function)
    def untracked(session: Session) -> Result:
        with session.without_gradients():
            return function(session)

    return untracked


def timed(
    stage: str, *, on_device: bool = False
) -> Callable[[Callable[[Session], Result]], Callable[[Session], Result]]:
    """Decorate a function of a session: its time is added to that stage of the session's clock."""

    def decorate(function: Callable[[Session], Result]) -> Callable[[Session], Result]:
        @functools.wraps(function)
        def measured(session: Session) -> Result:
            with session.clock.measure(stage, on_device=on_device):
                return function(session)

        return measured

    return decorate
