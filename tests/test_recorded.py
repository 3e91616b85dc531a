"""A step as two launches: its draft and the target's verdict on it, recorded and replayed on a pretended device.

What is replayed there are the operations that were recorded, with every number that the host had computed then and at
the same addresses, as a CUDA graph does. Recording refuses what CUDA refuses.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import warnings
from collections.abc import Callable, Iterator
from typing import Any, ClassVar
from unittest import mock

import attrs
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from pretended_device import moved, pretended
from torch import Tensor

from dynatree_core import Engine, Frontier, Session, StepReport, hookimpl, run
from dynatree_core.drafters.model import ModelDrafter
from dynatree_core.engine import recorded as recorded_steps
from dynatree_core.errors import DrafterError, NonFiniteLogitsError
from dynatree_core.runners import cudagraph
from dynatree_core.runners.behind import PassesBehind
from dynatree_core.testing.conformance import POLICY_PROPERTIES
from dynatree_core.testing.models import perturbed, tiny_model

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a device is pretended where there is none")

RECORDED = [
    "fixed(depth=3,branch=2)",
    "fixed(depth=4,branch=3,tau=0.0,max_nodes=20)",  # the budget cuts within a level
    "linear(depth=5)",
    "phase1",
    "phase2:plan",
    "phase3",
    "phase3:plan",  # moves a whole number too, the depth
    "best_first(nodes=8,depth=4,beam=3)",
    "sequoia(nodes=9,depth=3,size='full',acceptance='0.5,0.3,0.1')",
    "sequoia(nodes=12,depth=4,size='full')",  # plans anew after 1, 2, 4, 8, … iterations
    "fixed(depth=5)+best_first(nodes=5)",
]


@attrs.frozen
class Played:
    """What came of a generation."""

    token_ids: list[int]
    trees: list[object]  # of each iteration: all that is known of it
    num_replayed: int


@functools.cache
def models() -> tuple[Any, ...]:
    """A target and a drafter of two layers in which what a row sees decides what it says."""
    return tuple(copy.deepcopy(one).float() for one in (tiny_model("llama"), perturbed("llama", 0, 0.03)))


def engine_on_device() -> Engine:
    target, drafter = (moved(copy.deepcopy(one)) for one in models())
    return Engine(target, ModelDrafter(drafter), runner="cudagraph", trust_model=True)


def text(start: int, number: int) -> list[int]:
    """Tokens without an order."""
    return [(7 * place * place + 3 * place) % 31 for place in range(start, start + number)]


def played(
    stack: Any, *, num_tokens: int = 60, start: int = 0, prompt: int = 40, slots: int = 64, **options: Any
) -> Played:
    """A generation on a pretended device, whose steps are recorded."""
    with pretended(), warnings.catch_warnings(), mock.patch.object(cudagraph, "MIN_SLOTS", slots):
        warnings.simplefilter("error", RuntimeWarning)
        return played_on(engine_on_device(), text(start, prompt), stack, num_tokens, **options)


def plain(stack: Any, *, num_tokens: int = 60, start: int = 0, prompt: int = 40, **options: Any) -> Played:
    """The same on the CPU, with padded trees that are launched."""
    target, drafter = models()
    engine = Engine(target, ModelDrafter(drafter), runner="eager", pads_trees=True, trust_model=True)
    return played_on(engine, text(start, prompt), stack, num_tokens, **options)


def played_on(engine: Engine, prompt: list[int], stack: Any, num_tokens: int, **options: Any) -> Played:
    session = Session.on(
        engine, prompt, policy=stack, max_new_tokens=num_tokens, eos_token_id=[], inherit_settings=False, **options
    )
    with calls_of("_replay") as replays:
        reports = [*run(session)]
    return Played(session.new_token_ids, [told(one) for one in reports], len(replays))


@contextlib.contextmanager
def calls_of(name: str) -> Iterator[list[tuple[int, int, int, Any]]]:
    """An entry for each call of what records or replays: the kind of step, and what moves in it.

    It keeps no lane, whose caches are then the next one's.
    """
    function, calls = getattr(recorded_steps, name), list[tuple[int, int, int, Any]]()

    def counted(asked: Any, given: Any) -> Any:
        calls.append((asked.num_followed, asked.slots, asked.drafters_slots, given if name == "_record" else None))
        return function(asked, given)

    with mock.patch.object(recorded_steps, name, counted):
        yield calls


def told(report: StepReport) -> object:
    tree = report.tree
    names = ("token_ids", "parent", "depth", "rank", "draft_index", "ancestor_mask")
    places = [getattr(tree, name).tolist() for name in names]
    return tree.level_sizes, places, tree.logprob.tolist(), report.verdict.path, report.verdict.token_ids


def check_the_same(one: Played, other: Played) -> None:
    assert one.token_ids == other.token_ids
    for first, second in zip(one.trees, other.trees, strict=True):
        assert first[:2] == second[:2]  # type: ignore[index]
        # up to rounding: passes over another number of slots
        assert first[2] == pytest.approx(second[2], abs=1e-4)  # type: ignore[index]
        assert first[3:] == second[3:]  # type: ignore[index]


@pytest.mark.parametrize("stack", RECORDED)
def test_replayed_steps_do_what_steps_do_that_are_launched(stack):
    ours = played(stack)
    assert ours.num_replayed > len(ours.trees) // 3
    check_the_same(ours, plain(stack))


@pytest.mark.parametrize("stack", RECORDED)
def test_the_kit_finds_that_they_keep_their_promise(stack):
    POLICY_PROPERTIES["recordable"](stack, 10)


@given(
    stack=st.sampled_from(RECORDED),
    start=st.integers(0, 70),
    prompt=st.integers(2, 50),
    limits=st.fixed_dictionaries({}, optional={"max_depth": st.integers(1, 6), "max_nodes": st.integers(1, 30)}),
)
@settings(max_examples=4, deadline=None, phases=[Phase.generate])
def test_any_generation_is_the_same_with_and_without(stack, start, prompt, limits):
    options = {"start": start, "prompt": prompt, **limits}
    check_the_same(played(stack, slots=32, **options), plain(stack, **options))  # over borders of slots


def test_later_generations_replay_what_an_earlier_one_has_recorded():
    """Here with a stack that moves a parameter."""
    with pretended(), calls_of("_record") as recordings:
        engine, found = engine_on_device(), []
        for start in (0, 7, 0):
            one = played_on(engine, text(start, 40), "phase3", 60)  # whose caches are the next one's
            assert one.token_ids == plain("phase3", start=start).token_ids
            found.append((one.num_replayed, len(recordings)))
            gc.collect()
    (first, num_recorded), _, (third, num_recorded_in_all) = found
    assert first < third
    assert 0 < num_recorded <= num_recorded_in_all <= 2, "one kind for each number of tokens that are followed"


def test_a_parameter_that_moves_needs_no_new_graph():
    """`history` moves a threshold of `confidence` in each iteration."""
    with calls_of("_record") as recordings:
        ours = played("phase3")
    kinds = [one[:3] for one in recordings]
    assert len(kinds) == len(set(kinds)) > 0, "each kind is recorded once"
    assert {num_followed for num_followed, *_ in kinds} == {1}, (
        "accepted nodes have their rows from when they were drafted"
    )
    assert ours.num_replayed > 2 * len(kinds)
    assert all(moving == {("confidence", "high")} for *_, moving in recordings)


@attrs.define
class Counting:
    """Promises what it does not keep: what it says depends on the iteration."""

    is_capturable: ClassVar = True
    is_recordable: ClassVar = False

    @hookimpl
    def branch_factor(self, frontier: Frontier) -> int:
        return 1 + frontier.iteration % 2


@attrs.define
class Asking(Counting):
    """Reads a number of the device once trees are padded."""

    is_recordable: ClassVar = True
    max_width: ClassVar = 8

    @hookimpl
    def branch_factor(self, frontier: Frontier) -> Tensor:
        if frontier.tree.is_padded:
            frontier.top_logprobs.sum().item()
        return torch.ones(frontier.width, dtype=torch.int64, device=frontier.tree.device)


class Plain:
    """Promises it, but nobody sees whether its parameter is another one."""

    is_capturable = is_recordable = True

    def __init__(self, branch: int) -> None:
        self.branch = branch

    @hookimpl
    def branch_factor(self, frontier: Frontier) -> int:
        return self.branch


def test_policies_that_do_not_promise_it_or_whose_parameters_are_not_known_are_launched():
    for stack in (["fixed(depth=3)", Counting()], ["fixed(depth=3)", Plain(2)], "fixed(depth=3)+governor"):
        assert played(stack, num_tokens=40).num_replayed == 0


def test_a_policy_that_waits_cannot_be_recorded_and_is_launched():
    stack = ["fixed(depth=3)", Asking()]
    refused = pytest.warns(
        RuntimeWarning, match=r"could not be recorded as CUDA graphs.*not permitted when stream is cap"
    )
    with pretended(), refused:
        ours = played_on(engine_on_device(), text(0, 40), stack, 50)
    assert ours.num_replayed == 0
    check_the_same(ours, plain(stack, num_tokens=50))


def wrong(change: Callable[[Any], None]) -> Any:
    """`PassesBehind` with something wrong in the target's passes."""

    def forward(self: PassesBehind, flat: Any, cache: Any, **options: Any) -> Any:
        if options["stage"] == "verify":
            change(self)
        return forward_of(self, flat, cache, **options)

    forward_of = PassesBehind.forward
    return mock.patch.object(PassesBehind, "forward", forward)


@pytest.mark.parametrize("fault", ["sees too little", "writes elsewhere"])
def test_a_target_pass_that_comes_out_otherwise_is_not_replayed(fault):
    def change(passes: Any) -> None:
        if fault == "sees too little":
            passes._is_prefix = passes._every < passes._start - 3
        else:
            passes._start = passes._start + 1

    with pretended(), wrong(change), pytest.warns(RuntimeWarning, match="the first replay was off by"):
        ours = played_on(engine_on_device(), text(0, 40), "fixed(depth=3)", 50)
    assert ours.num_replayed == 0
    check_the_same(ours, plain("fixed(depth=3)", num_tokens=50))


def test_what_is_wrong_with_a_replayed_draft_or_verdict_is_told():
    """Weights that turn to NaN in the middle, which the graphs read where they are."""
    for part, error, match in (
        ("drafter", DrafterError, "log-probabilities must be numbers"),
        ("target", NonFiniteLogitsError, "must be numbers"),
    ):
        with pretended():
            on_device = {"target": moved(copy.deepcopy(models()[0])), "drafter": moved(copy.deepcopy(models()[1]))}
            drafter = ModelDrafter(on_device["drafter"])
            engine = Engine(on_device["target"], drafter, runner="cudagraph", trust_model=True)
            session = Session.on(engine, text(0, 40), policy="fixed(depth=3)", max_new_tokens=60, eos_token_id=[])
            steps = run(session)
            with calls_of("_replay") as replays:
                while len(replays) < 2:
                    next(steps)
                on_device[part].model.norm.weight.numbers.fill_(float("nan"))
                with pytest.raises(error, match=match):
                    next(steps)
                assert len(replays) == 3
            assert session.new_token_ids == plain("fixed(depth=3)").token_ids[: len(session.new_token_ids)]
