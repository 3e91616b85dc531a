"""Folded attention against each family's own: the same to 1e-12 in float64, and what a GPU no longer has to do."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pretended_device import PASSES, by_stage, moved, pretended
from test_architectures import bushy_tree
from test_captured import on_the_cpu, traced
from test_packed import single
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from dynatree_bench.data.synthetic import Shape, synthetic_pair
from dynatree_core import Engine
from dynatree_core.cache.tree_cache import TreeCache
from dynatree_core.clock import StageClock
from dynatree_core.errors import ForwardPassError
from dynatree_core.models.architectures import BIAS_ALIGNMENT, EXACT_FAMILIES, attention_layout
from dynatree_core.runners import eager, folded
from dynatree_core.runners.base import Rows
from dynatree_core.runners.cudagraph import CudaGraphRunner
from dynatree_core.runners.eager import EagerRunner
from dynatree_core.runners.folded import folded_attention, reason_against_folding
from dynatree_core.runners.passes import Passes
from dynatree_core.testing import strategies as ours
from dynatree_core.testing.models import VARIANTS, greedy, perturbed, tiny_model, tiny_variant
from dynatree_core.tree.flatten import flatten
from dynatree_core.tree.token_tree import TokenTree

CPU = torch.device("cpu")
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]  # longer than the sliding windows
EVERY = [*EXACT_FAMILIES, *VARIANTS]
# soft caps, sinks, and attention that is not looked up by its name
OWN = {"falcon", "gemma2", "gpt_oss", "stablelm"}
FOLDED = [name for name in EVERY if VARIANTS.get(name, (name,))[0] not in OWN]


@contextmanager
def calls() -> Iterator[list[tuple[int, ...]]]:
    """The shapes of the queries that the attention was called with."""
    found: list[tuple[int, ...]] = []
    attended = folded._attended

    def noted(query: Tensor, *others: Any) -> Tensor:
        found.append(tuple(query.shape))
        return attended(query, *others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folded, "_attended", noted)
        yield found


def with_folded(model: nn.Module) -> EagerRunner:
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        runner = EagerRunner.with_folded_attention(model, {})
    assert runner.model is not model
    return runner


class Both:
    """The same passes with a model's own attention and with ours."""

    def __init__(self, model: nn.Module, other: Any) -> None:
        self.passes = [Passes(runner, StageClock(CPU)) for runner in (EagerRunner(model), other)]
        self.caches = [TreeCache(150), TreeCache(150)]
        with torch.inference_mode():
            for one, cache in zip(self.passes, self.caches, strict=True):
                one.prefill(torch.tensor(PROMPT), cache)

    @torch.inference_mode()
    def check(self, tree: TokenTree, path: list[int], **options: bool) -> None:
        own, found = (
            one.forward(flatten([tree], [cache.length]), cache, stage="verify", **options)
            for one, cache in zip(self.passes, self.caches, strict=True)
        )
        tensors = [(own.logits, found.logits), *([(own.hidden, found.hidden)] if options.get("hidden") else [])]
        for cache in self.caches:
            cache.commit([path])
        end = self.caches[0].length
        for a, b in zip(*((*cache.keys, *cache.values) for cache in self.caches), strict=True):
            tensors.append((a[:, :, :end], b[:, :, :end]))
        for expected, got in tensors:
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
        assert torch.equal(own.logits.argmax(dim=-1), found.logits.argmax(dim=-1))


@pytest.mark.parametrize("name", FOLDED)
def test_a_pass_says_what_it_says_with_the_familys_own_attention(name: str) -> None:
    model, tree = tiny_variant(name), bushy_tree()
    with calls() as found:
        both = Both(model, with_folded(model))
        num_before = len(found)
        for hidden, last_row_only in ((False, False), (True, False), (False, True)):
            both.check(tree, [0, 2], hidden=hidden, last_row_only=last_row_only)
        both.check(TokenTree.root(torch.tensor([3])), [0])
    assert len(found) - num_before == 4 * model.config.num_hidden_layers, "each layer of each pass asks for it"


@pytest.mark.parametrize("name", [*(name for name in EVERY if name not in FOLDED), "llama"])
def test_what_has_other_attention_keeps_it(name: str) -> None:
    model = copy.deepcopy(tiny_variant(name))
    if name == "llama":
        model.set_attn_implementation("eager")
    reason = reason_against_folding(model)
    assert reason in ("its attention is 'eager'", "its family does not look attention up by its name")
    assert EagerRunner.with_folded_attention(model, {}).model is model


def test_a_part_of_somebody_elses_keeps_the_models_attention() -> None:
    model = copy.deepcopy(tiny_model("llama"))
    model.model.layers[0].register_forward_hook(lambda *_: None)
    assert reason_against_folding(model) == "a part of it has code of its own"
    other = copy.deepcopy(tiny_model("llama"))
    other.model.layers[0].self_attn.num_key_value_groups = 1
    assert reason_against_folding(other) == "its layers group heads differently"


passes = st.lists(st.tuples(ours.trees(max_depth=4, max_width=4), st.integers(0, 30)), max_size=8)


@settings(max_examples=25)
@given(family=st.sampled_from(["llama", "gpt2", "mistral", "qwen2, window", "deepseek_v3"]), passes=passes)
def test_any_passes_are_those_of_the_familys_own_attention(family: str, passes: Any) -> None:
    model = tiny_variant(family)
    both = Both(model, with_folded(model))
    for tree, place in passes:
        if both.caches[0].length + tree.num_nodes > 140:
            break
        both.check(tree, tree.ancestor_mask[place % tree.num_nodes].nonzero().flatten().tolist())


@settings(max_examples=50)
@given(
    lanes=st.integers(1, 3), key_heads=st.integers(1, 4), group=st.integers(1, 4), rows=st.integers(1, 9),
    slots=st.integers(9, 40), sizes=st.tuples(st.integers(1, 9), st.integers(1, 9)), seed=st.integers(0, 99),
)  # fmt: skip
def test_grouped_heads_are_rows(
    lanes: int, key_heads: int, group: int, rows: int, slots: int, sizes: tuple[int, int], seed: int
) -> None:
    """Of transformers' attention, which repeats keys, to the last bits of float64."""
    random = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64)

    query = drawn(lanes, rows, key_heads * group, sizes[0]).transpose(1, 2)
    key, value = drawn(lanes, key_heads, slots, sizes[0]), drawn(lanes, key_heads, slots, sizes[1])
    visible = torch.rand(lanes, rows, slots, generator=random) < 0.5
    visible[:, :, 0] = True
    module: Any = nn.Module()
    module.num_key_value_groups, module.is_causal = group, True
    expected, _ = sdpa_attention_forward(module, query, key, value, visible[:, None], scaling=0.3)
    layout = attention_layout(tiny_model("llama"))
    bias = folded.attrs.evolve(layout, group=group)._mask(_flat_with(visible), None, torch.float64)
    found, _ = folded_attention(module, query, key, value, bias, scaling=0.3)
    assert found.shape == expected.shape == (lanes, rows, key_heads * group, sizes[1])
    torch.testing.assert_close(found, expected, rtol=3e-16 * 30, atol=3e-16 * 30)


def _flat_with(visible: Tensor) -> Any:
    class Flat:
        pass

    flat: Any = Flat()
    flat.visible = visible
    return flat


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_bias_is_as_the_kernel_wants_it(dtype: torch.dtype) -> None:
    """In the queries' dtype, with rows that begin where torch need not copy them, and nothing but 0 and the least."""
    flat = flatten([bushy_tree()], [10])
    layout = with_folded(tiny_model("llama"))._layout
    bias = layout.masks(flat, dtype)
    assert isinstance(bias, Tensor)
    rows, slots = flat.visible.shape[1:]
    assert (bias.dtype, tuple(bias.shape)) == (dtype, (1, 1, 2 * rows, slots))
    assert slots % BIAS_ALIGNMENT, "else nothing is to be aligned"
    assert not any(stride % BIAS_ALIGNMENT for stride in bias.stride()[:-1])
    assert bias.stride(-1) == 1
    for half in bias[0, 0].split(rows):
        assert torch.equal(half == 0, flat.visible[0])
        assert torch.equal(half == torch.finfo(dtype).min, ~flat.visible[0])


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text"])
def test_sequences_of_one_padded_pass(family: str) -> None:
    model, texts = tiny_model(family), [PROMPT, [5, 8], [9, 7, 9, 3, 2]]
    runners, found = (EagerRunner(model), with_folded(model)), []
    for runner in runners:
        parts = []
        for text in texts:
            cache = TreeCache(60)
            with torch.inference_mode():
                Passes(runner, StageClock(CPU)).prefill(torch.tensor(text), cache)
            parts.append(Rows(cache.prepare(flatten([bushy_tree()], [cache.length])), cache))
        with torch.inference_mode():
            found.append([output.logits for output in runner.forward_together(parts)])
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_generations_are_greedy(family: str) -> None:
    model = tiny_model(family)
    used: list[EagerRunner] = []

    def make(of: nn.Module, name: str) -> EagerRunner:
        used.append(with_folded(of))
        return used[-1]

    for drafter, policy in ((perturbed(family), "phase1"), (None, "autoregressive")):
        engine = Engine(model, drafter, make_runner=make)
        handle = engine.submit(PROMPT, policy=policy, max_new_tokens=60, eos_token_id=[])
        assert handle.result().token_ids == greedy(model, PROMPT, 60)
    assert len(used) == 3, "target, drafter, target"


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "gemma3_text", "qwen2, window", "opt"])
def test_recorded_passes_have_it_too(name: str) -> None:
    model, tree = tiny_variant(name), bushy_tree()
    with on_the_cpu(traced) as count, calls() as found:
        both = Both(model, CudaGraphRunner(with_folded(model)))
        num_before = len(found)
        for turn in range(4):
            kept = torch.arange(tree.num_nodes) < tree.num_nodes - turn % 3
            both.check(tree.subtree(kept), [0, 2])
    assert (count.recorded, count.replayed) == (1, 3)
    assert len(found) > num_before


def test_the_attention_of_an_earlier_generation_is_taken_unless_the_model_was_changed() -> None:
    model, kept = copy.deepcopy(tiny_model("llama")), {}
    first = EagerRunner.with_folded_attention(model, kept)
    assert EagerRunner.with_folded_attention(model, kept).model is first.model
    assert all(a is b for a, b in zip(first.model.parameters(), model.parameters(), strict=True))
    model.model.layers[0].self_attn.scaling *= 2
    assert EagerRunner.with_folded_attention(model, kept).model is not first.model


def wrong(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Tensor:
    return value.mean(dim=2, keepdim=True).expand(*query.shape[:3], -1)


def undefined(*arguments: Any) -> Tensor:
    return wrong(*arguments) * float("nan")


def refused(*_: Any) -> Tensor:
    raise RuntimeError("no kernel for these sizes")


@pytest.mark.parametrize(
    ("attended", "reason"), [(wrong, "was off by 1"), (undefined, "off by nan"), (refused, "RuntimeError: no kernel")]
)
def test_an_attention_that_says_something_else_is_noticed_and_not_used(
    attended: Callable[..., Tensor], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folded, "_attended", attended)
    model, kept = copy.deepcopy(tiny_model("llama")), {}
    with pytest.warns(RuntimeWarning, match=f"folded attention cannot take the place.*{reason}"):
        assert EagerRunner.with_folded_attention(model, kept).model is model
    assert EagerRunner.with_folded_attention(model, kept).model is model, "and not tried again"


@pytest.mark.parametrize(
    ("rows", "others", "reason"),
    [
        (3, {"softcap": 2.0}, "got softcap"),
        (3, {"s_aux": torch.zeros(4)}, "got s_aux"),
        (3, {"dropout": 0.1}, "got dropout"),
        (2, {}, "a row for each of 2 heads that share keys and 3 rows, got 4 rows"),
    ],
)
def test_what_it_leaves_out_is_an_error(rows: int, others: dict[str, Any], reason: str) -> None:
    query, key = torch.zeros(1, 4, 3, 8), torch.zeros(1, 2, 16, 8)
    with pytest.raises(ForwardPassError, match=reason):
        folded_attention(nn.Module(), query, key, key, torch.zeros(1, 1, 2 * rows, 16), **others)


def test_on_the_cpu_nobody_gets_it_who_did_not_ask() -> None:
    model = tiny_model("llama")
    assert EagerRunner.make(model, {}).model is model


# what a GPU no longer has to do


def launches_of_a_pass(num_layers: int, rows: int, *, own: bool) -> int:
    """Kernels of a pass over so many rows, of a model with four heads to a key head and fp16 weights."""
    llama = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 8}
    llama |= {"num_key_value_heads": 2, "vocab_size": 80, "num_hidden_layers": num_layers}
    pair = synthetic_pair(Shape(llama, llama), num_choices=16, dtype="float16")
    with pretended() as device, torch.inference_mode():
        model = moved(pair.target)
        runner = EagerRunner(model) if own else EagerRunner.make(model, {})
        assert (runner.model is model) is own
        cache, passes = TreeCache(64, num_layers=num_layers), Passes(runner, StageClock(model.device))
        passes.prefill(torch.arange(20, device=model.device), cache)
        tree = TokenTree.root(torch.zeros(1, dtype=torch.int64, device=model.device))
        if rows > 1:
            parents = torch.zeros(rows - 1, dtype=torch.int64, device=model.device)
            tree = tree.grow(parents, parents, torch.zeros(rows - 1, device=model.device))
        flat = flatten([tree], [cache.length])
        with by_stage(device), device.counting() as counts:
            passes.forward(flat, cache, stage="verify")
    return counts.launches[PASSES]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a device is pretended where there is none")
@pytest.mark.parametrize(("rows", "own", "ours"), [(1, 44, 40), (16, 46, 42)])
def test_kernels_of_a_layer(rows: int, own: int, ours: int) -> None:
    """A boolean mask is made a bias and padded in each layer, and keys are repeated for 16 rows; ours copies heads."""
    for is_own, expected in ((True, own), (False, ours)):
        few, many = (launches_of_a_pass(num_layers, rows, own=is_own) for num_layers in (2, 6))
        assert (many - few) / 4 == expected


def test_both_attentions_of_a_model_in_float32_agree() -> None:
    model = single("llama")
    found = with_folded(model)
    both = [eager._of_a_small_tree(runner, model) for runner in (EagerRunner(model), found)]
    torch.testing.assert_close(both[1], both[0], rtol=1e-5, atol=1e-5)
