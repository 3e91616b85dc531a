"""Sampling: with a seed the text is that of autoregressive sampling, token for token, and its law the target's own."""

from __future__ import annotations

import copy
import itertools

import attrs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from students import drafter_of_each_kind

from dynatree_core import Session, generate, run
from dynatree_core.errors import ParameterError
from dynatree_core.plugins.registry import DRAFTERS, POLICIES, PRESETS, plugin_table
from dynatree_core.request.sampling import Sampler
from dynatree_core.testing import strategies as ours
from dynatree_core.testing.models import perturbed, reference, tiny_model

TARGET, DRAFTER, PROMPT = tiny_model("llama"), perturbed("llama"), [1, 2, 3]


def sampled_by_generate(model, prompt, length, seed, eos, **asked):
    """What transformers' own sampling says when torch's generator has this seed."""
    return reference(model, prompt, length, eos, do_sample=True, seed=seed, **asked)


@given(data=st.data())
def test_a_seed_gives_the_text_of_generate(data):
    """Any policy, any drafter, any warpers, several end tokens: the same draws in the same order."""
    family, model_seed = data.draw(ours.families), data.draw(ours.model_seeds)
    target, prompt = tiny_model(family, model_seed), data.draw(ours.prompts)
    length, seed = data.draw(st.integers(1, 24)), data.draw(st.integers(0, 2**32))
    eos, asked = data.draw(st.lists(ours.token_ids, max_size=2)), data.draw(ours.warper_settings)
    expected = sampled_by_generate(target, prompt, length, seed, eos, **asked)
    drafter, stack = data.draw(ours.drafters(family, model_seed)), data.draw(ours.stacks())
    result = generate(
        target,
        drafter,
        prompt,
        policy=stack,
        max_new_tokens=length,
        eos_token_id=eos,
        do_sample=True,
        seed=seed,
        **asked,
    )
    assert result.token_ids == expected


@pytest.mark.parametrize("policy", [*plugin_table(POLICIES), *plugin_table(PRESETS)])
# adapter_off is for targets with adapters, see tests/libraries/test_adapter_off.py
@pytest.mark.parametrize("drafter", [name for name in plugin_table(DRAFTERS) if name != "adapter_off"])
def test_every_registered_policy_and_drafter(policy, drafter):
    drafter = drafter_of_each_kind(TARGET)[drafter]
    for seed in range(4):
        expected = sampled_by_generate(TARGET, PROMPT, 24, seed, [], temperature=0.6)
        options = {"policy": policy, "max_new_tokens": 24, "do_sample": True, "temperature": 0.6, "seed": seed}
        assert generate(TARGET, drafter, PROMPT, **options).token_ids == expected
        assert generate(TARGET, None, PROMPT, **options).token_ids == expected


def test_without_a_seed_torchs_generator_is_used():
    expected = sampled_by_generate(TARGET, PROMPT, 24, 5, [])
    torch.manual_seed(5)
    first = generate(TARGET, DRAFTER, PROMPT, max_new_tokens=24, do_sample=True).token_ids
    second = generate(TARGET, DRAFTER, PROMPT, max_new_tokens=24, do_sample=True).token_ids
    assert first == expected != second


def test_trees_are_worth_something_when_sampling():
    options = {"policy": "fixed(depth=5,branch=3,tau=0.0)", "max_new_tokens": 60, "do_sample": True, "temperature": 0.5}
    assert generate(TARGET, TARGET, PROMPT, seed=1, **options).report.tokens_per_iteration > 2


def test_the_law_is_the_targets_own(monkeypatch):
    """Exact enumeration: every text of three tokens over five ids comes out of its own draws, each made from the scores
    that the target has after the tokens before it. So its probability is the product of the target's own."""
    target = tiny_model("llama", vocab_size=5)
    num_texts = 0
    for text in itertools.product(range(5), repeat=3):
        drawn = []

        def scripted(self, scores, text=text, drawn=drawn):
            drawn.append(scores.log_softmax(-1))
            return torch.tensor([text[len(drawn) - 1]])

        monkeypatch.setattr(Sampler, "draw", scripted)
        result = generate(
            target,
            target,
            [1, 2],
            policy="fixed(depth=3,branch=3,tau=0.0)+confidence",
            max_new_tokens=3,
            do_sample=True,
        )
        assert tuple(result.token_ids) == text
        with torch.inference_mode():
            alone = target(torch.tensor([[1, 2, *text[:2]]])).logits[0, 1:].float().log_softmax(-1)
        torch.testing.assert_close(torch.cat(drawn), alone, rtol=1e-5, atol=1e-5)
        num_texts += 1
    assert num_texts == 125


def test_frequencies_are_those_of_generate():
    """Two samples of 500 texts of two tokens over five ids, in one chi-square test of homogeneity.

    Were both laws equal, which they are, a pair of seeds would fail it in one of ten thousand cases.
    """
    target, num_texts = tiny_model("llama", vocab_size=5), 500
    counts = torch.zeros(2, 25, dtype=torch.float64)
    options = {"policy": "fixed(depth=2,branch=3,tau=0.0)", "max_new_tokens": 2, "do_sample": True, "temperature": 2.0}
    for seed in range(num_texts):
        a, b = generate(target, target, [1, 2], seed=seed, **options).token_ids
        counts[0, 5 * a + b] += 1
        a, b = sampled_by_generate(target, [1, 2], 2, num_texts + seed, [], temperature=2.0)
        counts[1, 5 * a + b] += 1
    seen = counts[:, counts.sum(0) >= 10]
    expected = seen.sum(0, keepdim=True) * seen.sum(1, keepdim=True) / seen.sum()
    statistic = ((seen - expected) ** 2 / expected).sum()
    degrees = torch.tensor(float(seen.shape[1] - 1), dtype=torch.float64)
    assert degrees >= 8
    assert torch.special.gammaincc(degrees / 2, statistic / 2) > 1e-4


@pytest.mark.parametrize("step", [0, 2])
def test_what_was_drawn_in_a_step_that_failed_is_drawn_again(step, monkeypatch):
    options = {"policy": "fixed(tau=0.0)", "max_new_tokens": 24, "do_sample": True, "temperature": 0.7, "seed": 3}
    expected = generate(TARGET, DRAFTER, PROMPT, **options).token_ids
    session = Session(TARGET, DRAFTER, PROMPT, **options)
    record = session.sequence.record

    def interrupted(report):
        if session.num_iterations == step:
            monkeypatch.undo()
            raise KeyboardInterrupt
        record(report)

    monkeypatch.setattr(session.sequence, "record", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(run(session))
    list(run(session))
    assert session.new_token_ids == expected


def test_a_session_that_goes_on_with_shallower_trees_draws_the_same():
    """What was drawn for a deep tree that was never committed is neither drawn again nor lost."""
    options = {"max_new_tokens": 24, "do_sample": True, "temperature": 0.7, "seed": 3}
    expected = generate(TARGET, None, PROMPT, policy="autoregressive", **options).token_ids
    for step in range(6):
        session = Session(TARGET, TARGET, PROMPT, policy="fixed(depth=6,tau=0.0)", **options)
        record = session.sequence.record

        def interrupted(report, session=session, record=record, step=step):
            if session.num_iterations == step:
                raise KeyboardInterrupt
            record(report)

        session.sequence.record = interrupted
        with pytest.raises(KeyboardInterrupt):
            list(run(session))
        session.sequence.record = record
        session.sequence.limits = attrs.evolve(session.limits, max_depth=1)
        list(run(session))
        assert session.new_token_ids == expected


def test_on_every_device(device):
    target = copy.deepcopy(TARGET).to(device)
    options = {"max_new_tokens": 24, "do_sample": True, "temperature": 0.7, "seed": 3}
    alone = generate(target, None, PROMPT, policy="autoregressive", **options).token_ids
    for policy in ("fixed(tau=0.0)", "phase3"):
        assert generate(target, target, PROMPT, policy=policy, **options).token_ids == alone


@settings(max_examples=20)
@given(st.integers(0, 2**32))
def test_greedy_is_the_default_whatever_the_model_asks_for(seed):
    TARGET.generation_config.do_sample = True
    try:
        torch.manual_seed(seed)
        tokens = generate(TARGET, DRAFTER, PROMPT, max_new_tokens=12).token_ids
    finally:
        TARGET.generation_config.do_sample = False
    assert tokens == generate(TARGET, DRAFTER, PROMPT, max_new_tokens=12).token_ids


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"seed": -1}, "seed must be an integer of at least 0"),
        ({"seed": 2**70}, "seed must be below"),
        ({"seed": 1.5}, "seed must be an integer of at least 0"),
        ({"temperature": -1.0}, "cannot be used"),
        ({"top_p": -1.0}, "cannot be used"),
    ],
)
def test_bad_options(option, message):
    with pytest.raises(ParameterError, match=message):
        generate(TARGET, DRAFTER, PROMPT, do_sample=True, **option)
