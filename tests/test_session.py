"""Bad input is refused before anything runs; limits and reports are what they claim to be."""

from __future__ import annotations

import copy
import gc
import threading
import weakref

import pytest
import torch

from dynatree_core import Drafter, Proposals, Session, decode_step, generate, hookimpl, prefill, run
from dynatree_core.drafters.model import ModelDrafter, ModelDraftState
from dynatree_core.engine.metrics import repetition
from dynatree_core.errors import (
    CacheError,
    ContextLimitError,
    DrafterError,
    InputError,
    NonFiniteLogitsError,
    OutOfMemoryError,
    ParameterError,
    PolicyError,
    PromptError,
    UnsupportedModelError,
    VocabularyMismatchError,
)
from dynatree_core.testing.models import CONTEXT, VOCAB, greedy, perturbed, tiny_model
from dynatree_core.testing.strategies import HostileDrafter

TARGET, DRAFTER, PROMPT = tiny_model("llama"), perturbed("llama"), [1, 2, 3]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "at least one token"),
        (torch.zeros(1, 0, dtype=torch.int64), "at least one token"),
        ([0.5, 1.0], "integers, got torch.float32"),
        ([True], "integers, got torch.bool"),
        ([[1, 2], [3, 4]], r"one sequence.*got shape \[2, 2\]"),
        ([VOCAB], f"from 0 to {VOCAB - 1}"),
        ([-1, 2], f"from 0 to {VOCAB - 1}"),
        ("Hello", "got 'Hello'; tokenize the text first"),
        (["a", "b"], "tokenize the text first"),
        ([[1], [2, 3]], "tokenize the text first"),
        ([1, None], "tokenize the text first"),
        (None, "tokenize the text first"),
    ],
)
def test_bad_prompts(prompt, message):
    with pytest.raises(PromptError, match=message):
        generate(TARGET, DRAFTER, prompt)


@pytest.mark.parametrize("prompt", [PROMPT, (1, 2, 3), torch.tensor(PROMPT), torch.tensor([PROMPT], dtype=torch.int32)])
def test_prompts_of_any_kind(prompt):
    assert generate(TARGET, DRAFTER, prompt, max_new_tokens=5).token_ids == greedy(TARGET, PROMPT, 5)


@pytest.mark.parametrize("value", [-1, 2.5, "8", True])
def test_bad_max_new_tokens(value):
    with pytest.raises(ParameterError, match="max_new_tokens must be an integer of at least 0"):
        generate(TARGET, DRAFTER, PROMPT, max_new_tokens=value)


def test_nothing_to_generate():
    result = generate(TARGET, DRAFTER, PROMPT, max_new_tokens=0)
    assert (result.token_ids, result.stop_reason) == ([], "length")
    report = result.report
    assert (report.num_iterations, report.num_new_tokens, report.tokens_per_iteration) == (0, 0, None)
    assert (report.path_acceptance, report.node_acceptance, report.tokens_per_second) == (None, None, None)


def test_past_the_context():
    with pytest.raises(ContextLimitError, match=f"context of {CONTEXT} tokens, got 3 \\+ {CONTEXT}.*at most 157"):
        generate(TARGET, DRAFTER, PROMPT, max_new_tokens=CONTEXT)
    short = tiny_model("llama", max_position_embeddings=32)
    with pytest.raises(ContextLimitError, match="the drafter must have a position for each of the 43 tokens"):
        generate(TARGET, short, PROMPT, max_new_tokens=40)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"tau": -0.1}, "tau must be a probability"),
        ({"tau": 2}, "tau must be a probability"),
        ({"max_nodes": -1}, "max_nodes must be an integer of at least 0"),
        ({"max_depth": 1.5}, "max_depth must be an integer"),
        ({"max_branch": 0}, "max_branch must be an integer of at least 1"),
        ({"max_branch": None}, "max_branch must be an integer of at least 1"),
        ({"eos_token_id": "5"}, "eos_token_id must be a token id or several"),
        ({"eos_token_id": 2.5}, "eos_token_id must be a token id or several"),
        ({"exact": "yes"}, "exact must be None or 'fixed_width'"),
        ({"exact": "fixed_width", "max_nodes": "4"}, "max_nodes must be an integer of at least 0"),
        ({"on_error": "ignore"}, "on_error must be 'raise' or 'fallback'"),
    ],
)
def test_bad_options(option, message):
    with pytest.raises(ParameterError, match=message):
        generate(TARGET, DRAFTER, PROMPT, **option)


def test_an_unknown_option_is_an_error():
    with pytest.raises(ParameterError, match=r"'max_tokens' does not exist \(did you mean 'max_new_tokens'\?\)"):
        generate(TARGET, DRAFTER, PROMPT, max_tokens=4)


def test_every_input_error_is_a_value_error():
    assert issubclass(InputError, ValueError)


def test_vocabularies():
    other = tiny_model("llama", vocab_size=90)
    with pytest.raises(VocabularyMismatchError, match=f"the target has {VOCAB} token ids, the drafter 90"):
        generate(TARGET, other, PROMPT)


@pytest.mark.parametrize(("target_vocab", "drafter_vocab"), [(300, 304), (304, 300)])
def test_vocabularies_that_differ_by_padding(target_vocab, drafter_vocab):
    """Padding ids of either side are harmless: not proposed, and replaced where the drafter cannot embed them."""
    target = tiny_model("llama", 1, vocab_size=target_vocab)
    drafter = tiny_model("llama", 2, vocab_size=drafter_vocab)
    for prompt in ([target_vocab - 1, 5], [1, 2, 3]):
        result = generate(target, drafter, prompt, policy="fixed", max_new_tokens=20, tau=0.0)
        assert result.token_ids == greedy(target, prompt, 20)


def test_limits_the_strictest_wins():
    def limits(policy, **options):
        return Session(TARGET, DRAFTER, PROMPT, policy=policy, **options).limits

    assert (limits("confidence").tau, limits("confidence").max_nodes, limits("confidence").max_depth) == (0.05, 128, 64)
    assert limits("fixed(tau=0.01)").tau == 0.01  # the policy's own replaces the default
    assert limits("fixed(tau=0.01)", tau=0.2).tau == 0.2
    assert limits("fixed(tau=0.3)", tau=0.2).tau == 0.3
    assert limits("linear").tau == 0.0
    assert limits("linear+fixed").tau == 0.05
    assert limits("fixed(max_nodes=20)").max_nodes == 20
    assert limits("fixed(max_nodes=20)", max_nodes=10).max_nodes == 10
    assert limits("dynamic_depth(max_depth=6)").max_depth == 6
    assert limits("confidence", max_branch=1000).max_branch == VOCAB


@pytest.mark.parametrize("max_nodes", [None, 0, 5])
def test_fixed_width(max_nodes, monkeypatch):
    """Every verification pass has one and the same shape, and the output is what it always is."""
    session = Session(
        TARGET, DRAFTER, PROMPT, policy="fixed(tau=0.0)", max_new_tokens=20, exact="fixed_width", max_nodes=max_nodes
    )
    shapes = set()
    forward = session.target.forward

    def note(flat, cache, *, stage, **options):
        if stage == "verify":
            shapes.add(tuple(flat.visible.shape))
        return forward(flat, cache, stage=stage, **options)

    monkeypatch.setattr(session.target, "forward", note)
    for _ in run(session):
        pass
    rows = 16 if max_nodes is None else max_nodes + 1
    assert shapes == {(1, rows, session.cache.capacity)}
    assert session.new_token_ids == greedy(TARGET, PROMPT, 20)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fixed_width_rounds_as_its_reference_does(family, dtype):
    """Tokens and cached rows are equal bit by bit, with trees and without; with passes as they come they are not."""
    target = copy.deepcopy(tiny_model(family)).to(dtype)

    def decoded(drafter, exact):
        session = Session(target, drafter, list(range(9)), policy="fixed(tau=0.0)", max_new_tokens=60, exact=exact)
        for _ in run(session):
            pass
        return session

    def are_equal(one, other):
        end = min(one.cache.length, other.cache.length)
        buffers = zip((*one.cache.keys, *one.cache.values), (*other.cache.keys, *other.cache.values), strict=True)
        return all(torch.equal(a[:, :, :end], b[:, :, :end]) for a, b in buffers)

    alone, trees = decoded(None, "fixed_width"), decoded(target, "fixed_width")
    assert trees.num_iterations < 40
    assert trees.new_token_ids == alone.new_token_ids
    assert are_equal(trees, alone)
    if are_equal(decoded(target, None), decoded(None, None)):
        pytest.skip("this CPU rounds passes of one row and of many alike, so there is nothing that the option mends")


def test_nan_logits_end_the_generation_with_what_was_committed():
    broken = copy.deepcopy(TARGET)
    expected = greedy(TARGET, PROMPT, 12)

    def poison(module, args, kwargs, output):
        if int(kwargs["position_ids"].max()) >= 8:
            output.logits[..., 0] = torch.nan
        return output

    broken.register_forward_hook(poison, with_kwargs=True)
    with pytest.raises(NonFiniteLogitsError, match="got NaN") as caught:
        generate(broken, None, PROMPT, max_new_tokens=12)
    assert caught.value.partial.token_ids == expected[:6]


@pytest.mark.parametrize("option", [{}, {"exact": "fixed_width"}, {"cache": "sinks=2,window=6"}])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_wrong_draft_that_overflows_changes_nothing(option, rank):
    """Its keys and values are NaN, which no mask hides: the rows of the whole pass are NaN."""
    fragile = copy.deepcopy(TARGET)
    expected = generate(TARGET, None, PROMPT, max_new_tokens=20, **option).token_ids
    wrong = max(set(range(VOCAB)) - {*PROMPT, *expected})
    with torch.no_grad():
        fragile.get_input_embeddings().weight[wrong] = torch.nan

    class Misled(ModelDraftState):
        def propose(self, committed_ids, tree, k):
            found = super().propose(committed_ids, tree, k)
            found.token_ids[:, rank] = wrong
            return found

    class Misleading(ModelDrafter):
        def start(self, plan):
            return Misled(self.model, plan)

    session = Session(fragile, Misleading(TARGET), PROMPT, policy="fixed(branch=2)", max_new_tokens=20)
    prefill(session)
    with pytest.raises(NonFiniteLogitsError):
        decode_step(session)
    for policy in ("fixed(depth=2,branch=2,tau=0.0)", "linear(depth=3)"):
        found = generate(fragile, Misleading(TARGET), PROMPT, policy=policy, max_new_tokens=20, **option)
        assert found.token_ids == expected
    if rank == 1:
        assert found.report.tokens_per_iteration > 1, "a chain of right drafts is accepted"

    if "exact" in option and rank == 1:
        return  # it drafts chains of first choices, and none overflows

    class Dividing:
        @hookimpl
        def on_iteration_end(self, report):
            return 1 / report.tree.num_drafted  # which fails in the step that is done again

    stack = ["fixed(depth=2,branch=2,tau=0.0)", Dividing()]
    with pytest.warns(RuntimeWarning, match="drafting is off for the rest of this generation: policy 'dividing'"):
        found = generate(
            fragile, Misleading(TARGET), PROMPT, policy=stack, max_new_tokens=20, on_error="fallback", **option
        )
    assert found.token_ids == expected


def test_out_of_memory_has_its_own_error():
    broken = copy.deepcopy(TARGET)

    def fail(module, args, kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    broken.register_forward_pre_hook(fail, with_kwargs=True)
    with pytest.raises(OutOfMemoryError, match=r"a forward pass of 2 rows over 2 cache slots.*lower max_new_tokens"):
        generate(broken, None, PROMPT, trust_model=True)  # without passes that ask what the hook does


class BadDrafter(Drafter):
    """Proposes what its test tells it to."""

    def __init__(self, proposals):
        self.proposals = proposals

    def start(self, plan):
        state = HostileDrafter(0).start(plan)
        state.propose = lambda committed_ids, tree, k: self.proposals(tree.level_sizes[-1], k)
        return state


@pytest.mark.parametrize(
    ("proposals", "message"),
    [
        (lambda w, k: None, "must propose int64 token_ids.*got None"),
        (lambda w, k: Proposals(torch.zeros(w, 1, dtype=torch.int64), torch.zeros(w, 1)), r"of shape \[1, 16\]"),
        (lambda w, k: Proposals(torch.zeros(w, k), torch.zeros(w, k)), "int64"),
        (lambda w, k: Proposals(torch.zeros(w, k, dtype=torch.int64), torch.full((w, k), torch.nan)), "bad proposal"),
        (lambda w, k: Proposals(torch.zeros(w, k, dtype=torch.int64), torch.ones(w, k)), "at most 0"),
        (lambda w, k: Proposals(torch.full((w, k), VOCAB), torch.zeros(w, k)), f"from 0 to {VOCAB - 1}"),
        (lambda w, k: Proposals(torch.full((w, k), -1), torch.zeros(w, k)), f"from 0 to {VOCAB - 1}"),
    ],
)
def test_bad_proposals(proposals, message):
    with pytest.raises(DrafterError, match=message):
        generate(TARGET, BadDrafter(proposals), PROMPT, policy="fixed", max_new_tokens=8)
    with pytest.warns(RuntimeWarning, match="drafting is off"):
        result = generate(TARGET, BadDrafter(proposals), PROMPT, policy="fixed", max_new_tokens=8, on_error="fallback")
    assert result.token_ids == greedy(TARGET, PROMPT, 8)


def test_flash_attention_is_refused():
    model = copy.deepcopy(TARGET)
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(UnsupportedModelError, match="needs attn_implementation 'sdpa' or 'eager'"):
        generate(model, None, PROMPT)


def test_the_report_adds_up():
    session = Session(TARGET, DRAFTER, PROMPT, policy="phase2", max_new_tokens=30)
    assert session.result().stop_reason == "interrupted"  # nothing yet, and valid all the same
    for _ in run(session):
        partial = session.result()
        assert partial.token_ids == greedy(TARGET, PROMPT, 30)[: len(partial.token_ids)]
    report, steps = session.result().report, session.steps
    assert report.num_new_tokens == sum(step.num_committed for step in steps) == 30
    assert report.num_iterations == len(steps)
    assert report.tokens_per_iteration == pytest.approx(30 / len(steps))
    assert report.num_drafted_nodes == sum(step.num_drafted for step in steps)
    assert report.node_acceptance == pytest.approx(report.num_accepted_tokens / report.num_drafted_nodes)
    shares = [step.num_accepted / step.depth for step in steps if step.depth]
    assert report.path_acceptance == pytest.approx(sum(shares) / len(shares))
    assert report.num_accepted_tokens == sum(step.num_accepted for step in steps)
    assert all(step.num_committed - step.num_accepted in (0, 1) for step in steps)
    total = report.draft_seconds + report.verify_seconds + report.rest_seconds
    assert total == pytest.approx(report.decode_seconds)
    assert report.tokens_per_second == pytest.approx(30 / report.decode_seconds)
    assert 0 < report.rest_seconds <= report.overhead_seconds < report.decode_seconds
    assert report.prefill_seconds > 0
    assert (report.policy, report.num_prompt_tokens) == ("phase2", 3)


def test_an_end_inside_a_path_counts_only_what_was_committed():
    expected = greedy(TARGET, PROMPT, 20)
    eos = expected[4]
    result = generate(TARGET, TARGET, PROMPT, policy="linear(depth=8)", max_new_tokens=20, eos_token_id=eos)
    (step,) = result.report.steps
    assert step.num_committed == step.num_accepted == expected.index(eos) + 1
    assert result.stop_reason == "eos"


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [([], None), ([1, 2, 3], None), ([1, 2, 3, 4], 0.0), ([1] * 8, 0.8), ([1, 2, 3, 4, 1, 2, 3, 4], 0.2)],
)
def test_repetition(tokens, expected):
    assert repetition(tokens) == (None if expected is None else pytest.approx(expected))


def test_a_drafter_without_numbers_is_refused():
    empty = copy.deepcopy(DRAFTER).to("meta")
    with pytest.raises(UnsupportedModelError, match=r"the drafter .* weights have no values .*; load them"):
        generate(TARGET, empty, PROMPT)


def test_settings_of_the_generation_config_that_are_not_applied_are_named():
    model = copy.deepcopy(TARGET)
    model.generation_config.num_beams = 4
    model.generation_config.guidance_scale = 1
    with pytest.warns(RuntimeWarning, match=r"asks for num_beams=4, which generate\(\) would apply"):
        result = generate(model, DRAFTER, PROMPT, max_new_tokens=8)
    assert result.token_ids == greedy(TARGET, PROMPT, 8)


def test_a_session_driven_by_hand_has_times():
    session = Session(TARGET, DRAFTER, PROMPT, max_new_tokens=12)
    prefill(session)
    while session.stop_reason is None:
        decode_step(session)
    report = session.result().report
    assert min(report.prefill_seconds, report.rest_seconds, report.overhead_seconds) > 0
    assert report.decode_seconds > report.verify_seconds


class Failing(Drafter):
    """Drafts well, but fails in one of its methods, from the second call of it on if it is called often."""

    def __init__(self, method):
        self.method = method

    def start(self, plan):
        if self.method == "start":
            raise OSError("out of order")
        state, calls = HostileDrafter(3).start(plan), []
        original = getattr(state, self.method)

        def fail(*arguments):
            calls.append(1)
            if len(calls) > 1 or self.method == "prefill":
                raise OSError("out of order")
            return original(*arguments)

        setattr(state, self.method, fail)
        return state


@pytest.mark.parametrize("method", ["prefill", "propose", "commit"])
def test_a_drafter_may_fail_anywhere(method):
    expected = greedy(TARGET, PROMPT, 12)
    with pytest.raises(DrafterError, match="raised OSError: out of order") as caught:
        generate(TARGET, Failing(method), PROMPT, policy="fixed", max_new_tokens=12)
    partial = caught.value.partial
    assert partial.token_ids == expected[: len(partial.token_ids)]
    assert sum(step.num_committed for step in partial.report.steps) == len(partial.token_ids)
    with pytest.warns(RuntimeWarning, match="drafting is off"):
        result = generate(TARGET, Failing(method), PROMPT, policy="fixed", max_new_tokens=12, on_error="fallback")
    assert result.token_ids == expected
    assert sum(step.num_committed for step in result.report.steps) == 12


def test_a_drafter_that_cannot_start():
    with pytest.raises(DrafterError, match="raised OSError: out of order"):
        generate(TARGET, Failing("start"), PROMPT)


@pytest.mark.parametrize("kind", [int, torch.tensor, lambda token: torch.tensor([token]), lambda token: [token, token]])
def test_end_tokens_of_any_kind(kind):
    expected = greedy(TARGET, PROMPT, 20)
    result = generate(TARGET, DRAFTER, PROMPT, max_new_tokens=20, eos_token_id=kind(expected[4]))
    assert result.token_ids == expected[: expected.index(expected[4]) + 1]


def test_a_drafter_that_refuses_while_costs_are_measured_is_not_the_policys_fault(monkeypatch):
    def refused(*_, **__):
        raise InputError("one generation at a time")

    monkeypatch.setattr("dynatree_core.engine.resources.measured_costs", refused)
    with pytest.raises(DrafterError, match="drafter 'prompt_lookup' raised InputError: one generation at a time"):
        generate(TARGET, "prompt_lookup", PROMPT, policy="cost_aware")


def test_limits_of_policies_are_checked():
    class Odd:
        branch_factor = hookimpl(lambda self, frontier: 1)

        def __init__(self, **limits):
            vars(self).update(limits)

    for limits, message in [
        ({"max_nodes": "many"}, "its max_nodes must be an integer of at least 0, got 'many'"),
        ({"max_depth": float("inf")}, "its max_depth must be an integer of at least 0, got inf"),
        ({"tau": 5}, "its tau must be a number from 0 to 1, got 5"),
    ]:
        with pytest.raises(ParameterError, match=f"policy 'odd': {message}"):
            generate(TARGET, DRAFTER, PROMPT, policy=Odd(**limits))

    class Raises(Odd):
        tau = property(lambda self: {}["x"])

    with pytest.raises(PolicyError, match="policy 'raises': its tau raised KeyError: 'x'"):
        generate(TARGET, DRAFTER, PROMPT, policy=Raises())


def test_a_policy_that_cannot_be_copied():
    class Locked:
        branch_factor = hookimpl(lambda self, frontier: 1)

        def __init__(self):
            self.lock = threading.Lock()

    class Followed:
        branch_factor = hookimpl(lambda self, frontier: 1)

        def __init__(self):
            self.weight = 2 * torch.ones(1, requires_grad=True)

    for policy in (Locked(), Followed()):
        with pytest.raises(ParameterError, match=r"policy '(locked|followed)' must be copyable"):
            generate(TARGET, DRAFTER, PROMPT, policy=policy)


@pytest.mark.parametrize("policy", ["fixed", "confidence"])
def test_any_error_of_a_drafter_is_the_drafters(policy):
    def fail(width, k):
        raise CacheError("no room")

    with pytest.raises(DrafterError, match="raised CacheError: no room"):
        generate(TARGET, BadDrafter(fail), PROMPT, policy=policy)


def test_a_session_goes_without_the_garbage_collector():
    """Its caches are large, and a collection may be long in coming. Reports that somebody keeps do not hold it."""
    session = Session(tiny_model("llama"), tiny_model("llama"), [1, 2, 3], policy="fixed(depth=2)", max_new_tokens=8)
    reports = list(run(session))
    gone = weakref.ref(session)
    gc.disable()
    try:
        del session
        assert gone() is None
    finally:
        gc.enable()
    assert reports[0].costs.plain_step_seconds() > 0
