"""The cache as a state machine beside recomputation: after every commit, its rows are those of a plain pass."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from transformers import DynamicCache

from dynatree_core.cache.tree_cache import TreeCache
from dynatree_core.clock import StageClock
from dynatree_core.errors import CacheError
from dynatree_core.models.architectures import cache_argument
from dynatree_core.runners.eager import EagerRunner
from dynatree_core.runners.passes import Passes
from dynatree_core.testing import strategies as ours
from dynatree_core.testing.models import tiny_model
from dynatree_core.tree.flatten import flatten


class CacheMachine(RuleBasedStateMachine):
    """Two lanes of different lengths, driven by random trees, commits and rollbacks, cut, freed and filled by rows.

    The naive model beside it is the committed tokens alone: their rows are computed anew for each check.
    """

    @initialize(family=st.sampled_from(["llama", "gpt_neox", "mistral"]))
    def start(self, family):
        self.model = tiny_model(family)
        self.passes = Passes(EagerRunner(self.model), StageClock(torch.device("cpu")))
        self.cache = TreeCache(80, lanes=2)
        self.texts = [[], []]
        self.joined = set()
        self.trees = None

    @precondition(lambda self: self.trees is None and max(map(len, self.texts)) < 40)
    @rule(trees=st.tuples(ours.trees(max_depth=4, max_width=4), ours.trees(max_depth=4, max_width=4)))
    def append(self, trees):
        """A forward pass over one tree a lane; the roots are new tokens here."""
        self.trees = trees
        with torch.inference_mode():
            logits = self.passes.forward(flatten(trees, self.cache.lengths), self.cache, stage="verify").logits
        for lane, tree in enumerate(trees):
            node = tree.num_nodes - 1
            text = [*self.texts[lane], *tree.token_ids[tree.ancestor_mask[node]].tolist()]
            expected = self.model(input_ids=torch.tensor([text])).logits[0, -1]
            torch.testing.assert_close(logits[lane, node], expected, rtol=1e-9, atol=1e-9)

    @precondition(lambda self: self.trees is not None)
    @rule(data=st.data())
    def commit(self, data):
        paths = []
        for lane, tree in enumerate(self.trees):
            node = data.draw(st.integers(0, tree.num_nodes - 1))
            path = tree.ancestor_mask[node].nonzero().flatten().tolist()[: data.draw(st.integers(0, 5))]
            paths.append(path)
            self.texts[lane] += tree.token_ids[path].tolist()
        self.cache.commit(paths)
        self.trees = None

    @precondition(lambda self: self.trees is not None)
    @rule()
    def rollback(self):
        self.cache.rollback()
        self.trees = None

    @precondition(lambda self: self.trees is not None)
    @rule(lane=st.integers(0, 1))
    def one_lane_does_not_change_within_a_step(self, lane):
        for change in (
            lambda: self.cache.truncate(0, lane),
            lambda: self.cache.free(lane),
            lambda: self.cache.load([], [], 0, lane),
        ):
            with pytest.raises(CacheError, match="rows of one lane change between two steps only"):
                change()

    @rule(lane=st.sampled_from([None, 0, 1]), length=st.integers(0, 30))
    def truncate(self, lane, length):
        if lane is not None and self.trees is not None:
            return  # it is refused
        self.cache.truncate(length, lane)
        self.texts = [text[:length] if lane in (None, one) else text for one, text in enumerate(self.texts)]
        self.trees = None

    @precondition(lambda self: self.trees is None)
    @rule(source=st.integers(0, 1), lane=st.integers(0, 1), data=st.data())
    def load(self, source, lane, data):
        """A lane begins with rows of its own or of the other one."""
        length = data.draw(st.integers(0, len(self.texts[source])))
        self.cache.load(*self.cache.copied(source), length, lane)
        self.texts[lane] = self.texts[source][:length]

    @rule()
    def join(self):
        if len(self.joined) == 2:
            with pytest.raises(CacheError, match="has 2 lanes, and all are taken"):
                self.cache.join()
            return
        lane = self.cache.join()
        assert lane == min({0, 1} - self.joined)
        self.joined.add(lane)

    @precondition(lambda self: self.trees is None)
    @rule(lane=st.integers(0, 1))
    def free(self, lane):
        self.cache.free(lane)
        self.joined.discard(lane)
        self.texts[lane] = []

    @invariant()
    def lengths_are_the_texts(self):
        if hasattr(self, "cache"):
            assert self.cache.lengths == [len(text) for text in self.texts]
            assert self.cache.block_len == (max(t.num_nodes for t in self.trees) if self.trees else 0)

    @invariant()
    def rows_are_those_of_a_plain_pass(self):
        if not hasattr(self, "cache") or self.trees is not None:
            return
        for lane, text in enumerate(self.texts):
            if not text:
                continue
            plain = DynamicCache()  # no config: the layers keep all rows, also where attention slides
            with torch.inference_mode():
                self.model(input_ids=torch.tensor([text]), **{cache_argument(self.model): plain})
            for layer, expected in enumerate(plain.layers):
                for ours_, theirs in ((self.cache.keys, expected.keys), (self.cache.values, expected.values)):
                    torch.testing.assert_close(ours_[layer][lane, :, : len(text)], theirs[0], rtol=1e-9, atol=1e-9)


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(max_examples=30, stateful_step_count=14, deadline=None)


def rows(n: int, start: float = 0.0) -> torch.Tensor:
    return torch.arange(n, dtype=torch.float32)[None, None, :, None] + start


def test_rows_beyond_the_capacity_are_refused():
    cache = TreeCache(4)
    cache.update(rows(3), rows(3), 0)
    with pytest.raises(CacheError, match="room for 4 rows, got 0 committed, 3 undecided and 2 new"):
        cache.update(rows(2), rows(2), 0)


@pytest.mark.parametrize("path", [[1, 1], [2, 0], [3], [-1]])
def test_a_path_that_is_not_in_the_block_is_refused(path):
    cache = TreeCache(8)
    cache.update(rows(3), rows(3), 0)
    with pytest.raises(CacheError, match="ascend within the block of 3 rows"):
        cache.commit([path])
    assert cache.lengths == [0]


def test_commit_moves_only_the_path(device):
    cache = TreeCache(16)
    cache.update(rows(4, 10).to(device), rows(4, 10).to(device), 0)
    cache.commit([[0, 1, 2, 3]])
    keys, _ = cache.update(rows(6).to(device), rows(6).to(device), 0)
    assert keys.flatten().tolist() == [10, 11, 12, 13, 0, 1, 2, 3, 4, 5]
    cache.commit([[0, 2, 5]])
    keys, _ = cache.update(rows(1, 99).to(device), rows(1, 99).to(device), 0)
    assert keys.flatten().tolist() == [10, 11, 12, 13, 0, 2, 5, 99]


@pytest.mark.parametrize("lane", [0, 1])
def test_rows_are_loaded_into_the_lane_that_was_named(lane):
    """The machine above seldom loads into one lane while the other has a text of its own."""
    cache = TreeCache(8, lanes=2)
    cache.update(torch.cat([rows(3), rows(3, 10)]), torch.cat([rows(3, 20), rows(3, 30)]), 0)
    cache.commit([[0, 1, 2], [0, 1, 2]])
    cache.load([rows(8, 50)], [rows(8, 60)], 2, lane)
    other = 1 - lane
    assert (cache.lengths[lane], cache.lengths[other]) == (2, 3)
    for buffer, loaded, kept in ((cache.keys[0], 50, 10 * other), (cache.values[0], 60, 20 + 10 * other)):
        assert buffer[lane, 0, :2, 0].tolist() == [loaded, loaded + 1]
        assert buffer[other, 0, :3, 0].tolist() == [kept, kept + 1, kept + 2]


def append(cache: TreeCache, states: torch.Tensor) -> None:
    """What a forward pass of two layers does."""
    for layer in (0, 1):
        cache.update(states, states, layer)


def test_wiping_leaves_no_numbers_behind_the_committed_rows():
    cache = TreeCache(8)
    append(cache, rows(2))
    cache.commit([[0, 1]])
    append(cache, rows(3) * torch.nan)
    cache.wipe()
    assert (cache.length, cache.block_len) == (2, 0)
    for buffer in (*cache.keys, *cache.values):
        assert torch.equal(buffer[:, :, :2], rows(2))
        assert not buffer[:, :, 2:5].any()


def failing(function, call):
    """The function, but memory ends at that call of it."""
    calls = []

    def fail(*arguments):
        calls.append(arguments)
        if len(calls) == call:
            raise torch.OutOfMemoryError("no memory")
        return function(*arguments)

    return fail


@pytest.mark.parametrize("call", [1, 2])
def test_a_commit_that_fails_keeps_nothing(call, monkeypatch):
    """Memory ends between the layers, of which nobody has said how many there are: committed rows stay, the block is
    forgotten."""
    cache = TreeCache(16)
    append(cache, rows(3, 10))
    cache.commit([[0, 1, 2]])
    append(cache, rows(4))
    monkeypatch.setattr(torch.Tensor, "clone", failing(torch.Tensor.clone, call))
    with pytest.raises(torch.OutOfMemoryError):
        cache.commit([[0, 2, 3]])  # rows that go where one of them stands are copied first
    assert (cache.lengths, cache.block_len) == ([3], 0)
    for layer in (0, 1):
        for seen in cache.update(rows(1, 99), rows(1, 99), layer):
            assert seen.flatten().tolist() == [10, 11, 12, 99]


def test_neighbours_that_move_together_keep_their_order():
    cache = TreeCache(16)
    append(cache, rows(7, 20))
    cache.commit([[0, 2, 3, 4, 6]])  # three rows go where one of them stands
    for layer in (0, 1):
        for seen in cache.update(rows(1, 99), rows(1, 99), layer):
            assert seen.flatten().tolist() == [20, 22, 23, 24, 26, 99]


@pytest.mark.parametrize("call", [1, 2])
def test_an_allocation_that_fails_adds_no_layer(call, monkeypatch):
    cache = TreeCache(8)
    monkeypatch.setattr(torch.Tensor, "new_empty", failing(torch.Tensor.new_empty, call))
    with pytest.raises(torch.OutOfMemoryError):
        append(cache, rows(3))
    assert len(cache.keys) == len(cache.values) == call - 1  # keys and values of a layer are allocated together
    cache.rollback()
    for layer in (0, 1):
        for seen in cache.update(rows(2, layer), rows(2, layer), layer):
            assert seen.flatten().tolist() == [layer, layer + 1]


def test_a_layer_that_comes_after_a_reservation_shows_no_slot_that_was_never_written():
    """As after a first pass that failed in its second layer: the buffers of both are there by then."""
    cache = TreeCache(8, num_layers=2)
    cache.update(rows(1), rows(1), 0)
    cache.rollback()
    for shelf in cache._shelves:
        shelf.fill_(torch.nan)  # what memory may have
    cache.reserve(2)
    cache.min_slots = 8
    for layer in (0, 1):
        for seen in cache.update(rows(1, 5), rows(1, 5), layer):
            assert seen.flatten().tolist() == [5.0] + [0.0] * 7


def test_layers_of_other_shapes_or_on_other_devices_have_buffers_of_their_own():
    cache = TreeCache(8, num_layers=3)
    shapes = [((1, 2, 1, 4), "cpu"), ((1, 2, 1, 4), "meta"), ((1, 1, 1, 8), "cpu")]
    with torch.inference_mode():
        for layer, (shape, device) in enumerate(shapes):
            states = torch.ones(shape, device=device)
            assert cache.update(states, states, layer)[0].device.type == device
    assert [buffer.shape[1::2] for buffer in cache.keys] == [(2, 4), (2, 4), (1, 8)]


def test_a_growth_that_fails_leaves_the_cache_as_it_was(monkeypatch):
    keys, values = rows(3, 20), torch.cat([rows(3, 20)] * 2, dim=-1)  # of two sizes, so of two allocations
    cache = TreeCache(4)
    cache.update(keys, values, 0)
    cache.commit([range(3)])
    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "new_empty", failing(torch.Tensor.new_empty, 2))
        with pytest.raises(torch.OutOfMemoryError):
            cache.grow(8)
    assert cache.capacity == 4
    with pytest.raises(CacheError, match="room for 4 rows"):
        cache.update(rows(2, 40), torch.cat([rows(2, 40)] * 2, dim=-1), 0)
    cache.grow(8)
    cache.update(rows(2, 40), torch.cat([rows(2, 40)] * 2, dim=-1), 0)
    cache.commit([[1]])
    assert cache.copied()[0][0].flatten().tolist() == [20, 21, 22, 41]


def test_models_may_use_it_without_positions_and_masks():
    """The public forward with nothing but the cache: transformers makes the causal mask from the cache's sizes."""
    model, cache = tiny_model("llama"), TreeCache(32)
    with torch.inference_mode():
        model(input_ids=torch.tensor([[1, 2, 3]]), **{cache_argument(model): cache})
        cache.commit([[0, 1, 2]])
        logits = model(input_ids=torch.tensor([[4, 5]]), **{cache_argument(model): cache}).logits[0, -1]
        expected = model(input_ids=torch.tensor([[1, 2, 3, 4, 5]])).logits[0, -1]
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
