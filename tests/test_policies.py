"""Each published rule decides as SPEC says at its thresholds and around them."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dynatree_core import Frontier, Proposals, StepReport, TokenTree, Verdict, build_stack
from dynatree_core.errors import ParameterError
from dynatree_core.plugins.registry import plugin_variants
from dynatree_policies.confidence import Confidence
from dynatree_policies.dynamic_depth import DynamicDepth
from dynatree_policies.history import History

BELOW, ABOVE = -1e-4, 1e-4


def frontier(confidences: list[float], *, depth: int = 1, cum: list[float] | None = None) -> Frontier:
    """A level of nodes with the given top-1 probabilities, and path probabilities where they matter."""
    tree = TokenTree.root(torch.tensor([0]))
    for _ in range(depth - 1):
        tree = tree.grow(torch.tensor([tree.num_nodes - 1]), torch.tensor([1]), torch.tensor([0.0]))
    width = len(confidences)
    if depth:
        probs = torch.tensor(cum or [0.5] * width)
        tree = tree.grow(torch.full((width,), tree.num_nodes - 1), torch.arange(width), probs.log())
    top = torch.tensor(confidences)
    logprobs = torch.stack([top, (1 - top) / 2, (1 - top) / 4, (1 - top) / 8], dim=1).log()
    proposals = Proposals(torch.arange(4).repeat(width, 1), logprobs)
    return Frontier(tree, 0, 128, 4, lambda: proposals)


def level_with(**fields: object) -> Any:
    """Just the fields of a frontier that a rule looks at, so that they can be exactly at a threshold."""
    return SimpleNamespace(**fields)


def report(accepted: int, depth: int, iteration: int = 0) -> StepReport:
    """The outcome of a chain of that depth of which so many nodes were accepted."""
    tree = TokenTree.root(torch.tensor([0]))
    for _ in range(depth):
        tree = tree.grow(torch.tensor([tree.num_nodes - 1]), torch.tensor([1]), torch.tensor([0.0]))
    path = tuple(range(1, accepted + 1))
    return StepReport(iteration, tree, Verdict(path, path, (1,) * (accepted + 1)))


@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        (None, {0.9 + ABOVE: 1, 0.9: 2, 0.9 + BELOW: 2, 0.4 + ABOVE: 2, 0.4: 2, 0.4 + BELOW: 3, 1.0: 1, 0.01: 3}),
        ("plan", {0.8 + ABOVE: 1, 0.8: 2, 0.8 + BELOW: 2, 0.3 + ABOVE: 2, 0.3: 2, 0.3 + BELOW: 4, 1.0: 1, 0.01: 4}),
    ],
)
def test_confidence(variant, expected):
    policy = build_stack(f"confidence:{variant}" if variant else "confidence").find("confidence")
    signal = torch.tensor(list(expected), dtype=torch.float64)
    level = level_with(confidence=signal, token_ids=torch.arange(len(expected)))
    assert policy.branch_factor(level).tolist() == list(expected.values())


@pytest.mark.parametrize(
    ("depth", "expected"),
    [
        (0, {0.1 + BELOW: False, 0.1: True, 0.5: True}),
        (4, {0.1 + BELOW: False, 0.1: True, 0.95: True, 0.99: True}),
        (5, {0.1: False, 0.5: False, 0.95: False, 0.95 + ABOVE: True}),
        (7, {0.95: False, 0.95 + ABOVE: True}),
    ],
)
def test_dynamic_depth_by_confidence(depth, expected):
    policy = DynamicDepth()
    for confidence, is_expanded in expected.items():
        level = level_with(depth=depth, confidence=torch.tensor([confidence], dtype=torch.float64))
        assert policy.should_expand(level).tolist() == [is_expanded], confidence


@pytest.mark.parametrize(
    ("depth", "expected"),
    [
        (1, {0.1 + BELOW: False, 0.1 + ABOVE: True, 0.5: True}),
        (3, {0.1 + BELOW: False, 0.1 + ABOVE: True}),
        (4, {0.5: False, 0.7 + BELOW: False, 0.7 + ABOVE: True}),
        (7, {0.7 + BELOW: False, 0.7 + ABOVE: True}),
    ],
)
def test_dynamic_depth_by_path_probability(depth, expected):
    policy = build_stack("dynamic_depth:plan").find("dynamic_depth")
    assert (policy.base_depth, policy.max_depth) == (4, 8)
    level = frontier([0.01] * len(expected), depth=depth, cum=list(expected))  # confidence must not matter
    assert policy.should_expand(level).tolist() == list(expected.values())


@pytest.mark.parametrize("signal", ["confidence", "cumulative"])
def test_dynamic_depth_ends_at_max_depth_without_looking(signal):
    def fail() -> Proposals:
        raise AssertionError("the drafter was asked")

    level = frontier([1.0], depth=8)
    level = Frontier(level.tree, 0, 128, 4, fail)
    assert DynamicDepth(signal=signal).should_expand(level) is False


def test_linear_and_fixed():
    linear, fixed = (build_stack(name).find(name) for name in ("linear", "fixed"))
    for depth in range(8):
        level = frontier([0.5], depth=depth)
        assert linear.should_expand(level) is (depth < 6)
        assert fixed.should_expand(level) is (depth < 5)
        assert (linear.branch_factor(level), fixed.branch_factor(level)) == (1, 2)
    assert (fixed.tau, fixed.max_nodes) == (0.05, 128)
    assert linear.tau == 0.0  # a chain is drafted to its end


def history_beside_it(text: str) -> tuple[History, Confidence, DynamicDepth, object]:
    stack = build_stack(f"confidence+dynamic_depth+{text}")
    return stack.find("history"), stack.find("confidence"), stack.find("dynamic_depth"), stack


def test_history_step_low_acceptance_explores_more():
    """More branches: `high` rises, so fewer nodes are confident enough for the smallest width."""
    history, confidence, dynamic_depth, stack = history_beside_it("history")
    history.on_iteration_end(report(1, 5), stack)
    assert confidence.high == pytest.approx(0.91)
    level = frontier([0.905])
    assert confidence.branch_factor(level).tolist() == [2]
    assert Confidence().branch_factor(level).tolist() == [1]
    assert dynamic_depth == DynamicDepth()  # the step rule moves one threshold


def test_history_step_high_acceptance_wastes_less():
    history, confidence, _, stack = history_beside_it("history")
    history.on_iteration_end(report(5, 5), stack)
    assert confidence.high == pytest.approx(0.89)


def test_history_step_at_the_target_and_at_the_bounds():
    history, confidence, _, stack = history_beside_it("history(target_accept_rate=0.8)")
    history.on_iteration_end(report(4, 5), stack)
    assert confidence.high == 0.9
    for _ in range(100):
        history.on_iteration_end(report(5, 5), stack)
    assert confidence.high == 0.5
    for _ in range(100):
        history.on_iteration_end(report(0, 5), stack)
    assert confidence.high == 0.95


def test_history_step_averages_over_its_window():
    history, confidence, _, stack = history_beside_it("history(history_window=2)")
    history.on_iteration_end(report(0, 5), stack)
    history.on_iteration_end(report(5, 5), stack)  # average 0.5: still too low
    assert confidence.high == pytest.approx(0.92)
    history.on_iteration_end(report(5, 5), stack)  # the 0 has left the window
    assert confidence.high == pytest.approx(0.91)


def test_history_ignores_iterations_without_a_tree():
    history, confidence, _, stack = history_beside_it("history")
    history.on_iteration_end(report(0, 0), stack)
    assert confidence.high == 0.9
    assert not history.recent


def test_history_window_waits_for_five():
    history, confidence, dynamic_depth, stack = history_beside_it("history:plan")
    for _ in range(4):
        history.on_iteration_end(report(5, 5), stack)
    assert (confidence.high, dynamic_depth.base_depth) == (0.9, 5)
    history.on_iteration_end(report(5, 5), stack)
    assert (confidence.high, dynamic_depth.base_depth) == (pytest.approx(0.85), 6)


@pytest.mark.parametrize(
    ("accepted", "high", "base_depth"),
    [(6, 0.9, 5), (7, 0.9, 5), (8, 0.9, 5), (9, 0.85, 6), (5, 0.95, 4)],
)
def test_history_window_around_its_margins(accepted, high, base_depth):
    """Averages of 0.6 and 0.8 are on the margin of 0.7 ± 0.1, and nothing moves there."""
    history, confidence, dynamic_depth, stack = history_beside_it("history:plan(margin=0.1000001)")
    for _ in range(5):
        history.on_iteration_end(report(accepted, 10), stack)
    assert (confidence.high, dynamic_depth.base_depth) == (pytest.approx(high), base_depth)


def test_history_window_bounds():
    history, confidence, dynamic_depth, stack = history_beside_it("history:plan")
    for _ in range(40):
        history.on_iteration_end(report(5, 5), stack)
    assert (confidence.high, dynamic_depth.base_depth) == (0.5, 10)
    for _ in range(40):
        history.on_iteration_end(report(0, 5), stack)
    assert (confidence.high, dynamic_depth.base_depth) == (0.95, 2)


def test_history_never_moves_a_parameter_the_wrong_way():
    """A threshold that was set beyond the published bound stays there, rather than being pulled back to it."""
    stack = build_stack("confidence(high=0.99)+dynamic_depth(base_depth=12,max_depth=20)+history:plan")
    for _ in range(5):
        stack.on_iteration_end(report(0, 5))
    assert stack.find("confidence").high == 0.99
    assert stack.find("dynamic_depth").base_depth == 11
    for _ in range(20):
        stack.on_iteration_end(report(5, 5))
    assert stack.find("confidence").high < 0.9


def test_history_alone_changes_nothing():
    stack = build_stack("history")
    for _ in range(12):
        stack.on_iteration_end(report(0, 5))


def test_presets_are_the_published_phases():
    phase1, phase2, phase3 = (list(build_stack(f"phase{n}").policies) for n in (1, 2, 3))
    assert phase1 == ["fixed", "confidence"]
    assert phase2 == ["confidence", "dynamic_depth"]
    assert phase3 == ["confidence", "dynamic_depth", "history"]
    assert build_stack("phase1").find("fixed").depth == 5
    plan = build_stack("phase3:plan")
    assert plan.find("confidence") == Confidence(high=0.8, low=0.3, min_branch=1, default_branch=2, max_branch=4)
    assert plan.find("dynamic_depth") == DynamicDepth(
        signal="cumulative", stop_threshold=0.1, extend_threshold=0.7, base_depth=4, max_depth=8
    )
    assert plan.find("history") == History(rule="window", target_accept_rate=0.7, history_window=10)
    assert plugin_variants(History)["plan"]["rule"] == "window"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fixed(branch=0)", "'branch' must be an integer of at least 1, got 0"),
        ("fixed(depth=2.5)", "'depth' must be an integer of at least 1, got 2.5"),
        ("fixed(depth=True)", "got True"),
        ("fixed(tau='x')", "'tau' must be a number from 0 to 1, got 'x'"),
        ("confidence(high=1.5)", "'high' must be a number from 0 to 1, got 1.5"),
        ("confidence(high=None)", "got None"),
        ("dynamic_depth(signal='entropy')", "'signal' must be one of 'confidence', 'cumulative', got 'entropy'"),
        ("history(rule='steps')", "'rule' must be one of"),
    ],
)
def test_parameters_of_wrong_type_or_range(text, message):
    with pytest.raises(ParameterError) as caught:
        build_stack(text)
    assert message in str(caught.value)


def test_nan_is_not_a_fraction():
    with pytest.raises(ParameterError, match="a number from 0 to 1, got nan"):
        Confidence(high=math.nan)
