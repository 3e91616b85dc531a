"""A budget of bytes: whatever runs, no more is taken up at any moment, and outputs are those without a budget."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynatree_core import Engine, PrefixCache, generate
from dynatree_core.cache.prefix_cache import PrefixReuse
from dynatree_core.cache.tree_cache import TreeCache
from dynatree_core.drafters.base import DraftPlan
from dynatree_core.drafters.model import ModelDrafter, ModelDraftState
from dynatree_core.drafters.prompt_lookup import PromptLookupDrafter
from dynatree_core.drafters.union import UnionDrafter
from dynatree_core.errors import DrafterError, OutOfMemoryError
from dynatree_core.testing.models import VOCAB, greedy, perturbed, tiny_model

ROW = 2 * 2 * 2 * 8 * 8  # bytes of a tiny llama's: layers, keys and values, heads, head_dim, float64
LOGITS = VOCAB * 8  # of a row


class Taken:
    """The buffers of all caches that are alive, and the most that they took up at any moment together."""

    def __init__(self, prefix_cache: PrefixCache | None = None) -> None:
        self.buffers: list[weakref.ref[torch.Tensor]] = []
        self.prefix_cache = prefix_cache
        self.most = 0

    def note(self, buffer: torch.Tensor) -> None:
        self.buffers = [*(one for one in self.buffers if one() is not None), weakref.ref(buffer)]
        self.look()

    def look(self) -> None:
        alive = [buffer for one in self.buffers if (buffer := one()) is not None]
        kept = 0 if self.prefix_cache is None else self.prefix_cache.num_bytes
        self.most = max(self.most, sum(buffer.numel() * buffer.element_size() for buffer in alive) + kept)


@contextmanager
def watched(prefix_cache: PrefixCache | None = None) -> Iterator[Taken]:
    taken, allocate, keep = Taken(prefix_cache), TreeCache._allocate, PrefixReuse.keep

    def noted(self: TreeCache, *given: Any) -> torch.Tensor:
        buffer = allocate(self, *given)
        taken.note(buffer)
        return buffer

    def kept(self: PrefixReuse, *given: Any) -> None:
        keep(self, *given)
        taken.look()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dynatree_core.engine.resources.SLOT_BLOCK", 8)
        patch.setattr(TreeCache, "_allocate", noted)
        patch.setattr(PrefixReuse, "keep", kept)
        yield taken


prompts = st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=10)
drafters = st.sampled_from(["none", "model", "union"])
policies = st.sampled_from(["autoregressive", "linear(depth=2)", "fixed(depth=2,branch=2,tau=0.0)"])


def made(drafter: str) -> Any:
    model = ModelDrafter(perturbed("llama", noise=0.02))
    return {"none": None, "model": model, "union": UnionDrafter([model, PromptLookupDrafter()])}[drafter]


@settings(max_examples=15)
@given(
    st.lists(st.tuples(prompts, st.integers(1, 14), policies), min_size=1, max_size=4), drafters, st.integers(0, 90),
    st.booleans(),
)  # fmt: skip
def test_no_more_is_taken_up_at_any_moment(asked, drafter, more_rows, keeps):
    prefix_cache = PrefixCache() if keeps else None
    target, per_row = tiny_model("llama"), ROW if drafter == "none" else 2 * ROW
    # the longest text alone, growing, with full trees of four nodes
    budget = 40 * per_row + 32 * ROW + 5 * LOGITS + more_rows * ROW
    engine = Engine(target, made(drafter), max_bytes=budget, prefix_cache=prefix_cache, max_sequences=4)
    with watched(prefix_cache) as taken:
        handles = [
            engine.submit(prompt, policy=policy, max_new_tokens=num, max_nodes=4, eos_token_id=[])
            for prompt, num, policy in asked
        ]
        while not all(handle.is_done for handle in handles):
            engine.step()
    for handle, (prompt, num, _) in zip(handles, asked, strict=True):
        assert handle.result().token_ids == greedy(target, prompt, num)
    assert 0 < taken.most <= budget - 5 * LOGITS


def test_old_slots_stand_beside_new_ones_for_a_moment():
    """Two texts of 14 tokens outgrow 8 slots in the same step: 14, and 14 beside 8, are more than there are."""
    budget = 35 * ROW + 2 * LOGITS
    engine = Engine(tiny_model("llama"), None, max_bytes=budget)
    with watched() as taken:
        handles = [
            engine.submit([start, 1, 2, 3, 4, 5], max_new_tokens=8, max_nodes=0, eos_token_id=[]) for start in (6, 7)
        ]
        for handle, start in zip(handles, (6, 7), strict=True):
            assert handle.result().token_ids == greedy(tiny_model("llama"), [start, 1, 2, 3, 4, 5], 8)
    assert engine.load.num_preempted == 1
    assert taken.most <= 35 * ROW


def test_kept_prefixes_make_room_before_anybody_has_to_wait():
    prefix_cache = PrefixCache()
    budget = 4 * (24 * ROW + LOGITS) + 16 * ROW
    engine = Engine(tiny_model("llama"), None, max_bytes=budget, prefix_cache=prefix_cache)
    options = {"max_new_tokens": 8, "max_nodes": 0, "eos_token_id": []}
    with watched(prefix_cache) as taken:
        for start in range(3):
            engine.submit([start, *range(10)], **options).result()
        assert prefix_cache.num_bytes > 3 * 17 * ROW
        handles = [engine.submit([30, start, *range(10)], **options) for start in range(4)]
        engine.step()
        assert engine.load.num_running == 4
        for handle in handles:
            handle.result()
    assert engine.load.num_preempted == 0
    assert taken.most <= budget


def test_logits_of_full_trees_count():
    engine = Engine(tiny_model("llama"), None, max_bytes=40 * ROW)
    with pytest.raises(OutOfMemoryError, match=r"must fit into max_bytes=20480, got \d+ bytes .* lower max_nodes"):
        engine.submit([1, 2], max_new_tokens=2, max_nodes=100).result()
    assert engine.submit([1, 2], max_new_tokens=2, max_nodes=5, eos_token_id=[]).result().token_ids


@pytest.mark.parametrize("max_nodes", [10**18, 10**30])  # more bytes, or slots, than an integer of 64 bits says
def test_trees_of_sizes_that_no_memory_has(max_nodes):
    with pytest.raises(
        OutOfMemoryError, match=r"more memory than the device has left; .* lower max_new_tokens or max_nodes"
    ):
        generate(tiny_model("llama"), None, [1, 2], max_new_tokens=2, max_nodes=max_nodes)


def test_a_sequence_that_never_fits_takes_nothing():
    engine = Engine(tiny_model("llama"), None, max_bytes=20 * ROW)
    with watched() as taken, pytest.raises(OutOfMemoryError):
        engine.submit([1] * 60, max_new_tokens=4, max_nodes=0).result()
    assert taken.most <= ROW  # a pass over one token, to know what a row takes


def test_a_drafter_that_nobody_asks_takes_no_memory_but_has_its_place():
    with watched() as taken:
        engine = Engine(tiny_model("llama"), made("model"), max_bytes=10**6)
        engine.submit([1, 2, 3], policy="autoregressive", max_new_tokens=3, max_nodes=0, eos_token_id=[]).result()
    assert taken.most <= 8 * ROW + 2 * ROW


class Unsized(ModelDrafter):
    """Cannot say how much memory it needs for texts that begin with 9."""

    def start(self, plan: DraftPlan) -> UnsizedState:
        return UnsizedState(self.model, plan)


class UnsizedState(ModelDraftState):
    num_asked, is_faulty = 0, False

    def prefill(self, committed_ids: torch.Tensor) -> None:
        self.is_faulty = int(committed_ids[0]) == 9
        super().prefill(committed_ids)

    def num_bytes(self, num_committed: int | None = None) -> int:
        self.num_asked += 1
        if self.is_faulty and self.num_asked > 8:
            raise ValueError("who knows")
        return super().num_bytes(num_committed)


def test_a_drafter_that_cannot_say_what_it_needs_ends_its_own_sequence_alone():
    target = tiny_model("llama")
    engine = Engine(target, Unsized(perturbed("llama")), max_bytes=10**7)
    options = {"policy": "linear(depth=2)", "max_new_tokens": 12, "eos_token_id": []}
    handles = [engine.submit([start, 1, 2], **options) for start in (3, 9, 4)]
    late = engine.submit([5, 1, 2], **options)
    while not all(handle.is_done for handle in (*handles, late)):
        engine.step()
    for handle, start in zip([handles[0], handles[2], late], [3, 4, 5], strict=True):
        assert handle.result().token_ids == greedy(target, [start, 1, 2], 12)
    with pytest.raises(DrafterError, match="who knows"):
        handles[1].result()
