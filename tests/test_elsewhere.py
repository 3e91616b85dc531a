"""A drafter on another device than the target: what is copied, and that nothing else changes.

A machine with one device has two names for it: "cpu:0" is not "cpu", though its tensors are on "cpu". So the code for
two devices runs with real numbers. The meta device is another one for certain: operations that mix it with the CPU
raise.
"""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import attrs
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dynatree_core import Drafter, DraftPlan, DraftState, Proposals, TokenTree, build_drafter, generate
from dynatree_core.clock import StageClock
from dynatree_core.drafters.model import ModelDrafter
from dynatree_core.drafters.union import UnionDrafter
from dynatree_core.engine.costs import measured_costs
from dynatree_core.runners.choice import drafters_runner
from dynatree_core.testing import assert_drafter_contract, assert_lossless
from dynatree_core.testing import strategies as ours
from dynatree_core.testing.models import VOCAB, greedy, perturbed, tiny_model

CPU, META = torch.device("cpu"), torch.device("meta")
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


class Renamed(ModelDrafter):
    """A model that says that it is on another device, and is on the same."""

    def runs_on(self, target):
        return torch.device("cpu", 0)


def test_a_model_elsewhere_keeps_to_the_contract():
    drafter = Renamed(perturbed("llama", noise=0.02))
    assert_drafter_contract(drafter, max_examples=20)
    assert_lossless(ours.stacks(), drafter=drafter, max_examples=10)


@pytest.mark.parametrize("policy", ["phase3", "fixed(depth=3,tau=0.0)", "cost_aware"])
def test_trees_are_those_of_a_drafter_here(policy):
    target, model = tiny_model("llama"), perturbed("llama", noise=0.02)
    here, elsewhere = (
        generate(target, UnionDrafter([kind(model), build_drafter("prompt_lookup")]), PROMPT, policy=policy,
                 max_new_tokens=30)
        for kind in (ModelDrafter, Renamed)
    )  # fmt: skip
    assert here.token_ids == elsewhere.token_ids == greedy(target, PROMPT, 30)
    if policy != "cost_aware":  # which measures
        assert here.report.steps == elsewhere.report.steps


class OnMeta(Drafter):
    """Its tensors have shapes and no numbers, so an operation with one of the CPU's raises."""

    def runs_on(self, target):
        return META

    def start(self, plan: DraftPlan) -> DraftState:
        assert plan.device == META
        return OnMetaState()


class OnMetaState(DraftState):
    def __init__(self) -> None:
        self.lengths: list[int] = []

    def prefill(self, committed_ids):
        assert committed_ids.device == META

    def propose(self, committed_ids, tree, k):
        tensors = [value for value in attrs.asdict(tree, recurse=False).values() if isinstance(value, torch.Tensor)]
        assert {tensor.device for tensor in (committed_ids, *tensors)} == {META}
        self.lengths.append(committed_ids.numel())
        level = tree.token_ids[tree.last_level, None] + torch.arange(k, device=META)
        return Proposals(level % VOCAB, level.float().log_softmax(dim=-1))

    def commit(self, draft_path):
        pass

    def rollback(self):
        pass


class Copies(TorchDispatchMode):
    """Counts copies to the meta device and back. What comes back has no numbers, so it is all zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers: Counter[tuple[str, str]] = Counter()  # of numbers copied
        self.copies: Counter[tuple[str, str]] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        named = named or {}
        if function.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.to):
            values = (*arguments[1:], *named.values())
            source = arguments[0]
            to = next((value for value in values if isinstance(value, torch.device)), source.device)
        elif function is torch.ops.aten.copy_.default:
            source, to = arguments[1], arguments[0].device
        else:
            return function(*arguments, **named)
        if source.device == to:
            return function(*arguments, **named)
        self.copies[source.device.type, to.type] += 1
        self.numbers[source.device.type, to.type] += source.numel()
        if to == META:
            return function(*arguments, **named)
        is_into = function is torch.ops.aten.copy_.default
        return arguments[0].zero_() if is_into else torch.zeros(source.shape, dtype=source.dtype)


def test_ids_and_trees_go_there_and_proposals_come_back():
    """New ids are copied once, a tree by one copy a level, whatever its size, and its proposals by one."""
    target, text = tiny_model("llama"), torch.tensor(PROMPT)
    state = OnMeta().begin(DraftPlan(VOCAB, 30, 16, CPU, StageClock(CPU), target))
    with Copies() as seen:
        state.prefill(text[:-1])
        assert (dict(seen.copies), dict(seen.numbers)) == ({("cpu", "meta"): 1}, {("cpu", "meta"): 7})
        seen.copies.clear()
        tree = TokenTree.root(text[-1:])
        for depth in range(3):
            proposals = state.propose(text, tree, 2)
            assert proposals.token_ids.device == proposals.logprobs.device == CPU
            assert proposals.token_ids.shape == (depth + 1, 2)
            children = depth + 2
            parent = torch.full((children,), tree.num_nodes - 1)
            tree = tree.grow(parent, torch.zeros_like(parent), torch.zeros(children))
        assert seen.copies == {("cpu", "meta"): 1 + 3, ("meta", "cpu"): 3}
        state.commit(())
        seen.copies.clear()
        seen.numbers.clear()
        longer = torch.cat([text, torch.tensor([5])])
        state.propose(longer, TokenTree.root(longer[-1:]), 2)
        assert seen.copies["cpu", "meta"] == 2
        of_root = 5 * 8 + 2 * 4 + 1  # bytes: five integers, two floats, a bool
        assert seen.numbers["cpu", "meta"] == 1 + of_root, "the new id, and a root"


def test_a_generation_with_a_drafter_on_meta():
    target, drafter = tiny_model("llama"), OnMeta()
    with Copies() as seen:
        result = generate(target, drafter, PROMPT, policy="fixed(depth=3,branch=2,tau=0.0)", max_new_tokens=12)
    assert result.token_ids == greedy(target, PROMPT, 12)
    assert result.report.num_drafted_nodes > 0
    assert seen.copies["meta", "cpu"] > 0


def test_a_drafters_passes_are_computed_in_a_way_that_its_device_has():
    cuda = torch.device("cuda", 0)
    assert drafters_runner("cudagraph", CPU) == "auto"
    assert drafters_runner("cudagraph", cuda) == drafters_runner("cudagraph") == "cudagraph"
    assert drafters_runner("packed", cuda) == drafters_runner("packed") == "auto"
    plans = []

    class Noting(Renamed):
        def start(self, plan):
            plans.append(plan)
            return super().start(plan)

    Noting(perturbed("llama")).begin(
        DraftPlan(VOCAB, 30, 16, CPU, StageClock(CPU), tiny_model("llama"), runner="cudagraph")
    )
    assert [plan.runner for plan in plans] == ["auto"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("is_target_on_gpu", [True, False])
def test_the_gpu_and_the_cpu(is_target_on_gpu, tmp_path, monkeypatch):
    monkeypatch.setattr("dynatree_core.engine.costs.folder", lambda: tmp_path)
    target, model = copy.deepcopy(tiny_model("llama")), copy.deepcopy(perturbed("llama", noise=0.02))
    (target if is_target_on_gpu else model).cuda()
    expected = greedy(tiny_model("llama"), PROMPT, 30)
    for drafter in (ModelDrafter(model), UnionDrafter([ModelDrafter(model), build_drafter("prompt_lookup")])):
        for policy in ("phase3", "fixed(depth=3,tau=0.0)", "cost_aware"):
            result = generate(target, drafter, PROMPT, policy=policy, max_new_tokens=30)
            assert result.token_ids == expected
        assert measured_costs(target, drafter, rounds=1).drafter_level_seconds(4) > 0
