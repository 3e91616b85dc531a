"""The Triton kernels, computed by Triton's interpreter; `tests/test_triton.py` runs this in processes of its own."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreted import quicker
from pretended_device import OnDevice, moved, pretended
from test_native import EagerRunner, logits_of, single
from torch import Tensor, nn

from dynatree_core import Engine, Session, generate, run
from dynatree_core.cache.tree_cache import TreeCache
from dynatree_core.engine import fused, resources
from dynatree_core.errors import CacheError, ForwardPassError, InputError, ParameterError
from dynatree_core.ops import ACTIVATIONS, Norm, Rotary, Slabs, Visible, reference
from dynatree_core.ops.triton.levels import write_level
from dynatree_core.ops.triton.matrix import StackedMatrix
from dynatree_core.ops.triton.operators import TritonOperators, is_interpreted, launched, slab_table
from dynatree_core.ops.triton.visible import visible_of
from dynatree_core.runners.base import PassOutput, Rows
from dynatree_core.runners.choice import make_runner, runner_for
from dynatree_core.runners.triton import PassInput, TritonRunner, Twin, twin_of
from dynatree_core.testing.models import greedy, perturbed, tiny_model
from dynatree_core.tree.flatten import FlatTrees, flatten, flatten_chain
from dynatree_core.tree.token_tree import TokenTree

OPERATORS = TritonOperators()
# how far a result may be from the reference, relative to the largest: factors are rounded to the matrix's dtype, and
# to bfloat16 the interpreter cuts off
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 3e-2, torch.float16: 3e-3}
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
KINDS = st.sampled_from(["rms", "layer"])
TEXT = [3, 1, 4, 1, 5, 9, 2]
# one each of what families differ in: windows and caps, norms of all heads, heads and sums, parallel parts, orders of
# fused matrices, learned positions, growing queries, embeddings that are scaled, matrices that lie the other way
FAMILIES = ["llama", "gemma2", "gpt_neox", "gpt2", "cohere", "olmo2", "olmo", "ministral3", "granite", "opt"]

few = settings(max_examples=12)


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    with quicker():
        yield


def seeded(draw: st.DrawFn) -> torch.Generator:
    return torch.Generator().manual_seed(draw(st.integers(0, 99)))


def assert_close(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    scale = wanted.abs().amax().clamp(min=1e-3)
    torch.testing.assert_close(found / scale, wanted / scale, rtol=0, atol=tolerance)


def random_norm(draw: st.DrawFn, random: torch.Generator, *shape: int) -> Norm:
    kind = draw(KINDS)
    bias = torch.randn(shape, generator=random) if kind == "layer" and draw(st.booleans()) else None
    return Norm(kind, torch.randn(shape, generator=random), 1e-5, bias, offset=draw(st.sampled_from([0.0, 1.0])))


def random_matrix(draw: st.DrawFn, random: torch.Generator, outputs: list[int], inputs: int) -> StackedMatrix:
    dtype, is_turned = draw(DTYPES), draw(st.booleans())
    parts = []
    for number in outputs:
        shape = (inputs, number) if is_turned else (number, inputs)
        part = torch.randn(shape, generator=random).to(dtype)
        parts.append(part.t() if is_turned else part)
    order = None
    if len(parts) == 1 and draw(st.booleans()):
        order = torch.randperm(outputs[0], generator=random).int()
    bias = torch.randn(sum(outputs), generator=random) if draw(st.booleans()) else None
    return StackedMatrix(tuple(parts), bias, order)


@st.composite
def linear_cases(draw: st.DrawFn) -> tuple[Tensor, StackedMatrix, dict[str, Any]]:
    """Rows, a matrix, and what else a product is called with; tiles are 16 rows, 32 outputs and 64 or 128 inputs."""
    random = seeded(draw)
    num_rows, inputs = draw(st.integers(1, 20)), draw(st.integers(1, 150))
    num_parts = draw(st.integers(1, 3))
    size = draw(st.integers(1, 50))
    # parts that lie the other way have their outputs in the strides, which must be alike
    outputs = [size] * num_parts
    matrix = random_matrix(draw, random, outputs, inputs)
    shape = (num_rows, matrix.num_outputs)
    given: dict[str, Any] = {"scale": draw(st.sampled_from([1.0, 0.3]))}
    if draw(st.booleans()):
        given["norm"] = random_norm(draw, random, inputs)
    if draw(st.booleans()):
        given["residual"] = torch.randn(shape, generator=random)
    ending = draw(st.sampled_from(["none", "after", "soft_cap"]))
    if ending == "after":
        given["after"] = random_norm(draw, random, matrix.num_outputs)
    if ending == "soft_cap":
        given["soft_cap"] = 5.0
    return torch.randn(num_rows, inputs, generator=random), matrix, given


def of_row(given: dict[str, Any], row: int) -> dict[str, Any]:
    """What one row is called with."""
    part = {"residual", "growth"} & given.keys()
    return {**given, **{name: given[name][row : row + 1] for name in part}}


@given(linear_cases())
@few
def test_operator_linear_is_the_references_and_no_row_knows_its_neighbours(
    case: tuple[Tensor, StackedMatrix, dict[str, Any]],
) -> None:
    rows, matrix, given = case
    found = OPERATORS.linear(rows, matrix, **given)
    assert_close(found, reference.linear(rows, matrix, **given), TOLERANCES[matrix.parts[0].dtype])
    for row in {0, len(rows) // 2, len(rows) - 1}:
        alone = OPERATORS.linear(rows[row : row + 1], matrix, **of_row(given, row))
        assert torch.equal(found[row], alone[0])
    if "residual" in given:
        assert OPERATORS.linear(rows, matrix, **given, out=given["residual"]) is given["residual"]
        assert torch.equal(given["residual"], found)


@st.composite
def mlp_cases(draw: st.DrawFn) -> tuple[Tensor, StackedMatrix, StackedMatrix, dict[str, Any]]:
    random = seeded(draw)
    num_rows, size, inner = draw(st.integers(1, 20)), draw(st.integers(1, 70)), draw(st.integers(1, 40))
    dtype = draw(DTYPES)
    shapes = draw(st.sampled_from([[(inner, size)], [(inner, size)] * 2, [(2 * inner, size)]]))
    parts = tuple(torch.randn(shape, generator=random).to(dtype) for shape in shapes)
    bias = torch.randn(sum(map(len, parts)), generator=random) if draw(st.booleans()) else None
    outer = StackedMatrix((torch.randn(size, inner, generator=random).to(dtype),))
    given: dict[str, Any] = {
        "activation": draw(st.sampled_from(sorted(set(ACTIVATIONS.values())))),
        "residual": torch.randn(num_rows, size, generator=random),
        "scale": draw(st.sampled_from([1.0, 0.3])),
    }
    if draw(st.booleans()):
        given["norm"] = random_norm(draw, random, size)
    if draw(st.booleans()):
        given["after"] = random_norm(draw, random, size)
    return torch.randn(num_rows, size, generator=random), StackedMatrix(parts, bias), outer, given


@given(mlp_cases())
@few
def test_operator_mlp_is_the_references_and_no_row_knows_its_neighbours(
    case: tuple[Tensor, StackedMatrix, StackedMatrix, dict[str, Any]],
) -> None:
    rows, inner, outer, given = case
    found = OPERATORS.mlp(rows, inner, outer, **given)
    assert_close(found, reference.mlp(rows, inner, outer, **given), TOLERANCES[inner.parts[0].dtype])
    for row in {0, len(rows) - 1}:
        alone = OPERATORS.mlp(rows[row : row + 1], inner, outer, **of_row(given, row))
        assert torch.equal(found[row], alone[0])


@pytest.mark.parametrize("activation", sorted(set(ACTIVATIONS.values())))
def test_operator_mlp_has_each_activation(activation: Any) -> None:
    random = torch.Generator().manual_seed(0)
    rows = torch.randn(3, 8, generator=random)
    matrices = [StackedMatrix((torch.randn(8, 8, generator=random),)) for _ in range(2)]
    found = OPERATORS.mlp(3 * rows, *matrices, activation=activation)
    wanted = reference.mlp(3 * rows, *matrices, activation=activation)
    assert_close(found, wanted, TOLERANCES[torch.float32])


@st.composite
def rope_cases(draw: st.DrawFn) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor, Tensor, dict[str, Any]]:
    """Rows, keys and values of two lanes, lanes and slots, and what else `rope_write` is called with."""
    random = seeded(draw)
    num_rows, key_heads, shared = draw(st.integers(1, 6)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    head_dim, value_dim = draw(st.integers(2, 20)), draw(st.integers(1, 20))
    dtype, heads = draw(DTYPES), key_heads * shared
    rows = torch.randn(num_rows, (heads + key_heads) * head_dim + key_heads * value_dim, generator=random)
    keys = torch.zeros(2, key_heads, 9, head_dim, dtype=dtype)
    values = torch.zeros(2, key_heads, 9, value_dim, dtype=dtype)
    lanes = torch.randint(2, (num_rows,), generator=random, dtype=torch.int32)
    slots = torch.randperm(9, generator=random)[:num_rows].int()
    given: dict[str, Any] = {"num_heads": heads, "clip": draw(st.sampled_from([None, 0.7]))}
    if draw(st.booleans()):
        angles = torch.randn(num_rows, draw(st.integers(1, head_dim // 2)), generator=random)
        given["rotary"] = Rotary(angles.cos(), angles.sin(), draw(st.booleans()))
    if draw(st.booleans()):
        given["growth"] = torch.rand(num_rows, generator=random)
    kind = draw(st.sampled_from(["none", "one", "each", "whole"]))
    if kind != "none":
        for name, number in (("query_norm", heads), ("key_norm", key_heads)):
            shape = {"one": (head_dim,), "each": (number, head_dim), "whole": (number * head_dim,)}[kind]
            given[name] = random_norm(draw, random, *shape)
    return rows, (keys, values), lanes, slots, given


def slabs_of(keys: Tensor, values: Tensor) -> Slabs:
    """As a twin makes them."""
    table = slab_table([[keys]], [[values]])[0]
    return Slabs(keys.shape[1], keys.shape[3], values.shape[3], keys.dtype, table, (keys,), (values,))


@given(rope_cases())
@few
def test_operator_rope_write_is_the_references_and_no_row_knows_its_neighbours(
    case: tuple[Tensor, tuple[Tensor, Tensor], Tensor, Tensor, dict[str, Any]],
) -> None:
    rows, cache, lanes, slots, given = case
    plain = [one.float() for one in cache]
    wanted = reference.rope_write(rows, slabs_of(*plain), lanes, slots, **given)
    found = OPERATORS.rope_write(rows, slabs_of(*cache), lanes, slots, **given)
    assert_close(found, wanted, TOLERANCES[torch.float32])
    for one, other in zip(cache, plain, strict=True):
        assert_close(one.float(), other, TOLERANCES[cache[0].dtype])
    alone = [torch.zeros_like(one) for one in cache]
    for row in range(len(rows)):
        some = slice(row, row + 1)
        own = of_row(given, row)
        if "rotary" in given:
            rotary = given["rotary"]
            own["rotary"] = Rotary(rotary.cos[some], rotary.sin[some], rotary.is_interleaved)
        assert torch.equal(
            OPERATORS.rope_write(rows[some], slabs_of(*alone), lanes[some], slots[some], **own)[0], found[row]
        )
    assert torch.equal(alone[0], cache[0])
    assert torch.equal(alone[1], cache[1])


def test_operator_rope_write_writes_to_no_slot_outside_of_the_cache() -> None:
    cache = torch.zeros(2, 1, 2, 9, 4)  # keys and values side by side: what is written beyond one is seen in the other
    rows = torch.ones(2, 4 * (2 + 2 * 2))
    slabs = slabs_of(cache[0], cache[1])
    OPERATORS.rope_write(
        rows, slabs, torch.zeros(2, dtype=torch.int32), torch.tensor([9, -1], dtype=torch.int32), num_heads=2
    )
    assert cache.abs().sum() == 0


@st.composite
def attention_cases(draw: st.DrawFn) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor, dict[str, Any]]:
    """Queries, keys and values of two lanes, a mask whose rows see a run and some slots behind it, and the rest."""
    random = seeded(draw)
    lanes, num_rows, key_heads, shared = 2, draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 17))
    head_dim, value_dim, num_slots = draw(st.integers(1, 20)), draw(st.integers(1, 20)), draw(st.integers(1, 90))
    dtype = draw(DTYPES)
    keys = torch.randn(lanes, key_heads, num_slots, head_dim, generator=random).to(dtype)
    values = torch.randn(lanes, key_heads, num_slots, value_dim, generator=random).to(dtype)
    start = draw(st.integers(0, num_slots))
    mask = torch.rand(lanes, num_rows, num_slots, generator=random) < 0.5
    mask[:, :, :start], mask[:, :, start : start + draw(st.integers(0, num_slots))] = False, True
    queries = torch.randn(lanes * num_rows, key_heads * shared, head_dim, generator=random)
    given: dict[str, Any] = {"scale": 0.3, "soft_cap": draw(st.sampled_from([None, 2.0]))}
    if draw(st.booleans()):
        given["sinks"] = torch.randn(key_heads * shared, generator=random)
    return queries, (keys, values), mask, given


@given(attention_cases())
@few
def test_operator_attention_is_the_references_and_follows_a_rows_text_alone(
    case: tuple[Tensor, tuple[Tensor, Tensor], Tensor, dict[str, Any]],
) -> None:
    queries, (keys, values), mask, given = case
    visible = Visible.of_mask(mask)
    found = OPERATORS.tree_attention(queries, slabs_of(keys, values), visible, **given)
    wanted = reference.tree_attention(queries, slabs_of(keys.float(), values.float()), visible, **given)
    assert_close(found, wanted, TOLERANCES[keys.dtype])
    # the same slots one behind the other, at the end of a longer cache of one lane
    rows_per_lane = mask.shape[1]
    for row in range(len(queries)):
        lane, seen = row // rows_per_lane, mask.flatten(0, 1)[row].nonzero().flatten()
        number, capacity = len(seen), len(seen) + 3
        own_keys, own_values = (
            torch.full((1, one.shape[1], capacity, one.shape[3]), torch.nan, dtype=one.dtype) for one in (keys, values)
        )
        own_keys[0, :, 3:], own_values[0, :, 3:] = keys[lane, :, seen], values[lane, :, seen]
        none = torch.zeros(2, dtype=torch.int32)
        alone = Visible(none[:1], none[:1] + 3, none[:1] + 3 + number, none, none)
        moved_there = OPERATORS.tree_attention(queries[row : row + 1], slabs_of(own_keys, own_values), alone, **given)
        assert torch.equal(moved_there[0], found[row])


@given(st.data())
@settings(max_examples=50)
def test_operator_visible_is_what_the_mask_says(data: st.DataObject) -> None:
    num_rows, num_slots = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 9))
    size = num_rows * num_slots
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=size, max_size=size))).view(num_rows, num_slots)
    seen = visible_of(mask, torch.zeros(num_rows, dtype=torch.int32))
    for row, wanted in enumerate(mask):
        own = seen.own[int(seen.own_start[row]) : int(seen.own_start[row + 1])].tolist()
        assert [*range(int(seen.start[row]), int(seen.end[row])), *own] == wanted.nonzero().flatten().tolist()


@pytest.mark.parametrize(("width", "max_branch"), [(1, 1), (1, 3), (3, 4), (16, 2)])
def test_operator_level_is_the_one_that_plain_torch_writes(width: int, max_branch: int) -> None:
    """Over made-up trees whose scores tie, and whose levels are cut by thresholds, widths and budgets."""
    cpu = torch.device("cpu")
    write = fused.FusedLevels(width, max_branch, cpu)
    assert all(fused._are_same(write, width, max_branch, cpu, seed) for seed in range(8))


def test_operator_level_takes_what_does_not_lie_side_by_side() -> None:
    """Answers of one number for all nodes, and proposals that are columns of a larger tensor."""
    given = torch.arange(24, dtype=torch.int64).view(4, 6)
    flat = {"expand": torch.tensor([True]).expand(2), "branch": torch.tensor([3]).expand(2)}
    parts = {**flat, "logprobs": -given.float().T[:2, :3], "token_ids": given[:2, ::2]}
    found = []
    for asked in (parts, {name: one.contiguous() for name, one in parts.items()}):
        room = torch.zeros(6, 9, dtype=torch.int64), torch.eye(9, dtype=torch.bool)
        write_level(*room, **asked, old=3, width=4, least=-99.0, max_nodes=9, vocab_size=50)
        found.append(torch.cat([room[0], room[1].long()]))
    assert torch.equal(*found)
    assert found[0][0, 3:7].unique().numel() > 2


@pytest.mark.parametrize("policy", ["phase3", "best_first(nodes=5,depth=3,beam=2)", "fixed(depth=3,max_nodes=9,tau=0)"])
def test_operator_level_grows_the_trees_of_plain_torch(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for is_fused in (False, True):

        def level_writer(device: torch.device, width: int, max_branch: int, one: bool = is_fused) -> Any:
            return fused.FusedLevels(width, max_branch, device) if one else None

        monkeypatch.setattr(resources, "level_writer", level_writer)
        engine = Engine(tiny_model("llama"), perturbed("llama", 0, 0.03), pads_trees=True, runner="eager")
        session = Session.on(engine, TEXT, policy=policy, max_new_tokens=8, max_branch=4, eos_token_id=[])
        trees = [report.tree for report in run(session)]
        assert session.growth is not None
        assert isinstance(session.padded_space.write, fused.FusedLevels) == is_fused
        found.append([(tree.token_ids.tolist(), tree.ancestor_mask.tolist(), tree.rank.tolist()) for tree in trees])
    assert found[0] == found[1]
    assert any(len(ids) > 2 for ids, *_ in found[0])


@pytest.mark.parametrize("num_rows", [1, 5, 19])
def test_operator_angles_and_growth_follow_a_rows_position_alone(num_rows: int) -> None:
    positions = torch.randint(5000, (num_rows,), generator=torch.Generator().manual_seed(num_rows))
    inv_freq = 10000.0 ** -torch.linspace(0, 1, 7)
    found, growth = OPERATORS.angles(positions, inv_freq, 1.3, False), OPERATORS.growth(positions, 0.1, 16)
    turned = positions[:, None].double() * inv_freq.double()
    torch.testing.assert_close(found.cos.double(), turned.cos() * 1.3, rtol=0, atol=1e-3)  # of 5000 in float32
    torch.testing.assert_close(found.sin.double(), turned.sin() * 1.3, rtol=0, atol=1e-3)
    torch.testing.assert_close(growth, 1 + 0.1 * torch.log(1 + torch.floor(positions / 16)))
    for row in range(num_rows):
        alone = OPERATORS.angles(positions[row : row + 1], inv_freq, 1.3, False)
        assert torch.equal(alone.cos[0], found.cos[row])
        assert torch.equal(alone.sin[0], found.sin[row])
        assert OPERATORS.growth(positions[row : row + 1], 0.1, 16)[0] == growth[row]


WEIGHT = torch.zeros(4, 3)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: StackedMatrix((WEIGHT,) * 4), "1 to 3 parts"),
        (lambda: StackedMatrix((WEIGHT, WEIGHT.half())), "alike"),
        (lambda: StackedMatrix((WEIGHT, torch.zeros(3, 4).t())), "alike"),
        (lambda: StackedMatrix((WEIGHT.double(),)), "torch.float64"),
        (lambda: StackedMatrix((WEIGHT, WEIGHT), order=torch.arange(8).int()), "of the rows of one part"),
        (lambda: StackedMatrix((WEIGHT,), torch.zeros(3)), r"must be \[4\]"),
        (lambda: StackedMatrix((WEIGHT, torch.zeros(3, 3))).halves(), r"got \[4, 3\] outputs"),
        (lambda: OPERATORS.linear(torch.zeros(2, 4), StackedMatrix((WEIGHT,))), r"rows must be \[2, 3\]"),
        (lambda: OPERATORS.linear(torch.zeros(3, 2).t(), StackedMatrix((WEIGHT,))), "must be contiguous float32"),
        (
            lambda: OPERATORS.linear(
                torch.zeros(2, 3), StackedMatrix((WEIGHT,)), after=Norm("rms", torch.ones(4), 0.0), soft_cap=1.0
            ),
            "got both",
        ),
        (
            lambda: OPERATORS.mlp(
                torch.zeros(2, 3), StackedMatrix((WEIGHT,)), StackedMatrix((WEIGHT,)), activation="silu"
            ),
            "the outer one's 3 inputs",
        ),
        (lambda: slab_table([[torch.zeros(1, 2, 5, 4)]], [[torch.zeros(1, 2, 6, 4)]]), "keys and values must be"),
        (lambda: slab_table([[torch.zeros(1, 2, 5, 5)[..., :4]]] * 1, [[torch.zeros(1, 2, 5, 4)]]), "multiples of 4"),
    ],
)
def test_operator_refuses_what_does_not_fit(make: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        make()


# ---- a model's passes -------------------------------------------------------------------------------------------


@functools.cache
def twin(name: str) -> Twin:
    return twin_of(single(name), OPERATORS)


class Passes:
    """A twin as what `logits_of` calls."""

    def __init__(self, twin: Twin) -> None:
        self.twin = twin

    def forward(self, flat: FlatTrees, cache: TreeCache, **asked: bool) -> PassOutput:
        return self.twin.forward_together([Rows(flat, cache)], **asked)[0]


def small_tree() -> TokenTree:
    """Six nodes in four levels with irregular parents."""
    tree = TokenTree.root(torch.tensor([5]))
    for parents, tokens in [([0, 0], [7, 2]), ([1, 2], [9, 7]), ([4], [3])]:
        tree = tree.grow(torch.tensor(parents), torch.tensor(tokens), torch.full((len(parents),), -0.7))
    return tree


@pytest.mark.parametrize("name", FAMILIES)
def test_family_has_the_plain_passes_logits_and_cache(name: str) -> None:
    caches, found = [], []
    for passes in (EagerRunner(single(name)), Passes(twin(name))):
        cache = TreeCache(20)
        with torch.inference_mode():
            prompt = passes.forward(cache.prepare(flatten_chain(torch.tensor(TEXT), 0)), cache, last_row_only=True)
            cache.commit([range(len(TEXT))])
            flat = flatten([small_tree()], [len(TEXT)])
            output = passes.forward(cache.prepare(flat), cache, hidden=True)
        caches.append(cache)
        found.append([prompt.logits, output.logits, output.hidden])
    plain, ours = caches
    assert (plain.length, plain.block_len) == (ours.length, ours.block_len) == (len(TEXT), 6)
    written = len(TEXT) + 6
    for one, other in zip((*ours.keys, *ours.values), (*plain.keys, *plain.values), strict=True):
        assert_close(one[:, :, :written], other[:, :, :written], 1e-5)
    for one, other in zip(found[1], found[0], strict=True):
        assert_close(one, other, 1e-5)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_bits_of_a_tree_are_those_of_plain_decoding(name: str) -> None:
    """Every node, against its path token by token and against the same path in a chunk."""
    tree = small_tree()
    in_tree = logits_of(Passes(twin(name)), [TEXT, flatten([tree], [len(TEXT)])], capacity=20)[len(TEXT) :]
    path = [0, 2, 4, 5]  # from the root to the deepest node
    tokens = tree.token_ids[path].tolist()
    step_by_step = logits_of(Passes(twin(name)), [TEXT, *([token] for token in tokens)], capacity=20)
    assert torch.equal(in_tree[path], step_by_step[len(TEXT) :])
    in_chunks = logits_of(Passes(twin(name)), [TEXT[:2], [*TEXT[2:], *tokens]], capacity=20)
    assert torch.equal(in_chunks, step_by_step)


def test_bits_of_several_sequences_are_those_of_each_alone() -> None:
    texts, trees = [TEXT[:3], TEXT], [TokenTree.root(torch.tensor([7])), small_tree()]
    caches, alone = [TreeCache(20), TreeCache(30)], []
    with torch.inference_mode():
        for cache, text, tree in zip(caches, texts, trees, strict=True):
            twin("gemma2").forward_together([Rows(flatten_chain(torch.tensor(text), 0), cache)])
            cache.commit([range(len(text))])
            rows = Rows(flatten([tree], [len(text)]), cache)
            alone.append(twin("gemma2").forward_together([rows], hidden=True)[0])
            cache.rollback()
        parts = [Rows(flatten([tree], [len(text)]), one) for tree, text, one in zip(trees, texts, caches, strict=True)]
        found = twin("gemma2").forward_together(parts, hidden=True)
    for one, own in zip(found, alone, strict=True):
        assert one.hidden is not None
        assert own.hidden is not None
        assert torch.equal(one.logits, own.logits)
        assert torch.equal(one.hidden, own.hidden)
    assert [cache.block_len for cache in caches] == [1, 6]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_family_in_16_bits_is_the_plain_pass_up_to_rounding(dtype: torch.dtype) -> None:
    model: Any = tiny_model.__wrapped__("gemma2").to(dtype)
    exact = logits_of(EagerRunner(model.float()), [TEXT], capacity=20)
    model.to(dtype)
    found = logits_of(Passes(twin_of(model, OPERATORS)), [TEXT], capacity=20)
    assert found.dtype == torch.float32
    assert ((found - exact).abs().amax() / exact.abs().amax()).item() < (0.1 if dtype == torch.bfloat16 else 0.01)
    shared = {parameter.data_ptr() for parameter in model.parameters()}
    layer = twin_of(model, OPERATORS).blueprint.layers[0]
    matrices: list[Any] = [layer.qkv, layer.output, layer.mlp.up, layer.mlp.down]
    assert {part.data_ptr() for matrix in matrices for part in matrix.parts} <= shared


def test_a_weight_that_is_changed_in_place_is_changed_in_the_twin() -> None:
    model: Any = tiny_model.__wrapped__("llama").float()
    passes = Passes(twin_of(model, OPERATORS))
    before = logits_of(passes, [TEXT[:3]], capacity=20)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(2)
    after = logits_of(passes, [TEXT[:3]], capacity=20)
    assert not torch.equal(after, before)
    torch.testing.assert_close(after, logits_of(EagerRunner(model), [TEXT[:3]], capacity=20), rtol=0, atol=1e-4)


# ---- what the host does -----------------------------------------------------------------------------------------


class Launches:
    """Launches nothing, and writes down what it was asked for."""

    def __init__(self, device: Any = None) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.device = device

    def __call__(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        described = [tuple(one.shape) if isinstance(one, Tensor) else one for one in arguments]
        self.asked.append((kernel.__name__, grid, *described, *sorted(constants.items())))
        if self.device is not None:
            self.device.launch("kernel")


def given_to(model: nn.Module, tree: TokenTree, to: Any = lambda tensor: tensor) -> PassInput:
    """A pass over a tree behind seven tokens."""
    config: Any = model.config
    flat, num_rows = flatten([tree], [len(TEXT)]), tree.num_nodes
    key_heads, head_dim = config.num_key_value_heads, config.head_dim
    buffer = to(torch.zeros(1, key_heads, 20, head_dim))
    table = to(torch.zeros(1, 8, dtype=torch.int64))
    slabs = Slabs(key_heads, head_dim, head_dim, torch.float32, table, (buffer,), (buffer,))
    windows = {None, *([config.sliding_window] if config.model_type == "gemma2" else [])}
    return PassInput(
        token_ids=to(flat.token_ids[0]),
        positions=to(flat.position_ids[0]),
        lanes=to(torch.zeros(num_rows, dtype=torch.int32)),
        slots=to(torch.arange(7, 7 + num_rows, dtype=torch.int32)),
        masks={window: to(flat.visible[0]) for window in windows},
        slabs=[slabs] * config.num_hidden_layers,
    )


def chain(num_nodes: int) -> TokenTree:
    tree = TokenTree.root(torch.tensor([5]))
    for node in range(num_nodes - 1):
        tree = tree.grow(torch.tensor([node]), torch.tensor([7]), torch.tensor([-0.7]))
    return tree


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_host_launches_the_same_for_each_tree_of_a_size(name: str) -> None:
    """So a recorded pass serves all of them."""
    launches = Launches()
    passes, asked = twin_of(single(name), TritonOperators(launches)), []
    for tree in (small_tree(), chain(6)):
        passes.compute(given_to(single(name), tree))
        asked.append(launches.asked)
        launches.asked = []
    assert asked[0] == asked[1]
    assert len(asked[0]) > 6


@pytest.mark.parametrize(("name", "most"), [("llama", 6), ("gpt2", 6), ("cohere", 6), ("gemma2", 8)])
def test_host_launches_at_most_six_kernels_a_layer(name: str, most: int) -> None:
    """And one more for each norm of what attention or MLP add; the rest are the embeddings' angles and the head."""
    launches: Counter[str] = Counter()

    def counted(kernel: Any, *arguments: Any, **constants: Any) -> None:
        launches[kernel.__name__] += 1
        launched(kernel, *arguments, **constants)

    logits_of(Passes(twin_of(single(name), TritonOperators(counted))), [TEXT[:2]], capacity=20)
    num_layers = single(name).config.num_hidden_layers  # type: ignore[union-attr]
    around = launches.pop("angles_kernel", 0) + 1
    assert around <= 3
    assert launches.total() - 1 == most * num_layers


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_host_waits_for_nothing_within_a_pass(name: str) -> None:
    model: Any = tiny_model.__wrapped__(name).float()
    # tensors of the device are wrapped
    plain = mock.patch("dynatree_core.models.blueprint.is_plain", return_value=True)
    with plain, pretended() as device, torch.no_grad():
        launches = Launches(device)
        passes = twin_of(moved(model), TritonOperators(launches))
        given = given_to(model, small_tree(), OnDevice)
        with device.counting() as counts:
            passes.logits_of(passes.compute(given))
    assert counts.waits == {}
    assert counts.copies == {}
    assert counts.launches.total() > len(launches.asked) > 6 * model.config.num_hidden_layers


# ---- the runner -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "policy"), [("llama", "fixed"), ("gemma2", "autoregressive"), ("gpt_neox", "phase1")])
def test_runner_decodes_what_eager_decodes(name: str, policy: str) -> None:
    model = single(name)
    drafter = None if policy == "autoregressive" else perturbed(name)
    found = generate(model, drafter, TEXT[:4], policy=policy, max_new_tokens=8, runner="triton")
    assert found.report.runner == "triton"
    assert found.token_ids == generate(model, None, TEXT[:4], max_new_tokens=8, runner="eager").token_ids
    assert found.token_ids == greedy(model, TEXT[:4], 8)


def test_runner_refuses_and_is_never_chosen_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    model = single("llama")
    assert is_interpreted()
    assert runner_for(model, "triton") == "triton"
    assert runner_for(model, "auto") != "triton"
    with pytest.raises(ParameterError, match="knows no model whose layers are mixtures of experts"):
        runner_for(tiny_model("mixtral"), "triton")
    with pytest.raises(ParameterError, match=r"one device and one dtype of .* got cpu, torch\.float64"):
        runner_for(tiny_model("llama"), "triton")
    mine: Any = tiny_model.__wrapped__("llama").float()
    mine.model.layers[0].register_forward_hook(lambda *_: None)
    with pytest.raises(ParameterError, match="code of somebody else's"):
        runner_for(mine, "triton")
    with pytest.raises(ForwardPassError, match=r"torch\.autocast"), torch.autocast("cpu"):
        TritonRunner(model).forward(flatten_chain(torch.tensor(TEXT), 0), TreeCache(20))
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ParameterError, match="is for models on a CUDA GPU, got one on cpu"):
        make_runner(model, "triton")


def test_runner_keeps_the_twin_of_a_model_and_takes_only_caches_that_it_can_write_to() -> None:
    model, kept = single("llama"), {}
    runner = make_runner(model, "triton", kept=kept)
    assert make_runner(model, "triton", kept=kept) is runner
    with pytest.raises(CacheError, match="can_record, got a Nothing"):
        runner.forward(flatten_chain(torch.tensor(TEXT), 0), Nothing())  # type: ignore[arg-type]


class Nothing:
    can_record = False
