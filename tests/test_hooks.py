"""Hooks: how answers combine, and what happens to a policy that breaks its contract."""

from __future__ import annotations

import gc
import warnings
import weakref

import attrs
import pytest
import torch

from dynatree_core import Frontier, StepReport, TokenTree, build_stack, count, generate, hookimpl
from dynatree_core.errors import DrafterError, PolicyError
from dynatree_core.policy.registration import hook_names, implemented_hooks
from dynatree_core.policy.stack import PolicyStack
from dynatree_core.testing.models import greedy, perturbed, tiny_model

TARGET, DRAFTER, PROMPT = tiny_model("llama"), perturbed("llama"), [1, 2, 3]


def policy(**hooks):
    """A policy object whose hooks are the given functions of their first argument."""
    members = {name: hookimpl(function) for name, function in hooks.items()}
    return type("Policy", (), members)()


def trees_of(stack, **options):
    """The trees that a generation verified, having checked that its output is the target's."""
    trees = []

    class Recorder:
        name = "recorder"

        @hookimpl
        def on_iteration_end(self, report: StepReport) -> None:
            trees.append(report.tree)

    result = generate(TARGET, DRAFTER, PROMPT, policy=[*stack, Recorder()], max_new_tokens=12, tau=0.0, **options)
    assert result.token_ids == greedy(TARGET, PROMPT, 12)
    return trees


def test_hook_branch_factor():
    def by_depth(self, frontier):
        return torch.full((frontier.width,), 3) if frontier.depth == 0 else 1

    trees = trees_of([policy(branch_factor=by_depth), "linear(depth=3)"][:1], max_depth=3)
    assert trees[0].level_sizes == (1, 3, 3, 3)


def test_hook_branch_factor_rightmost_wins():
    two = attrs.make_class("Two", {}, class_body={"branch_factor": hookimpl(lambda self, frontier: 2)})()
    three = attrs.make_class("Three", {}, class_body={"branch_factor": hookimpl(lambda self, frontier: 3)})()
    silent = attrs.make_class("Silent", {}, class_body={"branch_factor": hookimpl(lambda self, frontier: None)})()
    assert trees_of([two, three], max_depth=1)[0].level_sizes == (1, 3)
    assert trees_of([three, two, silent], max_depth=1)[0].level_sizes == (1, 2)
    assert trees_of([silent], max_depth=3)[0].level_sizes == (1, 1, 1, 1)  # nobody answers: one child


def test_marked_hooks_are_asked_first_or_last():
    asked = []

    def noting(name, **mark):
        def expand(self, frontier):
            asked.append(name)
            return True

        def branch(self, frontier):
            asked.append(name)

        members = {"should_expand": hookimpl(expand, **mark), "branch_factor": hookimpl(branch, **mark), "name": name}
        return type(name, (), members)()

    stack = build_stack([noting("late", trylast=True), noting("a"), noting("b"), noting("early", tryfirst=True)])
    level = Frontier(TokenTree.root(torch.tensor([0])), 0, 9, 4, lambda: None)
    stack.should_expand(level)
    assert asked == ["early", "a", "b", "late"]
    asked.clear()
    stack.branch_factor(level)
    assert asked == ["early", "b", "a", "late"]


def test_hook_should_expand():
    """AND of all answers; True and None do not object."""

    def even(self, frontier):
        return torch.arange(frontier.width) % 2 == 0

    def not_last(self, frontier):
        return torch.arange(frontier.width) < frontier.width - 1 if frontier.width > 1 else None

    class Even:
        branch_factor = hookimpl(lambda self, frontier: 3)
        should_expand = hookimpl(even)

    class NotLast:
        should_expand = hookimpl(not_last)

    class Willing:
        should_expand = hookimpl(lambda self, frontier: True)

    trees = trees_of([Even(), NotLast(), Willing()], max_depth=2)
    assert trees[0].level_sizes == (1, 3, 3)
    assert trees[0].parent.tolist() == [-1, 0, 0, 0, 1, 1, 1]  # nodes 1 and 3 are even, node 3 is last


def test_hook_should_expand_false_costs_no_drafter_pass():
    passes = []
    handle = DRAFTER.register_forward_pre_hook(lambda module, args, kwargs: passes.append(1), with_kwargs=True)
    try:
        generate(TARGET, DRAFTER, PROMPT, policy="fixed(depth=3)", max_new_tokens=1)
        assert not passes  # with one token left nothing is drafted, so nobody reads the prompt
        steps = generate(TARGET, DRAFTER, PROMPT, policy="linear(depth=3)", max_new_tokens=12).report.steps
        # a chain of 3 takes 3 passes, not 4; the first look reads the prompt, too
        assert len(passes) == sum(step.depth for step in steps)
    finally:
        handle.remove()


def test_hook_should_expand_a_plain_false_ends_the_level_wherever_it_stands():
    def num_passes(policy: str) -> int:
        passes = []
        handle = DRAFTER.register_forward_pre_hook(lambda module, args, kwargs: passes.append(1), with_kwargs=True)
        try:
            generate(TARGET, DRAFTER, PROMPT, policy=policy, max_new_tokens=30, tau=0.0)
        finally:
            handle.remove()
        return len(passes)

    assert num_passes("dynamic_depth:plan+fixed(depth=2,tau=0.0)") == num_passes(
        "fixed(depth=2,tau=0.0)+dynamic_depth:plan"
    )


def test_hook_keep_nodes():
    """Closed under ancestors, ANDed, and the root stays."""

    def drop_first_child(self, tree):
        keep = torch.ones(tree.num_nodes, dtype=torch.bool)
        keep[:2] = False
        return keep

    class DropFirst:
        branch_factor = hookimpl(lambda self, frontier: 2)
        keep_nodes = hookimpl(drop_first_child)

    trees = trees_of([DropFirst()], max_depth=2)
    assert trees[0].level_sizes == (1, 1, 2)  # child 1 and its two children are gone
    assert trees[0].draft_index.tolist() == [0, 2, 5, 6]

    class DropLast:
        keep_nodes = hookimpl(lambda self, tree: torch.arange(tree.num_nodes) < tree.num_nodes - 1)

    assert trees_of([DropFirst(), DropLast()], max_depth=2)[0].level_sizes == (1, 1, 1)

    class DropAll:
        keep_nodes = hookimpl(lambda self, tree: torch.zeros(tree.num_nodes, dtype=torch.bool))

    assert {tree.level_sizes for tree in trees_of([DropFirst(), DropAll()], max_depth=2)} == {(1,)}


def test_hook_on_iteration_end():
    """It sees what was committed, and what it changes holds for the rest of the session and no other."""
    reports = []

    class Widening:
        @hookimpl
        def on_iteration_end(self, report: StepReport, stack: PolicyStack) -> None:
            reports.append(report)
            stack.find("fixed").branch = 3
            assert stack.find("nobody") is None

    options = {"max_new_tokens": 8, "tau": 0.0, "max_depth": 1}
    result = generate(TARGET, DRAFTER, PROMPT, policy=["fixed", Widening()], **options)
    assert [token for report in reports for token in report.token_ids] == result.token_ids
    assert [report.iteration for report in reports] == list(range(len(reports)))
    assert reports[0].tree.level_sizes == (1, 2)
    assert reports[1].tree.level_sizes == (1, 3)
    reports.clear()
    generate(TARGET, DRAFTER, PROMPT, policy=["fixed", Widening()], **options)
    assert reports[0].tree.level_sizes == (1, 2)


def test_every_hook_is_listed():
    assert hook_names() == ["branch_factor", "should_expand", "keep_nodes", "on_iteration_end"]
    assert implemented_hooks(build_stack("fixed").find("fixed")) == ["branch_factor", "should_expand"]


def test_frontier_tells_what_policies_need():
    seen: list[Frontier] = []

    class Looking:
        branch_factor = hookimpl(lambda self, frontier: 2)

        @hookimpl
        def should_expand(self, frontier: Frontier) -> bool:
            seen.append(frontier)
            return frontier.depth < 2

    generate(TARGET, DRAFTER, PROMPT, policy=Looking(), max_new_tokens=8, tau=0.0, max_nodes=50, max_branch=5)
    root, level = seen[0], seen[1]
    assert (root.depth, root.width, root.nodes_left, root.max_branch, root.iteration) == (0, 1, 50, 5, 0)
    assert (level.depth, level.width, level.nodes_left) == (1, 2, 48)
    logits = DRAFTER(torch.tensor([PROMPT])).logits[0, -1].float()
    expected = logits.log_softmax(-1).topk(5)
    torch.testing.assert_close(root.top_logprobs[0], expected.values)
    assert root.top_token_ids[0].tolist() == expected.indices.tolist()
    torch.testing.assert_close(root.confidence, logits.softmax(-1).max()[None])
    probs = torch.cat([expected.values.exp(), 1 - expected.values.exp().sum(0, keepdim=True)])
    torch.testing.assert_close(root.entropy, -(probs * probs.log()).sum(0, keepdim=True), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(level.cum_logprob, expected.values[:2])
    torch.testing.assert_close(level.logprob, expected.values[:2])
    assert level.token_ids.tolist() == expected.indices[:2].tolist()
    assert isinstance(level.tree, TokenTree)


def raising(self, frontier):
    raise ZeroDivisionError("an honest mistake")


BAD_ANSWERS = [
    ("branch_factor", raising, "raised ZeroDivisionError: an honest mistake"),
    ("branch_factor", lambda self, frontier: torch.ones(frontier.width + 1, dtype=torch.int64), r"shape \[2\]"),
    ("branch_factor", lambda self, frontier: torch.ones(frontier.width), "got torch.float32"),
    ("branch_factor", lambda self, frontier: torch.full((frontier.width,), torch.nan), "got torch.float32"),
    ("branch_factor", lambda self, frontier: float("nan"), "got nan"),
    ("branch_factor", lambda self, frontier: True, "got True"),
    ("branch_factor", lambda self, frontier: "two", "got 'two'"),
    ("branch_factor", lambda self, frontier: -1, "from 0 to max_branch=16, got -1"),
    ("branch_factor", lambda self, frontier: 10**9, "from 0 to max_branch=16, got 1000000000"),
    ("branch_factor", lambda self, frontier: torch.full((frontier.width,), -2), "from 0 to max_branch=16"),
    ("branch_factor", lambda self, frontier: torch.full((frontier.width,), 17), "from 0 to max_branch=16"),
    ("should_expand", lambda self, frontier: 1, "got 1"),
    ("should_expand", lambda self, frontier: torch.ones(frontier.width), "torch.bool"),
    ("should_expand", lambda self, frontier: torch.ones(3, 2, dtype=torch.bool), r"shape \[3, 2\]"),
    ("should_expand", raising, "raised ZeroDivisionError"),
    ("keep_nodes", lambda self, tree: torch.ones(1, dtype=torch.bool), r"shape \[1\]"),
    ("keep_nodes", lambda self, tree: torch.arange(tree.num_nodes), "got torch.int64"),
    ("keep_nodes", lambda self, tree: [True], "got [True]"),
    ("on_iteration_end", lambda self, report: 1 / 0, "raised ZeroDivisionError"),
    ("on_iteration_end", lambda self, stack: setattr(stack.find("fixed"), "branch", 0), "'branch' must be an integer"),
]


@pytest.mark.parametrize(("hook", "answer", "message"), BAD_ANSWERS)
def test_a_bad_answer_names_policy_and_hook(hook, answer, message):
    stack = ["fixed", policy(**{hook: answer})]
    with pytest.raises(PolicyError) as caught:
        generate(TARGET, DRAFTER, PROMPT, policy=stack, max_new_tokens=12)
    text = str(caught.value)
    assert f"policy 'policy', hook {hook}" in text
    assert message.replace("\\", "") in text
    partial = caught.value.partial
    assert partial.stop_reason == "error"
    assert partial.token_ids == greedy(TARGET, PROMPT, 12)[: len(partial.token_ids)]
    assert bool(partial.token_ids) == (hook == "on_iteration_end")


@pytest.mark.parametrize(("hook", "answer", "message"), BAD_ANSWERS)
def test_fallback_finishes_with_the_exact_output(hook, answer, message):
    with pytest.warns(RuntimeWarning, match="drafting is off"):
        result = generate(
            TARGET, DRAFTER, PROMPT, policy=["fixed", policy(**{hook: answer})], max_new_tokens=12, on_error="fallback"
        )
    assert result.token_ids == greedy(TARGET, PROMPT, 12)
    assert sum(step.num_committed for step in result.report.steps) == 12


def test_a_policy_that_fails_late_keeps_what_was_committed():
    class Late:
        @hookimpl
        def branch_factor(self, frontier: Frontier) -> int:
            if frontier.iteration == 3:
                raise RuntimeError("late")
            return 2

    with pytest.raises(PolicyError) as caught:
        generate(TARGET, DRAFTER, PROMPT, policy=Late(), max_new_tokens=40, max_depth=2)
    assert caught.value.partial.report.num_iterations == 3
    assert caught.value.partial.token_ids == greedy(TARGET, PROMPT, 40)[: len(caught.value.partial.token_ids)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = generate(TARGET, DRAFTER, PROMPT, policy=Late(), max_new_tokens=40, max_depth=2, on_error="fallback")
    assert result.token_ids == greedy(TARGET, PROMPT, 40)


def test_a_drafter_that_fails_inside_a_policy_is_not_the_policys_fault(monkeypatch):
    def broken(self, committed_ids, tree, k):
        raise OSError("disk on fire")

    monkeypatch.setattr("dynatree_core.drafters.prompt_lookup.PromptLookupState.propose", broken)
    with pytest.raises(DrafterError, match="drafter 'prompt_lookup' raised OSError: disk on fire"):
        generate(TARGET, "prompt_lookup", PROMPT, policy="confidence", max_new_tokens=4)


def test_unusable_policies_are_refused_before_anything_runs():
    class Misspelt:
        @hookimpl
        def branch_facter(self, frontier):
            return 1

    class WrongArgument:
        @hookimpl
        def branch_factor(self, front):
            return 1

    class Defaulted:
        @hookimpl
        def branch_factor(self, frontier=None):
            return 1

    class NoHooks:
        def branch_factor(self, frontier):
            return 1

    class HalfMarked(FullyMarked):
        def should_expand(self, frontier):
            return frontier.depth < 2

    class Twice:
        @hookimpl
        def branch_factor(self, frontier):
            return 1

        @hookimpl(specname="branch_factor")
        def width(self, frontier):
            return 2

    class Unmade:
        width: int = count(3)

        @hookimpl
        def branch_factor(self, frontier):
            return self.width

    for bad, message in [
        (Misspelt(), "unknown hook 'branch_facter'.*did you mean 'branch_factor'"),
        (WrongArgument(), "front"),
        (Defaulted(), "no default values"),
        (NoHooks(), "a method branch_factor that is not marked.*put @hookimpl above it"),
        (HalfMarked(), "a method should_expand that is not marked"),
        (Twice(), "hook branch_factor: a policy implements a hook once, got 2 methods"),
        (Unmade(), "width must be parameters made by attrs.*put @attrs.define above the class"),
        (HookedClass, r"must be an instance, got the class HookedClass; write HookedClass\(\)"),
        (object(), "must implement at least one of branch_factor"),
    ]:
        with pytest.raises(PolicyError, match=message):
            generate(TARGET, DRAFTER, PROMPT, policy=bad, max_new_tokens=4)


def test_a_second_stack_looks_for_no_hooks_again(monkeypatch):
    build_stack("phase3:plan")
    monkeypatch.setattr("dynatree_core.policy.registration._checked_callers", pytest.fail)
    stack = build_stack("phase3:plan")
    assert stack.find("fixed") is None
    assert [name for name, _ in stack.callers["branch_factor"]]


def test_policies_of_one_class_answer_for_themselves():
    @attrs.define
    class Width:
        width: int

        @hookimpl
        def branch_factor(self, frontier):
            return self.width

    level = Frontier(TokenTree.root(torch.tensor([0])), 0, 9, 4, lambda: None)
    assert [build_stack(Width(width)).branch_factor(level).value for width in (1, 2, 3)] == [1, 2, 3]


def test_what_was_found_on_a_class_does_not_hide_what_came_later():
    level = Frontier(TokenTree.root(torch.tensor([0])), 0, 9, 4, lambda: None)

    class Plain:
        @hookimpl
        def branch_factor(self, frontier):
            return 1

    assert implemented_hooks(Plain()) == ["branch_factor"]
    own = Plain()
    own.should_expand = hookimpl(lambda frontier: False)
    assert implemented_hooks(own) == ["branch_factor", "should_expand"]
    other = Plain()
    other.branch_factor = hookimpl(lambda frontier: 2)
    assert PolicyStack({"other": other}, "other").branch_factor(level).value == 2
    unmarked = Plain()
    unmarked.keep_nodes = lambda tree: None
    with pytest.raises(PolicyError, match="a method keep_nodes that is not marked"):
        implemented_hooks(unmarked)
    Plain.branch_factor = hookimpl(lambda self, front: 3)
    with pytest.raises(PolicyError, match="front"):
        implemented_hooks(Plain())
    Plain.branch_factor = hookimpl(lambda self, frontier: 3, tryfirst=True)
    Plain.keep_nodes = hookimpl(lambda self, tree: None)
    assert implemented_hooks(Plain()) == ["branch_factor", "keep_nodes"]


def test_a_hook_in_a_slot_is_the_policys_own():
    class Slotted:
        __slots__ = ("width",)

        @hookimpl
        def should_expand(self, frontier):
            return True

    class WithSlot(Slotted):
        __slots__ = ("branch_factor",)

    assert implemented_hooks(WithSlot()) == ["should_expand"]
    marked = WithSlot()
    marked.branch_factor = hookimpl(lambda frontier: 2)
    assert implemented_hooks(marked) == ["branch_factor", "should_expand"]


def test_a_class_of_policies_can_go():
    bad = policy(branch_factor=lambda self, frontier: 1)
    build_stack(bad)
    build_stack(bad)
    kind = weakref.ref(type(bad))
    del bad
    gc.collect()
    assert kind() is None


class FullyMarked:
    """All its hooks are marked; one that overrides them has to be marked again."""

    @hookimpl
    def branch_factor(self, frontier):
        return 2

    @hookimpl
    def should_expand(self, frontier):
        return True


class HookedClass:
    """Given to a stack as the class itself, by mistake."""

    @hookimpl
    def branch_factor(self, frontier):
        return 1
