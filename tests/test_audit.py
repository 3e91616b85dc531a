"""The audit: it finds what is there, at its place, and calls rounding rounding and a bug a bug."""

from __future__ import annotations

import copy
import math

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GenerationConfig

from dynatree_core import Rounding, audit_generation, audit_output
from dynatree_core.audit import AUTOREGRESSIVE, STEPWISE, VERIFIED, WHOLE, _spacing, judge
from dynatree_core.cache import TreeCache
from dynatree_core.engine import decode as decode_module
from dynatree_core.errors import ContextLimitError, NonFiniteLogitsError, ParameterError, PromptError
from dynatree_core.testing.models import CONFIGS, CONTEXT, VOCAB, greedy, perturbed, tiny_model
from dynatree_core.testing.strategies import families, model_seeds, prompts, stacks

PROMPT = [1, 2, 3, 4, 5]
WIDE = "fixed(depth=3,branch=3,tau=0.0)"


def tiny(family: str, dtype: torch.dtype, seed: int = 0) -> torch.nn.Module:
    return copy.deepcopy(tiny_model(family, seed)).to(dtype)


# ---- what is right -------------------------------------------------------------------------------------------


def test_what_the_generation_was_asked_holds_for_the_reference():
    target, drafter = tiny_model("llama"), perturbed("llama")
    padded = [0, 0, *PROMPT]
    _, report = audit_generation(target, drafter, padded, attention_mask=[0, 0, 1, 1, 1, 1, 1], max_new_tokens=20)
    assert report.verdict == "identical", report.faults
    target.generation_config.eos_token_id = greedy(target, PROMPT, 20)[3]
    try:
        _, report = audit_generation(target, drafter, PROMPT, generation_config=GenerationConfig(), max_new_tokens=20)
        assert report.verdict == "identical", report.faults
        assert report.num_tokens == 20
    finally:
        target.generation_config.eos_token_id = None
    with pytest.raises(ParameterError, match="got position_ids; leave them out"):
        audit_generation(target, drafter, PROMPT, position_ids=[2, 3, 4, 5, 6])


def test_an_output_may_be_a_batch_of_one():
    target = tiny_model("llama")
    output = torch.tensor([greedy(target, PROMPT, 40)])
    assert audit_output(target, PROMPT, output, exact="fixed_width", max_nodes=3).verdict == "identical"


@pytest.mark.parametrize("family", CONFIGS)
def test_a_generation_is_identical_on_every_family(family):
    """The reference, the run and transformers' own passes agree, past windows too."""
    result, report = audit_generation(tiny_model(family), perturbed(family), PROMPT, policy=WIDE, max_new_tokens=40)
    assert report.verdict == "identical", report.faults
    assert report.num_tokens == len(result.token_ids) == len(report.top_gaps) == 40
    assert set(report.deviations) == {AUTOREGRESSIVE, VERIFIED}
    assert report.first_difference is None
    assert result.token_ids == greedy(tiny_model(family), PROMPT, 40)


@given(families, model_seeds, prompts, stacks(), st.sampled_from([torch.float64, torch.float32]))
def test_any_generation_in_full_precision_is_identical(family, seed, prompt, stack, dtype):
    _, report = audit_generation(tiny(family, dtype, seed), "prompt_lookup", prompt, policy=stack, max_new_tokens=12)
    assert report.verdict == "identical", report.faults
    assert report.rounding.bound < 1e-3


@pytest.mark.parametrize("exact", [None, "fixed_width"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["llama", "mistral", "olmo2", "phi3"])
def test_rounding_is_never_taken_for_a_bug(family, dtype, exact):
    """Which of these outputs differ depends on the processor; that rounding explains it does not."""
    target = tiny(family, dtype)
    result, report = audit_generation(
        target, "prompt_lookup", PROMPT, policy=WIDE, max_new_tokens=60, exact=exact, top_k=4
    )
    assert report.faults == ()
    assert report.num_rows == (16 if exact else 1)
    again = audit_output(target, PROMPT, result.token_ids, exact=exact)
    assert [one.position for one in again.differences] == [one.position for one in report.differences]
    assert again.rounding == report.rounding
    assert set(again.deviations) == {AUTOREGRESSIVE}


def test_a_tie_is_called_one():
    """Two tokens with the same row of the head tie, up to how the product rounds, and an output may hold either."""
    target = tiny("llama", torch.float32)
    plain = greedy(target, PROMPT, 12)
    position = max(i for i in range(12) if plain[i] not in plain[:i])
    twins = [plain[position], max(set(range(VOCAB)) - set(plain))]
    with torch.no_grad():
        target.lm_head.weight[twins[1]] = target.lm_head.weight[twins[0]]
    reports = [audit_output(target, PROMPT, [*plain[:position], twin]) for twin in twins]
    assert {report.verdict for report in reports} == {"identical", "tie"}
    (first,) = [report.first_difference for report in reports if report.first_difference is not None]
    assert first.position == position
    assert {first.expected_id, first.token_id} == set(twins)
    for report in reports:
        assert all(abs(pair.gap) <= report.rounding.bound < 1e-4 for pair in first.pairs)
        assert report.num_close >= 1


# ---- what is wrong -------------------------------------------------------------------------------------------


@given(families, model_seeds, prompts, st.data())
def test_a_wrong_token_is_found_where_it_stands(family, seed, prompt, data):
    target = tiny_model(family, seed)
    right = greedy(target, prompt, 12)
    position = data.draw(st.integers(0, 11))
    wrong = data.draw(st.integers(0, VOCAB - 1).filter(lambda token_id: token_id != right[position]))
    report = audit_output(target, prompt, [*right[:position], wrong, *right[position + 1 :]])
    assert report.verdict == "bug"
    first = report.first_difference
    assert (first.position, first.expected_id, first.token_id) == (position, right[position], wrong)
    assert not report.is_tie(first)
    # what follows is judged by the text that it follows
    text = [*prompt, *right[:position], wrong]
    assert all(
        one.expected_id == greedy(target, [*text, *right[position + 1 : one.position]], 1)[0]
        for one in report.differences[1:]
    )


def _sees_siblings(flat):
    visible = flat.visible.clone()
    rows = flat.num_rows
    visible[:, :, -rows:] = torch.ones(rows, rows, dtype=torch.bool).tril()
    return attrs.evolve(flat, visible=visible)


def _positions_by_slot(flat):
    return attrs.evolve(flat, position_ids=flat.position_ids[:, :1] + torch.arange(flat.num_rows))


def _no_prefix(flat):
    visible = flat.visible.clone()
    visible[:, 1:, : -flat.num_rows] = False
    return attrs.evolve(flat, visible=visible)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mutate", [_sees_siblings, _positions_by_slot, _no_prefix])
def test_a_broken_layout_is_a_bug(mutate, dtype, monkeypatch):
    flatten = decode_module.flatten
    monkeypatch.setattr(decode_module, "flatten", lambda *args, **options: mutate(flatten(*args, **options)))
    drafter = copy.deepcopy(perturbed("llama", noise=0.02))
    _, report = audit_generation(tiny("llama", dtype), drafter, PROMPT, policy=WIDE, max_new_tokens=40)
    assert report.verdict == "bug"
    assert report.deviations[VERIFIED] > report.rounding.bound
    assert report.deviations[AUTOREGRESSIVE] <= report.rounding.bound, "the reference is not what is broken"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_cache_that_keeps_wrong_rows_is_a_bug(dtype, monkeypatch):
    class Careless(TreeCache):
        def commit(self, paths):
            super().commit([range(len(path)) for path in paths])

    monkeypatch.setattr("dynatree_core.runners.base.TreeCache", Careless)
    drafter = perturbed("llama", noise=0.02)
    _, report = audit_generation(tiny("llama", dtype), drafter, PROMPT, policy=WIDE, max_new_tokens=40)
    assert report.verdict == "bug"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_verifier_that_chooses_badly_is_a_bug(dtype, monkeypatch):
    """Also where the token is nearly the best: the run's own logits speak against it."""
    verify = decode_module.verify

    def second_best(trees, outputs, faults):
        verdicts = verify(trees, outputs, faults)
        for lane, (tree, verdict) in verdicts.items():
            last = ([0, *verdict.path])[-1]
            second = int(outputs[lane].logits[0, last].topk(2).indices[1])
            verdicts[lane] = tree, attrs.evolve(verdict, token_ids=(*verdict.token_ids[:-1], second))
        return verdicts

    monkeypatch.setattr(decode_module, "verify", second_best)
    _, report = audit_generation(tiny("llama", dtype), None, PROMPT, policy=WIDE, max_new_tokens=10)
    assert report.verdict == "bug"
    assert report.misread == tuple(range(10))
    assert any("its own logits say" in fault for fault in report.faults)


@pytest.mark.parametrize("exact", [None, "fixed_width"])
def test_an_output_far_longer_than_allowed_is_a_bug(exact):
    target = tiny("llama", torch.float32)
    output = greedy(target, PROMPT, 140)
    report = audit_output(target, PROMPT, output, max_new_tokens=3, exact=exact)
    assert "the output has 140 tokens where 3 were allowed" in report.faults


def test_a_reference_that_is_broken_too_does_not_hide_it(monkeypatch):
    """A fault that runner, run and reference share shows against transformers' own passes."""
    from dynatree_core import audit as audit_module

    def blind(*args, **options):
        flat = flatten(*args, **options)
        visible = flat.visible.clone()
        visible[:, :, 0] = False
        return attrs.evolve(flat, visible=visible)

    flatten = decode_module.flatten
    for module in (decode_module, audit_module):
        monkeypatch.setattr(module, "flatten", blind)
    _, report = audit_generation(tiny_model("llama"), None, PROMPT, policy=WIDE, max_new_tokens=10)
    assert report.first_difference is None
    assert report.verdict == "bug"
    assert "'autoregressive'" in report.faults[0]


def test_endings():
    target = tiny_model("llama")
    output = greedy(target, PROMPT, 12)
    end = next(position for position in range(3, 12) if output[position] not in output[:position])
    eos = output[end]
    stopped = output[: end + 1]
    options = {"eos_token_id": eos, "max_new_tokens": 12}
    assert audit_output(target, PROMPT, stopped, **options).verdict == "identical"
    assert audit_output(target, PROMPT, output, max_new_tokens=12).verdict == "identical"
    late = audit_output(target, PROMPT, output, **options)
    assert (late.verdict, late.first_difference) == ("bug", None)
    assert late.faults == (f"the output goes on after token {end}, the end token {eos}",)
    early = audit_output(target, PROMPT, stopped[:-1], **options)
    assert early.faults == (f"the output stops after {end} of 12 tokens without an end token",)
    assert audit_output(target, PROMPT, stopped[:-1], eos_token_id=eos).verdict == "identical", "no limit is known"
    assert audit_output(target, PROMPT, output, max_new_tokens=11).verdict == "bug"
    result, report = audit_generation(target, None, PROMPT, **options)
    assert (result.token_ids, report.verdict) == (stopped, "identical")


# ---- the judgement alone -------------------------------------------------------------------------------------


def _logits(draw: st.DrawFn, positions: int, vocab: int, dtype: torch.dtype) -> torch.Tensor:
    numbers = st.integers(-40, 40).map(lambda number: number / 8)  # coarse, so that ties occur
    values = draw(st.lists(numbers, min_size=positions * vocab, max_size=positions * vocab))
    return torch.tensor(values, dtype=dtype).view(positions, vocab)


@given(
    st.data(), st.integers(1, 6), st.integers(2, 12), st.sampled_from([torch.bfloat16, torch.float32, torch.float64])
)
def test_judging_agrees_with_a_plain_loop(data, positions, vocab, dtype):
    ways = {way: _logits(data.draw, positions, vocab, dtype) for way in (AUTOREGRESSIVE, VERIFIED, STEPWISE, WHOLE)}
    output = data.draw(st.lists(st.integers(0, vocab - 1), min_size=positions, max_size=positions))
    report = judge(output, ways)
    lists = {way: logits.tolist() for way, logits in ways.items()}
    largest = 0.0
    for row, other in zip(lists[STEPWISE], lists[WHOLE], strict=True):
        best = sorted(range(vocab), key=lambda token: -row[token])[:8]
        changes = [other[token] - row[token] for token in best]
        if sorted(row, reverse=True)[7:9].count(row[best[-1]]) < 2:  # else topk may take either of two equals
            largest = max(largest, max(changes) - min(changes))
            assert report.rounding.deviation >= max(changes) - min(changes)
    expected = [row.index(max(row)) for row in lists[AUTOREGRESSIVE]]
    assert [one.position for one in report.differences] == [i for i in range(positions) if expected[i] != output[i]]
    for one in report.differences:
        i = one.position
        gaps = {way: rows[i][one.expected_id] - rows[i][one.token_id] for way, rows in lists.items()}
        assert {pair.way: pair.gap for pair in one.pairs} == gaps
        assert one.deviation == max(gaps[AUTOREGRESSIVE], gaps[AUTOREGRESSIVE] - gaps[VERIFIED])
        assert report.is_tie(one) == (one.deviation <= report.rounding.bound)
    assert report.misread == tuple(i for i, row in enumerate(lists[VERIFIED]) if row.index(max(row)) != output[i])
    tops = [sorted(row)[-1] - sorted(row)[-2] for row in lists[AUTOREGRESSIVE]]
    assert list(report.top_gaps) == tops
    assert report.num_close == sum(gap <= report.rounding.bound for gap in tops)
    assert (report.verdict == "bug") == bool(report.faults)


@given(
    st.floats(2**-10, 2**10, width=32), st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64])
)
def test_spacing_is_the_distance_to_the_next_number(value, dtype):
    number = torch.tensor(value, dtype=dtype)
    above = torch.nextafter(number, torch.tensor(math.inf, dtype=dtype))
    assert _spacing(float(number), dtype) == float(above) - float(number)


def test_what_several_outputs_say_together():
    together = Rounding.of_all([Rounding(0.1, 0.01, 0.5, 3), Rounding(0.75, 0.05, 0.25, 9)])
    assert together == Rounding(0.75, pytest.approx(math.sqrt((3 * 0.01**2 + 9 * 0.05**2) / 12)), 0.5, 12)
    assert together.bound == 1.0
    assert Rounding(0.1, 0.2, 0.5, 3).bound == 2.0
    assert Rounding(3.0, 0.2, 0.5, 3).bound == 3.0


def test_the_spread_is_that_of_a_gap():
    torch.manual_seed(0)
    exact = torch.randn(400, 20, dtype=torch.float64) * 10
    ways = {way: exact + 0.01 * torch.randn_like(exact) for way in (AUTOREGRESSIVE, STEPWISE, WHOLE)}
    rounding = judge(exact.argmax(dim=1).tolist(), ways).rounding
    # two tokens' errors in two ways: four independent ones; 1.5 % is what 2,800 numbers give, so 6 % is 4 of these
    assert rounding.spread == pytest.approx(0.02, rel=0.06)


def test_what_cannot_be_audited():
    target = tiny_model("llama")
    with pytest.raises(PromptError, match="an output to audit must have at least one token"):
        audit_output(target, PROMPT, [])
    with pytest.raises(PromptError, match="at least one token"):
        audit_output(target, [], PROMPT)
    with pytest.raises(PromptError, match="output tokens must be from 0 to 36"):
        audit_output(target, PROMPT, [VOCAB])
    with pytest.raises(ContextLimitError):
        audit_output(target, PROMPT, [1] * CONTEXT)
    broken = tiny("llama", torch.float32)
    with torch.no_grad():
        broken.lm_head.weight[3] = math.nan
    with pytest.raises(NonFiniteLogitsError, match="got NaN in those computed 'autoregressive'"):
        audit_output(broken, PROMPT, [1, 2])


def test_logits_in_another_precision_are_shown():
    target = tiny("llama", torch.bfloat16)
    report = audit_output(target, PROMPT, [1, 2], precise=tiny_model("llama"))
    ways = [pair.way for pair in report.first_difference.pairs]
    assert ways == [AUTOREGRESSIVE, STEPWISE, WHOLE, f"{WHOLE}, float64"]
