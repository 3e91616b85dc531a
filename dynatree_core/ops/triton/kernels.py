"""The kernels. Each program has tiles of one shape, whatever the number of rows: so each sum has one order.

Triton compiles a kernel anew for integers that are 1 or multiples of 16. Not for the number of rows: it is marked, so
that one kernel computes them all.

What a kernel is called with, and why its sums have the order that they have, stands in `operators`.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "angles_kernel",
    "attention_kernel",
    "growth_kernel",
    "linear_kernel",
    "mlp_kernel",
    "norm_kernel",
    "rope_write_kernel",
]


@triton.jit
def _added_product(left, right, sums, IS_INTERPRETED: tl.constexpr):
    """sums + left @ right, [m, k] @ [k, n], in float32."""
    if IS_INTERPRETED:
        # the interpreter's own product is numpy's, whose order follows a row's place, and takes bfloat16 for integers
        products = left.to(tl.float32)[:, None, :] * tl.trans(right.to(tl.float32))[None, :, :]
        sums += tl.sum(products, axis=2)
    else:
        sums = tl.dot(left, right, sums, input_precision="ieee")
    return sums


@triton.jit
def _tanh(x):
    small = tl.exp(-2 * tl.abs(x))
    size = (1 - small) / (1 + small)
    return tl.where(x < 0, -size, size)


@triton.jit
def _capped(x, soft_cap):
    return _tanh(x / soft_cap) * soft_cap


@triton.jit
def _activated(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        x = x / (1 + tl.exp(-x))
    elif ACTIVATION == "gelu":
        x = 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        x = 0.5 * x * (1 + _tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    elif ACTIVATION == "quick_gelu":
        x = x / (1 + tl.exp(-1.702 * x))
    elif ACTIVATION == "relu":
        x = tl.maximum(x, 0.0)
    else:
        tl.static_assert(ACTIVATION == "relu2")
        x = tl.maximum(x, 0.0) * tl.maximum(x, 0.0)
    return x


@triton.jit
def _tile(rows, row, k, num_rows, num_inputs):
    """[m, k] of rows, zeros outside of them."""
    is_there = (row < num_rows)[:, None] & (k < num_inputs)[None, :]
    return tl.load(rows + row.to(tl.int64)[:, None] * num_inputs + k[None, :], mask=is_there, other=0.0)


@triton.jit
def _moments(rows, row, num_rows, num_inputs, eps, KIND: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """Mean and 1 / deviation of rows, [m] each; of RMS the mean is 0."""
    mean = tl.zeros([BLOCK_M], tl.float32)
    if KIND == "layer":
        total = tl.zeros([BLOCK_M], tl.float32)
        for start in range(0, num_inputs, BLOCK_K):
            total += tl.sum(_tile(rows, row, start + tl.arange(0, BLOCK_K), num_rows, num_inputs), axis=1)
        mean = total / num_inputs
    squares = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, num_inputs, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        off = _tile(rows, row, k, num_rows, num_inputs) - mean[:, None]
        off = tl.where((k < num_inputs)[None, :], off, 0.0)
        squares += tl.sum(off * off, axis=1)
    return mean, 1 / tl.sqrt(squares / num_inputs + eps)


@triton.jit
def _normed(x, mean, inverse, k, num_inputs, weight, bias, offset):
    """[m, k] normed, with the norm's weights of these inputs; `weight` and `bias` may be None."""
    x = (x - mean[:, None]) * inverse[:, None]
    if weight is not None:
        x = x * (offset + tl.load(weight + k, mask=k < num_inputs, other=0.0))[None, :]
    if bias is not None:
        x = x + tl.load(bias + k, mask=k < num_inputs, other=0.0)[None, :]
    return x


@triton.jit
def norm_kernel(
    rows, weight, bias, residual, out, num_inputs, eps, offset, scale,
    KIND: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A row a program: residual + scale * norm(row)."""
    row = tl.program_id(0) + tl.arange(0, 1)
    num_rows = tl.num_programs(0)
    mean, inverse = _moments(rows, row, num_rows, num_inputs, eps, KIND, 1, BLOCK_K)
    for start in range(0, num_inputs, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x = _tile(rows, row, k, num_rows, num_inputs)
        x = _normed(x, mean, inverse, k, num_inputs, weight, bias, offset) * scale
        if residual is not None:
            x += _tile(residual, row, k, num_rows, num_inputs)
        place = row.to(tl.int64)[:, None] * num_inputs + k[None, :]
        tl.store(out + place, x, mask=(k < num_inputs)[None, :])


@triton.jit(do_not_specialize=["num_rows"])
def linear_kernel(
    rows, first, second, third, order, bias, norm_weight, norm_bias, residual, out,
    num_rows, num_inputs, num_first, num_second, num_third, stride_output, stride_input,
    eps, offset, scale, soft_cap,
    KIND: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    IS_INTERPRETED: tl.constexpr,
):  # fmt: skip
    """A tile of rows and one of outputs a program: residual + cap(scale * (norm(rows) @ matrix.T + bias)).

    The matrix is in three parts at most, one below the other; a tile of outputs is of one of them.
    """
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    tile = tl.program_id(1)
    tiles_first, tiles_second = tl.cdiv(num_first, BLOCK_N), tl.cdiv(num_second, BLOCK_N)
    part, num_outputs, before = first, num_first, 0
    if tile >= tiles_first + tiles_second:
        part, num_outputs, before = third, num_third, num_first + num_second
        tile -= tiles_first + tiles_second
    elif tile >= tiles_first:
        part, num_outputs, before = second, num_second, num_first
        tile -= tiles_first
    output = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    is_output = output < num_outputs
    source = output
    if order is not None:
        source = tl.load(order + output, mask=is_output, other=0)
    weights = part + source.to(tl.int64)[None, :] * stride_output

    if KIND is not None:
        mean, inverse = _moments(rows, row, num_rows, num_inputs, eps, KIND, BLOCK_M, BLOCK_K)
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, num_inputs, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x = _tile(rows, row, k, num_rows, num_inputs)
        if KIND is not None:
            x = _normed(x, mean, inverse, k, num_inputs, norm_weight, norm_bias, offset)
        is_weight = (k < num_inputs)[:, None] & is_output[None, :]
        w = tl.load(weights + k.to(tl.int64)[:, None] * stride_input, mask=is_weight, other=0.0)
        sums = _added_product(x.to(w.dtype), w, sums, IS_INTERPRETED)

    if bias is not None:
        sums += tl.load(bias + before + output, mask=is_output, other=0.0)[None, :]
    sums *= scale
    if soft_cap is not None:
        sums = _capped(sums, soft_cap)
    place = row.to(tl.int64)[:, None] * (num_first + num_second + num_third) + (before + output)[None, :]
    is_there = (row < num_rows)[:, None] & is_output[None, :]
    if residual is not None:
        sums += tl.load(residual + place, mask=is_there, other=0.0)
    tl.store(out + place, sums, mask=is_there)


@triton.jit(do_not_specialize=["num_rows"])
def mlp_kernel(
    rows, gate, up, gate_bias, up_bias, norm_weight, norm_bias, out,
    num_rows, num_inputs, num_outputs, stride_output, stride_input, eps, offset,
    KIND: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    IS_INTERPRETED: tl.constexpr,
):  # fmt: skip
    """A tile of rows and one of outputs a program: activation(gate) * up of the normed rows; `gate` may be None."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    output = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_output = output < num_outputs
    places = output.to(tl.int64)[None, :] * stride_output

    if KIND is not None:
        mean, inverse = _moments(rows, row, num_rows, num_inputs, eps, KIND, BLOCK_M, BLOCK_K)
    gates = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, num_inputs, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x = _tile(rows, row, k, num_rows, num_inputs)
        if KIND is not None:
            x = _normed(x, mean, inverse, k, num_inputs, norm_weight, norm_bias, offset)
        is_weight = (k < num_inputs)[:, None] & is_output[None, :]
        steps = k.to(tl.int64)[:, None] * stride_input
        w = tl.load(up + places + steps, mask=is_weight, other=0.0)
        x = x.to(w.dtype)
        sums = _added_product(x, w, sums, IS_INTERPRETED)
        if gate is not None:
            w = tl.load(gate + places + steps, mask=is_weight, other=0.0)
            gates = _added_product(x, w, gates, IS_INTERPRETED)

    if up_bias is not None:
        sums += tl.load(up_bias + output, mask=is_output, other=0.0)[None, :]
    if gate is not None:
        if gate_bias is not None:
            gates += tl.load(gate_bias + output, mask=is_output, other=0.0)[None, :]
        sums = _activated(gates, ACTIVATION) * sums
    else:
        sums = _activated(sums, ACTIVATION)
    place = row.to(tl.int64)[:, None] * num_outputs + output[None, :]
    tl.store(out + place, sums, mask=(row < num_rows)[:, None] & is_output[None, :])


@triton.jit
def _of_heads(rows, head, dim, num_heads, head_dim, clip):
    """[heads, dims] of a row, cut to a size, zeros outside of it."""
    is_there = (head < num_heads)[:, None] & (dim < head_dim)[None, :]
    x = tl.load(rows + head[:, None] * head_dim + dim[None, :], mask=is_there, other=0.0)
    if clip is not None:
        x = tl.minimum(tl.maximum(x, -clip), clip)
    return x


@triton.jit
def _norm_of_heads(x, head, dim, num_heads, head_dim, eps, KIND: tl.constexpr, IS_WHOLE: tl.constexpr):
    """Mean and 1 / deviation of each head, or of all of them together, [heads]; of RMS the mean is 0."""
    is_there = (head < num_heads)[:, None] & (dim < head_dim)[None, :]
    size = head_dim
    mean = tl.sum(x, axis=1)
    if IS_WHOLE:
        size = head_dim * num_heads
        mean = tl.sum(mean, axis=0) + 0 * mean
    mean = mean / size
    if KIND == "rms":
        mean = 0 * mean
    off = tl.where(is_there, x - mean[:, None], 0.0)
    squares = tl.sum(off * off, axis=1)
    if IS_WHOLE:
        squares = tl.sum(squares, axis=0) + 0 * squares
    return mean, 1 / tl.sqrt(squares / size + eps)


@triton.jit
def _turned(
    rows, head, dim, num_heads, head_dim, clip, weight, bias, weight_step, eps, offset, cos, sin, half,
    KIND: tl.constexpr, IS_WHOLE: tl.constexpr, IS_INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """[heads, dims] of a row, cut, normed and turned by its angles."""
    x = _of_heads(rows, head, dim, num_heads, head_dim, clip)
    if KIND is not None:
        mean, inverse = _norm_of_heads(x, head, dim, num_heads, head_dim, eps, KIND, IS_WHOLE)
        x = _weighed(x, mean, inverse, head, dim, num_heads, head_dim, weight, bias, weight_step, offset)
    if cos is not None:
        if IS_INTERLEAVED:
            pair = dim // 2
            other = dim + 1 - 2 * (dim % 2)
            is_second = dim % 2 == 1
        else:
            pair = dim % half
            other = tl.where(dim < half, dim + half, dim - half)
            is_second = dim >= half
        is_turned = dim < 2 * half
        other = tl.where(is_turned, other, dim)
        y = _of_heads(rows, head, other, num_heads, head_dim, clip)  # the other number of each pair
        if KIND is not None:
            y = _weighed(y, mean, inverse, head, other, num_heads, head_dim, weight, bias, weight_step, offset)
        c = tl.load(cos + pair, mask=is_turned, other=1.0)[None, :]
        s = tl.load(sin + pair, mask=is_turned, other=0.0)[None, :]
        x = x * c + tl.where(is_second[None, :], y, -y) * s
    return x


@triton.jit
def _weighed(x, mean, inverse, head, dim, num_heads, head_dim, weight, bias, weight_step, offset):
    """[heads, dims] normed, with the weights of each head."""
    is_there = (head < num_heads)[:, None] & (dim < head_dim)[None, :]
    place = head[:, None] * weight_step + dim[None, :]
    x = (x - mean[:, None]) * inverse[:, None]
    x = x * (offset + tl.load(weight + place, mask=is_there, other=0.0))
    if bias is not None:
        x = x + tl.load(bias + place, mask=is_there, other=0.0)
    return x


@triton.jit
def _write_heads(x, slab, of_values: tl.constexpr, like, lanes, slots, row, head, dim, num_heads, head_dim):
    """Write a row's [heads, dims] into the cache, whose dtype is that of `like`."""
    slab += tl.load(lanes + row).to(tl.int64) * 8
    slot = tl.load(slots + row).to(tl.int64)
    is_slot = (slot >= 0) & (slot < tl.load(slab + 6))  # nobody else's memory is written, whatever is asked for
    cache = tl.load(slab + of_values).to(tl.pointer_type(like.dtype.element_ty), bitcast=True)
    head_step, slot_step = tl.load(slab + 2 + 2 * of_values), tl.load(slab + 3 + 2 * of_values)
    place = head.to(tl.int64)[:, None] * head_step + slot * slot_step + dim[None, :]
    is_there = (head < num_heads)[:, None] & (dim < head_dim)[None, :] & is_slot
    tl.store(cache + place, x.to(like.dtype.element_ty), mask=is_there)


@triton.jit
def rope_write_kernel(
    rows, table, like, lanes, slots, cos, sin, growth, out,
    query_weight, query_bias, key_weight, key_bias, query_step, key_step,
    num_heads, num_key_heads, head_dim, value_dim, half, clip, query_eps, query_offset, key_eps, key_offset,
    QUERY_KIND: tl.constexpr, KEY_KIND: tl.constexpr, IS_QUERY_WHOLE: tl.constexpr, IS_KEY_WHOLE: tl.constexpr,
    IS_INTERLEAVED: tl.constexpr,
    BLOCK_HEADS: tl.constexpr, BLOCK_KEY_HEADS: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_VALUE: tl.constexpr,
):  # fmt: skip
    """A row's queries, keys or values a program."""
    row = tl.program_id(0).to(tl.int64)
    what = tl.program_id(1)
    keys = rows + row * ((num_heads + num_key_heads) * head_dim + num_key_heads * value_dim) + num_heads * head_dim
    if cos is not None:
        cos += row * half
        sin += row * half
    key_head, dim = tl.arange(0, BLOCK_KEY_HEADS), tl.arange(0, BLOCK_DIM)
    if what == 0:
        head = tl.arange(0, BLOCK_HEADS)
        x = _turned(
            keys - num_heads * head_dim, head, dim, num_heads, head_dim, clip, query_weight, query_bias, query_step,
            query_eps, query_offset, cos, sin, half, QUERY_KIND, IS_QUERY_WHOLE, IS_INTERLEAVED,
        )  # fmt: skip
        if growth is not None:
            x *= tl.load(growth + row)
        is_there = (head < num_heads)[:, None] & (dim < head_dim)[None, :]
        tl.store(out + (row * num_heads + head[:, None]) * head_dim + dim[None, :], x, mask=is_there)
    elif what == 1:
        k = _turned(
            keys, key_head, dim, num_key_heads, head_dim, clip, key_weight, key_bias, key_step, key_eps, key_offset,
            cos, sin, half, KEY_KIND, IS_KEY_WHOLE, IS_INTERLEAVED,
        )  # fmt: skip
        _write_heads(k, table, 0, like, lanes, slots, row, key_head, dim, num_key_heads, head_dim)
    else:
        value = tl.arange(0, BLOCK_VALUE)
        v = _of_heads(keys + num_key_heads * head_dim, key_head, value, num_key_heads, value_dim, clip)
        _write_heads(v, table, 1, like, lanes, slots, row, key_head, value, num_key_heads, value_dim)


@triton.jit
def _of_key_head(slab, of_values: tl.constexpr, like, key_head, UNIT: tl.constexpr):
    """Keys or values of a head, and the step from slot to slot; all steps are multiples of a unit."""
    bytes_of_unit: tl.constexpr = UNIT * like.dtype.element_ty.primitive_bitwidth // 8
    cache = tl.load(slab + of_values).to(tl.pointer_type(like.dtype.element_ty), bitcast=True)
    head_step = tl.multiple_of(tl.load(slab + 2 + 2 * of_values), UNIT)
    slot_step = tl.multiple_of(tl.load(slab + 3 + 2 * of_values), UNIT)
    return tl.multiple_of(cache, bytes_of_unit) + key_head * head_step, slot_step


@triton.jit
def attention_kernel(
    queries, table, like, lanes, start, end, own_start, own, sinks, out,
    num_heads, num_key_heads, head_dim, value_dim, scale, soft_cap,
    BLOCK_HEADS: tl.constexpr, BLOCK_SLOTS: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_VALUE: tl.constexpr,
    KEY_UNIT: tl.constexpr, VALUE_UNIT: tl.constexpr, IS_INTERPRETED: tl.constexpr,
):  # fmt: skip
    """A row and the heads that share a key head a program, over blocks of the slots in the order of the row's text."""
    row = tl.program_id(0).to(tl.int64)
    key_head = tl.program_id(1)
    slab = table + tl.load(lanes + row).to(tl.int64) * 8
    keys, key_step = _of_key_head(slab, 0, like, key_head, KEY_UNIT)
    values, value_step = _of_key_head(slab, 1, like, key_head, VALUE_UNIT)
    first, first_own = tl.load(start + row), tl.load(own_start + row)
    num_run = tl.load(end + row) - first
    num_seen = num_run + tl.load(own_start + row + 1) - first_own

    shared = num_heads // num_key_heads
    member = tl.arange(0, BLOCK_HEADS)
    head = key_head * shared + member
    dim, value = tl.arange(0, BLOCK_DIM), tl.arange(0, BLOCK_VALUE)
    is_member = member < shared
    asked = queries + (row * num_heads + head)[:, None] * head_dim + dim[None, :]
    q = tl.load(asked, mask=is_member[:, None] & (dim < head_dim)[None, :], other=0.0).to(like.dtype.element_ty)
    greatest = tl.full([BLOCK_HEADS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_HEADS], tl.float32)
    if sinks is not None:
        greatest = tl.load(sinks + head, mask=is_member, other=0.0)
        total += 1.0
    found = tl.zeros([BLOCK_HEADS, BLOCK_VALUE], tl.float32)

    for begin in range(0, num_seen, BLOCK_SLOTS):
        place = begin + tl.arange(0, BLOCK_SLOTS)
        is_seen = place < num_seen
        listed = tl.load(own + first_own + place - num_run, mask=is_seen & (place >= num_run), other=0)
        slot = tl.where(place < num_run, first + place, listed).to(tl.int64)
        is_key = (dim < head_dim)[:, None] & is_seen[None, :]
        k = tl.load(keys + slot[None, :] * key_step + dim[:, None], mask=is_key, other=0.0)
        scores = _added_product(q, k, tl.zeros([BLOCK_HEADS, BLOCK_SLOTS], tl.float32), IS_INTERPRETED) * scale
        if soft_cap is not None:
            scores = _capped(scores, soft_cap)
        scores = tl.where(is_seen[None, :], scores, float("-inf"))
        higher = tl.maximum(greatest, tl.max(scores, axis=1))
        shares = tl.exp(scores - higher[:, None])
        kept = tl.exp(greatest - higher)
        greatest = higher
        total = total * kept + tl.sum(shares, axis=1)
        is_value = is_seen[:, None] & (value < value_dim)[None, :]
        v = tl.load(values + slot[:, None] * value_step + value[None, :], mask=is_value, other=0.0)
        found = _added_product(shares.to(v.dtype), v, found * kept[:, None], IS_INTERPRETED)

    found = found / tl.where(total > 0, total, 1.0)[:, None]  # of a row that sees nothing: zeros
    place = (row * num_heads + head)[:, None] * value_dim + value[None, :]
    tl.store(out + place, found, mask=is_member[:, None] & (value < value_dim)[None, :])


@triton.jit
def angles_kernel(positions, inv_freq, cos, sin, half, scaling, BLOCK: tl.constexpr):
    """A row a program: cosine and sine of its position times each frequency."""
    row = tl.program_id(0).to(tl.int64)
    pair = tl.arange(0, BLOCK)
    turned = tl.load(positions + row).to(tl.float32) * tl.load(inv_freq + pair, mask=pair < half, other=0.0)
    tl.store(cos + row * half + pair, tl.cos(turned) * scaling, mask=pair < half)
    tl.store(sin + row * half + pair, tl.sin(turned) * scaling, mask=pair < half)


@triton.jit
def growth_kernel(positions, out, beta, length):
    """A row a program: 1 + beta * log(1 + floor(position / length))."""
    row = tl.program_id(0)
    steps = tl.floor(tl.load(positions + row).to(tl.float32) / length)
    tl.store(out + row, 1 + beta * tl.log(1 + steps))
