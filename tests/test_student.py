"""Students: what they share with their target, what is stored of them, and drafting with them."""

from __future__ import annotations

import copy
import gc
import json
import os
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from students import HEAD_IDS, drafter_of_each_kind, tiny_student

from dynatree_core import DraftPlan, Proposals, TokenTree, build_drafter, generate
from dynatree_core.clock import StageClock
from dynatree_core.drafters.base import Drafter, DraftState, padded_proposals
from dynatree_core.drafters.distilled import DistilledDrafter, fast_dtype
from dynatree_core.drafters.model import ModelDrafter
from dynatree_core.drafters.union import UnionDrafter, backed_off
from dynatree_core.engine.costs import measured_costs
from dynatree_core.errors import ModelLoadError, ParameterError, VocabularyMismatchError
from dynatree_core.models.kept import kept_of
from dynatree_core.models.student import CARD, WEIGHTS, is_student, load_student, new_student, save_student
from dynatree_core.plugins.registry import DRAFTERS, plugin_table
from dynatree_core.testing import assert_drafter_contract, assert_lossless
from dynatree_core.testing import strategies as ours
from dynatree_core.testing.models import VOCAB, greedy, perturbed, tiny_model, tiny_variant

CPU = torch.device("cpu")
FAMILIES = ["llama", "gpt_neox", "gpt2", "gemma2", "qwen3"]


def plan_for(target):
    return DraftPlan(VOCAB, 64, 32, CPU, StageClock(CPU), target, store=kept_of(target))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_of_all_layers_and_tokens_is_its_target(family):
    target = tiny_model(family)
    student = new_student(target, [0, 1], torch.arange(VOCAB), dtype=torch.float64).eval()
    token_ids = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]])
    with torch.inference_mode():
        torch.testing.assert_close(student(token_ids).logits, target(token_ids).logits, rtol=0, atol=1e-12)


WITH_DENSE_LAYERS = {
    "deepseek_v3": {},  # the first layer has no experts
    "qwen2_moe": {"mlp_only_layers": (0,)},
    "qwen3_moe": {"decoder_sparse_step": 2},
}


@pytest.mark.parametrize("family", WITH_DENSE_LAYERS)
def test_any_layers_of_a_target_of_which_some_have_no_experts(family):
    target = tiny_model(family, **WITH_DENSE_LAYERS[family])
    whole = dict(target.state_dict())
    for layers in ([0], [1], [0, 1], [1, 1]):
        own = new_student(target, layers, HEAD_IDS, dtype=torch.float64).state_dict()
        for place, layer in enumerate(layers):
            begin, origin = f"model.layers.{place}.", f"model.layers.{layer}."
            found = {name.removeprefix(begin): own[name] for name in own if name.startswith(begin)}
            assert found.keys() == {name.removeprefix(origin) for name in whole if name.startswith(origin)}
            assert all(torch.equal(weight, whole[origin + name].to(weight.dtype)) for name, weight in found.items())
    if family == "deepseek_v3":
        with pytest.raises(ValueError, match=r"without experts, those below 1, must come first, got \[1, 0\]"):
            new_student(target, [1, 0], HEAD_IDS)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_restricted_head_says_its_tokens_as_before_and_no_others(family):
    """Against the whole head: the same logits for its tokens, normalised among themselves."""
    target = tiny_model(family)
    whole = new_student(target, [1], torch.arange(VOCAB), dtype=torch.float64).eval()
    part = new_student(target, [1], HEAD_IDS, dtype=torch.float64).eval()
    text = torch.tensor([3, 1, 4, 1, 5])
    plan = plan_for(target)
    with torch.inference_mode():
        states = [ModelDrafter(student).start(plan) for student in (whole, part)]
        proposals = []
        for state in states:
            state.prefill(text[:-1])
            proposals.append(state.propose(text, TokenTree.root(text[-1:]), VOCAB))
    dense = [torch.full((VOCAB,), -torch.inf).index_put((p.token_ids[0],), p.logprobs[0]) for p in proposals]
    among_them = dense[0][HEAD_IDS] - dense[0][HEAD_IDS].logsumexp(0)
    torch.testing.assert_close(proposals[1].logprobs[0].max(), among_them.max(), rtol=1e-5, atol=1e-6)
    said = proposals[1].logprobs[0] > -torch.inf
    assert set(proposals[1].token_ids[0][said].tolist()) == set(HEAD_IDS.tolist())
    order = proposals[1].token_ids[0][said]
    torch.testing.assert_close(
        proposals[1].logprobs[0][said], dense[0][order] - dense[0][HEAD_IDS].logsumexp(0), rtol=1e-5, atol=1e-6
    )


def test_a_student_copies_and_changes_nothing_of_its_target():
    target = tiny_model("llama")
    before = {name: weight.clone() for name, weight in target.state_dict().items()}
    student = tiny_student(target)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.5)
    student(torch.tensor([[1, 2, 3]])).logits.square().mean().backward()
    optimizer.step()
    assert all(torch.equal(before[name], weight) for name, weight in target.state_dict().items())
    assert all(weight.grad is None for weight in target.parameters())
    names = set(student.state_dict())
    assert names
    assert not any("embed" in name or "lm_head" in name for name in names)
    student.to(torch.float32)
    assert target.dtype == torch.float64


def test_layers_that_are_not_there():
    for layers in ([], [2], [-1]):
        with pytest.raises(ValueError, match="from 0 to 1"):
            new_student(tiny_model("llama"), layers, HEAD_IDS)


def test_layers_are_what_they_were_in_the_target():
    """SmolLM3 says of each layer whether it turns its heads; StableLM's layers have lists of norms inside."""
    target: Any = tiny_model("smollm3")
    student: Any = new_student(target, [1, 0], HEAD_IDS, dtype=torch.float64)
    turned = [[layer.self_attn.use_rope for layer in model.model.layers] for model in (target, student)]
    assert turned[0] == turned[1][::-1] == [1, 0]
    target = tiny_variant("stablelm, parallel")
    student = new_student(target, [1], HEAD_IDS, dtype=torch.float64)
    norms = [model.model.layers[-1].self_attn.q_layernorm.norms[3].weight for model in (target, student)]
    assert torch.equal(*norms)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_stored_is_what_is_loaded(family, tmp_path):
    target = tiny_model(family)
    student = tiny_student(target)
    save_student(student, tmp_path, torch.float64, {"target": "tiny"})
    loaded = load_student(tmp_path, target, torch.float64)
    token_ids = torch.tensor([[3, 1, 4, 1, 5]])
    with torch.inference_mode():
        assert torch.equal(student(token_ids).logits, loaded(token_ids).logits)
    assert is_student(tmp_path)
    own = sum(weight.numel() * 8 for weight in student.state_dict().values())
    assert (tmp_path / "student.safetensors").stat().st_size < own + 8 * VOCAB + 4096, "the embeddings are not stored"


def test_a_folder_that_holds_no_student(tmp_path):
    target = tiny_model("llama")
    with pytest.raises(ModelLoadError, match="dynatree distill"):
        build_drafter(f"distilled(path={str(tmp_path)!r})")
    save_student(tiny_student(target), tmp_path, torch.float32, {"target": "tiny"})
    (tmp_path / "student.safetensors").write_bytes(b"damaged")
    with pytest.raises(ModelLoadError, match=r"dynatree distill.*Error"):
        load_student(tmp_path, target, torch.float32)


@pytest.mark.parametrize("damage", ["card", "missing", "shape", "tokens"])
def test_a_damaged_folder(damage, tmp_path):
    target = tiny_model("llama")
    save_student(tiny_student(target), tmp_path, torch.float32, {"target": "tiny"})
    weights = load_file(tmp_path / WEIGHTS)
    name = next(name for name in weights if name.endswith("q_proj.weight"))
    if damage == "card":
        (tmp_path / CARD).write_text("[]")
    elif damage == "missing":
        del weights[name]
    elif damage == "shape":
        weights[name] = weights[name][1:].contiguous()
    else:
        weights["head_ids"] += VOCAB
    save_file(weights, tmp_path / WEIGHTS)
    with pytest.raises(ModelLoadError, match=r"expected a folder made by `dynatree distill`, got \w+Error .*again"):
        load_student(tmp_path, target, torch.float32)


def test_another_target(tmp_path):
    save_student(tiny_student(tiny_model("llama")), tmp_path, torch.float32, {"target": "tiny"})
    card = json.loads((tmp_path / "student.json").read_text())
    (tmp_path / "student.json").write_text(json.dumps({**card, "hidden_size": 64}))
    with pytest.raises(VocabularyMismatchError, match=r"its target, tiny: 37 tokens of 64 numbers.* 37 of 32"):
        generate(tiny_model("llama"), DistilledDrafter(str(tmp_path)), [1, 2], max_new_tokens=2)


def test_a_target_that_was_given_fewer_tokens(tmp_path):
    target: Any = copy.deepcopy(tiny_model("llama"))
    save_student(tiny_student(target), tmp_path, torch.float64, {"target": "llama"})
    drafter = DistilledDrafter(str(tmp_path))
    generate(target, drafter, [1, 2, 3], max_new_tokens=4)
    target.resize_token_embeddings(VOCAB - 5)
    with pytest.raises(VocabularyMismatchError, match=r"shares the embeddings of its target, llama: 37 .* 32 of 32"):
        generate(target, drafter, [1, 2, 3], max_new_tokens=4)


def test_the_distilled_drafter_by_name(tmp_path):
    target = tiny_model("llama")
    save_student(tiny_student(target), tmp_path, torch.float32, {"target": "tiny"})
    text = f"distilled(path={str(tmp_path)!r},dtype='float64')"
    drafter = build_drafter(text)
    assert str(drafter) == text
    assert str(build_drafter("distilled")) == "distilled"
    result = generate(target, drafter, [1, 2, 3], policy="fixed", max_new_tokens=40)
    assert result.token_ids == greedy(target, [1, 2, 3], 40)
    assert result.report.num_accepted_tokens > 0
    with pytest.raises(ParameterError, match="dtype must be one of auto"):
        build_drafter("distilled(dtype='int8')")


def test_a_student_is_loaded_once_a_target(tmp_path):
    first, second = tiny_model("llama"), perturbed("llama", noise=0.1)
    save_student(tiny_student(first), tmp_path, torch.float32, {"target": "tiny"})
    models = [DistilledDrafter(str(tmp_path)).start(plan_for(t)).passes.runner.model for t in (first, second, first)]
    assert models[0] is models[2] is not models[1]
    assert DistilledDrafter(str(tmp_path), "float64").start(plan_for(first)).passes.runner.model is not models[0]
    save_student(tiny_student(second), tmp_path, torch.float32, {"target": "tiny"})
    os.utime(tmp_path / WEIGHTS, ns=(0, 0))
    assert DistilledDrafter(str(tmp_path)).start(plan_for(first)).passes.runner.model is not models[0]


def test_a_student_goes_with_its_target(tmp_path):
    """What is kept for later generations with a target must not keep the target alive, nor outlive it."""
    target = copy.deepcopy(tiny_model("llama"))
    save_student(tiny_student(target), tmp_path, torch.float32, {"target": "tiny"})
    drafter = DistilledDrafter(str(tmp_path))
    for _ in range(2):
        generate(target, drafter, [1, 2, 3], policy="fixed", max_new_tokens=9)
    [student] = [value for key, value in kept_of(target).items() if key[0] == "distilled"]
    held = weakref.ref(target), weakref.ref(student)
    del target, student
    gc.collect()
    assert [one() for one in held] == [None, None]


def test_a_student_that_is_kept_may_be_used_in_any_mode(tmp_path):
    """Also if costs were measured first, which is done in inference mode: such tensors count no changes."""
    target = tiny_model("llama")
    save_student(tiny_student(target), tmp_path, torch.float32, {"target": "tiny"})
    plan = DraftPlan(VOCAB, 64, 32, CPU, StageClock(CPU), target)
    with torch.inference_mode():
        state = DistilledDrafter(str(tmp_path)).start(plan)
    assert not any(tensor.is_inference() for tensor in state.passes.runner.model.state_dict(keep_vars=True).values())


def test_costs_are_measured_with_the_student_that_generations_use(tmp_path, monkeypatch):
    monkeypatch.setattr("dynatree_core.engine.costs.folder", lambda: tmp_path / "costs")
    target, loaded = tiny_model("llama"), []
    save_student(tiny_student(target), tmp_path, torch.float32, {"target": "tiny"})
    load = load_student
    monkeypatch.setattr(
        "dynatree_core.drafters.distilled.load_student", lambda *given: loaded.append(given) or load(*given)
    )
    known = {}
    measured_costs(target, DistilledDrafter(str(tmp_path)), rounds=1, patience=0.0, known=known)
    DistilledDrafter(str(tmp_path)).start(attrs.evolve(plan_for(target), store=known))
    assert len(loaded) == 1


def test_threads_that_begin_at_once_load_a_student_once(tmp_path, monkeypatch):
    target, loaded = tiny_model("llama"), []
    save_student(tiny_student(target), tmp_path, torch.float32, {"target": "tiny"})

    def slow(*arguments):
        loaded.append(arguments)
        time.sleep(0.05)
        return load_student(*arguments)

    monkeypatch.setattr("dynatree_core.drafters.distilled.load_student", slow)
    plan = DraftPlan(VOCAB, 64, 32, CPU, StageClock(CPU), target)
    with ThreadPoolExecutor(3) as pool:
        states = list(pool.map(lambda _: DistilledDrafter(str(tmp_path)).start(plan), range(3)))
    assert len({state.passes.runner.model for state in states}) == len(loaded) == 1


def test_bfloat16_where_the_device_has_it(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    assert fast_dtype(torch.device("cpu")) == torch.bfloat16
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True}, raising=False)
    assert fast_dtype(torch.device("cpu")) == torch.float32
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert fast_dtype(torch.device("cpu")) == torch.float32
    assert fast_dtype(torch.device("cuda")) == torch.bfloat16


@pytest.mark.parametrize(("reason", "expected"), [(None, torch.float32), ("no library", torch.bfloat16)])
def test_float32_where_the_native_runner_can_be_used(monkeypatch, tmp_path, reason, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    monkeypatch.setattr("dynatree_core.ops.reason_unavailable", lambda: reason)
    save_student(new_student(tiny_model("llama"), [0], torch.arange(4)), tmp_path, torch.float32, {})
    for device, dtype in (("cpu", expected), ("cuda", torch.bfloat16)):
        (weights,) = DistilledDrafter(str(tmp_path)).own_weights(torch.device(device))
        assert weights.dtype == dtype
        (weights,) = DistilledDrafter(str(tmp_path), "float16").own_weights(torch.device(device))
        assert weights.dtype == torch.float16


def test_there_is_a_drafter_of_each_kind_here():
    for_adapted_targets = {"adapter_off"}  # see tests/libraries/test_adapter_off.py
    assert set(drafter_of_each_kind(tiny_model("llama"))) == set(plugin_table(DRAFTERS)) - for_adapted_targets


@pytest.mark.parametrize("kind", ["distilled", "union"])
def test_they_keep_to_the_contract(kind):
    target = tiny_model("llama")
    assert_drafter_contract(drafter_of_each_kind(target)[kind], target=target, max_examples=30)
    assert_lossless(ours.stacks(), drafter=drafter_of_each_kind(target)[kind], max_examples=15)


@given(data=st.data())
def test_a_union_backs_off(data):
    """Against dictionaries: p = p_last + (1 − Σ p_last) · p_before, the k best of it."""
    k = data.draw(st.integers(1, 5))
    rows = []
    for _ in range(2):
        ids = data.draw(st.lists(st.integers(0, 9), min_size=k, max_size=k, unique=True))
        weights = data.draw(st.lists(st.integers(0, 8), min_size=k, max_size=k))
        probs = sorted((weight / (sum(weights) + 1) for weight in weights), reverse=True)
        rows.append((ids, probs))
    (first_ids, first), (second_ids, second) = rows
    expected = {token: p for token, p in zip(first_ids, first, strict=True) if p > 0}
    for token, p in zip(second_ids, second, strict=True):
        if p * (1 - sum(first)) > 0:
            expected[token] = expected.get(token, 0) + p * (1 - sum(first))
    union = backed_off(*(Proposals(torch.tensor([ids]), torch.tensor([probs]).log()) for ids, probs in rows), k)
    found = {
        token: logprob
        for token, logprob in zip(union.token_ids[0].tolist(), union.logprobs[0].exp().tolist(), strict=True)
        if logprob > 0
    }
    assert union.logprobs.shape == (1, k)
    assert sorted(found.values(), reverse=True) == pytest.approx(sorted(expected.values(), reverse=True)[:k], abs=1e-6)
    assert all(expected[token] == pytest.approx(p, abs=1e-6) for token, p in found.items())
    assert union.logprobs[0].tolist() == sorted(union.logprobs[0].tolist(), reverse=True)


def test_a_union_proposes_what_either_knows():
    """The model knows nothing of a text without repetition's copy; the lookup nothing else."""
    target = tiny_model("llama")
    union = UnionDrafter([ModelDrafter(target), build_drafter("prompt_lookup")])
    assert str(union) == f"{union.drafters[0]}+prompt_lookup"
    result = generate(target, union, [1, 2, 3, 4], policy="linear", max_new_tokens=40)
    assert result.token_ids == greedy(target, [1, 2, 3, 4], 40)
    assert result.report.tokens_per_iteration > 3, "the model alone would be accepted wholly"


class Sure(Drafter):
    """Says that the next token is one more, with a probability; with `only_even` where the last one is even."""

    def __init__(self, probability: float, *, only_even: bool = False) -> None:
        self.probability, self.only_even = probability, only_even

    def start(self, plan: DraftPlan) -> SureState:
        return SureState(self)


class SureState(DraftState):
    def __init__(self, drafter: Sure) -> None:
        self.drafter = drafter

    def prefill(self, committed_ids):
        pass

    def propose(self, committed_ids, tree, k):
        token_ids = tree.token_ids[tree.last_level]
        is_known = (token_ids % 2 == 0) | (not self.drafter.only_even)
        probs = torch.where(is_known, self.drafter.probability, 0.0)
        return padded_proposals(((token_ids + 1) % VOCAB)[:, None], probs[:, None].log(), k)

    def commit(self, draft_path):
        pass

    def rollback(self):
        pass


@pytest.mark.parametrize(("probability", "asked"), [(0.95, 0), (0.5, 0), (0.2, 4)])
@pytest.mark.parametrize("is_nested", [False, True])
def test_a_model_is_not_asked_where_the_last_drafter_knows_enough(probability, asked, is_nested):
    """About any level of a tree of 4, or about all of them; the proposals say which it was."""
    target, passes = tiny_model("llama"), []
    drafter = ModelDrafter(perturbed("llama"))
    union = UnionDrafter([drafter, Sure(probability)])
    state = (UnionDrafter([union, Sure(0.01)]) if is_nested else union).start(plan_for(target))
    model = (state.states[0] if is_nested else state).states[0]
    model.passes.forward = counted(model.passes.forward, passes)
    text = torch.tensor([1, 2, 3])
    tree = TokenTree.root(text[-1:])
    with torch.inference_mode():
        model.prefill(text[:-1])
        del passes[:]
        for depth in range(4):
            proposals = state.propose(text, tree, 2)
            assert asked or proposals.token_ids[0, 0] == 4 + depth
            assert proposals.is_free == (not asked and not is_nested)  # of a union in a union nothing is said
            tree = tree.grow(torch.tensor([depth]), proposals.token_ids[0, :1], proposals.logprobs[0, :1])
    assert len(passes) == asked


def counted(function, calls):
    def call(*args, **kwargs):
        calls.append(args)
        return function(*args, **kwargs)

    return call


@pytest.mark.parametrize("last", [Sure(0.1), Sure(0.95), Sure(1.0), Sure(0.95, only_even=True)])
def test_a_union_that_skips_levels_keeps_to_the_contract(last):
    """The model is asked about all levels, about none, or about some of a tree and in some iterations."""
    target = tiny_model("llama")
    union = UnionDrafter([ModelDrafter(perturbed("llama")), last])
    assert_drafter_contract(union, target=target, max_examples=20)
    assert_lossless(ours.stacks(), drafter=union, max_examples=10)


def test_loading_draws_no_random_numbers(tmp_path):
    """Sampling without a seed draws from torch's own generator, whose numbers must be those that generate() gets."""
    target = tiny_model("llama")
    save_student(tiny_student(target), tmp_path, torch.float32, {"target": "tiny"})
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    load_student(tmp_path, target, torch.float64)
    assert torch.equal(torch.rand(1), expected)


def test_a_card_that_lacks_its_sizes(tmp_path):
    target = tiny_model("llama")
    save_student(tiny_student(target), tmp_path, torch.float32, {"target": "tiny"})
    (tmp_path / CARD).write_text('{"target": "tiny"}')
    with pytest.raises(ModelLoadError, match="vocab_size"):
        load_student(tmp_path, target, torch.float64)
