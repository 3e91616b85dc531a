"""Observers: what they are told is what happened, they change nothing, and without them nothing is paid."""

from __future__ import annotations

import math
import time

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from operations import counted

from dynatree_core import (
    CostModel,
    Engine,
    Observer,
    Outcome,
    Proposals,
    Session,
    StepFunction,
    generate,
    hookimpl,
    run,
)
from dynatree_core.clock import StageClock
from dynatree_core.drafters.base import Drafter, DraftState
from dynatree_core.engine.observer import Commit, Fault, Level, Prefill, Pruning, Verification
from dynatree_core.errors import DrafterError, ForwardPassError, NonFiniteLogitsError, ParameterError, PolicyError
from dynatree_core.policy.stack import Decision
from dynatree_core.testing import strategies as ours
from dynatree_core.testing.models import greedy, perturbed, tiny_model

TARGET, DRAFTER = tiny_model("llama"), perturbed("llama", noise=0.02)
PROMPT, LENGTH = [5, 6, 7, 5, 6], 14


class Recorder(Observer):
    """Keeps every record."""

    wants_logits = True

    def __init__(self) -> None:
        self.records: list[object] = []

    def of(self, kind: type) -> list:
        return [record for record in self.records if isinstance(record, kind)]

    def on_prefill(self, prefill: Prefill) -> None:
        self.records.append(prefill)

    def on_level(self, level: Level) -> None:
        self.records.append(level)

    def on_prune(self, pruning: Pruning) -> None:
        self.records.append(pruning)

    def on_verify(self, verification: Verification) -> None:
        self.records.append(verification)

    def on_commit(self, commit: Commit) -> None:
        self.records.append(commit)

    def on_fault(self, fault: Fault) -> None:
        self.records.append(fault)


def recorded(policy: object, drafter: object = DRAFTER, **options: object) -> Recorder:
    """What was told of a generation, whose output is the target's own."""
    recorder = Recorder()
    options = {"max_new_tokens": LENGTH, "tau": 0.0, "observer": recorder, **options}
    result = generate(TARGET, drafter, PROMPT, policy=policy, **options)
    assert result.token_ids == greedy(TARGET, PROMPT, options["max_new_tokens"])
    return recorder


# no observer, no cost

# operations of torch and transfers to the host outside the models' passes, counted before there were observers. Since
# then greedy decoding on a CPU has NumPy look at the logits, which counts as a transfer an iteration, though nothing is
# moved; what a GPU waits for is counted in test_device_work.py
COUNTS = {
    "phase3": (4878, 75),
    "fixed": (4571, 81),
    "cost_aware": (7724, 255),
    "best_first": (5850, 107),
    "autoregressive": (2730, 78),
    "phase3, sampling": (7568, 178),
    "fixed, fixed_width": (6059, 111),
}
ROWS = tuple(range(1, 200))
COSTS = CostModel(StepFunction(ROWS, tuple(1.0 + 0.01 * row for row in range(199))), StepFunction((1,), (0.05,)), 0.0)


@pytest.mark.parametrize("case", COUNTS)
def test_without_observers_no_operation_is_added(case):
    """With one neither, but what it does itself: a record is made of what is there."""
    policy, _, kind = case.partition(", ")
    options = {"": {}, "sampling": {"do_sample": True, "seed": 1}, "fixed_width": {"exact": "fixed_width"}}[kind]
    drafter = None if policy == "autoregressive" else DRAFTER

    def operations(observer: Observer | None) -> tuple[int, int]:
        asked = {
            "policy": policy,
            "max_new_tokens": 40,
            "runner": "eager",
            "trust_model": True,
            "costs": COSTS,
            **options,
        }
        steps = run(Session(TARGET, drafter, PROMPT, observer=observer, **asked))
        next(steps)  # buffers are made
        with counted(TARGET, DRAFTER) as counts:
            for _ in steps:
                pass
        return counts.operations, counts.transfers

    operations(None)  # tables of costs are made, once for all generations
    found = operations(None)
    assert found[0] <= COUNTS[case][0]
    assert found[1] <= COUNTS[case][1]
    assert operations(Recorder()) == found


# what is told


def naive_outcome(level: Level, tau: float, row: int, rank: int) -> Outcome:
    """What becomes of one proposed child; OVER_BUDGET where only the budget can refuse it."""
    logprob, expand = level.proposals.logprobs[row, rank], level.expand.value
    if logprob == -math.inf:
        return Outcome.NO_TOKEN
    if expand is False or (isinstance(expand, torch.Tensor) and not expand[row]):
        return Outcome.NOT_EXPANDED
    wanted = level.branch.value
    if rank >= (wanted if isinstance(wanted, int) else wanted[row]):
        return Outcome.BEYOND_WIDTH
    if tau > 0 and path_logprob(level, row, rank) < math.log(tau):
        return Outcome.BELOW_TAU
    return Outcome.OVER_BUDGET


def path_logprob(level: Level, row: int, rank: int) -> torch.Tensor:
    """[] float32 of a proposed child."""
    return level.tree.cum_logprob[level.tree.last_level.start + row] + level.proposals.logprobs[row, rank]


def check_level(level: Level, tau: float) -> None:
    assert (level.end is None) == (level.grown is not None)
    assert (level.expand is None) == (level.end in ("depth", "nodes"))
    assert (level.branch is None) == (level.end in ("depth", "nodes", "expand"))
    assert (level.outcomes is None) == (level.proposals is None)
    if level.proposals is None:
        return
    admitted, left = [], []
    for row, outcomes in enumerate(level.outcomes.tolist()):
        for rank, outcome in enumerate(outcomes):
            if outcome in (Outcome.ADMITTED, Outcome.OVER_BUDGET):
                assert naive_outcome(level, tau, row, rank) == Outcome.OVER_BUDGET
                (admitted if outcome == Outcome.ADMITTED else left).append((row, rank))
            else:
                assert naive_outcome(level, tau, row, rank) == outcome
    assert not left or len(admitted) == level.nodes_left
    scores, others = ([float(path_logprob(level, *child)) for child in some] for some in (admitted, left))
    assert not left or min(scores) >= max(others)
    children = [
        (level.tree.last_level.start + row, int(level.proposals.token_ids[row, rank])) for row, rank in admitted
    ]
    if level.grown is None:
        assert children == []
    else:
        last = level.grown.last_level
        assert level.grown.level_sizes[:-1] == level.tree.level_sizes
        assert children == list(
            zip(level.grown.parent[last].tolist(), level.grown.token_ids[last].tolist(), strict=True)
        )


@given(
    st.data(),
    st.sampled_from(["llama", "gpt2"]),
    ours.prompts,
    st.one_of(ours.stacks(), ours.stacks().flatmap(ours.compositions)),
    ours.limits,
)
def test_what_is_told_is_what_happened(data, family, prompt, policy, limits):
    """Over random models, drafters, policies and limits; and the tokens are those without an observer."""
    target, recorder = tiny_model(family), Recorder()
    drafter = data.draw(ours.drafters(family, 0))
    session = Session(target, drafter, prompt, policy=policy, max_new_tokens=12, observer=recorder, **limits)
    reports = list(run(session))
    assert session.new_token_ids == greedy(target, prompt, 12)
    begin, end, *told = recorder.records
    assert (begin.seconds, end.token_ids, end.num_prompt_tokens) == (None, tuple(prompt), len(prompt))
    assert (end.policy, end.limits, end.drafter) == (str(session.stack), session.limits, session.drafter_name)
    for number, report in enumerate(reports):
        levels = []
        while isinstance(told[0], Level):
            levels.append(told.pop(0))
        pruning, verification, commit, *told = told
        assert {one.iteration for one in (*levels, pruning, verification, commit.report)} == {number}
        for level, after in zip(levels, [*levels[1:], None], strict=True):
            check_level(level, session.limits.tau)
            assert level.grown is (after and after.tree)  # every level is told, the last one ends the tree
        assert pruning.drafted is levels[-1].tree
        assert pruning.kept is verification.tree is report.tree
        wanted = torch.ones(pruning.drafted.num_nodes, dtype=torch.bool)
        for vote in pruning.keep.votes.values():
            wanted &= wanted if vote is None else vote
        kept = pruning.drafted.close_under_ancestors(wanted).nonzero().flatten()
        assert pruning.kept.draft_index.tolist() == kept.tolist()
        assert verification.verdict is report.verdict is commit.report.verdict
        chosen_at = [0, *report.verdict.path][: len(report.token_ids)]
        assert verification.logits[chosen_at].float().argmax(dim=1).tolist() == list(report.token_ids)
    assert told == []


def opinion(name: str, *, expand: object = None, branch: object = None, keep: object = None) -> object:
    """A policy of that name with these answers."""

    class Opinion:
        @hookimpl
        def should_expand(self, frontier):
            return expand

        @hookimpl
        def branch_factor(self, frontier):
            return branch

        @hookimpl
        def keep_nodes(self, tree):
            return keep

    policy = Opinion()
    policy.name = name
    return policy


def test_votes_have_names():
    keep = torch.tensor([True, False])
    stack = [
        opinion("one", expand=True, branch=2, keep=keep),
        opinion("two", branch=1),
        opinion("three", expand=torch.tensor([True])),
    ]
    recorder = recorded(stack, max_depth=1, max_new_tokens=3)
    level, pruning = recorder.of(Level)[0], recorder.of(Pruning)[0]
    assert list(level.expand.votes) == ["one", "two", "three"]
    assert (level.expand.votes["one"], level.expand.votes["two"], level.expand.decider) == (True, None, "three")
    assert level.expand.value.tolist() == level.expand.votes["three"].tolist() == [True]
    # the rightmost is asked first; who stands behind the one that decided is not asked
    assert (level.branch.value, list(level.branch.votes.items())) == (1, [("three", None), ("two", 1)])
    assert level.branch.decider == "two"
    assert pruning.keep.votes["one"] is keep
    assert (pruning.keep.votes["three"], pruning.keep.decider) == (None, "one")
    assert (pruning.drafted.level_sizes, pruning.kept.level_sizes) == ((1, 1), (1,))
    nobody = recorded(opinion("silent"), max_depth=1).of(Level)[0].branch
    assert (nobody.value, nobody.decider) == (1, None)


def test_a_decision_is_no_condition():
    with pytest.raises(TypeError, match="look at its `value`"):
        bool(Decision(False, {}))


@pytest.mark.parametrize(
    ("policy", "options", "end"),
    [
        (opinion("some", branch=1), {"max_depth": 2}, "depth"),
        (opinion("some", branch=2), {"max_nodes": 2}, "nodes"),
        (opinion("no", expand=False), {}, "expand"),
        (opinion("none", branch=0), {}, "width"),
        (opinion("some", branch=torch.tensor([0])), {}, "refused"),
        (opinion("some", branch=1), {"tau": 1.0}, "refused"),
        (opinion("some", branch=1), {"drafter": None}, "depth"),
    ],
)
def test_it_is_told_why_a_tree_ends(policy, options, end):
    levels = recorded(policy, **options).of(Level)
    assert end in {level.end for level in levels}
    for level in levels:
        check_level(level, options.get("tau", 0.0))


class Fails(Drafter):
    """Proposes one child, and raises when it is asked for another level."""

    def __str__(self) -> str:
        return "fails"

    def start(self, plan: object) -> DraftState:
        class State(DraftState):
            prefill = commit = rollback = lambda *_: None

            def propose(self, committed_ids, tree, k):
                if tree.max_depth:
                    raise OSError("gone")
                logprobs = torch.full((1, k), -torch.inf)
                logprobs[0, 0] = 0.0
                return Proposals(torch.zeros(1, k, dtype=torch.int64), logprobs)

        return State()


def test_faults_are_told(monkeypatch):
    recorder = Recorder()
    asked = {"policy": "fixed", "max_new_tokens": 6, "observer": recorder}
    with pytest.warns(RuntimeWarning, match="drafting is off"):
        generate(TARGET, Fails(), PROMPT, on_error="fallback", **asked)
    (fault,) = recorder.of(Fault)
    assert (fault.then, fault.iteration, type(fault.error)) == ("fallback", 0, DrafterError)
    with pytest.raises(DrafterError) as caught:
        generate(TARGET, Fails(), PROMPT, **asked)
    fault = recorder.of(Fault)[-1]
    assert (fault.then, fault.error, fault.error.partial.token_ids) == ("ended", caught.value, [])
    session = Session(TARGET, None, PROMPT, **asked)
    monkeypatch.setattr(session.target.runner.model, "forward", lambda **_: 1 / 0)
    with pytest.raises(ForwardPassError) as failed:
        list(run(session))
    assert recorder.of(Fault)[-1].error is failed.value


def test_a_step_that_is_done_again_without_a_draft_is_told(monkeypatch):
    recorder, strikes = Recorder(), iter([True])

    session = Session(TARGET, DRAFTER, PROMPT, policy="fixed", max_new_tokens=6, observer=recorder)
    forward = session.target.forward

    def overflowing(flat, *arguments, stage, **options):
        output = forward(flat, *arguments, stage=stage, **options)
        is_struck = stage == "verify" and next(strikes, False)
        return attrs.evolve(output, logits=output.logits * math.nan) if is_struck else output

    monkeypatch.setattr(session.target, "forward", overflowing)
    list(run(session))
    (fault,) = recorder.of(Fault)
    assert (fault.then, type(fault.error)) == ("root alone", NonFiniteLogitsError)
    assert session.new_token_ids == greedy(TARGET, PROMPT, 6)


# what observers do


@pytest.mark.parametrize("hook", ["on_prefill", "on_level", "on_prune", "on_verify", "on_commit"])
@pytest.mark.parametrize("kind", [PolicyError, DrafterError, NonFiniteLogitsError])
def test_an_observers_own_error_of_our_classes_is_nobody_elses_fault(hook, kind):
    """Though one of a policy or a drafter would be fallen back from, and one of logits repeated."""
    error = kind("mine")

    def struck(self, record):
        raise error

    observer = type("Struck", (Observer,), {hook: struck, "on_fault": lambda self, fault: pytest.fail("told of it")})()
    session = Session(TARGET, DRAFTER, PROMPT, max_new_tokens=LENGTH, on_error="fallback", observer=observer)
    with pytest.raises(kind) as caught:
        list(run(session))
    assert caught.value is error
    assert error.partial.token_ids == session.new_token_ids
    assert bool(session.new_token_ids) == (hook == "on_commit")
    session.observer = None
    list(run(session))
    assert session.new_token_ids == greedy(TARGET, PROMPT, LENGTH)


def test_what_an_observer_raises_that_is_told_of_a_fault_is_a_note_of_it():
    class Struck(Observer):
        def on_fault(self, fault: Fault) -> None:
            raise OSError("gone")

    with pytest.raises(DrafterError) as caught:
        generate(TARGET, Fails(), PROMPT, policy="fixed", on_error="raise", observer=Struck())
    assert caught.value.__notes__ == ["an observer that was told of it has failed: OSError: gone"]
    assert caught.value.partial.token_ids == []

    Struck.on_end = lambda self, end: 1 / 0
    engine = Engine(TARGET, Fails())
    handle = engine.submit(engine.request(PROMPT, policy="fixed", on_error="raise", observer=Struck()))
    engine.step()
    with pytest.raises(DrafterError) as caught:
        handle.result()
    assert [note.partition("failed: ")[2] for note in caught.value.__notes__] == [
        "OSError: gone", "ZeroDivisionError: division by zero"
    ]  # fmt: skip


def test_several_observers_and_logits_only_where_they_are_wanted():
    one, other = Recorder(), Recorder()
    Session(TARGET, DRAFTER, PROMPT, observer=[])
    recorded("fixed", observer=[one, other])
    assert one.records == other.records
    one.wants_logits = False
    one.records.clear()
    recorded("fixed", observer=one)
    assert {verification.logits for verification in one.of(Verification)} == {None}


@pytest.mark.parametrize("drafter", [DRAFTER, "prompt_lookup", None])
def test_times(drafter):
    """By stage; what observers take counts nowhere."""
    slept = 0.0

    class Slow(Recorder):
        def on_level(self, level: Level) -> None:
            nonlocal slept
            begin = time.perf_counter()
            time.sleep(0.01)
            slept += time.perf_counter() - begin

    slow, begin = Slow(), time.perf_counter()
    session = Session(TARGET, drafter, PROMPT, max_new_tokens=LENGTH, observer=slow)
    list(run(session))
    report = session.result().report
    assert report.decode_seconds + slept < time.perf_counter() - begin
    commits = slow.of(Commit)
    assert sum(commit.seconds["verify"] for commit in commits) == pytest.approx(report.verify_seconds)
    assert sum(commit.seconds.get("draft", 0.0) for commit in commits) == pytest.approx(report.draft_seconds)
    assert all(commit.report.seconds >= commit.seconds["verify"] for commit in commits)
    assert slow.of(Prefill)[1].seconds["prefill"] == pytest.approx(report.prefill_seconds)


def test_laps():
    now = iter([1.0, 3.0, 3.0, 4.0, 4.0, 4.5])
    clock = StageClock(torch.device("cpu"), now=lambda: next(now))
    for name in ("draft", "verify"):
        with clock.measure(name):
            pass
    assert clock.lap() == {"draft": 2.0, "verify": 1.0}
    with clock.measure("verify"):
        pass
    assert clock.lap() == {"verify": 0.5}
    assert (clock.lap(), clock.seconds("verify")) == ({}, 1.5)


def test_what_is_left_out_is_so_by_the_clock_that_was_given():
    now = iter([1.0, 2.0, 3.0, 5.0, 7.0, 9.0])
    clock = StageClock(torch.device("cpu"), now=lambda: next(now))
    with clock.measure("draft"), clock.leave_out(), clock.leave_out():
        pass
    assert clock.seconds("draft") == 3.0, "from 1 to 9 without 2 to 7, which is left out once"


@pytest.mark.parametrize("observer", [print, "trace", [Recorder(), None], Recorder])
def test_what_is_no_observer_is_refused(observer):
    with pytest.raises(ParameterError, match=r"observer must be an Observer or a list of them, got .*; derive from"):
        generate(TARGET, DRAFTER, PROMPT, observer=observer)


def test_a_method_that_nobody_would_call_is_refused():
    class Misspelt(Observer):
        def on_levels(self, level: Level) -> None: ...

    with pytest.raises(ParameterError, match=r"got Misspelt.on_levels \(did you mean 'on_level'\?\)"):
        generate(TARGET, DRAFTER, PROMPT, observer=Misspelt())
