"""The packed runner: the same pass, computed with copies of the weights. Rounding apart, nothing may differ."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import click
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from students import HEAD_IDS
from test_architectures import bushy_tree
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from dynatree_core import generate, ops
from dynatree_core.cache.tree_cache import TreeCache
from dynatree_core.cli.generate import generate as generate_command
from dynatree_core.clock import StageClock
from dynatree_core.drafters.model import ModelDrafter
from dynatree_core.errors import ParameterError, UnknownPluginError
from dynatree_core.models.architectures import EXACT_FAMILIES
from dynatree_core.models.kept import kept_of
from dynatree_core.models.student import new_student
from dynatree_core.plugins.registry import runner_names
from dynatree_core.runners.choice import make_runner, runner_for
from dynatree_core.runners.packed import ATTENTION, PackedRunner, can_pack, grouped_attention, packed_bytes
from dynatree_core.runners.passes import Passes
from dynatree_core.testing import strategies as ours
from dynatree_core.testing.models import VOCAB, greedy, perturbed, tiny_model
from dynatree_core.tree.flatten import flatten

CPU = torch.device("cpu")
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]


def single(family: str, dtype: torch.dtype = torch.float32, **overrides: object) -> nn.Module:
    """A tiny model of its own, in single precision."""
    return copy.deepcopy(tiny_model(family, **overrides)).to(dtype)


def single_student(target: nn.Module) -> nn.Module:
    return new_student(target, [0, 1], HEAD_IDS).eval()


needs_kernels = pytest.mark.skipif(
    not can_pack(single("llama")), reason="this build of torch has no oneDNN kernels to pack weights for"
)
pytestmark = needs_kernels


def tree_logits(model: nn.Module, name: str) -> torch.Tensor:
    """[nodes, vocab] of one pass over a tree behind a prompt."""
    passes, cache = Passes(make_runner(model, name, kept=kept_of(model)), StageClock(CPU)), TreeCache(64)
    with torch.inference_mode():
        passes.prefill(torch.tensor(PROMPT), cache)
        return passes.forward(flatten([bushy_tree()], [cache.length]), cache, stage="verify").logits[0]


def pack(model: nn.Module) -> nn.Module:
    """The packed copy that a generation with this model gets."""
    return PackedRunner.make(model, kept_of(model)).twin


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", EXACT_FAMILIES)
def test_a_packed_pass_is_the_plain_pass_up_to_rounding(family, dtype):
    model = single(family, dtype)
    if not can_pack(model):
        pytest.skip("this CPU does not multiply in bfloat16")
    tolerance = 2e-4 if dtype == torch.float32 else 0.15
    plain, packed = tree_logits(model, "eager").float(), tree_logits(model, "packed").float()
    scale = plain.abs().amax()
    torch.testing.assert_close(packed / scale, plain / scale, rtol=0, atol=tolerance)


def test_layers_that_read_the_same_rows_are_one_product():
    model = single("llama")
    twin = pack(model)
    attention, mlp = twin.model.layers[0].self_attn, twin.model.layers[0].mlp
    assert attention.q_proj.product is attention.k_proj.product is attention.v_proj.product
    assert mlp.gate_proj.product is mlp.up_proj.product is not mlp.down_proj.product
    tree_logits(model, "packed")
    assert pack(model) is twin
    assert attention.q_proj.product._last is None, "what a pass computed is not kept"


def test_only_layers_alike_are_one_product():
    model = single("llama")
    attention = model.model.layers[0].self_attn
    attention.k_proj.bias = nn.Parameter(torch.randn(attention.k_proj.out_features))
    attention = model.model.layers[1].self_attn
    attention.v_proj = nn.Linear(attention.v_proj.in_features, attention.v_proj.out_features, False).bfloat16()
    twin = pack(model)
    for layer in twin.model.layers[:2]:
        assert layer.self_attn.q_proj.product is not layer.self_attn.k_proj.product
        assert layer.mlp.gate_proj.product is layer.mlp.up_proj.product


def test_layers_that_are_used_at_two_places_are_packed_once():
    model = single("llama")
    first, second = model.model.layers[:2]
    second.self_attn.k_proj = first.self_attn.k_proj
    second.mlp.up_proj = second.mlp.gate_proj
    twin = pack(model)
    first, second = twin.model.layers[:2]
    assert first.self_attn.q_proj.product is first.self_attn.k_proj.product is not second.self_attn.q_proj.product
    plain, packed = tree_logits(model, "eager"), tree_logits(model, "packed")
    torch.testing.assert_close(packed, plain, rtol=0, atol=2e-4 * float(plain.abs().amax()))


def projections() -> tuple[list[nn.Linear], list[nn.Linear]]:
    """Queries, keys and values of a layer, plain ones with biases, and their one product."""
    attention = single("qwen2").model.layers[0].self_attn
    plain = [attention.q_proj, attention.k_proj, attention.v_proj]
    for layer in plain:
        nn.init.normal_(layer.bias)
    model = single("qwen2")
    model.model.layers[0].self_attn.load_state_dict(attention.state_dict())
    attention = pack(model).model.layers[0].self_attn
    return plain, [attention.q_proj, attention.k_proj, attention.v_proj]


@given(data=st.data())
def test_each_layer_of_a_product_gets_its_own_rows(data):
    """In whatever order, for whatever rows, and as often as they are asked."""
    inputs = torch.randn(3, 1, 4, 32)
    calls = st.tuples(st.integers(0, 2), st.integers(0, 2))
    with torch.inference_mode():
        views = list(inputs)
        for layer, rows in data.draw(st.lists(calls, max_size=12)):
            torch.testing.assert_close(_joint[layer](views[rows]), _plain[layer](views[rows]), rtol=1e-4, atol=1e-4)


_plain, _joint = projections()


def test_threads_share_a_product():
    barrier = threading.Barrier(4)

    def passes(_: int) -> None:
        for _ in range(200):
            rows = torch.randn(1, 4, 32)
            barrier.wait(timeout=60)
            for layer, expected in zip(_joint, _plain, strict=True):
                torch.testing.assert_close(layer(rows), expected(rows), rtol=1e-4, atol=1e-4)

    with ThreadPoolExecutor(4) as pool, torch.inference_mode():
        list(pool.map(passes, range(4)))


@pytest.mark.parametrize("family", sorted(set(EXACT_FAMILIES) - {"falcon"}))  # its linear layers are of its own class
def test_every_family_is_packed(family):
    """So that a family whose layers are of another kind is noticed."""
    model = single(family)
    matrices = [weight for weight in model.parameters() if weight.dim() == 2]
    assert packed_bytes(model) > 0.5 * sum(4 * matrix.numel() for matrix in matrices)


def check_the_same_up_to_a_tie(model: nn.Module, prompt: list[int], found: list[int], expected: list[int]) -> None:
    """In single precision two logits may be equal up to rounding, about once in 100,000 tokens of such models."""
    if found == expected:
        return
    place = [a == b for a, b in zip(found, expected, strict=True)].index(False)
    with torch.inference_mode():
        logits = copy.deepcopy(model).double()(torch.tensor([[*prompt, *expected[:place]]])).logits[0, -1]
    gap = float(logits[expected[place]] - logits[found[place]])
    assert abs(gap) < 1e-4, f"token {place} is {found[place]} instead of {expected[place]}, {gap} below it"


def test_what_counts_as_a_tie():
    model, expected = _singles["llama"], greedy(_singles["llama"], PROMPT, 6)
    wrong = [*expected[:3], (expected[3] + 1) % VOCAB, *expected[4:]]
    with pytest.raises(AssertionError, match="token 3 is"):
        check_the_same_up_to_a_tie(model, PROMPT, wrong, expected)


@settings(max_examples=60)
@given(data=st.data())
def test_packed_generations_are_greedy(data):
    """Whatever tree: the tokens are those of the model's own greedy decoding, and of plain packed decoding."""
    family = data.draw(st.sampled_from(["llama", "gpt2", "qwen3", "gemma2"]))
    model = _singles[family]
    prompt = data.draw(st.lists(ours.token_ids, min_size=1, max_size=12))
    policy = data.draw(ours.stacks())
    drafter = data.draw(st.sampled_from([perturbed(family), "prompt_lookup", ModelDrafter(single_student(model))]))
    found = generate(model, drafter, prompt, policy=policy, max_new_tokens=24, runner="packed", eos_token_id=[])
    assert found.report.runner == "packed"
    check_the_same_up_to_a_tie(model, prompt, found.token_ids, greedy(model, prompt, 24))


_singles = {family: single(family) for family in ("llama", "gpt2", "qwen3", "gemma2")}


def test_the_model_is_shared_and_not_changed():
    model = single("llama")
    before = {name: (weight.data_ptr(), weight.clone()) for name, weight in model.state_dict().items()}
    kinds = [type(part) for part in model.modules()]
    twin = pack(model)
    assert twin is pack(model) is not model
    assert {id(weight) for weight in twin.parameters()} == {id(weight) for weight in model.parameters()}
    assert [type(part) for part in model.modules()] == kinds
    assert model.config._attn_implementation == "sdpa"
    assert twin.config._attn_implementation == ATTENTION
    for name, weight in model.state_dict().items():
        assert weight.data_ptr() == before[name][0]
        assert torch.equal(weight, before[name][1])
    assert twin.state_dict().keys() == model.state_dict().keys(), "the copies are no part of what is stored"


def test_it_goes_with_the_model():
    model = single("llama")
    gone = weakref.ref(pack(model))
    assert gone() is not None
    del model
    gc.collect()
    assert gone() is None


def changes(model: nn.Module) -> Iterator[None]:
    """Weights are changed in each of the usual ways."""
    with torch.no_grad():
        model.lm_head.weight.mul_(-1)
        yield
        model.load_state_dict({name: weight * 1.5 for name, weight in model.state_dict().items()})
        yield
        model.model.layers[0].mlp.up_proj.weight = nn.Parameter(torch.randn(48, 32))
        yield
        model.model.layers[0].mlp.up_proj.weight.data = torch.randn(48, 32)
        yield
        model.model.layers[1].mlp.down_proj.weight.data.mul_(-1)  # counted nowhere, as are the next two
        yield
        for row in range(VOCAB):
            model.lm_head.weight.data[row] *= 0.5
            yield
        model.model.layers[0].self_attn.q_proj.weight.data[:, 7] *= 2
        yield
        model.model.layers[0].mlp.act_fn = nn.ReLU()
        yield
        model.model.layers[0].self_attn.scaling *= 0.3
        yield
        model.model.norm.variance_epsilon = 0.5
        yield
        model.set_attn_implementation("eager")
        yield


def test_changed_weights_are_noticed():
    model = single("llama")
    tree_logits(model, "packed")
    for _ in changes(model):
        torch.testing.assert_close(tree_logits(model, "packed"), tree_logits(model, "eager"), rtol=1e-4, atol=1e-3)


def test_weights_made_in_inference_mode():
    with torch.inference_mode():
        model = single("llama")
        tree_logits(model, "packed")
        model.lm_head.weight.mul_(-1)
        torch.testing.assert_close(tree_logits(model, "packed"), tree_logits(model, "eager"), rtol=1e-4, atol=1e-3)


def test_a_model_with_something_on_it_that_cannot_be_copied():
    model = single("deepseek_v3")  # one that the native runner does not know
    model.lock = threading.Lock()
    with pytest.warns(RuntimeWarning, match="cannot pickle .*; take that off, or use runner='eager'"):
        found = generate(model, None, [1, 2, 3], max_new_tokens=4)
    assert found.token_ids == greedy(model, [1, 2, 3], 4)
    assert found.report.runner == "eager"
    with pytest.raises(ParameterError, match="cannot pickle"):
        generate(model, None, [1, 2, 3], max_new_tokens=4, runner="packed")


def test_two_threads_pack_once(monkeypatch):
    model, barrier = single("llama"), threading.Barrier(2)

    def packed_by(_: int) -> nn.Module:
        barrier.wait()
        return pack(model)

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(packed_by, range(2))
    assert first is second


def test_a_student_is_packed_without_its_targets_embeddings():
    target = single("llama")
    student = single_student(target)
    twin = pack(student)
    assert twin.get_input_embeddings()._table[0] is target.get_input_embeddings()
    with torch.inference_mode():
        ids = torch.tensor([PROMPT])
        torch.testing.assert_close(twin(ids).logits, student(ids).logits, rtol=1e-4, atol=1e-4)
    assert hasattr(twin.get_output_embeddings(), "product")


def test_autocast_is_obeyed():
    model = single("llama")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = tree_logits(model, "eager")
        assert torch.equal(tree_logits(model, "packed"), plain)
    assert not torch.equal(tree_logits(model, "packed"), plain)


def test_grouped_attention_is_that_of_transformers_to_the_last_bit():
    attention = SimpleNamespace(num_key_value_groups=3, is_causal=True, training=False)
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 6, 5, 16, generator=generator)
    key, value = torch.randn(2, 1, 2, 40, 16, generator=generator)
    mask = torch.rand(1, 1, 5, 40, generator=generator) > 0.3
    usual = sdpa_attention_forward(attention, query, key, value, mask, scaling=0.2)[0]
    assert torch.equal(grouped_attention(attention, query, key, value, mask, scaling=0.2)[0], usual)
    usual = sdpa_attention_forward(attention, query, key, value, None, scaling=0.2)[0]
    assert torch.equal(grouped_attention(attention, query, key, value, None, scaling=0.2)[0], usual)


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """The native runner, which auto prefers, cannot be had."""
    monkeypatch.setattr(ops, "reason_unavailable", lambda: "the test wants it so")


@pytest.mark.usefixtures("no_library")
def test_what_auto_chooses(monkeypatch):
    class Own(type(single("llama"))):  # somebody's subclass may do anything in its forward
        pass

    model = single("llama")
    assert runner_for(model, "auto") == "packed"
    assert runner_for(tiny_model("llama"), "auto") == "eager", "float64"
    assert runner_for(single("llama", torch.float16), "auto") == "eager"
    own = Own(model.config)
    assert runner_for(own, "auto") == "eager"
    assert runner_for(own, "packed") == "packed"
    hook = model.model.layers[1].register_forward_hook(lambda *_: None)
    assert runner_for(model, "auto") == "eager"
    hook.remove()
    assert runner_for(model, "auto") == "packed"
    model.lm_head.forward = model.lm_head.forward
    assert runner_for(model, "auto") == "eager"
    del model.lm_head.forward
    model.model.layers[0].mlp.act_fn = type("Own", (nn.ReLU,), {"__module__": "elsewhere"})()
    assert runner_for(model, "auto") == "eager"
    model.model.layers[0].mlp.act_fn = nn.ReLU()
    little = SimpleNamespace(available=3 * packed_bytes(model))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: little)
    assert runner_for(model, "auto") == "eager"
    assert runner_for(model, "packed") == "packed", "it was asked for"
    pack(model)
    assert runner_for(model, "auto", kept=kept_of(model)) == "packed", "there is a copy already"


def test_runners_that_there_are_not():
    with pytest.raises(
        UnknownPluginError, match=r"one of auto, cudagraph, eager, native, packed, triton, got 'compiled'"
    ):
        generate(single("llama"), None, [1, 2], runner="compiled")
    with pytest.raises(UnknownPluginError, match="did you mean 'packed'"):
        generate(single("llama"), None, [1, 2], runner="paked")
    with pytest.raises(UnknownPluginError, match="got None"):
        generate(single("llama"), None, [1, 2], runner=None)
    with pytest.raises(ParameterError, match=r"got torch\.float64 on cpu, .*; use runner='auto'"):
        generate(tiny_model("llama"), None, [1, 2], runner="packed")


def test_the_command_line_has_the_same_names():
    [option] = [option for option in generate_command.params if option.name == "runner"]
    assert option.make_metavar(click.Context(generate_command)) == f"[{'|'.join(runner_names())}]"
    assert [option.type.convert(name, option, None) for name in runner_names()] == runner_names()
    with pytest.raises(click.BadParameter, match="did you mean 'packed'"):
        option.type.convert("paked", option, None)


@pytest.mark.usefixtures("no_library")
def test_reports_say_which():
    model = single("llama")
    for asked, taken in (("auto", "packed"), ("eager", "eager"), ("packed", "packed")):
        assert generate(model, None, [1, 2], max_new_tokens=2, runner=asked).report.runner == taken
    assert generate(tiny_model("llama"), None, [1, 2], max_new_tokens=2).report.runner == "eager"
    assert model.config.vocab_size == VOCAB
