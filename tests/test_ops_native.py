"""The operators in C: the reference's numbers, and the same bits whatever stands beside a row, on every target here."""

from __future__ import annotations

import math
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import attrs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_ops import PUBLISHED, attention_case, random_blocks

from dynatree_core import ops
from dynatree_core.errors import InputError
from dynatree_core.ops.native import calls, loading, reason_unavailable, runnable_targets

PLAIN = ["float32", "bfloat16", "float16"]
ACTIVATIONS = ["silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "relu2"]
NUM_ROWS = 37  # more than two tiles of any target
MANY_ROWS = 101  # more than share what was decoded


def test_the_library_is_here():
    """Whoever runs these tests has a compiler: by the extra `dev`, if by nothing else."""
    if os.environ.get(loading.CHOICE) == "off":
        pytest.skip("the environment switches the library off")
    assert reason_unavailable() is None


@pytest.fixture(params=runnable_targets())
def target(request, monkeypatch):
    """One of the libraries that this CPU can run, in the place of the best."""
    used = loading.load(request.param)
    monkeypatch.setattr(calls, "library", lambda: used)
    return request.param


def matrix(kind: str, outputs: int, num_inputs: int, *, bias: bool = False) -> ops.PackedMatrix:
    random = torch.Generator().manual_seed(outputs * num_inputs)
    some_bias = torch.randn(outputs, generator=random) if bias else None
    if kind in PUBLISHED:
        return ops.pack_blocks(random_blocks(kind, outputs, num_inputs), kind, num_inputs, some_bias)
    weight = torch.randn(outputs, num_inputs, generator=random)
    if kind in ("4", "8"):
        return ops.quantise(weight, int(kind), bias=some_bias)
    return ops.pack(weight.to(getattr(torch, kind)), some_bias)


def in_float64(packed: ops.PackedMatrix) -> ops.PackedMatrix:
    bias = None if packed.bias is None else packed.bias[: packed.num_outputs].double()
    return ops.pack(packed.unpacked().double(), bias)


MATRICES = [
    *(
        (kind, outputs, num_inputs)
        for kind in (*PLAIN, "4", "8")
        for outputs, num_inputs in ((1, 1), (45, 33), (16, 100), (20, 300))
    ),
    *((kind, 20, 160) for kind in ("Q5_0", "Q5_1")),
    *((kind, outputs, 512) for kind in PUBLISHED for outputs in (16, 75)),
]


@pytest.mark.parametrize(("kind", "outputs", "num_inputs"), MATRICES)
def test_a_product_is_right_and_no_row_knows_its_neighbours(kind, outputs, num_inputs, target):
    packed = matrix(kind, outputs, num_inputs, bias=True)
    rows, residual = torch.randn(MANY_ROWS, num_inputs), torch.randn(MANY_ROWS, outputs)
    result = ops.linear(rows, packed, residual=residual, scale=0.5)
    right = ops.linear(rows.double(), in_float64(packed), residual=residual.double(), scale=0.5)
    size = packed.unpacked().abs().max().item() * math.sqrt(num_inputs)
    assert ((result - right).abs() < 1e-5 * (1 + size)).all()
    for num_rows in (*range(1, 19), 33, 98):
        for first in (0, MANY_ROWS - num_rows):
            some = slice(first, first + num_rows)
            assert torch.equal(ops.linear(rows[some], packed, residual=residual[some], scale=0.5), result[some])


INTEGERS = [
    *((kind.upper(), outputs, 512) for kind in ops.INTEGER_KINDS for outputs in (16, 75)),
    *((kind, outputs, num_inputs) for kind in ("4", "8") for outputs, num_inputs in ((1, 1), (45, 33), (20, 300))),
]


def rounding(kind: str, outputs: int, num_inputs: int) -> ops.PackedMatrix:
    """A matrix whose products round their rows to 8 bits."""
    return ops.with_activations(matrix(kind, outputs, num_inputs, bias=True), "int8")


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether all bits are equal, where one NaN is as good as another."""
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(nan=0.0), b.nan_to_num(nan=0.0))


def awkward_rows(num_rows: int, num_inputs: int) -> torch.Tensor:
    """Rows of all sizes; some of zeros, of numbers that have lost bits, and halfway between two codes."""
    rows = torch.randn(num_rows, num_inputs, generator=torch.Generator().manual_seed(num_inputs))
    rows *= torch.logspace(-40, 33, num_rows, dtype=torch.float64)[:, None].float()
    rows[3] = 0
    rows[4, num_inputs // 2 :] = 0
    rows[5] = torch.full((num_inputs,), 2.0**-149)
    rows[6] = 190 * 2.0**-149  # the scale rounds to 2^-149, so the quotient is beyond 127
    rows[7] = torch.arange(num_inputs) % 32 - 15.5  # beside 127 a scale of 1: halves
    rows[7, ::32] = 127
    return rows


@pytest.mark.parametrize(("kind", "outputs", "num_inputs"), INTEGERS)
def test_rows_in_8_bits_have_the_references_bits_whatever_stands_beside_them(kind, outputs, num_inputs, target):
    packed = rounding(kind, outputs, num_inputs)
    rows, residual = awkward_rows(MANY_ROWS, num_inputs), torch.randn(MANY_ROWS, outputs)
    with ops.using("reference"):
        wanted = ops.linear(rows, packed, residual=residual, scale=0.5)
    for num_rows in (*range(1, 19), 33, MANY_ROWS):
        for first in (0, MANY_ROWS - num_rows):
            some = slice(first, first + num_rows)
            assert torch.equal(ops.linear(rows[some], packed, residual=residual[some], scale=0.5), wanted[some])


@pytest.mark.parametrize("implementation", ["native", "reference"])
@pytest.mark.parametrize(("kind", "outputs", "num_inputs"), INTEGERS)
def test_rows_in_8_bits_are_within_half_a_code_of_the_full_ones(kind, outputs, num_inputs, implementation):
    """Each input is moved by half its group's scale at most, and each weight is what it was."""
    packed = rounding(kind, outputs, num_inputs)
    rows = torch.randn(9, num_inputs)
    with ops.using(implementation):
        result = ops.linear(rows, packed)
    right = ops.linear(rows.double(), in_float64(packed))
    padded = torch.nn.functional.pad(rows, (0, -num_inputs % 32)).view(9, -1, 32)
    steps = (padded.abs().amax(-1) / 127).repeat_interleave(32, dim=1)[:, :num_inputs]
    sizes = packed.unpacked().abs().double()
    rounded, summed = 0.5 * steps.double() @ sizes.t(), rows.abs().double() @ sizes.t()
    assert ((result - right).abs() <= 1.0001 * rounded + 1e-5 * (1 + summed)).all()


@pytest.mark.parametrize("kind", ["Q4_1", "Q4_0", "Q8_0", "Q4_K"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_makes_no_number_of_its_row_and_of_no_other(kind, value, target):
    packed = rounding(kind, 45, 256)
    rows = torch.randn(NUM_ROWS, 256)
    wanted = ops.linear(rows, packed)
    for place in (0, 130, 255):
        broken = rows.clone()
        broken[20, place] = value
        result = ops.linear(broken, packed)
        assert result[20].isnan().all()
        assert ops.linear(broken[20:21], packed).isnan().all()
        others = torch.arange(NUM_ROWS) != 20
        assert torch.equal(result[others], wanted[others])
        with ops.using("reference"):
            assert same(ops.linear(broken, packed), result)


@pytest.mark.parametrize("kind", ["Q4_1", "Q8_0"])
def test_a_row_of_the_largest_codes_overflows_nothing(kind, target):
    """Sums of 16 bits hold what is added in them, with the least and the greatest code of the weights."""
    blocks = random_blocks(kind, 45, 512)
    spec = blocks.view(45, 16, -1)
    scale_bytes = 4 if kind == "Q4_1" else 2
    spec[:20, :, scale_bytes:] = 0xFF if kind == "Q4_1" else 0x80  # 15 and 15, or -128
    spec[20:30, :, scale_bytes:] = 0x7F
    packed = ops.with_activations(ops.pack_blocks(blocks, kind, 512), "int8")
    for rows in (torch.full((7, 512), 3.0), torch.full((7, 512), -3.0)):
        with ops.using("reference"):
            wanted = ops.linear(rows, packed)
        assert torch.equal(ops.linear(rows, packed), wanted)
        torch.testing.assert_close(wanted, ops.linear(rows, ops.with_activations(packed, "full")), rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize(("inner", "outer"), [("4", "8"), ("4", "bfloat16")])
def test_a_feed_forward_block_rounds_both_its_products(inner, outer, target):
    first, second = (ops.with_activations(matrix(*one), "int8") for one in ((inner, 128, 96), (outer, 96, 64)))
    rows, residual = torch.randn(MANY_ROWS, 96), torch.randn(MANY_ROWS, 96)
    norm, after = NORMS["rms"](96), NORMS["rms"](96)
    result = ops.mlp(rows, first, second, activation="silu", norm=norm, after=after, residual=residual)
    step = ops.linear(ops.norm(rows, norm), first)
    for num_rows in (1, 2, 5, 37):
        alone = ops.mlp(rows[:num_rows], first, second, activation="silu", norm=norm, after=after,
                        residual=residual[:num_rows])  # fmt: skip
        assert torch.equal(alone, result[:num_rows])
    assert torch.equal(step, ops.linear(rows, first, norm=norm))
    full = ops.mlp(rows, *(ops.with_activations(one, "full") for one in (first, second)), activation="silu", norm=norm,
                   after=after, residual=residual)  # fmt: skip
    assert 0 < (result - full).abs().max() < 0.5


def test_no_rows_have_no_results():
    packed = matrix("4", 20, 256)
    for one in (packed, ops.with_activations(packed, "int8")):
        # on a thread of its own, which has no memory for rows yet
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(ops.linear, torch.zeros(0, 256), one).result().shape == (0, 20)


def test_only_matrices_of_few_bits_round_their_rows():
    for kind in (*PLAIN, "Q5_0", "Q5_1", "Q5_K", "Q6_K"):
        packed = matrix(kind, 20, 256)
        assert ops.with_activations(packed, "int8") is packed
    packed = matrix("4", 20, 256)
    rounded = ops.with_activations(packed, "int8")
    assert rounded.data is packed.data
    assert ops.with_activations(rounded, "full").activations == "full"
    assert torch.equal(ops.lookup(rounded, torch.tensor([3])), ops.lookup(packed, torch.tensor([3])))
    with pytest.raises(InputError, match="one of full, int8, got 'int4'"):
        ops.with_activations(packed, "int4")


@pytest.mark.parametrize("kind", [*PLAIN, *PUBLISHED, "4", "8"])
def test_weights_are_decoded_to_the_last_bit(kind, target):
    """A row with a single 1 takes one input's weights out, alone and among many."""
    packed = matrix(kind, 45, 256)
    wanted = packed.unpacked().t()
    picks = torch.eye(256)
    assert torch.equal(ops.linear(picks, packed), wanted)
    assert torch.equal(torch.cat([ops.linear(row[None], packed) for row in picks]), wanted)


def test_targets_that_fuse_agree_to_the_last_bit(monkeypatch):
    fused = [name for name in runnable_targets() if name != "x86_64"]
    if len(fused) < 2:
        pytest.skip("this CPU runs one such target only")
    rows, inner, outer = torch.randn(5, 96), matrix("8", 400, 96), matrix("4", 96, 200)
    queries, keys, values, mask = attention_case(head_dim=20)
    results = []
    for name in fused:
        used = loading.load(name)
        monkeypatch.setattr(calls, "library", lambda used=used: used)
        results.append(ops.mlp(rows, inner, outer, activation="gelu", norm=ops.Norm("layer", torch.ones(96), 1e-5)))
        results.append(
            ops.tree_attention(queries, ops.Slabs.of(keys, values), ops.Visible.of_mask(mask), scale=0.3, soft_cap=2.0)
        )
    assert all(torch.equal(a, b) for a, b in zip(results, results[2:], strict=False))


NORMS = {
    "rms": lambda size: ops.Norm("rms", torch.randn(size), 1e-6),
    "rms of Gemma": lambda size: ops.Norm("rms", torch.randn(size), 1e-6, offset=1.0),
    "rms without weights": lambda size: ops.Norm("rms", None, 1e-6),
    "layer": lambda size: ops.Norm("layer", torch.randn(size), 1e-5, bias=torch.randn(size)),
    "layer without bias": lambda size: ops.Norm("layer", torch.randn(size), 1e-5),
}


def norm_in_float64(norm: ops.Norm | None) -> ops.Norm | None:
    if norm is None:
        return None
    weight, bias = (None if part is None else part.double() for part in (norm.weight, norm.bias))
    return ops.Norm(norm.kind, weight, norm.eps, bias, norm.offset)


@pytest.mark.parametrize("size", [1, 16, 23, 96])
@pytest.mark.parametrize("name", NORMS)
def test_norms(name, size, target):
    norm = NORMS[name](size)
    rows, residual = 3 + torch.randn(NUM_ROWS, size), torch.randn(NUM_ROWS, size)
    result = ops.norm(rows, norm, residual=residual)
    right = ops.norm(rows.double(), norm_in_float64(norm), residual=residual.double())
    torch.testing.assert_close(result.double(), right, atol=2e-4 if name.startswith("layer") else 1e-5, rtol=1e-5)
    alone = [ops.norm(row[None], norm, residual=x[None]) for row, x in zip(rows, residual, strict=True)]
    assert torch.equal(torch.cat(alone), result)
    assert torch.equal(ops.norm(rows, norm, residual=residual, out=residual), result)


@pytest.mark.parametrize("num_hidden", [64, 41])
@pytest.mark.parametrize(
    ("activation", "is_gated"),
    [*((name, is_gated) for name in ACTIVATIONS for is_gated in (True, False)), ("clipped_swiglu", True)],
)
def test_feed_forward_blocks(activation, is_gated, num_hidden, target):
    inner, outer = matrix("float32", num_hidden * (1 + is_gated), 40, bias=True), matrix("float32", 40, num_hidden)
    rows = torch.randn(NUM_ROWS, 40)
    norm, after = NORMS["rms"](40), NORMS["layer"](40)
    for last in (None, after):
        result = ops.mlp(rows, inner, outer, activation=activation, norm=norm, after=last, residual=rows, scale=0.7)
        right = ops.mlp(
            rows.double(),
            in_float64(inner),
            in_float64(outer),
            activation=activation,
            norm=norm_in_float64(norm),
            after=norm_in_float64(last),
            residual=rows.double(),
            scale=0.7,
        )
        torch.testing.assert_close(result.double(), right, atol=1e-5 * right.abs().max().item(), rtol=1e-5)
        for num_rows in (1, 2, 5, 8, 20):
            some = rows[:num_rows].clone()
            alone = ops.mlp(
                some, inner, outer, activation=activation, norm=norm, after=last, residual=some, scale=0.7, out=some
            )
            assert alone is some
            assert torch.equal(alone, result[:num_rows])


def mixture(
    kind: str = "float32",
    num_experts: int = 5,
    num_chosen: int = 2,
    size: int = 64,
    width: int = 32,
    router: torch.Tensor | None = None,
    **settings: Any,
) -> ops.Experts:
    """Experts whose matrices are all different; a shared one is a little wider than the others."""
    random = torch.Generator().manual_seed(num_experts)
    has_shared = settings.get("has_shared", False)
    router = torch.randn(num_experts + has_shared, size, generator=random) if router is None else router
    widths = [width] * num_experts + [2 * width] * has_shared

    def made(outputs: int, inputs: int) -> ops.PackedMatrix:
        weight, bias = torch.randn(outputs, inputs, generator=random), torch.randn(outputs, generator=random)
        return ops.quantise(weight, int(kind), bias=bias) if kind in "48" else ops.pack(weight, bias)

    inner = tuple(made(2 * one, size) for one in widths)
    outer = tuple(made(size, one) for one in widths)
    given = {"activation": "silu", "adds_up": True, **settings}
    return ops.Experts(ops.pack(router), inner, outer, num_chosen=num_chosen, **given)


def mixture_in_float64(experts: ops.Experts) -> ops.Experts:
    inner, outer = (tuple(map(in_float64, matrices)) for matrices in (experts.inner, experts.outer))
    return attrs.evolve(experts, router=in_float64(experts.router), inner=inner, outer=outer)


@pytest.mark.parametrize("kind", ["float32", "8", "4"])
@pytest.mark.parametrize("settings", [{}, {"adds_up": False}, {"has_shared": True}, {"activation": "clipped_swiglu"}])
@pytest.mark.parametrize(("num_experts", "num_chosen"), [(5, 2), (33, 8), (1, 1), (16, 16)])
def test_a_mixture_is_right_and_no_row_knows_its_neighbours(kind, settings, num_experts, num_chosen, target):
    experts = mixture(kind, num_experts, num_chosen, **settings)
    torch.manual_seed(num_experts)  # rows of which none has two experts that are as probable up to rounding
    norm, rows, residual = NORMS["rms"](64), torch.randn(40, 64), torch.randn(40, 64)
    result = ops.experts(rows, experts, norm=norm, residual=residual)
    right = ops.experts(
        rows.double(), mixture_in_float64(experts), norm=norm_in_float64(norm), residual=residual.double()
    )
    torch.testing.assert_close(result.double(), right, atol=1e-5 * right.abs().max().item(), rtol=1e-5)
    for num_rows in range(1, 41):
        some = torch.randperm(40)[:num_rows]
        alone = ops.experts(rows[some], experts, norm=norm, residual=residual[some])
        assert torch.equal(alone, result[some])
    assert torch.equal(ops.experts(rows, experts, norm=norm, residual=residual, out=residual), result)


def test_a_mixture_of_one_expert_is_its_block_and_experts_add_up_by_number(target):
    one = mixture(num_experts=1, num_chosen=1)
    rows = torch.randn(NUM_ROWS, 64)
    assert torch.equal(ops.experts(rows, one), ops.mlp(rows, one.inner[0], one.outer[0], activation="silu"))
    # of scores 1, 2 and 3, whoever is the most probable, results are added from the first on
    router = torch.zeros(3, 64)
    router[:, 0] = torch.tensor([1.0, 2.0, 3.0])
    rows[:, 0] = 1
    three = mixture(num_experts=3, num_chosen=3, router=router)
    shares = torch.tensor([1.0, 2.0, 3.0]).softmax(dim=0)
    blocks = [ops.mlp(rows, a, b, activation="silu") for a, b in zip(three.inner, three.outer, strict=True)]
    expected = sum(share * block for share, block in zip(shares, blocks, strict=True))
    torch.testing.assert_close(ops.experts(rows, three), expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("implementation", ["native", "reference"])
def test_of_equal_shares_the_lower_number_is_taken(implementation):
    rows = torch.randn(9, 64)
    experts = mixture(num_experts=21, num_chosen=3, router=torch.zeros(21, 64))  # all are equal
    first = zip(experts.inner[:3], experts.outer[:3], strict=True)
    blocks = [ops.mlp(rows, inner, outer, activation="silu") for inner, outer in first]
    with ops.using(implementation):
        torch.testing.assert_close(ops.experts(rows, experts), sum(blocks) / 3, atol=1e-4, rtol=1e-5)


def test_all_rows_may_go_to_one_expert_and_none_to_another(target):
    router = torch.zeros(4, 64)
    router[:, 0] = torch.tensor([0.0, 900.0, -900.0, 0.0])  # shares of 0 but one
    rows = torch.randn(NUM_ROWS, 64)
    rows[:, 0] = 1
    experts = mixture(num_experts=4, num_chosen=1, router=router)
    experts.outer[2].data.view(torch.float32).fill_(torch.nan)  # whoever reads it is found out
    result = ops.experts(rows, experts)
    assert torch.equal(result, ops.mlp(rows, experts.inner[1], experts.outer[1], activation="silu"))
    assert torch.equal(torch.cat([ops.experts(row[None], experts) for row in rows]), result)


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_no_number_stays_alone(wrong, target):
    experts, rows = mixture(num_experts=20, has_shared=True), torch.randn(5, 64)
    right = ops.experts(rows, experts)
    rows[2, 7] = wrong
    result = ops.experts(rows, experts)
    assert result[2].isnan().any()
    assert torch.equal(result[[0, 1, 3, 4]], right[[0, 1, 3, 4]])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_are_within_rounding(activation, target):
    """Everywhere, at the far ends and where there is no number; and the same in every place of a row."""
    one = matrix("float32", 1, 1)
    one.data.view(torch.float32)[:] = 1
    ends = torch.tensor([-torch.inf, torch.inf, torch.nan, -0.0, 0.0, -100.0, 100.0, -3e4, 3e4])
    numbers = torch.cat([torch.linspace(-20, 20, 40001), torch.linspace(-1e-3, 1e-3, 101), ends])
    result = ops.mlp(numbers[:, None].contiguous(), one, one, activation=activation)[:, 0]
    right = ops.mlp(numbers[:, None].double().contiguous(), in_float64(one), in_float64(one), activation=activation)[
        :, 0
    ]
    finite = right.isfinite()
    torch.testing.assert_close(result[finite].double(), right[finite], atol=6e-7, rtol=3e-7)
    assert torch.equal(result[~finite & ~right.isnan()].double(), right[~finite & ~right.isnan()])
    assert result[numbers.isnan()].isnan().all()
    wide = ops.pack(torch.eye(23))
    places = torch.stack([torch.roll(numbers[500 : 500 + 23], place) for place in range(23)])
    moved = ops.mlp(places, wide, wide, activation=activation)
    assert all(torch.equal(torch.roll(row, -place), moved[0]) for place, row in enumerate(moved))


@pytest.mark.parametrize("soft_cap", [None, 2.0])
@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize("head_dim", [8, 16, 64, 80])
def test_attention(head_dim, has_sinks, soft_cap, target):
    queries, keys, values, mask = attention_case(head_dim=head_dim, slots=60, rows=7)
    sinks = torch.randn(6) if has_sinks else None
    visible = ops.Visible.of_mask(mask)
    result = ops.tree_attention(queries, ops.Slabs.of(keys, values), visible, scale=0.3, soft_cap=soft_cap, sinks=sinks)
    right = ops.tree_attention(
        queries.double(),
        ops.Slabs.of(keys.double(), values.double()),
        visible,
        scale=0.3,
        soft_cap=soft_cap,
        sinks=None if sinks is None else sinks.double(),
    )
    torch.testing.assert_close(result.double(), right, atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize("implementation", ["native", "reference"])
def test_slots_outside_of_the_cache_are_refused(implementation):
    queries, keys, values, mask = attention_case()
    rows = torch.randn(2, (6 + 2) * 8 + 2 * 12)
    good = torch.zeros(2, dtype=torch.int32)
    with ops.using(implementation):
        for lanes, slots in ((good, good + 20), (good, good - 1), (good + 2, good), (good - 1, good)):
            with pytest.raises(InputError, match="must be in the cache"):
                ops.rope_write(rows, ops.Slabs.of(keys, values), lanes, slots, num_heads=6)
        for name, change in (
            ("lanes", 2),
            ("lanes", -1),
            ("start", 30),
            ("start", -9),
            ("end", 21),
            ("own", 20),
            ("own", -20),
        ):
            visible = ops.Visible.of_mask(mask)
            getattr(visible, name).add_(change)
            with pytest.raises(InputError, match="must be in the cache"):
                ops.tree_attention(queries, ops.Slabs.of(keys, values), visible, scale=1.0)
        for place, change in ((0, -1), (3, -20), (-1, 1)):
            visible = ops.Visible.of_mask(mask)
            visible.own_start[place] += change
            with pytest.raises(InputError, match="must be in the cache"):
                ops.tree_attention(queries, ops.Slabs.of(keys, values), visible, scale=1.0)


@pytest.mark.parametrize(("slots", "heads"), [(40000, 2), (37, 20), (16, 8)])
def test_long_texts_and_large_groups_of_heads(slots, heads, target):
    """Rows whose scores fill more than a cache, and more heads of one group than are computed together."""
    queries, keys, values, mask = attention_case(heads=heads, key_heads=1, slots=slots, lanes=1, rows=6)
    slabs, visible = ops.Slabs.of(keys, values), ops.Visible.of_mask(mask)
    result = ops.tree_attention(queries, slabs, visible, scale=0.3)
    right = ops.tree_attention(queries.double(), ops.Slabs.of(keys.double(), values.double()), visible, scale=0.3)
    torch.testing.assert_close(result.double(), right, atol=3e-6, rtol=1e-4)
    for row in range(6):
        alone = ops.Visible.of_mask(mask[:, row : row + 1])
        assert torch.equal(ops.tree_attention(queries[row : row + 1], slabs, alone, scale=0.3)[0], result[row])


def test_a_row_that_sees_nothing_gets_zeros(target):
    queries, keys, values, mask = attention_case()
    mask[0, 1] = False
    result = ops.tree_attention(queries, ops.Slabs.of(keys, values), ops.Visible.of_mask(mask), scale=0.3)
    assert result[1].eq(0).all()
    assert result.isfinite().all()


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_attention_depends_on_a_rows_text_alone(data):
    """The same text in other slots, beside other rows, in a run or a list, in another lane: the same bits."""
    seen = data.draw(st.integers(1, 40))
    head_dim, heads, repeats = data.draw(st.sampled_from([(8, 2, 1), (20, 1, 3), (64, 3, 2)]))
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    query = torch.randn(1, heads * repeats, head_dim, generator=random)
    text = torch.randn(2, 1, heads, seen, head_dim, generator=random)  # keys and values in the text's order
    run = ops.Visible.of_mask(torch.ones(1, 1, seen, dtype=torch.bool))
    alone = ops.tree_attention(query, ops.Slabs.of(text[0], text[1]), run, scale=0.2)

    num_slots, num_rows = 64, data.draw(st.integers(1, 9))
    slots = sorted(data.draw(st.sets(st.integers(0, num_slots - 1), min_size=seen, max_size=seen)))
    slabs = torch.randn(2, 2, num_slots, heads, head_dim, generator=random).transpose(2, 3)  # of two lanes
    lane, row = data.draw(st.integers(0, 1)), data.draw(st.integers(0, num_rows - 1))
    slabs[:, lane, :, slots] = text[:, 0]
    mask = torch.rand(2, num_rows, num_slots, generator=random) < 0.5
    mask[lane, row] = False
    mask[lane, row, slots] = True
    queries = torch.randn(2 * num_rows, heads * repeats, head_dim, generator=random)
    place = lane * num_rows + row
    queries[place] = query[0]
    visible = ops.Visible.of_mask(mask)
    if data.draw(st.booleans()):  # all in lists, nothing in a run
        own = mask.flatten(0, 1).nonzero()[:, 1].int()
        own_start = torch.cat([torch.zeros(1), mask.flatten(0, 1).sum(1).cumsum(0)]).int()
        nothing = torch.zeros(2 * num_rows, dtype=torch.int32)
        visible = ops.Visible(visible.lanes, nothing, nothing, own_start, own)
    result = ops.tree_attention(queries, ops.Slabs.of(slabs[0], slabs[1]), visible, scale=0.2)
    assert torch.equal(result[place], alone[0])


@pytest.mark.parametrize("is_interleaved", [False, True])
@pytest.mark.parametrize("rotated", [0, 4, 10])
@pytest.mark.parametrize("norms", [None, "head", "each head", "whole", "layer"])
def test_queries_and_keys(norms, rotated, is_interleaved, target):
    heads, key_heads, head_dim, value_dim = 4, 2, 10, 7
    rows = torch.randn(NUM_ROWS, (heads + key_heads) * head_dim + key_heads * value_dim)

    def norm(num_heads: int) -> ops.Norm | None:
        if norms is None:
            return None
        shape = {"head": (head_dim,), "each head": (num_heads, head_dim), "whole": (num_heads * head_dim,)}
        weight = torch.randn(shape.get(norms, (num_heads, head_dim)))
        return (
            ops.Norm("layer", weight, 1e-5, torch.randn_like(weight))
            if norms == "layer"
            else ops.Norm("rms", weight, 1e-6)
        )

    both = norm(heads), norm(key_heads)
    angles = torch.randn(NUM_ROWS, rotated // 2)
    lanes = torch.randint(0, 2, (NUM_ROWS,), dtype=torch.int32)
    slots = torch.randperm(50, dtype=torch.int32)[:NUM_ROWS]

    def written(dtype: torch.dtype, some: slice) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        keys = torch.zeros(2, 50, key_heads, head_dim, dtype=dtype).transpose(1, 2)  # not contiguous, as a slab may be
        values = torch.zeros(2, key_heads, 50, value_dim, dtype=dtype)
        chosen = both if dtype == torch.float32 else tuple(map(norm_in_float64, both))
        cos, sin = (part[some].to(dtype).contiguous() for part in (angles.cos(), angles.sin()))
        queries = ops.rope_write(
            rows[some].to(dtype),
            ops.Slabs.of(keys, values),
            lanes[some],
            slots[some],
            num_heads=heads,
            rotary=ops.Rotary(cos, sin, is_interleaved) if rotated else None,
            query_norm=chosen[0],
            key_norm=chosen[1],
        )
        return queries, keys, values

    result, right = written(torch.float32, slice(None)), written(torch.float64, slice(None))
    for mine, theirs in zip(result, right, strict=True):
        torch.testing.assert_close(mine.double(), theirs, atol=3e-5, rtol=1e-5)
    for row in (0, 5, NUM_ROWS - 1):
        queries, keys, values = written(torch.float32, slice(row, row + 1))
        assert torch.equal(queries[0], result[0][row])
        for mine, all_rows in ((keys, result[1]), (values, result[2])):
            assert torch.equal(mine[lanes[row], :, slots[row]], all_rows[lanes[row], :, slots[row]])


def big_block() -> tuple[torch.Tensor, ops.PackedMatrix, ops.PackedMatrix]:
    return torch.randn(9, 96), matrix("8", 1024, 96), matrix("float32", 96, 512)


def test_the_number_of_threads_changes_no_bit():
    rows, inner, outer = big_block()
    before, results = torch.get_num_threads(), []
    try:
        for num_threads in (1, 2, 3, 7):
            torch.set_num_threads(num_threads)
            results.append(ops.mlp(rows, inner, outer, activation="silu"))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


def test_several_callers_at_once():
    rows, inner, outer = big_block()
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        alone = ops.mlp(rows, inner, outer, activation="silu")
        wrong = []

        def call() -> None:
            wrong.extend(
                number for number in range(50) if not torch.equal(ops.mlp(rows, inner, outer, activation="silu"), alone)
            )

        callers = [threading.Thread(target=call) for _ in range(4)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
    finally:
        torch.set_num_threads(before)
    assert wrong == []


def test_a_forked_child_has_threads_of_its_own():
    rows, inner, outer = big_block()
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        alone = ops.mlp(rows, inner, outer, activation="silu")
        child = os.fork()
        if child == 0:
            os._exit(0 if torch.equal(ops.mlp(rows, inner, outer, activation="silu"), alone) else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert torch.equal(ops.mlp(rows, inner, outer, activation="silu"), alone)
    finally:
        torch.set_num_threads(before)


def test_operators_that_are_written_down_are_those_that_are_called(target):
    """For any number of rows; what is written into the tensors later counts."""
    norm, inner, outer = NORMS["rms"](40), matrix("4", 128, 40), matrix("float32", 40, 64)
    rows, fused = torch.zeros(NUM_ROWS, 40), torch.zeros(NUM_ROWS, 128)
    with ops.recorded() as recording:
        ops.linear(rows, inner, norm=norm, out=fused)
        ops.mlp(rows, inner, outer, activation="silu", residual=rows, out=rows)
    assert rows.eq(0).all()
    for num_rows in (1, 5, NUM_ROWS):
        new = torch.randn(num_rows, 40)
        rows[:num_rows] = new
        before = fused.clone()
        recording.run(num_rows)
        assert torch.equal(fused[:num_rows], ops.linear(new, inner, norm=norm))
        assert torch.equal(fused[num_rows:], before[num_rows:])
        assert torch.equal(rows[:num_rows], ops.mlp(new, inner, outer, activation="silu", residual=new))


def test_only_what_the_library_computes_is_written_down():
    """The reference would compute now, and `run` nothing."""
    inner, rows, out = matrix("float32", 8, 40), torch.zeros(2, 40), torch.zeros(2, 8)
    with ops.using("reference"), ops.recorded(), pytest.raises(InputError, match="only operators that the library"):
        ops.linear(rows, inner, out=out)


def test_what_is_written_down_needs_tensors_that_last_and_are_large_enough():
    inner, outer, rows = matrix("float32", 8, 40), matrix("float32", 5, 8), torch.zeros(3, 40)
    with ops.recorded() as recording:
        ops.linear(rows, inner, out=(hidden := torch.zeros(3, 8)))
        ops.linear(hidden[:2], outer, out=torch.zeros(2, 5))
        with pytest.raises(InputError, match="must be given as `out`"):
            ops.linear(rows, inner)
    with pytest.raises(InputError, match="as their tensors have, 2 here, got 3"):
        recording.run(3)


def test_a_description_stays_where_it_was_written_down():
    """Another thread that describes the same at the same time takes over what is there."""
    inner, norm = matrix("float32", 8, 40), NORMS["rms"](40)
    found = calls._matrix_address(inner), calls._norm_address(norm, 40)
    calls._describe(inner.kept, "described", bytes(48))  # of a thread that has looked before it was there
    calls._describe(norm.kept, 40, bytes(48))
    assert (calls._matrix_address(inner), calls._norm_address(norm, 40)) == found


@pytest.mark.parametrize("implementation", ["native", "reference"])
def test_lanes_of_several_caches_count_on(implementation):
    """Attention and writing over two caches at once are those over each by itself."""
    random = torch.Generator().manual_seed(3)
    caches = [
        [torch.randn(lanes, 2, slots, dim, generator=random) for dim in (8, 12)] for lanes, slots in ((2, 20), (1, 31))
    ]
    slabs = ops.Slabs(2, 8, 12, torch.float32, torch.zeros(5, 8, dtype=torch.int64))
    slabs.hold(*zip(*caches, strict=True))
    rows, lanes = torch.randn(6, (4 + 2) * 8 + 2 * 12, generator=random), torch.tensor([0, 0, 1, 2, 2, 2]).int()
    slots = torch.tensor([3, 4, 3, 30, 29, 28]).int()
    mask = torch.rand(1, 6, 31, generator=random) < 0.5
    mask[:, :3, 20:] = False
    seen = ops.Visible.of_mask(mask)
    seen.lanes[:] = lanes
    with ops.using(implementation):
        copies = [[part.clone() for part in cache] for cache in caches]
        queries = ops.rope_write(rows, slabs, lanes, slots, num_heads=4)
        found = ops.tree_attention(queries, slabs, seen, scale=0.3)
        for some, first_lane, copy in ((slice(0, 3), 0, copies[0]), (slice(3, 6), 2, copies[1])):
            own = ops.Slabs.of(*copy)
            alone = ops.rope_write(rows[some], own, lanes[some] - first_lane, slots[some], num_heads=4)
            visible = ops.Visible.of_mask(mask[:, some])
            visible.lanes[:] = lanes[some] - first_lane
            assert torch.equal(queries[some], alone)
            assert torch.equal(found[some], ops.tree_attention(alone, own, visible, scale=0.3))
        assert all(torch.equal(a, b) for a, b in zip((*caches[0], *caches[1]), (*copies[0], *copies[1]), strict=True))
        slabs.hold([caches[1][0]], [caches[1][1]])  # fewer lanes: the others are gone
        for call in (
            lambda: ops.rope_write(rows, slabs, lanes, slots, num_heads=4),
            lambda: ops.tree_attention(queries, slabs, seen, scale=0.3),
        ):
            with pytest.raises(InputError, match="must be in the cache"):
                call()
    with pytest.raises(InputError, match="room in the table for all lanes, which is 5, got 6"):
        slabs.hold([caches[0][0]] * 3, [caches[0][1]] * 3)
    with pytest.raises(InputError, match=r"values must be \[lanes, 2, capacity, 12\]"):
        slabs.hold([caches[0][0]], [caches[1][1]])


def test_queries_grow_and_all_is_clipped(target):
    rows, growth = 3 * torch.randn(NUM_ROWS, (4 + 2) * 8 + 2 * 12), 1 + torch.rand(NUM_ROWS)
    lanes, slots = torch.zeros(NUM_ROWS, dtype=torch.int32), torch.arange(NUM_ROWS, dtype=torch.int32)
    results = []
    for some, clip in ((rows, 1.5), (rows.clamp(-1.5, 1.5), None)):
        keys, values = torch.zeros(1, 2, NUM_ROWS, 8), torch.zeros(1, 2, NUM_ROWS, 12)
        slabs = ops.Slabs.of(keys, values)
        factor = growth if clip else None
        queries = ops.rope_write(some, slabs, lanes, slots, num_heads=4, clip=clip, growth=factor)
        results.append((queries if clip else queries * growth[:, None, None], keys, values))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    with pytest.raises(InputError, match="clipped to a size above 0, got -1"):
        ops.rope_write(rows, slabs, lanes, slots, num_heads=4, clip=-1.0)


@pytest.mark.parametrize("kind", [*PLAIN, *PUBLISHED, "4", "8"])
def test_looked_up_rows_are_those_of_the_matrix(kind, target):
    packed = matrix(kind, 45, 256)
    ids = torch.tensor([44, 0, 17, 17, 31])
    assert torch.equal(ops.lookup(packed, ids), packed.unpacked()[ids])
    for implementation in ("native", "reference"):
        for wrong in (45, -1):
            with ops.using(implementation), pytest.raises(InputError, match="below its number of outputs"):
                ops.lookup(packed, torch.tensor([3, wrong]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_results_are_float32_whatever_torchs_default_is(dtype):
    packed, ids = matrix("4", 45, 256), torch.tensor([44, 0, 17])
    wanted = ops.lookup(packed, ids)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        found = ops.lookup(packed, ids)
    finally:
        torch.set_default_dtype(before)
    assert found.dtype == torch.float32
    assert torch.equal(found, wanted)


def test_no_rows_at_all(target):
    packed = matrix("float32", 20, 10)
    assert ops.linear(torch.empty(0, 10), packed).shape == (0, 20)
    assert ops.mlp(torch.empty(0, 10), packed, matrix("float32", 10, 20), activation="relu").shape == (0, 10)


@pytest.mark.parametrize(("value", "words"), [("off", "is off"), ("sse9", "must be off or one of")])
def test_the_environment_chooses(value, words, monkeypatch):
    monkeypatch.setenv(loading.CHOICE, value)
    chosen = loading._chosen.__wrapped__()
    assert isinstance(chosen, str)
    assert words in chosen


def test_a_library_of_other_sources_is_refused(monkeypatch):
    monkeypatch.setattr(loading, "source_digest", lambda: "another")
    chosen = loading._chosen.__wrapped__()
    assert isinstance(chosen, str)
    assert "compiled from other sources; run" in chosen


def test_a_library_that_was_not_compiled(monkeypatch, tmp_path):
    monkeypatch.setattr(loading, "FOLDER", tmp_path)
    chosen = loading._chosen.__wrapped__()
    assert isinstance(chosen, str)
    assert "not compiled when the package was installed" in chosen


@pytest.mark.parametrize("size", [1, 15, 16, 1024, 1030, 49_152])
def test_totals(size, target):
    """To a few units in the last place, however small most of a row is, and for each row by itself."""
    rows = torch.randn(NUM_ROWS, size, generator=torch.Generator().manual_seed(size)) * 4
    rows[1, 0] = 30.0  # beside which the others hardly count
    rows[2] -= 1000.0
    rows[3] += 1000.0
    rows[4, size // 2 :] = rows[4].max()  # of equals the first
    rows[5] = rows[5].sort().values  # each block has a greater one than those before
    rows[6, : size // 2] = -math.inf
    found = ops.totals(rows)
    expected = ops.totals(rows.double())
    assert torch.equal(ops.totals(rows)[:, 2].long(), rows.argmax(dim=1))
    assert torch.equal(ops.totals(rows.double())[:, 2].long(), rows.argmax(dim=1))
    assert torch.equal(found[:, 0], rows.max(dim=1).values)
    assert torch.allclose(expected[:, :2].sum(dim=1), rows.double().logsumexp(dim=1), rtol=1e-12)
    assert torch.allclose(found[:, 1].double(), expected[:, 1], rtol=1e-6, atol=1e-6)  # exp within two units
    assert torch.equal(found[5:6], ops.totals(rows[5:6]))
    with pytest.raises(InputError, match="1 to 16777215 numbers, got 0"):
        ops.totals(rows[:, :0])


@pytest.mark.parametrize(
    ("kind", "activations"), [("bfloat16", "full"), ("float32", "full"), ("Q4_0", "int8"), ("8", "full")]
)
def test_a_products_totals_have_the_bits_of_its_results(kind, activations, target):
    """Whatever stands beside a row, and however many threads there are: parts are joined in one order."""
    packed = ops.with_activations(matrix(kind, 1000, 64, bias=kind != "Q4_0"), activations)
    rows, residual = torch.randn(NUM_ROWS, 64), torch.randn(NUM_ROWS, 1000)
    rows[4] = math.nan
    for num_rows in (1, 2, 3, 7, NUM_ROWS):
        totals = torch.zeros(num_rows, 3)
        found = ops.linear(rows[:num_rows], packed, residual=residual[:num_rows], soft_cap=3.0, totals=totals)
        assert same(found, ops.linear(rows[:num_rows], packed, residual=residual[:num_rows], soft_cap=3.0))
        assert same(totals, ops.totals(found))
        assert totals[:, 2].tolist() == found.argmax(dim=1).tolist()
    with ops.using("reference"):
        wanted = torch.zeros(NUM_ROWS, 3)
        assert same(wanted, ops.totals(ops.linear(rows, packed, residual=residual, soft_cap=3.0, totals=wanted)))
    torch.testing.assert_close(totals[:, 1], wanted[:, 1], equal_nan=True)


def test_a_products_totals_are_those_of_its_last_step():
    packed, norm = matrix("float32", 16, 8), ops.Norm("rms", torch.ones(16), 1e-6)
    with pytest.raises(InputError, match="without a norm after it"):
        ops.linear(torch.zeros(2, 8), packed, after=norm, totals=torch.zeros(2, 3))
    with pytest.raises(InputError, match=r"totals must be contiguous \[2, 3\]"):
        ops.linear(torch.zeros(2, 8), packed, totals=torch.zeros(2, 2))


def test_totals_of_what_is_no_number(target):
    rows = torch.tensor([[0.0, math.nan], [math.inf, 0.0], [-math.inf, -math.inf], [-math.inf, 0.0]]).repeat(1, 20)
    totals = ops.totals(rows)
    assert totals[:, 2].tolist() == rows.argmax(dim=1).tolist() == [1, 0, 0, 1]
    found = (rows - totals[:, :2].sum(dim=1, keepdim=True)).isnan().any(dim=1)
    assert found.tolist() == [True, True, True, False]
