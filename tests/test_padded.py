"""Padded trees: levels of one width, of which the host learns with the verdict how many nodes they have.

What is verified must be what is verified without padding: the same tree, the same verdict, the same caches.
"""

from __future__ import annotations

import copy
import itertools
import threading
import warnings
from contextlib import nullcontext
from typing import Any, ClassVar
from unittest import mock

import attrs
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper

from dynatree_core import Engine, Frontier, Observer, Proposals, Session, TokenTree, build_stack, hookimpl, run
from dynatree_core.cost_model import NOMINAL_COSTS
from dynatree_core.drafters.base import Drafter, DraftPlan, takes_padding
from dynatree_core.drafters.model import ModelDrafter, ModelDraftState
from dynatree_core.drafters.prompt_lookup import PromptLookupDrafter
from dynatree_core.drafters.union import UnionDrafter
from dynatree_core.engine.fused import checked, level_writer
from dynatree_core.engine.rehearsal import Rehearsal
from dynatree_core.engine.verify import outcome_of, told
from dynatree_core.errors import DrafterError, PolicyError
from dynatree_core.runners.base import PassOutput
from dynatree_core.runners.choice import runner_for
from dynatree_core.testing import conformance
from dynatree_core.testing.conformance import POLICY_PROPERTIES, without_database
from dynatree_core.testing.models import perturbed, reference, tiny_model
from dynatree_core.tree.padded import PaddedGrowth, PaddedRows, PaddedSpace, least_width, write_plainly

STACKS = [
    "fixed(depth=3,branch=2)",
    "fixed(depth=4,branch=3,tau=0.0,max_nodes=20)",  # the budget cuts within a level, and ends before the depth
    "linear(depth=5)",
    "phase1",
    "phase1:plan",
    "phase2",
    "phase3",
    "phase3:plan",
    "best_first(nodes=8,depth=4,beam=3)",
    "eagle2",
    "sequoia(nodes=12,depth=4,size='full')",
    "sequoia(nodes=9,depth=3,size='full',acceptance='0.5,0.3,0.1')",
    "confidence(high=0.6,low=0.5,max_branch=5)+dynamic_depth(signal='cumulative',stop_threshold=0.2)",
    "fixed(depth=5)+best_first(nodes=5)",
]


def decoded(
    stack: Any, prompt: list[int], *, drafter: Any, pads: bool, family: str = "llama", **options: Any
) -> Session:
    target = tiny_model(family)
    engine = Engine(target, drafter, pads_trees=pads, runner="eager")
    session = Session.on(engine, prompt, policy=stack, max_new_tokens=30, eos_token_id=[], **options)
    session.reports = [*run(session)]  # type: ignore[attr-defined]
    return session


def outcomes(session: Any) -> list[object]:
    """All that is known of each iteration but the places of nodes as they were drafted, which count padding too."""
    return [
        (
            report.tree.level_sizes,
            *(
                getattr(report.tree, name).tolist()
                for name in ("token_ids", "parent", "depth", "rank", "ancestor_mask")
            ),
            report.tree.logprob.tolist(),
            report.tree.cum_logprob.tolist(),
            report.verdict.path,
            report.verdict.token_ids,
        )
        for report in session.reports
    ]


def cached(session: Any) -> list[Tensor]:
    """The committed rows of target and drafter."""
    caches = [session.cache, *[session.draft_state.cache for _ in [0] if hasattr(session.draft_state, "cache")]]
    return [buffer[:, :, : cache.length] for cache in caches for buffer in (*cache.keys, *cache.values)]


@given(
    stack=st.sampled_from(STACKS),
    prompt=st.lists(st.integers(0, 36), min_size=1, max_size=12),
    family=st.sampled_from(["llama", "gpt2", "gpt_neox", "mistral"]),
    kind=st.sampled_from(["model", "prompt_lookup", "union"]),
    hears_early=st.booleans(),
    limits=st.fixed_dictionaries({}, optional={"max_depth": st.integers(1, 9), "max_nodes": st.integers(1, 40)}),
)
@settings(max_examples=20, deadline=None, phases=[Phase.generate])  # shrinking it takes minutes
def test_what_is_verified_is_what_is_verified_without_padding(stack, prompt, family, kind, hears_early, limits):
    model = ModelDrafter(perturbed(family, 0, 0.03))
    union = UnionDrafter([model, PromptLookupDrafter()])
    drafter = {"model": model, "prompt_lookup": PromptLookupDrafter(), "union": union}[kind]
    heard = nullcontext() if hears_early else mock.patch.object(PaddedGrowth, "is_over", False)
    with warnings.catch_warnings(), heard:
        warnings.simplefilter("error", RuntimeWarning)  # that a policy's answers depend on padding
        plain, padded = (
            decoded(stack, prompt, drafter=drafter, pads=pads, family=family, **limits) for pads in (False, True)
        )
    assert padded.padded_space is not None
    # up to rounding: rows beside a row may change its last bit, and so a probability's
    for one, other in zip(outcomes(plain), outcomes(padded), strict=True):
        assert one[:6] == other[:6]
        assert one[6] == pytest.approx(other[6], abs=1e-5)
        assert one[7] == pytest.approx(other[7], abs=1e-5)
        assert one[8:] == other[8:]
    for one, other in zip(cached(plain), cached(padded), strict=True):
        # a model may have been asked about a level more, where the budget was used up
        length = min(one.shape[2], other.shape[2])
        torch.testing.assert_close(one[:, :, :length], other[:, :, :length])
    assert plain.cache.length == padded.cache.length


@pytest.mark.parametrize("stack", ["fixed(depth=4)", "phase3"])
def test_padding_does_not_decide_whether_a_union_asks_its_model(stack):
    """A text that repeats itself, so that some levels do without, and one where what is looked up is not enough."""
    model = ModelDrafter(perturbed("llama", 0, 0.03))
    asked = {}
    for pads in (False, True):
        with mock.patch.object(
            ModelDraftState, "proposing", autospec=True, side_effect=ModelDraftState.proposing
        ) as looks:
            union = UnionDrafter([model, PromptLookupDrafter()])
            session = decoded(stack, [7, 8, 9, 7, 8, 9, 7, 8], drafter=union, pads=pads)
        asked[pads] = outcomes(session), looks.call_count, sum(report.tree.max_depth for report in session.reports)
    assert session.growth is not None
    trees, num_looks, num_levels = asked[True]
    assert [one[:6] for one in trees] == [one[:6] for one in asked[False][0]]
    assert 0 < num_looks == asked[False][1] < num_levels


@pytest.mark.parametrize("stack", [STACKS[1], "phase3", "best_first(nodes=8,depth=4,beam=3)"])
def test_a_stack_drafts_the_trees_that_it_drafts_without_padding(stack):
    """A fixed example of each kind: a budget, depths that depend on data, and nodes that are cut."""
    drafter = ModelDrafter(perturbed("llama", 0, 0.03))
    plain, padded = (decoded(stack, [7, 8, 9, 3], drafter=drafter, pads=pads) for pads in (False, True))
    assert padded.growth is not None
    assert [one[:6] for one in outcomes(plain)] == [one[:6] for one in outcomes(padded)]


def written(spoil: Any, **changes: Any) -> Any:
    """What writes levels as torch does, but for what is changed of what is wanted, or spoilt afterwards."""

    def write(space, wanted, room, level):
        write_plainly(space, attrs.evolve(wanted, **changes), room, level)
        if spoil is not None:
            spoil(room, level)

    return write


def sees_a_sibling(room: Any, level: slice) -> None:
    room.mask[level.stop - 1, level.start] = True


def of_another_rank(room: Any, level: slice) -> None:
    room.packed[3, level.start] += 1


def fails(room: Any, level: slice) -> None:
    raise OSError("no compiler")


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (written(sees_a_sibling), "come out otherwise"),
        (written(of_another_rank), "come out otherwise"),
        (written(None, max_nodes=99, fits_budget=False), "come out otherwise"),
        (written(None, least=-3.0), "come out otherwise"),
        (written(None, expand=True), "come out otherwise"),
        (written(None, vocab_size=9), "come out otherwise"),
        (written(fails), "OSError: no compiler"),
    ],
)
def test_a_kernel_that_writes_other_levels_than_torch_is_told_and_not_used(write, words):
    cpu = torch.device("cpu")
    with pytest.warns(RuntimeWarning, match=f"levels of 4 places cannot be written by one .*{words}"):
        assert checked(lambda: write, 4, 3, cpu) is None


def test_a_kernel_that_writes_what_torch_writes_is_used_and_none_on_a_cpu():
    plain = written(None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert all(checked(lambda: plain, width, 3, torch.device("cpu")) is plain for width in (1, 4, 16))
    assert level_writer(torch.device("cpu"), 16, 16) is None


def test_padding_is_not_accepted():
    """Where all else of a level is padding, and padding carries the token that the target chooses."""
    space = PaddedSpace(4, 2, 1, torch.device("cpu"))
    growth = PaddedGrowth(space, max_nodes=8, tau=0.0, vocab_size=5)
    tree = growth.root(torch.tensor([3]))
    proposals = Proposals(torch.tensor([[2, 1]]), torch.tensor([[-0.1, -torch.inf]]))
    tree = growth.grown(Frontier(tree, 0, 8, 2, lambda: proposals), True, 2, None)
    rows = PaddedRows.of(tree, None, growth, None)
    assert rows.token_ids.tolist() == [3, 2, 0]
    chosen = torch.tensor([0, 4, 1])  # at the root padding's token, which is no child's
    session = Session(tiny_model("llama"), perturbed("llama"), [3], policy="fixed(depth=1)", max_new_tokens=9)
    session.growth = growth
    known, verdict = told(session, rows, outcome_of(session, rows, PassOutput(torch.eye(5)[None, chosen])).tolist())
    assert known.level_sizes == (1, 1)
    assert (verdict.path, verdict.token_ids) == ((), (0,))


def test_padded_trees_are_drafted_once_the_policies_were_seen_to_bear_them():
    session = decoded("fixed(depth=3)", [1, 2, 3], drafter=ModelDrafter(perturbed("llama")), pads=True)
    assert session.num_rehearsed == 2
    assert session.growth is not None
    assert session.padded_space.width == 16
    plain = decoded("fixed(depth=3)", [1, 2, 3], drafter=ModelDrafter(perturbed("llama")), pads=False)
    assert plain.growth is None


@pytest.mark.parametrize(
    ("most", "width"), [((1, 0.0, None), 1), ((16, 0.0, None), 16), ((128, 0.05, None), 32), ((200, 0.0, None), None)]
)
def test_a_level_has_the_least_width_that_is_enough(most, width):
    assert least_width(*most) == width


def test_a_plan_says_of_each_level_how_many_nodes_it_has():
    stack = build_stack("sequoia(nodes=12,depth=4,size='full')")
    assert (stack.max_width, stack.max_width_of("sequoia", 0)) == (12, 12)
    stack.should_expand(Frontier(TokenTree.root(torch.tensor([3])), 0, 12, 16, pytest.fail))
    depth = stack.find("sequoia").plan.depth
    widths = [stack.max_width_of("sequoia", level) for level in range(depth)]
    assert sum(widths) == 12
    assert (stack.max_width, stack.max_width_of("sequoia", depth)) == (max(widths), None)


@pytest.mark.parametrize(
    ("promised", "most", "of_each"),
    [
        ((4, 8, 0), 8, [4, 8, 1]),
        ((0,), 1, [1]),
        ((4, -1), None, [4, None]),
        ((), None, []),
        ((4, None), None, [4, None]),
    ],
)
def test_a_level_that_leads_to_nothing_is_promised_by_0(promised, most, of_each):
    class Promising:
        max_width = promised

        @hookimpl
        def branch_factor(self, frontier):
            return 1

    stack = build_stack([Promising()])
    (name,) = stack.policies
    assert stack.max_width == most
    assert [stack.max_width_of(name, depth) for depth in range(len(promised))] == of_each


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "seed": 1},
        {"logits_processor": LogitsProcessorList([TemperatureLogitsWarper(0.7)])},
        {"observer": Observer()},
        {"exact": "fixed_width"},
        {"cache": "sinks=1,window=32"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_what_reads_from_the_device_anyway_drafts_without_padding(options):
    session = decoded("fixed(depth=2)", [1, 2, 3], drafter=ModelDrafter(perturbed("llama")), pads=True, **options)
    assert session.padded_space is None


@attrs.define
class LevelMean:
    """Depends on padding: the mean over a level counts it."""

    is_capturable: ClassVar = True

    @hookimpl
    def should_expand(self, frontier: Frontier) -> bool:
        return frontier.depth < 3

    @hookimpl
    def branch_factor(self, frontier: Frontier) -> Tensor:
        return (frontier.confidence >= frontier.confidence.mean()).long() + 1


@attrs.define
class Greedier:
    """Wants more than it says."""

    is_capturable: ClassVar = True
    max_width: ClassVar = 1

    @hookimpl
    def branch_factor(self, frontier: Frontier) -> int:
        return 3


@attrs.define
class KeepsMore:
    is_capturable: ClassVar = True
    max_kept: ClassVar = 1

    @hookimpl
    def keep_nodes(self, tree: TokenTree) -> Tensor:
        return torch.ones_like(tree.is_live)


@attrs.define
class KeepsTheLast:
    """Depends on padding: the last nodes of a tree are padding."""

    is_capturable: ClassVar = True

    @hookimpl
    def keep_nodes(self, tree: TokenTree) -> Tensor:
        keep = torch.ones_like(tree.is_live)
        keep[-2:] = False
        return keep


@pytest.mark.parametrize(
    ("stack", "what"),
    [
        ([LevelMean()], "branch_factor says"),
        (["fixed(depth=2)", Greedier()], "nodes are wanted at depth 0 than max_width=1"),
        (["fixed(depth=2)", KeepsMore()], "max_kept=1"),
        (["fixed(depth=2)", KeepsTheLast()], "keep_nodes keeps other nodes"),
    ],
    ids=lambda value: value if isinstance(value, str) else str(value[-1]),
)
def test_policies_whose_answers_depend_on_padding_are_told_and_go_without(stack, what):
    drafter = ModelDrafter(perturbed("llama"))
    with pytest.warns(RuntimeWarning, match=what) as caught:
        padded = decoded(stack, [1, 2, 3], drafter=drafter, pads=True)
    assert len(caught) == 1
    plain = decoded(stack, [1, 2, 3], drafter=drafter, pads=False)
    assert padded.padded_space is None
    assert outcomes(padded) == outcomes(plain)


@attrs.define
class Widening:
    """Changes a parameter beside it, so that levels need more places than there are."""

    is_capturable: ClassVar = True
    seen: int = attrs.field(default=0, init=False)

    @hookimpl
    def on_iteration_end(self, report: Any, stack: Any) -> None:
        self.seen += 1
        stack.find("fixed").branch = 1 if self.seen < 4 else 3


def test_a_parameter_that_was_changed_is_followed():
    drafter = ModelDrafter(perturbed("llama"))
    plain, padded = (
        decoded(["fixed(depth=2,branch=1,tau=0.0)", Widening()], [1, 2, 3], drafter=drafter, pads=pads)
        for pads in (False, True)
    )
    assert padded.padded_space.width == 1
    assert max(report.tree.num_drafted for report in padded.reports) == 12
    assert outcomes(padded) == outcomes(plain)


def test_a_tree_without_padding_has_its_places_in_the_drafters_cache_too(monkeypatch):
    """A padded chain has few places, but a tree that grows level by level may have as many nodes as the limit says."""
    monkeypatch.setattr("dynatree_core.engine.resources.SLOT_BLOCK", 8)  # a cache ends near what was asked for
    drafter, prompt = ModelDrafter(perturbed("llama")), [1, 2, 3]
    plain, padded = (
        decoded(["fixed(depth=4,branch=1,tau=0.0)", Widening()], prompt, drafter=drafter, pads=pads, on_error="raise")
        for pads in (False, True)
    )
    assert max(report.tree.num_drafted for report in padded.reports) == 120
    assert outcomes(padded) == outcomes(plain)


@attrs.define
class Abstaining:
    """Wants one child of each node in the iterations that are rehearsed, and has no opinion later."""

    is_capturable: ClassVar = True
    max_width: ClassVar = 1

    @hookimpl
    def branch_factor(self, frontier: Frontier) -> int | None:
        return 1 if frontier.iteration < 4 else None


def test_a_level_has_room_for_whoever_decides_its_widths():
    drafter = ModelDrafter(perturbed("llama"))
    plain, padded = (
        decoded(["fixed(depth=2,branch=3,tau=0.0)", Abstaining()], [1, 2, 3], drafter=drafter, pads=pads)
        for pads in (False, True)
    )
    assert padded.growth is not None
    assert max(report.tree.num_drafted for report in padded.reports) == 12
    assert outcomes(padded) == outcomes(plain)


@attrs.define
class Locked:
    """Gets what cannot be copied in its first iteration."""

    is_capturable: ClassVar = True
    lock: Any = attrs.field(default=None, init=False)

    @hookimpl
    def on_iteration_end(self, report: Any) -> None:
        self.lock = threading.Lock()


def test_a_policy_that_cannot_be_copied_any_more_goes_without_padding():
    with pytest.warns(RuntimeWarning, match=r"have to be copied.*'locked' must be copyable"):
        session = decoded(["fixed(depth=2)", Locked()], [1, 2, 3], drafter=ModelDrafter(perturbed("llama")), pads=True)
    assert session.padded_space is None
    assert session.new_token_ids == reference(tiny_model("llama"), [1, 2, 3], 30)


class Interrupting(ModelDrafter):
    """Its first look is broken off."""

    is_over = False

    def start(self, plan: DraftPlan) -> ModelDraftState:
        return InterruptingState(self, plan)


class InterruptingState(ModelDraftState):
    def __init__(self, drafter: Interrupting, plan: DraftPlan) -> None:
        super().__init__(drafter.model, plan)
        self.drafter = drafter

    def proposing(self, *arguments: Any) -> Any:
        if not self.drafter.is_over:
            self.drafter.is_over = True
            raise KeyboardInterrupt
        return super().proposing(*arguments)


@pytest.mark.parametrize("stack", ["fixed(depth=2)+governor", "cost_aware"])
def test_policies_that_were_interrupted_are_copied_without_what_they_ask(stack):
    """They keep what they were shown of a tree, from which models and engines can be reached."""
    target = tiny_model("llama")
    drafter, now = Interrupting(perturbed("llama")), itertools.count().__next__
    engine = Engine(target, drafter, pads_trees=True, runner="eager", costs=NOMINAL_COSTS, now=now)
    prompt = [*range(1, 11)]  # long enough for a governor to keep whose look has it read
    session = Session.on(engine, prompt, policy=stack, max_new_tokens=30, eos_token_id=[])
    with pytest.raises(KeyboardInterrupt):
        [*run(session)]
    kept = [getattr(policy, name, []) for policy in session.stack.policies.values() for name in ("behind", "levels")]
    assert any(isinstance(level, Frontier) for levels in kept for level in levels), "of the broken iteration"
    copied = AssertionError("a model was copied")
    with mock.patch.object(type(target), "__deepcopy__", create=True, side_effect=copied):
        copy.deepcopy(session.stack)
        [*run(session)]
    assert session.new_token_ids == reference(target, prompt, 30)


def test_policies_that_do_not_draft_are_copied_ever_less_often():
    stack = build_stack("autoregressive")
    with mock.patch("dynatree_core.engine.padded.Rehearsal", wraps=Rehearsal) as rehearsed:
        session = decoded(stack, [1, 2, 3], drafter=ModelDrafter(perturbed("llama")), pads=True)
    assert session.padded_space is not None
    assert rehearsed.call_count == 5, "in iterations 0, 1, 3, 7 and 15 of 30"


def test_processes_that_share_a_model_grow_no_padded_trees(monkeypatch):
    """When the host hears that a level is empty depends on its clock, and they must draft the same."""
    monkeypatch.setattr("dynatree_core.engine.resources.num_processes", lambda model: 2)
    session = decoded("fixed(depth=2)", [1, 2, 3], drafter=ModelDrafter(perturbed("llama")), pads=True)
    assert session.padded_space is None


class FaultyDrafter(ModelDrafter):
    """Its proposals are altered from the sixth look on."""

    def __init__(self, alter: Any) -> None:
        super().__init__(perturbed("llama"))
        self.alter = alter

    def start(self, plan: DraftPlan) -> ModelDraftState:
        state = FaultyState(self.model, plan)
        state.alter = self.alter
        return state


class FaultyState(ModelDraftState):
    is_capturable = True
    num_looks = 0

    def proposing(self, *arguments: Any) -> Any:
        proposals = yield from super().proposing(*arguments)
        self.num_looks += 1
        return proposals if self.num_looks < 6 else self.alter(proposals)


def unknown_tokens(proposals: Proposals) -> Proposals:
    return attrs.evolve(proposals, token_ids=proposals.token_ids + 100)


def not_numbers(proposals: Proposals) -> Proposals:
    return attrs.evolve(proposals, logprobs=torch.full_like(proposals.logprobs, torch.nan))


@pytest.mark.parametrize(("alter", "what"), [(unknown_tokens, "token ids must be"), (not_numbers, "must be numbers")])
def test_a_bad_proposal_is_refused_when_the_host_hears_of_it(alter, what):
    options: dict[str, Any] = {"drafter": FaultyDrafter(alter), "pads": True, "on_error": "raise"}
    with pytest.raises(DrafterError, match=what) as caught:
        decoded("fixed(depth=2,branch=2)", [1, 2, 3], **options)
    expected = reference(tiny_model("llama"), [1, 2, 3], 30)
    assert caught.value.partial.token_ids == expected[: len(caught.value.partial.token_ids)]
    with pytest.warns(RuntimeWarning, match="drafting is off"):
        session = decoded("fixed(depth=2,branch=2)", [1, 2, 3], **{**options, "on_error": "fallback"})
    assert session.new_token_ids == expected


@attrs.define
class TooWide:
    """Asks for too many children once it was rehearsed."""

    is_capturable: ClassVar = True
    max_width: ClassVar = 16

    @hookimpl
    def branch_factor(self, frontier: Frontier) -> Tensor:
        return torch.full((frontier.width,), 2 if frontier.iteration < 4 else 99)


def test_a_width_out_of_range_is_refused_when_the_host_hears_of_it():
    drafter = ModelDrafter(perturbed("llama"))
    with pytest.raises(PolicyError, match=r"'too_wide', hook branch_factor: .*99"):
        decoded(["fixed(depth=2)", TooWide()], [1, 2, 3], drafter=drafter, pads=True, on_error="raise")


@attrs.define
class TooWideAtTheRoot:
    is_capturable: ClassVar = True
    max_width: ClassVar = 16

    @hookimpl
    def branch_factor(self, frontier: Frontier) -> Tensor | None:
        return torch.full((1,), 2 if frontier.iteration < 4 else 99) if frontier.depth == 0 else None


def test_a_width_out_of_range_is_blamed_on_who_wanted_it():
    with pytest.raises(PolicyError, match=r"'too_wide_at_the_root', hook branch_factor: .*99"):
        decoded(
            ["confidence+dynamic_depth", TooWideAtTheRoot()], [1, 2, 3], drafter=ModelDrafter(perturbed("llama")),
            pads=True, on_error="raise",
        )  # fmt: skip


class Overridden(ModelDraftState):
    def propose(self, committed_ids: Tensor, tree: TokenTree, k: int) -> Proposals:
        return super().propose(committed_ids, tree, k)


class OverriddenDrafter(ModelDrafter):
    def start(self, plan: DraftPlan) -> ModelDraftState:
        return Overridden(self.model, plan)


def test_who_overrides_what_a_drafter_proposes_says_anew_that_it_bears_padding():
    drafter: Drafter = OverriddenDrafter(perturbed("llama"))
    session = decoded("fixed(depth=2)", [1, 2, 3], drafter=drafter, pads=True)
    assert not takes_padding(session.draft_state)
    assert session.growth is None


@pytest.mark.parametrize("runner", ["eager", "packed", "native"])
def test_each_runner_computes_passes_with_padding(runner):
    target, model = (copy.deepcopy(one).float() for one in (tiny_model("llama", 3), perturbed("llama", 3, 0.03)))
    if runner_for(target, runner) != runner:
        pytest.skip(f"the {runner} runner is not for this machine")
    engine = Engine(target, ModelDrafter(model), runner=runner, pads_trees=True)
    session = Session.on(engine, [5, 6, 7], policy="fixed(depth=4)", max_new_tokens=40, eos_token_id=[])
    [*run(session)]
    assert session.growth is not None
    assert session.new_token_ids == reference(target, [5, 6, 7], 40)


def test_sequences_that_share_passes_draft_padded_trees():
    target, drafter = tiny_model("llama"), ModelDrafter(perturbed("llama", 0, 0.03))
    engine = Engine(target, drafter, pads_trees=True)
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8], [9]]
    policies = ["fixed(depth=3)", "phase3", "cost_aware"]  # the last one reads from the device
    handles = [
        engine.submit(prompt, policy=policy, max_new_tokens=25, eos_token_id=[])
        for prompt, policy in zip(prompts, policies, strict=True)
    ]
    while engine.step():
        pass
    assert [handle.result().token_ids for handle in handles] == [reference(target, prompt, 25) for prompt in prompts]


@attrs.define
class Reader:
    """Asks the host."""

    is_capturable: ClassVar = True

    @hookimpl
    def should_expand(self, frontier: Frontier) -> bool:
        return bool(frontier.cum_logprob.exp().sum() >= 0.5)


@attrs.define
class Picker:
    """Asks the host how many nodes it means."""

    is_capturable: ClassVar = True

    @hookimpl
    def branch_factor(self, frontier: Frontier) -> Tensor:
        widths = torch.ones_like(frontier.token_ids)
        widths[frontier.confidence > 0.5] = 2
        return widths


@pytest.fixture
def _unshrunk(monkeypatch):
    """The first counterexample is enough."""

    def quick(max_examples: int) -> settings:
        return settings(without_database(max_examples), phases=[Phase.generate])

    monkeypatch.setattr(conformance, "without_database", quick)


@pytest.mark.usefixtures("_unshrunk")
@pytest.mark.parametrize("policy", [Reader(), Picker()], ids=["a bool", "an index of bools"])
def test_the_kit_refuses_hooks_that_read_on_the_host(policy):
    with pytest.raises(PolicyError, match="must not read a tensor's numbers on the host"):
        POLICY_PROPERTIES["capturable"](policy, 20)


@pytest.mark.usefixtures("_unshrunk")
@pytest.mark.parametrize("policy", [LevelMean(), KeepsTheLast()], ids=["a level", "a tree"])
def test_the_kit_refuses_hooks_whose_answers_depend_on_padding(policy):
    with pytest.raises(AssertionError, match="must not depend on padding"):
        POLICY_PROPERTIES["capturable"](policy, 100)


@pytest.mark.parametrize("stack", STACKS)
def test_built_in_policies_bear_padding(stack):
    assert build_stack(stack).is_capturable
    POLICY_PROPERTIES["capturable"](stack, 10)


@pytest.mark.parametrize("stack", ["cost_aware", "best_first(min_gain=0.1)", "phase3+cost_aware"])
def test_policies_that_save_passes_by_reading_are_not_marked(stack):
    assert not build_stack(stack).is_capturable
