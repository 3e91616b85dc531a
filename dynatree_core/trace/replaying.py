"""Replaying a trace: the trees that other policies would have grown of what was proposed, over the text that came out.

The text is known and so are the drafter's proposals, so no model runs: a stand-in for the target says the text, and a
stand-in for the drafter what the trace has. What was never proposed cannot be replayed, so trees that differ much from
the recorded ones come out smaller than they would be (`Replay.unknown_share`).
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import attrs
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, StoppingCriteria
from transformers.modeling_outputs import CausalLMOutputWithPast

from dynatree_core.cost_model import CostModel, StepFunction
from dynatree_core.drafters.base import Drafter, DraftPlan, DraftState
from dynatree_core.engine.costs import isotonic
from dynatree_core.engine.decode import decode_step, prefill
from dynatree_core.engine.engine import Engine
from dynatree_core.engine.session import Session
from dynatree_core.errors import InputError
from dynatree_core.request.arguments import DEFAULT_MAX_DEPTH, DEFAULT_MAX_NODES, DEFAULT_TAU
from dynatree_core.runners.around import RunnerAround
from dynatree_core.runners.base import Rows
from dynatree_core.runners.eager import EagerRunner
from dynatree_core.trace.reading import Iteration, SequenceTrace
from dynatree_core.tree.flatten import FlatTrees
from dynatree_core.tree.frontier import Proposals
from dynatree_core.tree.token_tree import TokenTree

__all__ = ["KnownTarget", "Replay", "ReplayStep", "fitted_costs", "recorded", "replay"]

DEFAULTS = {"max_depth": DEFAULT_MAX_DEPTH, "max_nodes": DEFAULT_MAX_NODES, "tau": DEFAULT_TAU}

# where proposals were made: tokens of the text up to there, and the tokens of the path behind them that left the text
Place = tuple[int, tuple[int, ...]]


@attrs.frozen
class ReplayStep:
    """One iteration, replayed or recorded."""

    start: int  # committed tokens before it, the prompt among them
    num_verified: int  # nodes that were verified, the root not counted
    num_committed: int
    expected_seconds: float  # by the cost model
    num_asked: int = 0  # nodes whose children were asked for
    num_unknown: int = 0  # of these, those about which the trace says nothing


@attrs.frozen
class Replay:
    """What a stack does, or did, on a recorded generation."""

    policy: str
    steps: tuple[ReplayStep, ...]

    @property
    def num_tokens(self) -> int:
        return sum(step.num_committed for step in self.steps)

    @property
    def tokens_per_iteration(self) -> float | None:
        """None without an iteration."""
        return self.num_tokens / len(self.steps) if self.steps else None

    @property
    def nodes_per_iteration(self) -> float | None:
        """Verified nodes, the root not counted; None without an iteration."""
        return sum(step.num_verified for step in self.steps) / len(self.steps) if self.steps else None

    @property
    def expected_seconds(self) -> float:
        """All iterations, by the cost model."""
        return sum(step.expected_seconds for step in self.steps)

    @property
    def unknown_share(self) -> float:
        """Of the nodes whose children were asked for, those of which the trace says nothing: what limits a replay."""
        num_asked = sum(step.num_asked for step in self.steps)
        return sum(step.num_unknown for step in self.steps) / num_asked if num_asked else 0.0


def replay(
    sequence: SequenceTrace,
    policy: str | object | Sequence[str | object],
    *,
    costs: CostModel | None = None,
    **limits: Any,
) -> Replay:
    """What a stack would have done on a recorded generation.

    With the recorded stack it does what was recorded, iteration by iteration, also where policies go by the seconds
    that a step took: a step with the recorded tree takes the recorded time, and any other what the cost model says.

    Args:
        sequence: of a trace.
        policy: as for `dynatree_core.generate`.
        costs: what iterations take; None: what the trace has of it, else what is fitted to the trace's own times.
        limits: `tau`, `max_nodes`, `max_depth` and `max_branch`, as for `generate`; by default those that were given
            when it was recorded.

    Raises:
        InputError: the stack cannot be built, a limit cannot be used, or nothing was recorded.
        PolicyError: a policy fails.
    """
    new_ids = sequence.token_ids
    costs = costs or costs_of(sequence)
    script, settings = _Script(sequence, costs), sequence.begin["settings"]
    room = max(settings["max_new_tokens"] - len(new_ids), 0)
    with torch.random.fork_rng(devices=[]):  # its weights are drawn, and are nobody's
        target = KnownTarget(script.text, settings["vocab_size"], room)
    engine = Engine(
        target,
        None if sequence.begin["drafter"] is None else _ReplayedDrafter(script),
        costs=costs,
        now=script.now,
        make_runner=lambda model, name: RunnerAround(EagerRunner(model), script.each_pass),
        trust_model=True,  # it says what comes next in one text, whatever stands in other rows
    )
    session = Session.on(
        engine,
        script.prompt,
        policy=policy,
        max_new_tokens=len(new_ids) + room,
        eos_token_id=[],
        inherit_settings=False,
        stopping_criteria=[_AtEnd(len(script.text))],
        exact=settings["exact"],
        **{**_given_limits(sequence), **{name: value for name, value in limits.items() if value is not None}},
    )
    prefill(session)
    while session.stop_reason is None:
        script.begin_step()
        start = len(script.prompt) + len(session.new_token_ids)
        report = decode_step(session)
        script.end_step(start, report.tree.num_drafted, len(report.token_ids))
    assert session.new_token_ids == new_ids, "the stand-in says the text"
    return Replay(str(session.stack), tuple(script.steps))


def recorded(sequence: SequenceTrace, *, costs: CostModel | None = None) -> Replay:
    """The recorded iterations themselves, at the same prices.

    Args:
        sequence: of a trace.
        costs: as for `replay`.
    """
    costs = costs or costs_of(sequence)
    steps = [
        ReplayStep(
            start=iteration.start,
            num_verified=len(_verified(iteration)) - 1,
            num_committed=len(iteration.committed),
            expected_seconds=costs.iteration_seconds(len(_verified(iteration)) - 1, _paid_widths(iteration)),
            num_asked=sum(level["width"] for level in iteration.levels if _is_free(level) is not None),
        )
        for iteration in sequence.iterations
    ]
    return Replay(sequence.begin["policy"], tuple(steps))


def costs_of(sequence: SequenceTrace) -> CostModel:
    """The cost model that the trace has, else the one that is fitted to its times."""
    return sequence.costs or fitted_costs(sequence.iterations)


def fitted_costs(iterations: Sequence[Iteration]) -> CostModel:
    """A cost model from the times of iterations: passes by their rows, and one price for all levels.

    It says less than a measured one: nothing is known of more rows than there were, and of fewer only what was seen.

    Raises:
        InputError: there is no iteration.
    """
    if not iterations:
        raise InputError("costs are fitted to the times of iterations, got a trace without one; record some tokens")
    by_rows: defaultdict[int, list[float]] = defaultdict(list)
    levels, widths, rest = [], [1], []
    for iteration in iterations:
        seconds = iteration.seconds
        verify, draft = seconds.get("verify", 0.0), seconds.get("draft", 0.0)
        by_rows[len(_verified(iteration))].append(verify)
        rest.append(max(seconds["iteration"] - verify - draft, 0.0))
        paid = _paid_widths(iteration)
        widths += paid
        if paid:
            levels.append(draft / len(paid))
    rows = sorted(by_rows)
    passes = isotonic([statistics.median(by_rows[one]) for one in rows])
    level = statistics.median(levels) if levels else 0.0
    return CostModel(
        StepFunction(tuple(rows), tuple(passes)), StepFunction((max(widths),), (level,)), statistics.median(rest)
    )


class KnownTarget(LlamaForCausalLM):
    """Stands in for a target whose output is known: at each position of the text it says the token that came next.

    That is right for rows on the text's path. Any other has an ancestor that is rejected, so its own do not matter.
    """

    def __init__(self, token_ids: Sequence[int], vocab: int, room: int) -> None:
        tiny: Any = {"hidden_size": 2, "intermediate_size": 2, "num_hidden_layers": 1, "num_attention_heads": 1}
        super().__init__(LlamaConfig(vocab_size=vocab, max_position_embeddings=len(token_ids) + room, **tiny))
        self.next_ids = torch.tensor([*token_ids[1:], *[0] * (room + 1)])
        self.eval()  # type: ignore[no-untyped-call]  # transformers leaves it unannotated

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, cache: Any, logits_to_keep: int = 0, **_: Any
    ) -> CausalLMOutputWithPast:
        rows = input_ids.shape[1]
        cache.update(torch.zeros(1, 1, rows, 1), torch.zeros(1, 1, rows, 1), 0)
        said = self.next_ids[position_ids[0, -logits_to_keep:]]
        return CausalLMOutputWithPast(
            logits=torch.zeros(1, said.numel(), self.config.vocab_size).scatter_(2, said[None, :, None], 1.0)
        )


class _AtEnd(StoppingCriteria):
    """The text ends where the recorded one has ended, whatever the reason was."""

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens = num_tokens

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= self.num_tokens)


class _Script:
    """What is known of a recorded generation: text, proposals, and what steps took; and the clock of the replay."""

    def __init__(self, sequence: SequenceTrace, costs: CostModel) -> None:
        self.costs = costs
        self.drafter_name = str(sequence.begin["drafter"])
        self.prompt = list(sequence.prompt or [0] * sequence.begin["num_prompt_tokens"])
        self.text = [*self.prompt, *sequence.token_ids]
        self._recorded = {one.start: one for one in sequence.iterations}
        # place -> start of the iteration that was there -> its proposals
        self._known: defaultdict[Place, dict[int, _Children]] = defaultdict(dict)
        for iteration in sequence.iterations:
            self._remember(iteration)
        self.steps: list[ReplayStep] = []
        self.begin_step()

    def _remember(self, iteration: Iteration) -> None:
        nodes = iteration.nodes
        children: defaultdict[int, list[int]] = defaultdict(list)
        for node, parent in enumerate(nodes["parent"]):
            children[parent].append(node)
        for level in iteration.levels:
            is_free = _is_free(level)
            if is_free is None:
                continue
            for parent in range(level["first"], level["first"] + level["width"]):
                path = _path(parent, nodes["parent"], nodes["token"])
                proposed = {
                    nodes["rank"][one]: (nodes["token"][one], nodes["logprob"][one]) for one in children[parent]
                }
                self._known[self._place(iteration.start, path)][iteration.start] = _Children(proposed, is_free)

    def _place(self, start: int, path: Sequence[int]) -> Place:
        """Where a node is, whatever iteration drafted it: tokens of the path that are the text's own belong to it."""
        behind = self.text[start : start + len(path)]
        same = next((i for i, (mine, its) in enumerate(zip(path, behind, strict=False)) if mine != its), len(behind))
        return start + same, tuple(path[same:])

    def children(self, start: int, path: Sequence[int]) -> _Children | None:
        """What was proposed there, in the iteration that began at this token, else in the nearest; None: unknown."""
        found = self._known.get(self._place(start, path))
        return found[min(found, key=lambda one: abs(one - start))] if found else None

    # the clock

    def now(self) -> float:
        return self._seconds

    def begin_step(self) -> None:
        self._seconds = self._expected = 0.0
        self._widths: list[int] = []  # of levels that cost something
        self._num_asked = self._num_unknown = 0

    def asked(self, width: int, num_unknown: int, is_free: bool) -> None:
        """The drafter was asked about a level of so many nodes."""
        self._num_asked += width
        self._num_unknown += num_unknown
        if not is_free:
            self._widths.append(width)

    @contextmanager
    def each_pass(self, parts: Sequence[Rows], is_prompt: bool) -> Iterator[None]:
        """Around a pass of the target's: one over a tree lets the step's time pass."""
        for part in parts if not is_prompt else ():
            self._verified(part.flat, part.cache.length + 1)
        yield

    def _verified(self, flat: FlatTrees, start: int) -> None:
        root = start - 1  # its slot
        num_nodes = int(flat.visible[0, :, root].sum())  # behind them stands padding, which nobody sees
        self._expected = self.costs.iteration_seconds(num_nodes - 1, self._widths)
        before = self._recorded.get(start)
        sees = flat.visible[0, :num_nodes, root : root + num_nodes]
        is_same = before is not None and _is_tree(before, flat.token_ids[0, :num_nodes].tolist(), sees)
        self._seconds += before.seconds["iteration"] if before is not None and is_same else self._expected

    def end_step(self, start: int, num_verified: int, num_committed: int) -> None:
        asked = self._num_asked, self._num_unknown
        self.steps.append(ReplayStep(start, num_verified, num_committed, self._expected, *asked))


@attrs.frozen
class _Children:
    """The proposals for one node."""

    by_rank: Mapping[int, tuple[int, float]]  # token id, log-probability
    is_free: bool


@attrs.frozen(eq=False)
class _ReplayedDrafter(Drafter):
    """Stands in for the drafter of a recorded generation."""

    script: _Script

    def __str__(self) -> str:
        return self.script.drafter_name

    def start(self, plan: DraftPlan) -> DraftState:
        return _ReplayedState(self.script)


class _ReplayedState(DraftState):
    can_skip_levels = True

    def __init__(self, script: _Script) -> None:
        self.script = script

    def prefill(self, committed_ids: Tensor) -> None: ...

    def propose(self, committed_ids: Tensor, tree: TokenTree, k: int) -> Proposals:
        found = self._found(committed_ids, tree)
        token_ids = torch.zeros(len(found), k, dtype=torch.int64)
        logprobs = torch.full((len(found), k), -math.inf)
        for row, children in enumerate(found):
            for rank, (child, logprob) in children.by_rank.items() if children is not None else ():
                if rank < k:
                    token_ids[row, rank], logprobs[row, rank] = child, logprob
        known = [one for one in found if one is not None]
        is_free = all(one.is_free for one in known)  # what is not known costs nothing
        self.script.asked(len(found), len(found) - len(known), is_free)
        return Proposals(token_ids, logprobs, is_free=is_free)

    def _found(self, committed_ids: Tensor, tree: TokenTree) -> list[_Children | None]:
        """What is known of each node of the last level."""
        start, parent, token = committed_ids.numel(), tree.parent.tolist(), tree.token_ids.tolist()
        nodes = range(tree.last_level.start, tree.last_level.stop)
        return [self.script.children(start, _path(node, parent, token)) for node in nodes]

    def is_look_free(self, committed_ids: Tensor, tree: TokenTree, k: int) -> bool:
        return all(children is not None and children.is_free for children in self._found(committed_ids, tree))

    def commit(self, draft_path: tuple[int, ...]) -> None: ...

    def rollback(self) -> None: ...


def _path(node: int, parent: Sequence[int], token: Sequence[int]) -> list[int]:
    """The tokens that lead from the root to a node, the root's own not among them."""
    path = []
    while node > 0:
        path.append(token[node])
        node = parent[node]
    return path[::-1]


def _verified(iteration: Iteration) -> list[int]:
    """The verified nodes, the root among them, in the order of the pass."""
    return [node for node in range(iteration.num_drafted + 1) if iteration.outcome(node) == "verified"]


def _is_tree(iteration: Iteration, token_ids: Sequence[int], sees: Tensor) -> bool:
    """Whether a recorded iteration has verified this tree, whose rows see their ancestors and themselves.

    The root is the text's own token. It is not compared: at the end of a private trace's prompt it is not known.
    """
    nodes, verified = iteration.nodes, _verified(iteration)
    if [nodes["token"][node] for node in verified[1:]] != token_ids[1:]:
        return False
    place = {node: row for row, node in enumerate(verified)}
    mask = torch.zeros_like(sees)
    for row, node in enumerate(verified):
        if node > 0:
            mask[row] = mask[place[nodes["parent"][node]]]
        mask[row, row] = True
    return torch.equal(mask, sees)


def _is_free(level: Mapping[str, Any]) -> bool | None:
    """Whether a level cost the drafter nothing; None where it was not asked."""
    if "is_free" in level:
        is_free: bool | None = level["is_free"]
        return is_free
    return None if level["branch"] is None else False  # of a version that did not say


def _paid_widths(iteration: Iteration) -> list[int]:
    return [level["width"] for level in iteration.levels if _is_free(level) is False]


def _given_limits(sequence: SequenceTrace) -> dict[str, Any]:
    """The limits that the caller has given: those that no policy had asked for, where they are not the defaults."""
    limits, by = sequence.begin["limits"], sequence.begin["limits_by"]
    given = {name: limits[name] for name, usual in DEFAULTS.items() if not by.get(name) and limits[name] != usual}
    return {**given, "max_branch": limits["max_branch"]}
