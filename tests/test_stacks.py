"""A stack that was built is a value: handed on, copied and pickled, and no generation changes it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import attrs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynatree_core import PluginSpec, Session, build_stack, count, generate, hf, hookimpl, parse_stack, run
from dynatree_core.errors import DrafterError, ParameterError, StackSyntaxError
from dynatree_core.policy.stack import PolicyStack
from dynatree_core.testing import strategies as ours
from dynatree_core.testing.models import perturbed, tiny_model

PROMPT = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
TIMED = ("cost_aware", "governor", "sequoia")  # what they draft depends on measured seconds
COPIES: dict[str, Callable[[PolicyStack], PolicyStack]] = {
    "itself": lambda stack: stack,
    "built again": build_stack,
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda stack: pickle.loads(pickle.dumps(stack)),
}


@attrs.define
class Counting:
    """One child more in each iteration: what it drafts tells how often it was told of one before."""

    first: int = count(1)
    num_told: int = attrs.field(default=0, init=False)

    @hookimpl
    def branch_factor(self, frontier):
        return min(self.first + self.num_told, 4)

    @hookimpl
    def should_expand(self, frontier):
        return frontier.depth < 2

    @hookimpl
    def on_iteration_end(self, report):
        self.num_told += 1


def steps(policy):
    """What a generation has drafted and committed, step by step."""
    result = generate(tiny_model("llama"), perturbed("llama"), PROMPT, policy=policy, max_new_tokens=12)
    return result.token_ids, result.report.policy, result.report.steps


def parameters(stack):
    return {name: repr(policy) for name, policy in stack.policies.items()}


@pytest.mark.parametrize("way", COPIES)
@settings(max_examples=8)
@given(text=ours.stacks().filter(lambda text: not any(name in text for name in TIMED)), num_before=st.integers(0, 2))
def test_a_stack_drafts_as_its_text_does_however_often_it_was_used(way, text, num_before):
    stack = build_stack([text, Counting()])
    before = parameters(stack)
    expected = steps([text, Counting()])
    for _ in range(num_before):
        steps(stack)
    handed = COPIES[way](stack)
    assert steps(handed) == expected
    assert parameters(stack) == parameters(handed) == before
    assert str(handed) == str(stack) == f"{build_stack(text)}+counting(first=1)"


def test_every_door_takes_a_stack():
    target, stack = tiny_model("llama"), build_stack(["phase1", Counting()])
    expected = target.generate(PROMPT, attention_mask=torch.ones_like(PROMPT), do_sample=False, max_new_tokens=12)
    asked = {"attention_mask": torch.ones_like(PROMPT), "max_new_tokens": 12, "policy": stack, "drafter": target}
    session = Session(target, target, PROMPT, policy=stack, max_new_tokens=12)
    assert [report.token_ids for report in run(session)]
    assert torch.equal(session.text, expected)
    assert torch.equal(target.generate(PROMPT, custom_generate=hf.generate, **asked), expected)
    assert torch.equal(hf.generate_with(target, PROMPT, **asked), expected)
    assert stack.find("counting").num_told == 0
    assert session.stack.find("counting").num_told == session.num_iterations > 0
    assert session.stack.find("counting") is not stack.find("counting")


def test_what_a_stack_is_copied_with():
    stack = build_stack([Counting(), "confidence+dynamic_depth"])
    stack.find("counting").num_told = 2
    for way in ("built again", "deepcopy", "pickle"):
        mine = COPIES[way](stack)
        assert mine.find("counting").num_told == 2
        mine.find("counting").num_told = 9
        assert mine.callers.keys() == stack.callers.keys()
    assert stack.find("counting").num_told == 2
    shallow = copy.copy(stack)
    assert shallow.find("counting") is stack.find("counting")
    assert shallow.policies is not stack.policies


def test_a_stack_whose_parameters_were_set_says_them():
    stack = build_stack("linear(depth=3)")
    assert steps(stack)[1] == "linear(depth=3)"
    stack.find("linear").depth = 2
    for copied in map(COPIES.get, ("built again", "copy", "deepcopy", "pickle")):
        assert str(copied(stack)) == "linear(depth=2,tau=0.0)"
    assert steps(stack) == steps("linear(depth=2,tau=0.0)")


def test_stacks_beside_other_policies():
    stack = build_stack([build_stack("phase1"), Counting(), PluginSpec("history")])
    assert str(stack) == "phase1+counting(first=1)+history"
    assert list(stack.policies) == ["fixed", "confidence", "counting", "history"]
    assert str(build_stack(parse_stack("fixed(depth=2)+history"))) == "fixed(depth=2)+history"
    with pytest.raises(StackSyntaxError, match="'fixed' twice"):
        build_stack([stack, "fixed"])


def test_a_stack_that_cannot_be_handed_on_says_why():
    class Locked:
        def __init__(self):
            self.held = (one for one in ())  # a generator has no copy

        @hookimpl
        def should_expand(self, frontier):
            return False

    stack = PolicyStack({"locked": Locked()}, "locked")
    for use in (copy.deepcopy, build_stack, steps):
        with pytest.raises(ParameterError, match="policy 'locked' must be copyable"):
            use(stack)


def test_a_stack_that_an_error_has_emptied_is_refused():
    session = Session(tiny_model("llama"), perturbed("llama"), PROMPT, policy="phase3", on_error="fallback")
    with pytest.warns(RuntimeWarning, match="drafting is off"):
        session.fall_back(DrafterError("drafter 'x' raised one"))
    with pytest.raises(StackSyntaxError, match="'phase3' from which an error has taken them; build another one"):
        build_stack(session.stack)
    assert list(build_stack(str(session.stack)).policies) == ["confidence", "dynamic_depth", "history"]
