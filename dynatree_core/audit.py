"""The audit: is an output what autoregressive decoding gives, and where it is not, a rounding tie or a bug?

The output is fed to the target token by token, as autoregressive decoding would (teacher forcing). At every position
its token should be the choice of these logits, so going over the output once judges each of its tokens. What rounding
alone can do is measured with passes of the model in which none of this package's trees, masks and caches take part, so
that a bug there cannot widen the bound that it is judged by. docs/audit.md says how to read the result.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig

from dynatree_core.drafters.base import Drafter
from dynatree_core.engine.observer import Commit, Observer, Verification, observers_of
from dynatree_core.engine.row_probe import row_fault
from dynatree_core.engine.session import Session
from dynatree_core.errors import NonFiniteLogitsError, ParameterError, PromptError
from dynatree_core.generation import run
from dynatree_core.models.architectures import cache_argument, forward_parameters
from dynatree_core.models.wrappers import plain_model
from dynatree_core.report import GenerationResult
from dynatree_core.request.arguments import checked_prompt
from dynatree_core.runners.passes import PREFILL_CHUNK
from dynatree_core.tree.flatten import flatten
from dynatree_core.tree.token_tree import TokenTree

__all__ = ["AuditReport", "Difference", "LogitPair", "Rounding", "audit_generation", "audit_output", "judge"]

# ways of computing the same logits
AUTOREGRESSIVE = "autoregressive"  # the reference: this package's runner, one token a pass
VERIFIED = "as verified"  # by the run that is audited
STEPWISE = "transformers, one row"
WHOLE = "transformers, all rows"
PRECISE = "transformers, all rows, {dtype}"

# deviations are measured among a position's best tokens: eight give 28 gaps, a steadier maximum than one gap gives
TOP_TOKENS = 8
# rounding errors are sums of many small ones; the farthest of 3,121 positions was 6 to 8 standard deviations out
SPREADS = 10
# a gap computed in two ways holds four logits, each rounded by up to half a spacing
SPACINGS = 2


@attrs.frozen
class Rounding:
    """What rounding alone does to a model's logits, measured with transformers' own forward passes."""

    deviation: float  # largest change of a gap between two of a position's best tokens, from one row to the whole text
    spread: float  # standard deviation of these changes
    spacing: float  # of neighbouring numbers of the dtype at the largest of these logits
    num_positions: int

    @property
    def bound(self) -> float:
        """Gaps up to here can be turned by rounding."""
        return max(self.deviation, SPREADS * self.spread, SPACINGS * self.spacing)

    @classmethod
    def of_all(cls, measured: Iterable[Rounding]) -> Rounding:
        """What several outputs of the same model say together; the more positions, the surer the maximum."""
        every = list(measured)
        num_positions = sum(one.num_positions for one in every)
        return cls(
            deviation=max(one.deviation for one in every),
            spread=math.sqrt(sum(one.spread**2 * one.num_positions for one in every) / num_positions),
            spacing=max(one.spacing for one in every),
            num_positions=num_positions,
        )


@attrs.frozen
class LogitPair:
    """The logits of two tokens, computed in one way."""

    way: str
    expected: float  # of the token that autoregressive decoding chooses
    got: float  # of the output's token

    @property
    def gap(self) -> float:
        """How much the expected token is ahead."""
        return self.expected - self.got


@attrs.frozen
class Difference:
    """A position at which autoregressive decoding, given the output up to there, chooses another token."""

    position: int  # among the new tokens, from 0
    expected_id: int  # what autoregressive decoding chooses
    token_id: int  # what the output has
    pairs: tuple[LogitPair, ...]  # one a way of computing

    @property
    def deviation(self) -> float:
        """How far two ways of computing the gap are apart: rounding has to explain all of it.

        Where the run's own logits are not known, only the gap that had to be overcome is.
        """
        gaps = {pair.way: pair.gap for pair in self.pairs}
        return gaps[AUTOREGRESSIVE] - min(gaps.get(VERIFIED, 0.0), 0.0)


@attrs.frozen
class AuditReport:
    """What an audit found."""

    num_tokens: int
    dtype: str
    num_rows: int  # of a pass of the reference: 1, or more with exact="fixed_width"
    differences: tuple[Difference, ...]  # by position; up to the first, output and autoregressive decoding are equal
    top_gaps: tuple[float, ...] = attrs.field(repr=False)  # top-1 less top-2 logit of each position, autoregressively
    rounding: Rounding
    deviations: dict[str, float]  # way -> the largest change of a gap from transformers' one-row passes
    misread: tuple[int, ...] = ()  # positions whose token is not the choice of the run's own logits
    ending: str | None = None  # what is wrong with where the output ends
    row_fault: str | None = None  # why trees cannot be exact on this model, see `dynatree_core.engine.row_probe`

    @property
    def verdict(self) -> str:
        """ "identical", "tie" (every difference is one), or "bug"."""
        if self.faults:
            return "bug"
        return "tie" if self.differences else "identical"

    @property
    def first_difference(self) -> Difference | None:
        return self.differences[0] if self.differences else None

    @property
    def num_close(self) -> int:
        """Positions at which rounding could have turned the choice."""
        return sum(gap <= self.rounding.bound for gap in self.top_gaps)

    def is_tie(self, difference: Difference) -> bool:
        """Whether rounding explains a difference."""
        return difference.deviation <= self.rounding.bound

    @property
    def faults(self) -> tuple[str, ...]:
        """What rounding does not explain, a sentence each."""
        bound = self.rounding.bound
        found = []
        if self.row_fault is not None:
            found.append(
                f"rows depend on each other in passes of this target, so trees change its text: {self.row_fault}"
            )
        found += [
            f"token {one.position} is {one.token_id} where autoregressive decoding chooses {one.expected_id}, and "
            f"rounding would have to move their gap by {one.deviation:.4g}, beyond the bound of {bound:.4g}"
            for one in self.differences
            if not self.is_tie(one)
        ]
        found += [
            f"the logits computed '{way}' are up to {deviation:.4g} away from those of transformers' own passes, "
            f"beyond the bound of {bound:.4g}"
            for way, deviation in self.deviations.items()
            if not deviation <= bound
        ]
        if self.misread:
            found.append(f"the run chose other tokens than its own logits say, first at token {self.misread[0]}")
        return (*found, *([self.ending] if self.ending else []))


def audit_output(
    target: nn.Module,
    prompt_ids: Tensor | Sequence[int],
    token_ids: Tensor | Sequence[int],
    *,
    exact: str | None = None,
    max_nodes: int | None = None,
    max_new_tokens: int | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    runner: str = "auto",
    precise: nn.Module | None = None,
) -> AuditReport:
    """Compare an output with the target's autoregressive decoding, position by position.

    Costs two passes a token, of one row each, and one over the whole text. Keeps the logits of all positions.

    Args:
        target: a transformers causal language model in eval mode, in the dtype that is audited.
        prompt_ids: the prompt, [tokens] or [1, tokens] integers.
        token_ids: the output without the prompt, at least one token; from whatever program.
        exact: None, or "fixed_width" with `max_nodes`, as the output was generated; see `dynatree_core.generate`.
        max_new_tokens: what the output was limited to; where given, an output that ends early is found.
        eos_token_id: as for `dynatree_core.generate`. An output that goes on after such a token is found.
        runner: of the autoregressive decoding that is compared with, as for `dynatree_core.generate`.
        precise: the same model in a higher precision, to show its logits too where there is a difference.

    Raises:
        InputError: an argument that cannot be used.
        NonFiniteLogitsError: the target's logits have NaN among them.
    """
    target, caller = plain_model(target, "target"), target
    reference = _reference(
        target,
        prompt_ids,
        max_new_tokens=max(torch.as_tensor(token_ids).numel(), max_new_tokens or 0),
        exact=exact,
        max_nodes=max_nodes,
        eos_token_id=eos_token_id,
        runner=runner,
    )
    return _audit(target, caller, reference, token_ids, max_new_tokens, verified=None, precise=precise)


def audit_generation(
    target: nn.Module,
    drafter: nn.Module | Drafter | str | None,
    prompt_ids: Tensor | Sequence[int],
    *,
    max_new_tokens: int = 128,
    eos_token_id: int | Sequence[int] | None = None,
    precise: nn.Module | None = None,
    **options: Any,
) -> tuple[GenerationResult, AuditReport]:
    """Generate, and audit the output together with the logits that it was verified by.

    Args:
        options: those of `dynatree_core.generate`.

    Returns:
        What was generated, and the audit of it.
    """
    if options.get("cache") is not None:
        raise ParameterError(
            f"an audit compares with the model's own cache, which keeps all tokens, got cache={options['cache']!r}; "
            "compare with policy='autoregressive' and the same cache instead"
        )
    sizes: dict[str, Any] = {"max_new_tokens": max_new_tokens, "eos_token_id": eos_token_id}
    if options.get("position_ids") is not None:
        raise ParameterError("an audit reads the prompt at positions 0, 1, 2, …, got position_ids; leave them out")
    # a target that a generation refuses, because its rows depend on each other, is judged here
    options = {"generation_config": _plain(target), "inherit_settings": False, **options, "trust_model": True}
    target, caller = plain_model(target, "target"), target
    accepted = _AcceptedLogits()
    options["observer"] = [accepted, *observers_of(options.get("observer"))]
    session = Session(target, drafter, prompt_ids, **sizes, **options)
    if session.request.logits_processors or session.sampler is not None:
        raise ParameterError(
            "an audit compares the target's own logits, got settings that change them or draw from them; leave them "
            "out, or compare two generations with one seed"
        )
    # of the prompt without its padding, and with the end tokens that the session has
    alike = {name: options[name] for name in ("exact", "max_nodes", "runner") if name in options}
    sizes["eos_token_id"] = sorted(session.request.eos_token_ids)
    reference = _reference(target, session.prompt_ids, **alike, **sizes)
    for _ in run(session):
        pass
    result = session.result()
    verified = torch.cat(accepted.rows) if accepted.rows else None
    limit = None if session.request.stopping_criteria else max_new_tokens
    return result, _audit(target, caller, reference, result.token_ids, limit, verified=verified, precise=precise)


class _AcceptedLogits(Observer):
    """Keeps the logits by which each committed token was chosen."""

    wants_logits = True

    def __init__(self) -> None:
        self.rows: list[Tensor] = []  # [tokens of a step, vocab], one a step

    def on_verify(self, verification: Verification) -> None:
        assert verification.logits is not None
        # the token after a node was chosen by that node's logits
        verdict = verification.verdict
        self._chosen_by = verification.logits[[0, *verdict.path][: len(verdict.token_ids)]]

    def on_commit(self, commit: Commit) -> None:
        self.rows.append(self._chosen_by)


def judge(
    token_ids: Sequence[int],
    ways: Mapping[str, Tensor],
    *,
    num_rows: int = 1,
    ending: str | None = None,
    row_fault: str | None = None,
) -> AuditReport:
    """Judge an output by the logits of its positions.

    Args:
        token_ids: the output.
        ways: way of computing -> logits [positions, vocab]: "autoregressive", "transformers, one row" and
            "transformers, all rows"; "as verified" if known; others are only shown.
        num_rows: rows of a pass of the reference.
        ending: what is wrong with where the output ends.
        row_fault: what is wrong with passes of several rows. The bound is then taken from passes of one row alone.
    """
    dtype = ways[AUTOREGRESSIVE].dtype
    scores = {way: _scores(logits) for way, logits in ways.items()}
    reference, stepwise = scores[AUTOREGRESSIVE], scores[STEPWISE]
    output = torch.tensor(token_ids, device=reference.device)
    expected = _choice(reference)
    differences = []
    for position in (expected != output).nonzero().flatten().tolist():
        expected_id, token_id = int(expected[position]), token_ids[position]
        pairs = tuple(
            LogitPair(way, float(score[position, expected_id]), float(score[position, token_id]))
            for way, score in scores.items()
        )
        differences.append(Difference(position, expected_id, token_id, pairs))
    top = reference.double().topk(2).values
    is_misread = _choice(scores[VERIFIED]) != output if VERIFIED in scores else torch.zeros_like(output)
    return AuditReport(
        num_tokens=len(token_ids),
        dtype=str(dtype).removeprefix("torch."),
        num_rows=num_rows,
        differences=tuple(differences),
        top_gaps=tuple((top[:, 0] - top[:, 1]).tolist()),
        rounding=_rounding(stepwise, scores[WHOLE] if row_fault is None else reference),
        deviations={way: _deviation(stepwise, scores[way]) for way in (AUTOREGRESSIVE, VERIFIED) if way in scores},
        misread=tuple(is_misread.nonzero().flatten().tolist()),
        ending=ending,
        row_fault=row_fault,
    )


def _reference(target: nn.Module, prompt_ids: Tensor | Sequence[int], **options: Any) -> Session:
    """A session for plain autoregressive decoding, which lends the reference its caches and the shape of its passes."""
    return Session(
        target,
        None,
        prompt_ids,
        policy="autoregressive",
        generation_config=_plain(target),
        inherit_settings=False,
        trust_model=True,
        **options,
    )


def _plain(target: Any) -> GenerationConfig:
    """The target's end tokens, and nothing that would change its logits."""
    config = getattr(target, "generation_config", None)
    return GenerationConfig(eos_token_id=config and config.eos_token_id)  # type: ignore[no-untyped-call]


def _audit(
    target: nn.Module,
    caller: nn.Module,
    reference: Session,
    token_ids: Tensor | Sequence[int],
    max_new_tokens: int | None,
    *,
    verified: Tensor | None,
    precise: nn.Module | None,
) -> AuditReport:
    prompt = reference.prompt_ids
    if len(token_ids) == 0:
        raise PromptError("an output to audit must have at least one token, got none; generate some first")
    output = checked_prompt(token_ids, reference.vocab_size, what="output")
    with reference.without_gradients():
        ways = {AUTOREGRESSIVE: _autoregressive_logits(reference, output)}
        if verified is not None:
            ways[VERIFIED] = verified
        ways[STEPWISE] = _stepwise_logits(target, prompt, output)
        ways[WHOLE] = _whole_text_logits(target, prompt, output)
        if precise is not None:
            dtype = str(precise.dtype).removeprefix("torch.")
            ways[PRECISE.format(dtype=dtype)] = _whole_text_logits(precise, prompt, output).to(ways[WHOLE].device)
    for way, logits in ways.items():
        if logits.isnan().any():
            raise NonFiniteLogitsError(
                f"the target's logits must be numbers to be compared, got NaN in those computed '{way}'; its weights "
                "may be damaged, or half precision overflows: try float32 or bfloat16"
            )
    ending = _fault_of_ending(output, reference.request.eos_token_ids, max_new_tokens)
    num_rows = reference.pass_shape.get("min_rows", 1)
    fault = row_fault(target, caller)
    mixing = None if fault is None or fault.is_rounding else fault.what  # rounding is what the audit measures
    return judge(output, ways, num_rows=num_rows, ending=ending, row_fault=mixing)


def _autoregressive_logits(session: Session, output: list[int]) -> Tensor:
    """[positions, vocab], by passes over one token each, as the session would make them."""
    ids = torch.tensor([*session.prompt_ids, *output], device=session.device)
    start = len(session.prompt_ids) - 1
    session.target.prefill(ids[:start], session.cache)
    rows = []
    for root in torch.split(ids[start:-1], 1):
        flat = flatten([TokenTree.root(root)], [session.cache.length], **session.pass_shape, wants_totals=False)
        rows.append(session.target.forward(flat, session.cache, stage="verify").logits[0, 0])
        session.cache.commit([[0]])
    return torch.stack(rows)


def _stepwise_logits(target: nn.Module, prompt: list[int], output: list[int]) -> Tensor:
    """[positions, vocab], by the same passes with the model's own cache and masks."""
    ids = _text(target, [*prompt, *output])
    start = len(prompt) - 1
    before = torch.split(ids[:, :start], PREFILL_CHUNK, dim=1) if start else ()
    rows = []
    config: Any = target.config
    arguments: dict[str, Any] = {cache_argument(target): DynamicCache(config=config), **_only_last(target, 1)}
    for chunk in (*before, *torch.split(ids[:, start:-1], 1, dim=1)):
        rows.append(target(input_ids=chunk, use_cache=True, **arguments).logits[0, -1])
    return torch.stack(rows[-len(output) :])


def _whole_text_logits(target: nn.Module, prompt: list[int], output: list[int]) -> Tensor:
    """[positions, vocab], by one pass of the model without any cache."""
    ids = _text(target, [*prompt, *output[:-1]])
    logits: Tensor = target(input_ids=ids, use_cache=False, **_only_last(target, len(output))).logits
    return logits[0, -len(output) :]


def _text(target: nn.Module, token_ids: list[int]) -> Tensor:
    """[1, tokens] on the target's device."""
    return torch.tensor([token_ids], device=target.device)  # type: ignore[arg-type]


def _only_last(target: nn.Module, rows: int) -> dict[str, int]:
    """The argument by which a model's head computes the last rows only, if it has one."""
    return {"logits_to_keep": rows} if "logits_to_keep" in forward_parameters(target) else {}


def _scores(logits: Tensor) -> Tensor:
    """What tokens are chosen by: the logits, float64 ones as float32, as verify() and generate() have it."""
    return logits.float() if logits.dtype == torch.float64 else logits


def _choice(scores: Tensor) -> Tensor:
    """[positions]: the best token of each, the first of equals."""
    return scores.max(dim=-1).indices


def _best(scores: Tensor) -> torch.return_types.topk:
    """The best tokens of each position, of which deviations are measured."""
    return scores.topk(min(TOP_TOKENS, scores.shape[1]))


def _changes(a: Tensor, b: Tensor) -> Tensor:
    """[positions, k]: how the logits of a position's best tokens change relative to their mean, from a to b."""
    best = _best(a).indices
    change = b.gather(1, best).double() - a.gather(1, best).double()
    return change - change.mean(dim=1, keepdim=True)


def _deviation(a: Tensor, b: Tensor) -> float:
    """The largest change of a gap between two of a position's best tokens from one way of computing to another."""
    changes = _changes(a, b)
    return float((changes.amax(dim=1) - changes.amin(dim=1)).max())


def _rounding(stepwise: Tensor, whole: Tensor) -> Rounding:
    """What there is to measure between two ways that differ by nothing but their rounding."""
    changes = _changes(stepwise, whole)
    positions, k = changes.shape
    # of the difference of two changes, k of which share a mean
    spread = math.sqrt(2 * float(changes.square().sum()) / (positions * max(k - 1, 1)))
    largest = float(_best(stepwise).values.abs().max())
    return Rounding(_deviation(stepwise, whole), spread, _spacing(largest, stepwise.dtype), positions)


def _spacing(value: float, dtype: torch.dtype) -> float:
    """The distance between neighbouring numbers of a dtype at a positive value."""
    return math.ldexp(torch.finfo(dtype).eps, math.frexp(value)[1] - 1)


def _fault_of_ending(output: list[int], eos_ids: frozenset[int], max_new_tokens: int | None) -> str | None:
    ends = [position for position, token_id in enumerate(output) if token_id in eos_ids]
    if ends and ends[0] < len(output) - 1:
        return f"the output goes on after token {ends[0]}, the end token {output[ends[0]]}"
    if max_new_tokens is not None and not ends and len(output) < max_new_tokens:
        return f"the output stops after {len(output)} of {max_new_tokens} tokens without an end token"
    if max_new_tokens is not None and len(output) > max_new_tokens:
        return f"the output has {len(output)} tokens where {max_new_tokens} were allowed"
    return None
