"""Log-probabilities are those of plain decoding at each token's place, and cost nothing where nobody asks."""

from __future__ import annotations

import copy
import functools
import itertools
import math

import pytest
import torch
from operations import counted
from torch import nn

from dynatree_core import Engine, Session, TokenLogprob, generate, generate_batch, ops, run, stream
from dynatree_core.errors import ParameterError
from dynatree_core.testing.models import VOCAB, perturbed, tiny_model

TARGET, DRAFTER = tiny_model("llama"), perturbed("llama", noise=0.02)
PROMPT, LENGTH = [5, 6, 7, 5, 6], 14


def expected(token_ids: list[int], num_top: int, *, target: nn.Module = TARGET) -> list[TokenLogprob]:
    """By one plain pass over each text, as anyone would write it."""
    listed = []
    for place, token_id in enumerate(token_ids):
        logits = target(torch.tensor([[*PROMPT, *token_ids[:place]]])).logits[0, -1]
        logprobs = logits.float().log_softmax(-1)
        best = logprobs.sort(descending=True, stable=True)
        top = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))[:num_top]
        listed.append(TokenLogprob(token_id, logprobs[token_id].item(), top))
    return listed


def check(found: list[TokenLogprob] | None, token_ids: list[int], num_top: int) -> None:
    assert found is not None
    assert [one.token_id for one in found] == token_ids
    for ours, theirs in zip(found, expected(token_ids, num_top), strict=True):
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-5)
        assert [token for token, _ in ours.top] == [token for token, _ in theirs.top]
        assert [value for _, value in ours.top] == pytest.approx([value for _, value in theirs.top], abs=1e-5)


@pytest.mark.parametrize("num_top", [0, 1, 5, VOCAB])
@pytest.mark.parametrize("policy", ["autoregressive", "fixed", "phase3"])
def test_each_token_has_that_of_its_place(policy, num_top):
    result = generate(TARGET, DRAFTER, PROMPT, policy=policy, max_new_tokens=LENGTH, logprobs=num_top)
    check(result.logprobs, result.token_ids, num_top)
    assert all(len(one.top) == num_top for one in result.logprobs)


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": True, "seed": 3, "temperature": 0.4},
        {"repetition_penalty": 3.0},
        {"logit_bias": {9: 50.0}},
        {"suppress_tokens": [1, 2, 3], "presence_penalty": 2.0},
    ],
    ids=str,
)
def test_they_are_the_models_own_whatever_changes_the_choice(settings):
    result = generate(TARGET, DRAFTER, PROMPT, policy="fixed", max_new_tokens=LENGTH, logprobs=3, **settings)
    check(result.logprobs, result.token_ids, 3)


def test_a_text_that_stops_inside_an_accepted_path_has_as_many_as_tokens():
    whole = generate(TARGET, TARGET, PROMPT, policy="linear(depth=6)", max_new_tokens=LENGTH, logprobs=1)
    for end in range(1, 8):
        cut = generate(
            TARGET, TARGET, PROMPT, policy="linear(depth=6)", max_new_tokens=LENGTH, logprobs=1,
            eos_token_id=whole.token_ids[end - 1],
        )  # fmt: skip
        check(cut.logprobs, cut.token_ids, 1)
        assert cut.token_ids == whole.token_ids[: len(cut.token_ids)]


def test_a_stream_has_them_step_by_step():
    reports = [*stream(TARGET, DRAFTER, PROMPT, policy="fixed", max_new_tokens=LENGTH, logprobs=2)]
    assert all(len(report.verdict.logprobs) == len(report.token_ids) for report in reports)
    check(
        [*itertools.chain(*(report.verdict.logprobs for report in reports))],
        [t for r in reports for t in r.token_ids],
        2,
    )


def test_each_of_a_batch_has_its_own_and_only_who_asks():
    prompts = [PROMPT, [1, 2, 3], PROMPT]
    asked = [{"logprobs": 2}, {}, {"logprobs": 0, "do_sample": True, "seed": 1}]
    first, second, third = generate_batch(
        TARGET, DRAFTER, prompts, each=asked, policy="fixed", max_new_tokens=LENGTH, max_sequences=3
    )
    check(first.logprobs, first.token_ids, 2)
    assert second.logprobs is None
    check(third.logprobs, third.token_ids, 0)


def test_a_session_that_goes_on_has_each_once():
    session = Session(TARGET, DRAFTER, PROMPT, policy="fixed", max_new_tokens=LENGTH, logprobs=1)
    steps = run(session)
    next(steps)
    steps.close()
    assert len(session.result().logprobs) == len(session.result().token_ids) < LENGTH
    for _ in run(session):
        pass
    check(session.result().logprobs, session.result().token_ids, 1)


def test_a_request_that_never_ran_has_none_of_them():
    engine = Engine(TARGET, DRAFTER, max_sequences=1)
    handle = engine.submit(PROMPT, logprobs=1)
    engine.cancel(handle)
    assert handle.result().logprobs == []


@functools.cache
def in_float32(seed: int) -> nn.Module:
    return copy.deepcopy(tiny_model("llama", seed=seed)).float()


@pytest.mark.skipif(ops.reason_unavailable() is not None, reason="the native library is not here")
@pytest.mark.parametrize("settings", [{}, {"do_sample": True, "seed": 2}], ids=["greedy", "sampled"])
def test_with_equal_bits_they_are_plain_decodings_bit_for_bit(settings):
    asked = {"runner": "native", "max_new_tokens": 24, "logprobs": 4, **settings}
    target, drafter = in_float32(0), perturbed("llama", noise=0.02).float()
    plain = generate(target, None, PROMPT, policy="autoregressive", **asked)
    for policy in ("fixed(depth=3,branch=2,tau=0.0)", "phase3", "linear(depth=5)"):
        ours = generate(target, drafter, PROMPT, policy=policy, **asked)
        assert ours.report.num_iterations < plain.report.num_iterations
        assert ours.token_ids == plain.token_ids
        assert ours.logprobs == plain.logprobs


def test_who_does_not_ask_pays_nothing_and_who_asks_one_transfer_a_step():
    def counts(**asked: object) -> tuple[int, int, int]:
        session = Session(
            TARGET, DRAFTER, PROMPT, policy="fixed", max_new_tokens=40, runner="eager", trust_model=True, **asked
        )
        steps = run(session)
        next(steps)
        with counted(TARGET, DRAFTER) as found:
            num_steps = sum(1 for _ in steps)
        return found.operations, found.transfers, num_steps

    silent, asked = counts(), counts(logprobs=3)
    assert counts(logprobs=None) == silent
    assert asked[1] - silent[1] == silent[2] == asked[2]
    assert 0 < asked[0] - silent[0] <= 16 * silent[2]


@pytest.mark.parametrize("wrong", [-1, 1.5, True, "3", VOCAB + 1])
def test_what_is_no_number_of_tokens_is_refused(wrong):
    with pytest.raises(ParameterError, match="logprobs must be"):
        generate(TARGET, DRAFTER, PROMPT, logprobs=wrong)


def test_an_impossible_token_has_minus_infinity():
    class Muted(nn.Module):
        """Adds -inf at one place of the head's output."""

        def forward(self, logits: torch.Tensor) -> torch.Tensor:
            return logits.index_fill(-1, torch.tensor([3]), -math.inf)

    target = tiny_model("llama", seed=4)
    target.lm_head = nn.Sequential(target.lm_head, Muted())
    result = generate(target, None, PROMPT, max_new_tokens=2, logprobs=VOCAB, trust_model=True, runner="eager")
    assert all(one.top[-1] == (3, -math.inf) for one in result.logprobs)


def test_who_is_put_back_when_memory_is_short_has_each_once():
    """By the handle too, which a server reads while a text grows."""
    engine = Engine(TARGET, DRAFTER, max_sequences=2)
    handles = [engine.submit(PROMPT, policy="fixed", max_new_tokens=LENGTH, logprobs=1) for _ in range(2)]
    listed: list[list[TokenLogprob]] = [[], []]
    for step in itertools.count():
        if all(handle.is_done for handle in handles):
            break
        if step in (1, 3) and engine.load.num_running > 1:
            engine._scheduler._put_back()
        engine.step()
        for handle, found in zip(handles, listed, strict=True):
            found += handle.new_logprobs()
    assert engine.load.num_preempted > 0
    for handle, found in zip(handles, listed, strict=True):
        assert found == handle.result().logprobs
        check(found, handle.result().token_ids, 1)
