"""What a student learns, that an interrupted training ends alike, and what the student is worth."""

from __future__ import annotations

import attrs
import pytest
import torch
from character_target import Interrupted
from students import HEAD_IDS

from dynatree_bench.distill.evaluate import agreement, level_costs
from dynatree_bench.distill.prompts import Prompt
from dynatree_bench.distill.teacher import Shard, read_shard, score, write, write_shard
from dynatree_bench.distill.train import (
    Batch,
    TrainingPlan,
    batches_of,
    collate,
    divergence,
    frequent_tokens,
    scored_logits,
    train,
)
from dynatree_bench.studies.drafter_value import replayed
from dynatree_core import build_drafter, generate
from dynatree_core.drafters.model import ModelDrafter
from dynatree_core.models.architectures import EXACT_FAMILIES
from dynatree_core.models.student import new_student
from dynatree_core.testing.models import VOCAB, perturbed, tiny_model


def said_by(model, num_texts=24, length=20) -> Shard:
    generator = torch.Generator().manual_seed(0)
    return score(model, torch.randint(VOCAB, (num_texts, length), generator=generator))


@pytest.mark.parametrize(("family", "stopped_after"), [("llama", 1), ("llama", 20), ("llama", 33), ("gpt2", 33)])
def test_an_interrupted_training_ends_with_the_same_weights(family, stopped_after, tmp_path):
    """Also where the target's configuration has dropout, as that of gpt2 does."""
    target, plan = tiny_model(family), TrainingPlan(6, batch_tokens=64, checkpoint_seconds=0)
    shards = [said_by(target)]
    whole = new_student(target, [0], HEAD_IDS)
    course = train(whole, shards, VOCAB, plan, tmp_path / "whole", lambda *_: None)
    assert len(course) >= 2

    def interrupt(done, total, loss):
        if done == stopped_after:
            raise Interrupted

    with pytest.raises(Interrupted):
        train(new_student(target, [0], HEAD_IDS), shards, VOCAB, plan, tmp_path / "parts", interrupt)
    resumed = new_student(target, [0], HEAD_IDS)
    steps = []
    often = attrs.evolve(plan, checkpoint_seconds=1)  # how often it is stored is no part of a training
    assert train(resumed, shards, VOCAB, often, tmp_path / "parts", lambda done, *_: steps.append(done)) == course
    assert steps[0] == (stopped_after // 20) * 20 + 1, "from the last checkpoint on"
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name]), name


@pytest.mark.parametrize(
    "change",
    [
        {"layers": [1]}, {"layers": [0, 1]}, {"head_ids": HEAD_IDS[1:]}, {"head_ids": torch.arange(HEAD_IDS.numel())},
        {"num_texts": 23}, {"temperature": 0.5}, {"num_epochs": 2}, {"learning_rate": 2e-3}, {"seed": 1},
        {"batch_tokens": 100}, {"warm_up": 0.5}, {"weight_decay": 0.1}, {"max_gradient": 0.1},
    ],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_another_training_has_a_checkpoint_of_its_own(change, tmp_path):
    """Beside a finished training it begins anew, and ends as it does alone."""
    target = tiny_model("llama")

    def trained(folder, layers=(0,), head_ids=HEAD_IDS, num_texts=24, temperature=1.0, **settings):
        student, steps = new_student(target, layers, head_ids), []
        shard = said_by(target, num_texts)
        shard = attrs.evolve(shard, top_logprobs=shard.top_logprobs / temperature)
        plan = TrainingPlan(**{"num_epochs": 1, "batch_tokens": 200, **settings})
        train(student, [shard], VOCAB, plan, folder, lambda done, *_: steps.append(done))
        return student.state_dict(), steps

    _, first = trained(tmp_path)
    assert len(first) > 1
    assert trained(tmp_path)[1] == [], "a finished training has nothing left to do"
    beside, steps = trained(tmp_path, **change)
    assert steps[0] == 1
    alone, _ = trained(tmp_path / "alone", **change)
    assert all(torch.equal(weight, alone[name]) for name, weight in beside.items())


@pytest.mark.parametrize("family", EXACT_FAMILIES)
def test_what_is_judged_and_learnt_is_what_the_model_says(family):
    """Some families scale or cap what their head says; the logits are those of the forward that drafts."""
    target = tiny_model(family, **({"logit_scale": 0.1} if family.startswith("cohere") else {}))
    text = torch.tensor([[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]])
    with torch.inference_mode():
        said = target(text).logits.log_softmax(-1)
    shard = score(target, text)
    known = said.flatten(0, 1).gather(1, shard.top_ids.long())
    torch.testing.assert_close(shard.top_logprobs.double(), known, atol=1e-2, rtol=1e-3)
    student = new_student(target, [0, 1], torch.arange(VOCAB), dtype=torch.float64)
    is_scored = torch.tensor([[False, True, True, False, False, False], [False, False, True, True, True, False]])
    batch = Batch(text, is_scored, shard.top_ids[:5], shard.top_logprobs[:5])
    with torch.inference_mode():
        found = scored_logits(student, batch).log_softmax(-1)
    torch.testing.assert_close(found.double(), said[is_scored], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("policy", ["linear", "fixed(depth=3,branch=3,tau=0.0)", "phase3"])
def test_a_replay_is_a_real_run_without_the_target(policy):
    """The same tokens and the same trees, for a model that drafts and for prompt_lookup."""
    target, drafter = tiny_model("llama"), ModelDrafter(perturbed("llama", noise=0.02))
    shard = write(target, [Prompt((1, 2, 3), 0.0), Prompt((5, 6), 0.0)], num_new=30, end_ids=[], pad_id=0, seed=0)
    for source in (drafter, build_drafter("prompt_lookup")):
        for index, prompt in enumerate([[1, 2, 3], [5, 6]]):
            real = generate(target, source, prompt, policy=policy, max_new_tokens=30).report
            session = replayed(shard, index, target, source, policy)
            assert session.steps == list(real.steps)
            assert real.num_iterations < 30 or source is not drafter


def test_a_shard_survives_its_file(tmp_path):
    shard = said_by(tiny_model("llama"))
    write_shard(shard, tmp_path / "one.safetensors")
    found = read_shard(tmp_path / "one.safetensors")
    for field in attrs.fields(Shard):
        assert torch.equal(getattr(found, field.name), getattr(shard, field.name))
    assert [file.name for file in tmp_path.iterdir()] == ["one.safetensors"]


def test_batches_hold_every_text_once():
    shards = [said_by(tiny_model("llama"), 5, 12), said_by(tiny_model("llama"), 7, 30)]
    batches = batches_of(shards, 64)
    assert sorted(text for batch in batches for text in batch) == [
        (s, i) for s, n in ((0, 5), (1, 7)) for i in range(n)
    ]
    for texts in batches:
        assert collate(shards, texts, torch.device("cpu")).token_ids.numel() <= 64


def test_divergence_is_that_of_the_whole_distributions():
    """With all tokens known and all of them named it is KL itself; with a restricted head the rest is one outcome."""
    torch.manual_seed(0)
    target, student = torch.randn(5, 8).log_softmax(-1), torch.randn(5, 8)
    top = target.topk(8)
    whole = divergence(student, torch.arange(8), top.indices, top.values)
    q = student.log_softmax(-1)
    expected = (target.exp() * (target - q)).sum(-1).mean()
    torch.testing.assert_close(whole, expected, atol=2e-5, rtol=1e-4)
    known = torch.tensor([0, 2, 3, 7])
    output_of = torch.full((8,), -1)
    output_of[known] = torch.arange(4)
    part = divergence(student[:, known], output_of, top.indices, top.values)
    q = student[:, known].log_softmax(-1)
    p = target[:, known].exp()
    tail_p = 1 - p.sum(-1)
    expected = ((p * (p.log() - q)).sum(-1) + tail_p * (tail_p.log() - torch.tensor(1e-6).log())).mean()
    torch.testing.assert_close(part, expected, atol=2e-4, rtol=1e-3)


def test_frequent_tokens_are_those_that_the_target_expects():
    shard = said_by(tiny_model("llama"))
    weight = torch.zeros(VOCAB)
    weight.index_add_(0, shard.top_ids.flatten().long(), shard.top_logprobs.float().exp().flatten())
    assert set(frequent_tokens([shard], VOCAB, 5).tolist()) == set(weight.topk(5).indices.tolist())
    assert frequent_tokens([shard], VOCAB, 10 * VOCAB).tolist() == list(range(VOCAB))


def test_agreement_of_the_target_with_itself_and_of_a_worse_one():
    target = tiny_model("llama")
    shards = [said_by(target)]
    itself = agreement(new_student(target, [0, 1], torch.arange(VOCAB)).eval(), shards, torch.float32)
    assert itself.top1 == itself.covered == 1
    assert itself.chain(6) == 7
    worse = agreement(new_student(target, [1], HEAD_IDS).eval(), shards, torch.float32)
    assert 0 < worse.top1 < worse.top3 < worse.covered < 1
    assert sum(worse.rank_acceptance) <= worse.covered
    assert sum(worse.counts) == worse.num_positions == shards[0].num_scored
    assert 1 < worse.chain(6) < worse.tree(6, 2)


def test_costs_of_levels():
    target = tiny_model("llama")
    student = new_student(target, [0], HEAD_IDS, dtype=torch.float64).eval()
    costs = level_costs(student, target, (1, 4), context=16, repeats=3)
    assert [cost.width for cost in costs] == [1, 4]
    assert all(0 < cost.ratio.low <= cost.ratio.median <= cost.ratio.high for cost in costs)
