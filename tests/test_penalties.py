"""Bias and penalties as in OpenAI's API, against a plain loop that is written by hand."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import LogitsProcessorList

from dynatree_core import generate, generate_batch
from dynatree_core.errors import ParameterError
from dynatree_core.request.penalties import LogitBias, RepeatPenalties
from dynatree_core.testing.models import VOCAB, perturbed, tiny_model

TARGET, DRAFTER = tiny_model("llama"), perturbed("llama", noise=0.02)
PROMPT, LENGTH = [5, 6, 7, 5, 6], 20
CASES = [
    {"logit_bias": {3: 2.5, 7: -4.0}},
    {"logit_bias": {11: 100.0}},
    {"presence_penalty": 1.5},
    {"frequency_penalty": 0.7},
    {"presence_penalty": -1.0, "frequency_penalty": 0.4, "logit_bias": {2: 1.0}},
]


def plain_loop(prompt: list[int], *, logit_bias=None, presence_penalty=0.0, frequency_penalty=0.0) -> list[int]:
    """One pass a token, number by number."""
    said: list[int] = []
    for _ in range(LENGTH):
        scores = TARGET(torch.tensor([[*prompt, *said]])).logits[0, -1].float().tolist()
        for token_id, value in (logit_bias or {}).items():
            scores[token_id] += value
        for token_id in set(said):
            scores[token_id] -= frequency_penalty * said.count(token_id) + presence_penalty
        said.append(max(range(VOCAB), key=scores.__getitem__))
    return said


@pytest.mark.parametrize("policy", ["autoregressive", "fixed(tau=0.0)", "phase3"])
@pytest.mark.parametrize("settings", CASES, ids=str)
def test_the_text_is_that_of_a_plain_loop(settings, policy):
    result = generate(TARGET, DRAFTER, PROMPT, policy=policy, max_new_tokens=LENGTH, **settings)
    assert result.token_ids == plain_loop(PROMPT, **settings)


def test_each_case_changes_the_text():
    assert all(plain_loop(PROMPT, **settings) != plain_loop(PROMPT) for settings in CASES)


def test_each_of_a_batch_has_its_own():
    results = generate_batch(
        TARGET, DRAFTER, [PROMPT] * len(CASES), each=CASES, policy="fixed", max_new_tokens=LENGTH, max_sequences=3
    )
    assert [result.token_ids for result in results] == [plain_loop(PROMPT, **settings) for settings in CASES]


def test_sampling_draws_from_what_they_leave():
    asked = {"do_sample": True, "temperature": 0.8, "max_new_tokens": LENGTH}
    torch.manual_seed(4)
    processors = LogitsProcessorList([LogitBias({3: 2.0}, "cpu"), RepeatPenalties(len(PROMPT), 0.5, 0.25)])
    theirs = TARGET.generate(torch.tensor([PROMPT]), logits_processor=processors, **asked)[0, len(PROMPT) :].tolist()
    for policy in ("autoregressive", "fixed"):
        ours = generate(
            TARGET, DRAFTER, PROMPT, policy=policy, seed=4, logit_bias={3: 2.0}, presence_penalty=0.5,
            frequency_penalty=0.25, **asked,
        )  # fmt: skip
        assert ours.token_ids == theirs


def test_padding_and_prompt_do_not_count():
    padded = {"input_ids": torch.tensor([[0, 0, *PROMPT]]), "attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1, 1]])}
    result = generate(TARGET, DRAFTER, padded, max_new_tokens=LENGTH, frequency_penalty=0.7)
    assert result.token_ids == plain_loop(PROMPT, frequency_penalty=0.7)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("logit_bias", [1, 2]),
        ("logit_bias", {VOCAB: 1.0}),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {"3": 1.0}),
        ("logit_bias", {True: 1.0}),
        ("logit_bias", {3: math.nan}),
        ("logit_bias", {3: "much"}),
        ("presence_penalty", math.inf),
        ("presence_penalty", None),
        ("frequency_penalty", "0.5"),
        ("frequency_penalty", True),
    ],
)
def test_what_is_no_number_or_no_token_is_refused(name, wrong):
    with pytest.raises(ParameterError, match=f"{name}.* must"):
        generate(TARGET, DRAFTER, PROMPT, **{name: wrong})
