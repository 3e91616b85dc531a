"""The operators: exact weights, and the reference against torch and transformers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, dequantize
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from dynatree_core import ops
from dynatree_core.errors import InputError
from dynatree_core.ops import reference
from dynatree_core.ops.layout import KINDS
from dynatree_core.ops.triton.matrix import StackedMatrix

MATRIX, ROWS = ops.pack(torch.zeros(3, 3)), torch.zeros(2, 3)
PUBLISHED = [name.upper() for name in KINDS]


def random_blocks(kind: str, outputs: int, num_inputs: int, seed: int = 0) -> torch.Tensor:
    """Any bytes, but scales of ordinary size."""
    spec = KINDS[kind.lower()]
    random = np.random.default_rng(seed)
    num = num_inputs // spec.published
    blocks = random.integers(0, 256, (outputs, num, spec.published_bytes), dtype=np.uint8)
    scales = random.normal(0, 0.01, (outputs, num, 2)).astype(np.float16).view(np.uint8).reshape(outputs, num, 4)
    if kind == "Q6_K":
        blocks[..., -2:] = scales[..., :2]
    else:
        num_bytes = 4 if spec.has_min else 2
        blocks[..., :num_bytes] = scales[..., :num_bytes]
    return torch.from_numpy(blocks.reshape(outputs, -1))


@pytest.mark.parametrize("outputs", [1, 16, 45])
@pytest.mark.parametrize("kind", PUBLISHED)
def test_published_blocks_become_the_weights_that_gguf_makes_of_them(kind, outputs):
    blocks = random_blocks(kind, outputs, 512)
    published = dequantize(blocks.numpy(), GGMLQuantizationType[kind])
    packed = ops.pack_blocks(blocks, kind, 512)
    assert torch.equal(packed.unpacked(), torch.from_numpy(published))
    assert packed.num_bytes == packed.num_blocks * KINDS[kind.lower()].block_bytes(512)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1), (16, 8), (45, 33), (64, 7)])
def test_plain_matrices_come_back(shape, dtype):
    weight = torch.randn(shape, dtype=torch.float64).to(dtype)
    packed = ops.pack(weight)
    assert torch.equal(packed.unpacked(), weight.to(packed.dtype))
    assert (packed.num_outputs, packed.num_inputs) == shape


def test_the_reference_takes_matrices_of_tritons_layout():
    """Here too where Triton is missing, whose tests compare with the reference."""
    rows, bias = torch.randn(2, 7), torch.randn(8)
    parts = torch.randn(5, 7), torch.randn(3, 7)
    packed, stacked = ops.pack(parts, bias), StackedMatrix(parts, bias)
    outer, outer_stacked = (kind(torch.ones(4, 4)) for kind in (ops.pack, lambda weight: StackedMatrix((weight,))))
    torch.testing.assert_close(reference.linear(rows, stacked), reference.linear(rows, packed))
    of_stacked = reference.mlp(rows, stacked, outer_stacked, activation="silu")
    torch.testing.assert_close(of_stacked, reference.mlp(rows, packed, outer, activation="silu"))


def test_stacked_matrices_are_one_below_the_other():
    first, second = torch.randn(5, 8), torch.randn(30, 8)
    packed = ops.pack([first, second], [torch.ones(5), torch.zeros(30)])
    assert torch.equal(packed.unpacked(), torch.cat([first, second]))
    assert packed.bias is not None
    assert packed.bias.sum() == 5
    blocks = [random_blocks("Q4_1", outputs, 64, seed=outputs) for outputs in (3, 20)]
    both = ops.pack_blocks(blocks, "Q4_1", 64)
    assert torch.equal(both.unpacked(), torch.cat([ops.pack_blocks(one, "Q4_1", 64).unpacked() for one in blocks]))


@pytest.mark.parametrize("bits", [4, 8])
@given(outputs=st.integers(1, 40), num_inputs=st.integers(1, 70), seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_rounded_weights_are_within_half_a_step(bits, outputs, num_inputs, seed):
    weight = torch.randn(outputs, num_inputs, generator=torch.Generator().manual_seed(seed))
    packed = ops.quantise(weight, bits)
    padded = torch.nn.functional.pad(weight, (0, -num_inputs % 32))
    groups = padded.view(outputs, -1, 32)
    span = groups.abs().amax(-1) * 2 / 254 if bits == 8 else (groups.amax(-1) - groups.amin(-1)) / 15
    step = span.repeat_interleave(32, dim=1)[:, :num_inputs]
    assert ((packed.unpacked() - weight).abs() <= 0.5 * step + 0.01 * weight.abs().amax()).all()
    assert packed.num_bytes == packed.num_blocks * -(-num_inputs // 32) * (32 * 17 if bits == 8 else 32 * 10)


def test_rounding_zeros_and_constants():
    assert torch.equal(ops.quantise(torch.zeros(3, 40), 4).unpacked(), torch.zeros(3, 40))
    assert torch.equal(ops.quantise(torch.zeros(3, 40), 8).unpacked(), torch.zeros(3, 40))
    assert torch.equal(ops.quantise(torch.full((3, 40), -0.5), 4).unpacked(), torch.full((3, 40), -0.5))


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "Q4_1", "Q6_K"])
def test_lookup_takes_rows_of_the_matrix(kind):
    if kind in ("float32", "bfloat16"):
        packed = ops.pack(torch.randn(50, 256).to(getattr(torch, kind)))
    else:
        packed = ops.pack_blocks(random_blocks(kind, 50, 256), kind, 256)
    ids = torch.tensor([49, 0, 17, 17, 48])
    assert torch.equal(packed.lookup(ids), packed.unpacked()[ids])
    assert packed.lookup(ids[:0]).shape == (0, 256)


def experts_of(number: int, num_chosen: int = 1, **settings) -> ops.Experts:
    router = ops.pack(torch.zeros(min(number, 3), 3))
    blocks = (MATRIX,) * number
    return ops.Experts(router, blocks, blocks, "silu", num_chosen=num_chosen, adds_up=True, **settings)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ops.pack(torch.zeros(3)), r"must be \[outputs, inputs\]"),
        (lambda: ops.pack(torch.zeros(3, 3, dtype=torch.int8)), "torch.int8"),
        (lambda: ops.pack([torch.zeros(3, 3), torch.zeros(3, 4)]), "as many inputs"),
        (lambda: ops.pack(torch.zeros(3, 3), torch.zeros(4)), r"must be \[outputs\], here \[3\]"),
        (lambda: ops.pack_blocks(torch.zeros(3, 20, dtype=torch.uint8), "Q2_K", 32), "must be one of Q8_0, Q4_0"),
        (lambda: ops.pack_blocks(torch.zeros(3, 21, dtype=torch.uint8), "Q4_1", 32), r"\[outputs, 20\]"),
        (lambda: ops.pack_blocks(torch.zeros(3, 20, dtype=torch.uint8), "Q4_1", 33), "a multiple of 32"),
        (lambda: ops.quantise(torch.zeros(3, 3), 3), "8 or 4 bits"),
        (lambda: ops.quantise(torch.full((3, 3), torch.nan), 8), "finite"),
        (lambda: ops.linear(torch.zeros(2, 4), MATRIX), r"\[any, 3\]"),
        (lambda: ops.linear(torch.zeros(3, 2).t(), MATRIX), "not contiguous"),
        (lambda: ops.linear(ROWS.double(), MATRIX), "float32"),
        (lambda: ops.linear(ROWS, MATRIX, norm=ops.Norm("rms", torch.ones(4), 0.0)), "weight of the norm"),
        (lambda: ops.norm(ROWS, ops.Norm("rms", None, 0.0, bias=torch.zeros(3))), "without a bias"),
        (lambda: ops.mlp(ROWS, MATRIX, ops.pack(torch.zeros(3, 4)), activation="silu"), "got 3 outputs"),
        (lambda: ops.mlp(ROWS, MATRIX, MATRIX, activation="tan"), "activation must be one of silu"),
        (lambda: ops.mlp(ROWS, MATRIX, MATRIX, activation="clipped_swiglu"), "must have 6 outputs, got 3"),
        (lambda: ops.experts(ROWS, experts_of(2, num_chosen=3)), "goes to 1 to 2 of 2 experts, got 3"),
        (lambda: ops.experts(ROWS, experts_of(2, num_chosen=2, has_shared=True)), "1 to 1 of 1 experts, got 2"),
        (lambda: ops.experts(ROWS, experts_of(4)), "got 3 outputs, 4 inner and 4 outer matrices"),
        (lambda: ops.experts(torch.zeros(2, 4), experts_of(3)), r"\[any, 3\]"),
    ],
)
def test_what_does_not_fit_is_refused(make, words):
    with pytest.raises(InputError, match=words):
        make()


def attention_case(*, heads=6, key_heads=2, head_dim=8, slots=20, lanes=2, rows=5, seed=0):
    """Queries, slabs, and a mask whose rows see a prefix and some of the slots behind it."""
    random = torch.Generator().manual_seed(seed)
    queries = torch.randn(lanes * rows, heads, head_dim, generator=random)
    keys = torch.randn(lanes, key_heads, slots, head_dim, generator=random)
    values = torch.randn(lanes, key_heads, slots, head_dim + 4, generator=random)
    mask = torch.rand(lanes, rows, slots, generator=random) < 0.5
    mask[:, :, 2:7] = True
    mask[:, :, :2] = False
    return queries, keys, values, mask


def test_attention_is_that_of_torch():
    queries, keys, values, mask = attention_case()
    seen = torch.nn.functional.scaled_dot_product_attention(
        queries.view(2, 5, 6, 8).transpose(1, 2), keys, values, attn_mask=mask[:, None], scale=0.3, enable_gqa=True
    )
    with ops.using("reference"):
        result = ops.tree_attention(queries, ops.Slabs.of(keys, values), ops.Visible.of_mask(mask), scale=0.3)
    torch.testing.assert_close(result.view(2, 5, 6, 12), seen.transpose(1, 2))


@given(st.data())
@settings(max_examples=50, deadline=None)
def test_visible_is_the_mask(data):
    lanes, rows, slots = (data.draw(st.integers(1, limit)) for limit in (3, 5, 9))
    size = lanes * rows * slots
    bits = data.draw(st.lists(st.booleans(), min_size=size, max_size=size))
    mask = torch.tensor(bits).view(lanes, rows, slots)
    visible = ops.Visible.of_mask(mask)
    window = data.draw(st.integers(1, 10))
    for seen, limit in ((visible, slots), (visible.last(window), window)):
        for row, wanted in enumerate(mask.view(lanes * rows, slots)):
            own = seen.own[int(seen.own_start[row]) : int(seen.own_start[row + 1])].tolist()
            found = [*range(int(seen.start[row]), int(seen.end[row])), *own]
            assert found == wanted.nonzero().flatten().tolist()[-limit:]
            assert int(seen.lanes[row]) == row // rows
            assert int(seen.num_seen[row]) == len(found)


def test_rotation_is_that_of_transformers():
    random = torch.Generator().manual_seed(0)
    rows = torch.randn(3, (4 + 2 + 2) * 8, generator=random, dtype=torch.float64)
    angles = torch.randn(3, 4, generator=random, dtype=torch.float64)
    keys, values = torch.zeros(1, 2, 9, 8, dtype=torch.float64), torch.zeros(1, 2, 9, 8, dtype=torch.float64)
    lanes, slots = torch.zeros(3, dtype=torch.int32), torch.tensor([4, 5, 7], dtype=torch.int32)
    queries = ops.rope_write(
        rows, ops.Slabs.of(keys, values), lanes, slots, num_heads=4, rotary=ops.Rotary(angles.cos(), angles.sin())
    )
    q, k, v = (part.view(3, -1, 8).transpose(0, 1)[None] for part in rows.split([32, 16, 16], dim=1))
    cos, sin = (torch.cat([part, part], dim=-1)[None] for part in (angles.cos(), angles.sin()))
    wanted_q, wanted_k = apply_rotary_pos_emb(q, k, cos, sin)
    assert torch.equal(queries.transpose(0, 1)[None], wanted_q)
    assert torch.equal(keys[:, :, slots.long()], wanted_k)
    assert torch.equal(values[:, :, slots.long()], v)
    assert keys[:, :, 6].abs().sum() == 0
