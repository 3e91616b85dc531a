"""A step of one sequence as two launches: its draft is recorded as a CUDA graph, and so is the target's verdict on it.

A padded tree (`dynatree_core.tree.padded`) is grown without the host knowing how many nodes it has, so all that is
launched for it is the same in each iteration, but for numbers: where the rows stand in the caches, the tokens that the
drafter has not followed, and parameters that a policy moves. These are tensors that the host writes before it replays
the graphs. It waits once, for the outcome.

It takes the `cudagraph` runner for target and drafter, a drafter with a model of its own, and policies that promise to
be recordable. A step that is alike for the first time is launched kernel by kernel, the second one is recorded, and
its target pass is compared with a plain one: logits, keys and values. Where anything fails, a warning says why, and
the generation goes on as it would have without. Graphs belong to the target's cache and the model, as recorded passes
do, so that later generations replay them.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Hashable, Mapping, MutableMapping
from typing import Any

import attrs
import torch
from torch import Tensor

from dynatree_core.drafters.base import by_itself, takes_padding
from dynatree_core.drafters.model import ModelDraftState
from dynatree_core.engine.faults import Faults
from dynatree_core.engine.lane import Lane
from dynatree_core.engine.padded import growth_of, has_rehearsed
from dynatree_core.engine.verify import outcome_of, told
from dynatree_core.policy.stack import PolicyStack
from dynatree_core.runners.agreement import TOLERANCE, apart
from dynatree_core.runners.behind import PassesBehind, RowsBehind
from dynatree_core.runners.cudagraph import CudaGraphRunner, Recorder, rounded_slots
from dynatree_core.tree.flatten import flatten
from dynatree_core.tree.padded import PaddedGrowth, PaddedRows, PaddedSpace
from dynatree_core.tree.token_tree import TokenTree
from dynatree_core.tree.verdict import Verdict

__all__ = ["replayed"]

# tokens that a drafter may have to follow, each number a graph of its own: the last one of a path and the one behind it
# where all levels were accepted, else one
MAX_FOLLOWED = 2
MAX_LEVELS = 16  # of a tree that is recorded, since all of them are computed in each iteration
MAX_KEPT = 8  # kinds of steps over one cache; the oldest one goes

Place = tuple[str, str]  # of a parameter: policy and name


def replayed(lane: Lane, faults: Faults) -> dict[Lane, tuple[TokenTree, Verdict]] | None:
    """What `verify` says of a step's tree; None where the step is to be launched stage by stage."""
    steps: dict[Lane, tuple[TokenTree, Verdict]] = {}
    with faults.of(lane):
        asked = _asked(lane)
        recorded = None if asked is None else _recorded(asked)
        if asked is None or recorded is None or lane.depth_limit < recorded.rows.max_depth:
            return None
        steps[lane] = _replay(asked, recorded)
    return steps


@attrs.frozen(eq=False)
class _Asked:
    """A step that may be one that is recorded."""

    lane: Lane
    target: CudaGraphRunner
    drafter: CudaGraphRunner
    state: ModelDraftState
    num_followed: int  # tokens that the drafter follows before it drafts
    slots: int  # that the target's pass sees
    drafters_slots: int  # that the drafter's passes see

    @property
    def kept(self) -> MutableMapping[Hashable, Any]:
        """What is recorded over the target's cache."""
        return self.target.recorded_over(self.lane.cache)


@attrs.define(eq=False)
class _Kind:
    """Steps that one pair of graphs can compute, but for numbers that a policy moves."""

    numbers: Mapping[Place, float]  # parameters that are no whole numbers, as they were last
    moving: set[Place] = attrs.field(factory=set)  # those that were seen to change: tensors in a graph
    graphs: _Recorded | None = None


@attrs.frozen(eq=False)
class _Inputs:
    """What the host writes before it replays a step."""

    pending: Tensor  # [followed] int64: the committed tokens that the drafter has not followed
    drafters_start: Tensor  # [1] int64: committed rows of its cache
    start: Tensor  # [1] int64: those of the target's
    moving: Mapping[Place, Tensor]  # [] float32 each

    @classmethod
    def of(cls, asked: _Asked, moving: set[Place]) -> _Inputs:
        def numbers(size: int) -> Tensor:
            return torch.zeros(size, dtype=torch.int64, device=asked.lane.device)

        with torch.inference_mode(False):  # so that iterations in and outside of that mode may write into them
            floats = {place: torch.zeros((), device=asked.lane.device) for place in sorted(moving)}
            return cls(numbers(asked.num_followed), numbers(1), numbers(1), floats)

    def fill(self, asked: _Asked) -> None:
        """Write what this iteration has. Single numbers are arguments of their kernels."""
        lane = asked.lane
        self.pending.copy_(lane.committed_ids[-asked.num_followed :])
        self.drafters_start.fill_(asked.state.cache.length)
        self.start.fill_(lane.cache.length)
        parameters = lane.stack.parameters() if self.moving else {}
        for (policy, name), number in self.moving.items():
            number.fill_(parameters[policy][name])


@attrs.frozen(eq=False)
class _Recorded:
    """A step's graphs, and where they leave what they compute."""

    inputs: _Inputs
    stack: PolicyStack  # of copies, whose tensors the draft reads at each replay: they must not go before the graph
    growth: PaddedGrowth  # of the tree
    draft: Callable[[], object]  # launches the draft
    rows: PaddedRows  # what it leaves for the target
    num_drafters_rows: int  # of the tree, that it leaves in the drafter's cache
    verdict: Callable[[], object]  # launches the target's pass and what is read of it
    outcome: Tensor  # [numbers] int64, for `told`
    drafters: MutableMapping[Hashable, Any]  # what is recorded over the drafter's cache: another one, another cache


def _asked(lane: Lane) -> _Asked | None:
    """What a step needs to be recorded; None where it must not be."""
    state, target = lane.draft_state, lane.target.runner
    if not (lane.can_record_steps and isinstance(target, CudaGraphRunner) and type(state) is ModelDraftState):
        return None  # nor a state of somebody's own that derives from it: what it proposes may follow from anything
    drafter, request = state.passes.runner, lane.request
    if not (isinstance(drafter, CudaGraphRunner) and takes_padding(state) and lane.stack.is_recordable):
        return None
    if target.failure is not None or drafter.failure is not None or growth_of(lane) is None or not has_rehearsed(lane):
        return None
    is_plain = lane.target.positions is None and request.num_logprobs is None and lane.observer is None
    if not is_plain or state.budget is not None or torch.is_autocast_enabled(lane.device.type):
        return None
    caches = lane.cache, state.cache
    if not all(cache.can_record and cache.length > 0 and cache.block_len == 0 for cache in caches):
        return None
    num_followed = lane.committed_ids.numel() - state.cache.length
    assert lane.padded_space is not None, "growth_of has looked"
    limits, width = lane.sequence.limits, lane.padded_space.width
    ends = [
        lane.cache.length + 1 + limits.max_nodes,
        state.cache.length + num_followed + min(limits.max_depth, MAX_LEVELS) * width,
    ]
    fits = all(end <= cache.capacity for end, cache in zip(ends, caches, strict=True))
    if not (fits and 1 <= num_followed <= MAX_FOLLOWED):
        return None
    slots, drafters_slots = (rounded_slots(end, cache.capacity) for end, cache in zip(ends, caches, strict=True))
    return _Asked(lane, target, drafter, state, num_followed, slots, drafters_slots)


def _recorded(asked: _Asked) -> _Recorded | None:
    """A step's graphs, recorded now where it comes for the second time; None where it comes for the first time."""
    lane, kept = asked.lane, asked.kept
    parameters = {
        (policy, name): value for policy, values in lane.stack.parameters().items() for name, value in values.items()
    }
    numbers = {place: value for place, value in parameters.items() if isinstance(value, float)}
    others = tuple((place, value) for place, value in parameters.items() if place not in numbers)
    policies = tuple(
        (name, type(policy), getattr(policy, "graph_key", None)) for name, policy in lane.stack.policies.items()
    )
    width = lane.padded_space and lane.padded_space.width
    key = (asked.num_followed, asked.slots, asked.drafters_slots, lane.sequence.limits, width, policies, others)
    kind: _Kind | None = kept.get(key)
    if kind is None:
        kept[key] = _Kind(numbers)
        if len(kept) > MAX_KEPT:
            del kept[next(iter(kept))]
        return None
    moved = {place for place, value in numbers.items() if value != kind.numbers[place]}
    is_known = kind.graphs is not None and kind.graphs.drafters is asked.drafter.recorded_over(asked.state.cache)
    if not is_known or not moved <= kind.moving:
        if lane.depth_limit < min(lane.sequence.limits.max_depth, MAX_LEVELS):  # the end is near
            return None
        of_others = {place for other in kept.values() for place in other.moving}  # what moves there will move here
        kind.moving |= moved | (of_others & numbers.keys())
        kind.numbers = numbers
        kind.graphs = None  # its memory goes before that of another one comes
        kind.graphs = _record(asked, kind.moving)
    return kind.graphs


def _record(asked: _Asked, moving: set[Place]) -> _Recorded | None:
    """Record a step; None, with a warning, where that fails. What is in the caches, counted as theirs, stays."""
    begun = time.perf_counter()
    try:
        recorded = _compared(asked, moving)
    except Exception as error:  # noqa: BLE001  # whatever it is, the step is done without, where it belongs to somebody
        recorded = None
        asked.lane.can_record_steps = False
        warnings.warn(
            f"a step of '{asked.lane.stack}' could not be recorded as CUDA graphs, so its draft is launched level by "
            f"level ({type(error).__name__}: {error})",
            RuntimeWarning,
            stacklevel=2,
        )
    finally:
        asked.lane.cache.cut_block(0)
    asked.target.num_steps_recorded += recorded is not None
    asked.target.recording_seconds += time.perf_counter() - begun
    return recorded


def _compared(asked: _Asked, moving: set[Place]) -> _Recorded:
    """Record a step, and see whether a replay's target pass is the plain one's.

    Raises:
        RuntimeError: it waits for the device, which cannot be recorded, or comes out otherwise.
        PolicyError: a policy reads a number that its parameter is no longer, or does anything else that is refused.
    """
    lane, device, recorder = asked.lane, asked.lane.device, Recorder()
    space, limits = lane.padded_space, lane.sequence.limits
    assert space is not None, "growth_of has looked"
    inputs, stack = _Inputs.of(asked, moving), copy.deepcopy(lane.stack)
    for (policy, name), number in inputs.moving.items():
        object.__setattr__(stack.policies[policy], name, number)  # its own check asks for a number of Python
    own_space = PaddedSpace(space.width, space.max_branch, min(space.max_depth, MAX_LEVELS), device, space.write)
    own_space.heard = None  # the host hears of no level: all are launched

    def draft() -> tuple[PaddedGrowth, PaddedRows, RowsBehind]:
        vocab_size = lane.engine.num_known_ids
        growth = PaddedGrowth(own_space, max_nodes=limits.max_nodes, tau=limits.tau, vocab_size=vocab_size)
        passes = PassesBehind(asked.drafter.plain, asked.state.cache, asked.drafters_slots, inputs.drafters_start)
        state = asked.state.behind(passes, RowsBehind())
        rows = _drafted(lane, stack, growth, state, inputs.pending)
        return growth, rows, state.cache  # type: ignore[return-value]  # as `behind` has made it

    inputs.fill(asked)
    asked.state.cache.reserve(asked.num_followed + own_space.max_depth * own_space.width)
    first = lane.cache.reserve(1 + limits.max_nodes)
    launch_draft = recorder.recorded(draft, device)
    growth, rows, behind = launch_draft()
    lane.growth, lane.rehearsal = growth, None

    def verdict() -> tuple[Tensor, Tensor]:
        passes = PassesBehind(asked.target.plain, lane.cache, asked.slots, inputs.start)
        output = passes.forward(flatten([rows], [0]), RowsBehind(), stage="verify")
        return outcome_of(lane, rows, output), output.logits

    launch_verdict = recorder.recorded(verdict, device)
    block = [buffer[:, :, first : first + rows.num_nodes] for buffer in (*lane.cache.keys, *lane.cache.values)]
    for of_layer in block:
        of_layer.zero_()  # what recording has written does not count
    outcome, logits = launch_verdict()
    found = [logits.clone(), *(of_layer.clone() for of_layer in block)]
    # last, so that its keys and values are those that stay until the first replay
    flat = lane.target.prepared(flatten([rows], [lane.cache.length]), lane.cache)
    expected = [asked.target.plain.forward(flat, lane.cache).logits, *block]
    off = float(torch.stack([apart(*pair) for pair in zip(found, expected, strict=True)]).amax())
    if not off <= TOLERANCE[lane.cache.keys[0].dtype]:  # NaN is not either
        raise RuntimeError(f"the first replay was off by {off:.2g} of the largest number")
    num_rows = behind.block_len
    drafters = asked.drafter.recorded_over(asked.state.cache)
    return _Recorded(inputs, stack, growth, launch_draft, rows, num_rows, launch_verdict, outcome, drafters)


def _drafted(
    lane: Lane, stack: PolicyStack, growth: PaddedGrowth, state: ModelDraftState, pending: Tensor
) -> PaddedRows:
    """Grow a padded tree as `draft` does, and prune it as `prune` does, with nothing but tensors.

    Args:
        lane: whose tree it is.
        stack: a copy of its policies.
        growth: how it grows.
        state: the drafter's, to be asked about what is behind its prefix.
        pending: [followed] int64: the tokens there, the root last.

    Raises:
        RuntimeError: the tree has no level, or more than a recorded one may have.
    """
    tree, max_depth = growth.root(pending[-1:]), lane.sequence.limits.max_depth
    while tree.max_depth < max_depth:
        if tree.max_depth == MAX_LEVELS:
            raise RuntimeError(f"the policies end no tree before {MAX_LEVELS} levels; add a policy that does")

        def propose(tree: TokenTree = tree) -> Any:
            return by_itself(state.proposing(pending, tree, growth.space.max_branch))

        def nodes_left(tree: TokenTree = tree) -> Tensor:
            return growth.nodes_left(tree)

        frontier = lane.frontier(tree, nodes_left, propose, lambda: False, 0)
        expand = stack.should_expand(frontier)
        if expand.value is False:
            break
        branch = stack.branch_factor(frontier)
        if isinstance(branch.value, int) and branch.value == 0:
            break
        most = stack.max_width_of(branch.decider, tree.max_depth)
        tree = growth.grown(frontier, expand.value, branch.value, most, branch.decider)
    if not tree.num_drafted:
        raise RuntimeError("the policies draft nothing")
    return PaddedRows.of(tree, stack.keep_nodes(tree).value, growth, stack.max_kept)


def _replay(asked: _Asked, recorded: _Recorded) -> tuple[TokenTree, Verdict]:
    """Launch a step that is recorded, and hear its outcome, for which the host waits."""
    lane, state, rows = asked.lane, asked.state, recorded.rows
    lane.note_load([])
    lane.growth, lane.rehearsal = recorded.growth, None
    recorded.inputs.fill(asked)
    state.cache.reserve(asked.num_followed + recorded.num_drafters_rows)
    lane.cache.reserve(rows.num_nodes)
    # what policies launch is part of the graph, so the drafter's passes are not told from the rest of the draft
    with lane.clock.measure("draft", on_device=True), lane.clock.measure("draft_forward", on_device=True):
        recorded.draft()
    lane.note_asked()
    state.note_replayed(asked.num_followed, recorded.num_drafters_rows)
    with lane.clock.measure("verify", on_device=True):
        recorded.verdict()
    lane.cache.append(rows.num_nodes)
    own_rows = rows.copied()  # a later replay writes over the graph's own
    return told(lane, own_rows, recorded.outcome.tolist())
