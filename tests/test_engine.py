"""The engine: one generation after another, with what earlier ones have left; and a sequence's own cost."""

from __future__ import annotations

import copy
import gc
import sys
import tracemalloc
from collections import Counter

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from dynatree_core import CostModel, Engine, Session, StepFunction, generate, run
from dynatree_core.engine.engine import ENGINE_OPTIONS
from dynatree_core.engine.sequence import Sequence
from dynatree_core.errors import ParameterError, PromptError
from dynatree_core.models import state as model_state
from dynatree_core.request.request import OPTION_NAMES, Options, Request
from dynatree_core.testing import strategies as ours
from dynatree_core.testing.models import greedy, perturbed, tiny_model
from dynatree_core.tree.token_tree import TokenTree
from dynatree_core.tree.verdict import StepReport, Verdict

PROMPT = [3, 1, 4, 1, 5]


def answer(engine: Engine, prompt: list[int], **options: object) -> list[int]:
    session = Session.on(engine, prompt, eos_token_id=[], **options)
    for _ in run(session):
        pass
    return session.result().token_ids


@given(
    st.lists(st.tuples(ours.prompts, st.integers(1, 30)), min_size=2, max_size=4), st.sampled_from(["phase3", "fixed"])
)
def test_each_generation_of_an_engine_is_as_if_it_were_the_first(asked, policy):
    target = tiny_model("llama")
    engine = Engine(target, perturbed("llama", noise=0.02))
    for prompt, num_tokens in asked:
        assert answer(engine, prompt, policy=policy, max_new_tokens=num_tokens) == greedy(target, prompt, num_tokens)


def test_a_generation_gets_the_memory_of_one_that_is_gone():
    engine = Engine(tiny_model("llama"), "prompt_lookup")
    first = Session.on(engine, PROMPT, max_new_tokens=20)
    list(run(first))
    cache = first.cache
    beside = Session.on(engine, PROMPT, max_new_tokens=20)
    assert beside.cache is not cache, "the first session still has it"
    del first
    gc.collect()
    again = Session.on(engine, PROMPT, max_new_tokens=30)
    assert again.cache is cache
    assert again.cache.length == 0
    list(run(again))
    assert again.new_token_ids == greedy(engine.target, PROMPT, 30)
    fixed = Session.on(engine, PROMPT, max_new_tokens=20, exact="fixed_width")
    assert fixed.cache is not cache, "its capacity is part of its passes' shape"


def test_a_cache_that_is_too_small_is_not_taken():
    engine = Engine(tiny_model("llama", max_position_embeddings=2048), "prompt_lookup")
    small = Session.on(engine, PROMPT, max_new_tokens=8).cache
    assert Session.on(engine, PROMPT, max_new_tokens=small.capacity).cache is not small


def test_an_engine_looks_at_its_models_once(monkeypatch):
    target, drafter = (copy.deepcopy(model).float() for model in (tiny_model("llama"), perturbed("llama")))
    engine = Engine(target, drafter)
    expected = answer(engine, PROMPT, max_new_tokens=4)

    def unexpected(*_: object, **__: object) -> None:
        raise AssertionError("the weights are looked at again")

    monkeypatch.setattr(model_state, "tensor_state", unexpected)
    monkeypatch.setattr("dynatree_core.engine.resources.can_infer", unexpected)
    monkeypatch.setattr("dynatree_core.engine.resources.refuse_dependent_rows", unexpected)
    assert answer(engine, PROMPT, max_new_tokens=4) == expected


def test_a_generations_start_costs_as_much_whatever_the_size_of_the_model():
    """Torch operations from the request to the first prefill, of the second generation."""
    counts = []
    for layers in (1, 6):
        target = tiny_model("llama", num_hidden_layers=layers)
        engine = Engine(target, tiny_model("llama", seed=5, num_hidden_layers=layers))
        answer(engine, PROMPT, max_new_tokens=4)
        with Operations() as counted:
            Session.on(engine, PROMPT, max_new_tokens=4)
        counts.append(counted.number)
    assert counts[0] == counts[1]


def test_a_second_generation_inspects_no_plugin():
    """Looking at the attributes of policies one by one was most of what a start took."""
    engine = Engine(tiny_model("llama"), "prompt_lookup")
    answer(engine, PROMPT, policy="phase3", max_new_tokens=4)
    called: Counter[str] = Counter()

    def note(frame, event, _):
        if event == "call":
            called[frame.f_code.co_name] += 1

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        Session.on(engine, PROMPT, policy="phase3", max_new_tokens=4)
    finally:
        sys.setprofile(before)
    assert called["hook_callers"] == 3, "the policies of phase3 are registered"
    assert called["getattr_static"] <= 10, "one a hook, where it was one for each attribute"


class Operations(TorchDispatchMode):
    """Counts torch operations."""

    number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number += 1
        return func(*args, **(kwargs or {}))


def test_refresh_follows_a_model_that_was_changed():
    target = copy.deepcopy(tiny_model("llama")).float()  # so that it is packed where it can be
    engine = Engine(target, "prompt_lookup")
    before = answer(engine, PROMPT, max_new_tokens=12)
    with torch.no_grad():
        for weight in target.parameters():
            weight.neg_()
    try:
        engine.refresh()
        after = answer(engine, PROMPT, max_new_tokens=12)
        assert after == generate(target, None, PROMPT, max_new_tokens=12, eos_token_id=[]).token_ids
        assert after != before
    finally:
        with torch.no_grad():
            for weight in target.parameters():
                weight.neg_()


def test_costs_that_are_given_are_not_measured(monkeypatch):
    monkeypatch.setattr("dynatree_core.engine.resources.measured_costs", pytest.fail)
    costs = CostModel(StepFunction((1, 64), (1.0, 1.5)), StepFunction((1,), (0.1,)), 0.0)
    target = tiny_model("llama")
    found = generate(
        target, perturbed("llama"), PROMPT, policy="cost_aware", costs=costs, max_new_tokens=12, eos_token_id=[]
    )
    assert found.token_ids == greedy(target, PROMPT, 12)


def test_times_are_those_of_the_given_clock():
    ticks = iter(range(10**6))
    result = generate(tiny_model("llama"), "prompt_lookup", PROMPT, now=lambda: float(next(ticks)), max_new_tokens=4)
    assert result.report.decode_seconds == int(result.report.decode_seconds) > 0


def test_a_request_is_read_once_and_does_not_change():
    given = {"input_ids": torch.tensor([[0, 0, 7, 8]]), "attention_mask": torch.tensor([[0, 0, 1, 1]])}
    request = Engine(tiny_model("llama")).request(given, max_new_tokens=3)
    assert (request.prompt_ids, request.num_padding, request.num_tokens) == ((7, 8), 2, 5)
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        request.max_new_tokens = 4


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_new_token": 3}, ParameterError, "did you mean 'max_new_tokens'"),
        ({"runnner": "eager"}, ParameterError, "did you mean 'runner'"),
        ({"on_error": "ignore"}, ParameterError, "on_error must be 'raise' or 'fallback'"),
        ({"attention_mask": [1]}, PromptError, "an attention mask must have a value for each"),
    ],
)
def test_requests_that_cannot_be_used(options, error, message):
    with pytest.raises(error, match=message):
        Engine(tiny_model("llama")).request(PROMPT, **options)


def test_every_option_is_documented():
    documented = generate.__doc__ or ""
    assert [name for name in (*OPTION_NAMES, *ENGINE_OPTIONS) if f"{name}:" not in documented] == []


def endless(num_tokens: int) -> Sequence:
    request = Request.parse(tiny_model("llama"), PROMPT, Options(max_new_tokens=num_tokens, cache="sinks=2,window=16"))
    return Sequence(request, torch.device("cpu"), torch.device("cpu"))


def test_recording_a_step_costs_as_much_after_a_long_text_as_after_a_short_one():
    """Counted in bytes that a step asks memory for: a copy of all tokens would be as long as the text."""
    sequence = endless(40_000)
    tree = TokenTree.root(torch.tensor([1]))
    reports = [StepReport(step, tree, Verdict((), (), (1, 2))) for step in range(20_000)]

    def peak(step: int) -> int:
        tracemalloc.start()
        sequence.record(reports[step])
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    for step in range(20_000):
        if step in (10, 19_990):
            continue
        sequence.record(reports[step])
    # a list that grows asks for more than it needs now and then, but no step for as much as the text is long
    assert peak(19_990) < 8 * sequence.num_new / 4
    assert sequence.num_new == 39_998
    assert sequence.new_token_ids == [1, 2] * 19_999
