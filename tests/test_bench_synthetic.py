"""The synthetic pair: its text, its acceptances, and that decoding it gives what the formulas say.

Seeds are fixed, so no test fails by chance from run to run. A statistical bound is so wide that it fails for one seed
in 10,000 (four standard errors) where all is as it should be.
"""

from __future__ import annotations

import math

import pytest
import torch

from dynatree_bench.data.synthetic import SHAPES, Shape, SyntheticPair, let_follow, rank_acceptance, synthetic_pair
from dynatree_bench.report.formulas import fixed_tokens
from dynatree_bench.run.pairs import load_synthetic
from dynatree_core import generate
from dynatree_core.errors import InputError, NonFiniteLogitsError

STANDARD_ERRORS = 4


@pytest.fixture(scope="module")
def pair() -> SyntheticPair:
    return synthetic_pair("tiny")


def drafter_probs(pair: SyntheticPair, token_ids: torch.Tensor) -> torch.Tensor:
    """[tokens, vocab]: what the drafter says behind each of these tokens."""
    with torch.no_grad():
        return pair.drafter(token_ids[None]).logits[0].double().softmax(dim=-1)


def test_the_target_says_the_source_s_text_and_nothing_twice(pair):
    prompt, text = pair.source.text(5, 10), pair.source.text(15, 40)
    ours = generate(pair.target, None, prompt, policy="autoregressive", max_new_tokens=40)
    theirs = pair.target.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=40)[0, 10:].tolist()
    assert ours.token_ids == theirs == text
    vocab_size = pair.source.vocab_size
    assert sorted(pair.source.text(7, vocab_size)) == list(range(vocab_size))
    assert pair.source.text(vocab_size - 1, 3)[1:] == pair.source.text(0, 2)  # it goes round


def test_prompts_are_pieces_of_the_text(pair):
    prompts = pair.source.prompts(4, 8)
    assert prompts[1] == pair.source.text(pair.source.vocab_size // 4, 8)
    assert len({token for prompt in prompts for token in prompt}) == 32


@pytest.mark.parametrize("rank", range(4))
def test_the_ranks_have_the_acceptances_that_are_said(pair, rank):
    share, expected = (pair.source.rank == rank).double().mean().item(), rank_acceptance(0.65, 0.6, 4)[rank]
    error = math.sqrt(expected * (1 - expected) / pair.source.vocab_size)
    assert abs(share - expected) < STANDARD_ERRORS * error


def test_acceptances_by_hand():
    assert rank_acceptance(0.65, 0.6, 4) == pytest.approx([0.65, 0.14, 0.084, 0.0504])
    assert sum(rank_acceptance(0.65, 0.6, 200)) == pytest.approx(1)
    assert rank_acceptance(0.65, 0.6, 1) == [0.65]


def test_the_drafter_puts_the_target_s_token_at_its_rank(pair):
    token_ids = torch.arange(512)
    order = drafter_probs(pair, token_ids).topk(8, dim=-1).indices
    for row, token in enumerate(token_ids.tolist()):
        rank, next_id = int(pair.source.rank[token]), int(pair.source.next_ids[token])
        assert len(set(order[row].tolist())) == 8
        if rank < 8:
            assert order[row, rank] == next_id
        else:
            assert next_id not in order[row]


def test_the_drafter_s_probabilities_are_the_source_s(pair):
    probs = drafter_probs(pair, torch.arange(64))
    first, second = probs.topk(2, dim=-1).values.T
    confidence = pair.source.confidence[:64].double()
    assert torch.allclose(first, confidence, rtol=1e-4)
    assert torch.allclose(second, (1 - confidence) * 0.4, rtol=1e-3)


def test_confidence_is_calibrated(pair):
    """Of the tokens with a confidence in one tenth of the range, the share with a right first choice is its mean."""
    confidence, is_right = pair.source.confidence.double(), pair.source.rank == 0
    bins = (confidence * 10).long().clamp(max=9)
    for i in bins.unique():
        chosen = bins == i
        mean = confidence[chosen].mean().item()
        error = math.sqrt((confidence[chosen] * (1 - confidence[chosen])).sum().item()) / int(chosen.sum())
        assert abs(is_right[chosen].double().mean().item() - mean) < STANDARD_ERRORS * error


@pytest.mark.parametrize(
    ("policy", "depth", "branch"),
    [("linear(depth=3)", 3, 1), ("fixed(depth=1,branch=4)", 1, 4), ("fixed(depth=2,branch=2)", 2, 2)],
)
@pytest.mark.parametrize("acceptance", [0.5, 0.8])
def test_decoding_gives_the_tokens_per_iteration_of_the_formulas(policy, depth, branch, acceptance):
    pair = synthetic_pair("tiny", acceptance=acceptance, seed=1)
    result = generate(pair.target, pair.drafter, pair.source.text(0, 4), policy=policy, max_new_tokens=420, tau=0.0)
    steps = result.report.steps[:100]  # of full depth: the end of the output, which clips trees, is not reached
    assert {step.depth for step in steps} == {depth}
    ranks = rank_acceptance(acceptance, 0.6, branch)
    p = sum(ranks)
    law = [p**accepted * (1 - p) for accepted in range(depth)] + [p**depth]
    mean = sum(prob * (accepted + 1) for accepted, prob in enumerate(law))
    variance = sum(prob * (accepted + 1 - mean) ** 2 for accepted, prob in enumerate(law))
    assert mean == pytest.approx(fixed_tokens(ranks, depth, branch))
    measured = sum(step.num_committed for step in steps) / len(steps)
    assert abs(measured - mean) < STANDARD_ERRORS * math.sqrt(variance / len(steps))
    assert result.token_ids == pair.source.text(4, 420)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("model_type", ["gpt_neox", "gpt2", "mistral", "gemma2"])
def test_any_architecture_and_dtype_says_the_text(model_type, dtype):
    sizes = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}
    if model_type == "gpt2":
        sizes = {"vocab_size": 300, "n_embd": 16, "n_layer": 2, "n_head": 2}
    shape = Shape({"model_type": model_type, **sizes}, {**SHAPES["tiny"].drafter, "vocab_size": 300})
    pair = synthetic_pair(shape, dtype=dtype)
    assert pair.name == f"synthetic {model_type}+llama"
    result = generate(pair.target, pair.drafter, pair.source.text(0, 4), policy="phase3", max_new_tokens=30)
    assert result.token_ids == pair.source.text(4, 30)
    assert result.report.num_accepted_tokens > 0


def test_transformers_own_assisted_generation_takes_the_pair(pair):
    prompt = pair.source.text(0, 4)
    output = pair.target.generate(
        torch.tensor([prompt]), assistant_model=pair.drafter, do_sample=False, max_new_tokens=20
    )
    assert output[0, 4:].tolist() == pair.source.text(4, 20)


def test_the_whole_forward_pass_is_done():
    """Its numbers reach the logits: weights that overflow are seen."""
    pair = synthetic_pair("tiny")
    with torch.no_grad():
        next(iter(pair.target.parameters())).fill_(float("nan"))
    with pytest.raises(NonFiniteLogitsError):
        generate(pair.target, None, [1, 2, 3], policy="autoregressive", max_new_tokens=2)


def test_a_seed_says_everything():
    one, same, other = (synthetic_pair("tiny", seed=seed) for seed in (3, 3, 4))
    assert one.source.text(0, 50) == same.source.text(0, 50) != other.source.text(0, 50)
    weights = [next(iter(pair.target.parameters())) for pair in (one, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shape": "pythia"}, r"must be one of pythia-2.8b\+70m"),
        ({"acceptance": 0.2}, "the acceptance must be above 0.286"),
        ({"acceptance": 1.0}, "below 0.9999, got 1.0"),
        ({"decay": 1.0}, "the decay must be above 0 and below 1"),
        ({"num_choices": 5000}, "more than twice the 5000 choices"),
        (
            {"shape": Shape(SHAPES["tiny"].target, {**SHAPES["tiny"].drafter, "vocab_size": 4096})},
            "got 8192 and 4096 tokens",
        ),
    ],
)
def test_what_makes_no_pair_is_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        synthetic_pair(**arguments)


def test_embeddings_alone_make_no_text(pair):
    with pytest.raises(InputError, match="must be given input_ids"):
        pair.target(inputs_embeds=torch.zeros(1, 2, 32))


def test_a_pair_may_follow_another_source_with_the_same_tables():
    def tables(pair: SyntheticPair) -> list[torch.Tensor]:
        return [table for model in (pair.target, pair.drafter) for table in model.markov_head.buffers()]

    ours, other = synthetic_pair("tiny", acceptance=0.9), synthetic_pair("tiny", acceptance=0.5)
    places = [table.data_ptr() for table in tables(ours)]
    let_follow(other.source, ours.target, ours.drafter)
    assert all(map(torch.equal, tables(ours), tables(other)))
    assert [table.data_ptr() for table in tables(ours)] == places


def test_a_synthetic_pair_has_the_numbers_of_its_name():
    def numbers(spec: str) -> tuple[float, float]:
        source = load_synthetic(spec, device="cpu").source
        return source.acceptance, source.decay

    assert [numbers("tiny"), numbers("tiny:0.7"), numbers("tiny:0.7:0.5")] == [(0.65, 0.6), (0.7, 0.6), (0.7, 0.5)]


@pytest.mark.parametrize("spec", ["tiny:high", "tiny:0.7:", "tiny:0.7:0.5:0.3"])
def test_a_synthetic_pair_has_two_numbers_at_most(spec):
    with pytest.raises(InputError, match=r"SHAPE\[:ACCEPTANCE\[:DECAY\]\] with numbers, got '" + spec):
        load_synthetic(spec, device="cpu")
