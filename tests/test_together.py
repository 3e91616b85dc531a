"""Passes over the rows of several sequences: padded and ragged, against a pass for each."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynatree_core.cache import SinkCache, SinkWindow, TreeCache
from dynatree_core.cache.base import KeyValueCache
from dynatree_core.clock import StageClock
from dynatree_core.errors import ForwardPassError
from dynatree_core.models.architectures import EXACT_FAMILIES
from dynatree_core.runners.base import Rows, Runner
from dynatree_core.runners.eager import EagerRunner
from dynatree_core.runners.packed import PackedRunner
from dynatree_core.runners.passes import AskedPass, Passes, computed
from dynatree_core.testing import strategies as ours
from dynatree_core.testing.models import CONFIGS, tiny_model
from dynatree_core.tree.flatten import flatten
from dynatree_core.tree.token_tree import TokenTree

# parts of some families, such as rotary angles and routers, are float32 in any model
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
CPU = torch.device("cpu")
TEXTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3], [5, 8], [9, 7, 9, 3, 2, 3, 8]]
# families whose attention is not looked up by its name, that need transformers' "eager", or make keys of what is cached
PADDED_FAMILIES = {"deepseek_v3", "falcon", "gemma2", "gpt_oss", "stablelm"}


def filled(model: Any, text: list[int], cache: KeyValueCache | None = None) -> KeyValueCache:
    cache = TreeCache(len(text) + 30) if cache is None else cache
    Passes(EagerRunner(model), StageClock(CPU)).prefill(torch.tensor(text), cache)
    return cache


def small_tree(num_children: int, *, is_deep: bool = True) -> TokenTree:
    """A root with so many children, of which the first has one of its own in a deep tree."""
    tree = TokenTree.root(torch.tensor([7]))
    if num_children == 0:
        return tree
    logprob = torch.full((num_children,), -1.0)
    tree = tree.grow(torch.zeros(num_children, dtype=torch.int64), torch.arange(num_children) + 11, logprob)
    return tree.grow(torch.tensor([1]), torch.tensor([20]), torch.tensor([-0.5])) if is_deep else tree


def rows_of(model: Any, texts: list[list[int]], trees: list[TokenTree]) -> list[Rows]:
    found = []
    for text, tree in zip(texts, trees, strict=True):
        cache = filled(model, text)
        found.append(Rows(cache.prepare(flatten([tree], [cache.next_place])), cache))
    return found


def check(runner: Runner, alone: Runner, texts: list[list[int]], trees: list[TokenTree]) -> None:
    model = alone.model
    expected = [alone.forward(part.flat, part.cache).logits for part in rows_of(model, texts, trees)]
    parts = rows_of(model, texts, trees)
    for output, logits, part in zip(runner.forward_together(parts), expected, parts, strict=True):
        torch.testing.assert_close(output.logits, logits, **CLOSE)
        assert part.cache.block_len == part.flat.num_rows, "padding goes into no cache"
    for output, logits in zip(
        runner.forward_together(rows_of(model, texts, trees), last_row_only=True), expected, strict=True
    ):
        torch.testing.assert_close(output.logits, logits[:, -1:], **CLOSE)


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_rows_of_several_sequences_say_what_they_say_alone(family):
    model = tiny_model(family)
    trees = [small_tree(2), small_tree(0), small_tree(5)]
    plain, packed = EagerRunner(model), PackedRunner(model)
    check(plain, plain, TEXTS, trees)
    check(packed, plain, TEXTS, trees)
    assert packed.is_ragged == (family not in PADDED_FAMILIES)


def test_a_ragged_pass_that_attention_has_not_looked_at_says_nothing(monkeypatch):
    model = tiny_model("deepseek_v3")
    packed = PackedRunner(model)
    monkeypatch.setattr("dynatree_core.runners.packed.MAKES_KEYS_LATER", ())
    with pytest.raises((ForwardPassError, RuntimeError)):  # the former where shapes happen to fit
        packed.forward_together(rows_of(model, TEXTS, [small_tree(2), small_tree(0), small_tree(5)]))


def test_every_family_is_tried():
    assert set(EXACT_FAMILIES) <= set(CONFIGS)


@settings(max_examples=30)
@given(
    st.lists(st.tuples(ours.prompts, ours.trees(max_depth=3)), min_size=2, max_size=5),
    st.sampled_from(["llama", "mistral", "gemma2", "gpt2"]),
)
def test_any_trees_behind_any_texts(parts, family):
    model = tiny_model(family)
    texts, trees = [text for text, _ in parts], [tree for _, tree in parts]
    for runner in (EagerRunner(model), PackedRunner(model)):
        check(runner, EagerRunner(model), texts, trees)


def test_hidden_states_of_several_sequences():
    model = tiny_model("llama")
    trees = [small_tree(2), small_tree(0), small_tree(5)]
    plain = EagerRunner(model)
    expected = [plain.forward(part.flat, part.cache, hidden=True) for part in rows_of(model, TEXTS, trees)]
    for runner in (plain, PackedRunner(model)):
        outputs = runner.forward_together(rows_of(model, TEXTS, trees), hidden=True)
        for output, alone in zip(outputs, expected, strict=True):
            torch.testing.assert_close(output.hidden, alone.hidden, **CLOSE)


@pytest.mark.parametrize("kind", [EagerRunner, PackedRunner])
def test_a_cache_with_sinks_beside_others(kind):
    model = tiny_model("llama")
    window = SinkWindow(2, 5)
    trees = [small_tree(2, is_deep=False), small_tree(3)]

    def parts() -> list[Rows]:
        caches = [filled(model, TEXTS[0], SinkCache(model, window, 20)), filled(model, TEXTS[1])]
        flats = [flatten([tree], [cache.next_place]) for tree, cache in zip(trees, caches, strict=True)]
        return [Rows(cache.prepare(flat), cache) for flat, cache in zip(flats, caches, strict=True)]

    expected = [EagerRunner(model).forward(part.flat, part.cache).logits for part in parts()]
    for output, logits in zip(kind(model).forward_together(parts()), expected, strict=True):
        torch.testing.assert_close(output.logits, logits, **CLOSE)


def asked(model: Any, runner: Runner, trees: list[TokenTree]) -> list[AskedPass]:
    found = []
    for text, tree in zip(TEXTS, trees, strict=True):
        cache = filled(model, text)
        flat = flatten([tree], [cache.next_place])
        found.append(AskedPass(Passes(runner, StageClock(CPU)), flat, cache, "verify"))
    return found


def test_a_pass_that_fails_is_computed_for_each_by_itself():
    """Only the sequence that it fails for alone has the error, and no cache holds rows of the pass that failed."""
    model = copy.deepcopy(tiny_model("llama"))
    trees = [small_tree(2), small_tree(0), small_tree(5)]
    expected = [one.alone().logits for one in asked(model, EagerRunner(model), trees)]
    parts = asked(model, EagerRunner(model), trees)
    last = model.model.layers[-1]
    forward = last.forward

    def failing(rows: torch.Tensor, *others: Any, **named: Any) -> Any:
        if rows.shape[0] == 3 or rows.shape[1] == 1:  # all of them, and the second sequence alone
            raise ZeroDivisionError("these rows")
        return forward(rows, *others, **named)

    last.forward = failing
    outputs = computed(parts)
    assert "ZeroDivisionError: these rows" in str(outputs[1])
    for place in (0, 2):
        torch.testing.assert_close(outputs[place].logits, expected[place], **CLOSE)
        assert parts[place].cache.block_len == trees[place].num_nodes


def test_runners_that_cannot_do_it_together_do_it_one_after_the_other():
    class Other(Runner):
        name = "other"
        calls = 0

        def __init__(self, model: Any) -> None:
            self.model, self.plain = model, EagerRunner(model)

        @classmethod
        def make(cls, model: Any, kept: Any) -> Runner:
            return cls(model)

        def forward(self, *given: Any, **named: Any) -> Any:
            self.calls += 1
            return self.plain.forward(*given, **named)

    model = tiny_model("llama")
    runner = Other(model)
    check(runner, EagerRunner(model), TEXTS, [small_tree(2), small_tree(0), small_tree(5)])
    assert runner.calls == 6
