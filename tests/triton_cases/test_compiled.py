"""The Triton kernels, compiled for GPUs without one; `tests/test_triton.py` runs this in a process of its own."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from test_native import single
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from dynatree_core.cache.tree_cache import TreeCache
from dynatree_core.ops import Norm, Rotary, Slabs, Visible
from dynatree_core.ops.triton import kernels
from dynatree_core.ops.triton.levels import write_level
from dynatree_core.ops.triton.matrix import StackedMatrix
from dynatree_core.ops.triton.operators import TritonOperators, is_interpreted, slab_table
from dynatree_core.runners.base import Rows
from dynatree_core.runners.triton import twin_of
from dynatree_core.tree.flatten import flatten_chain

NAMES = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int32: "*i32", torch.int64: "*i64",
    torch.uint8: "*u8",
}  # fmt: skip
SHARED_BYTES = 99 << 10  # that a block may have on the smallest of the GPUs: capability 8.6 and 8.9


class Compiler:
    """Compiles what it is asked to launch, as Triton does, and launches nothing.

    Attributes:
        compiled: by kernel, the code of each version.
    """

    def __init__(self, capability: int) -> None:
        self.capability = capability
        self.compiled: dict[str, list[Any]] = {}
        self._known: set[str] = set()

    def __call__(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        signature: dict[str, str] = {}
        fixed: dict[Any, Any] = {}
        hints: dict[Any, Any] = {}
        for place, (parameter, value) in enumerate(zip(kernel.params, arguments, strict=False)):
            is_specialised = isinstance(value, int) and not parameter.do_not_specialize
            if isinstance(value, Tensor):
                signature[parameter.name] = NAMES[value.dtype]
            elif value is None or (is_specialised and value == 1):
                signature[parameter.name], fixed[place,] = "constexpr", value
            else:
                signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
            if isinstance(value, Tensor) or (is_specialised and value % 16 == 0):
                hints[place,] = [["tt.divisibility", 16]]
        for name, value in constants.items():
            signature[name], fixed[kernel.arg_names.index(name),] = "constexpr", value
        if (version := f"{kernel.__name__} {signature} {fixed} {hints}") not in self._known:
            self._known.add(version)
            target = GPUTarget("cuda", self.capability, 32)
            code = compile(ASTSource(kernel, signature, fixed, hints), target=target)
            self.compiled.setdefault(kernel.__name__, []).append(code)


def check(code: Any) -> None:
    assert code.asm["cubin"]
    assert code.metadata.shared <= SHARED_BYTES
    assert not re.findall(r"\b(atom|red)\.", code.asm["ptx"]), "no sum may depend on the order in which programs end"


def call_all(operators: TritonOperators, dtype: torch.dtype, size: int, head_dim: int) -> None:
    """Each operator of a layer of Llama's kind, twice: for one row and for several."""
    heads, key_heads, inner = size // head_dim, max(size // head_dim // 4, 1), 3 * size
    norm, weight = Norm("rms", torch.ones(size), 1e-5), torch.empty(size, size, dtype=dtype)
    parts = [torch.empty(number * head_dim, size, dtype=dtype) for number in (heads, key_heads, key_heads)]
    gate, up = (torch.empty(inner, size, dtype=dtype) for _ in range(2))
    down = StackedMatrix((torch.empty(size, inner, dtype=dtype),))
    keys, values = (torch.empty(1, key_heads, 64, head_dim, dtype=dtype) for _ in range(2))
    slabs = Slabs(key_heads, head_dim, head_dim, dtype, slab_table([[keys]], [[values]])[0], (keys,), (values,))
    for num_rows in (1, 16):
        rows, places = torch.empty(num_rows, size), torch.zeros(num_rows, dtype=torch.int32)
        angles = torch.empty(num_rows, head_dim // 2)
        fused = operators.linear(rows, StackedMatrix(tuple(parts)), norm=norm)
        rotary = Rotary(angles, angles)
        queries = operators.rope_write(fused, slabs, places, places, num_heads=heads, rotary=rotary)
        visible = Visible.of_mask(torch.ones(1, num_rows, 64, dtype=torch.bool))
        seen = operators.tree_attention(queries, slabs, visible, scale=1.0)
        mixed = operators.linear(seen, StackedMatrix((weight,)), residual=rows)
        operators.mlp(mixed, StackedMatrix((gate, up)), down, activation="silu", norm=norm, residual=mixed)


@pytest.mark.parametrize("capability", [80, 90])
def test_compiled_products_are_those_of_tensor_cores_and_one_kernel_serves_any_number_of_rows(capability: int) -> None:
    assert not is_interpreted()
    compiler = Compiler(capability)
    call_all(TritonOperators(compiler), torch.bfloat16, 2048, 128)
    # queries, keys and values; behind attention and MLP, whose sizes are multiples of 16 alike
    numbers = {name: len(codes) for name, codes in compiler.compiled.items()}
    assert numbers == {"linear_kernel": 2, "rope_write_kernel": 1, "attention_kernel": 1, "mlp_kernel": 1}
    for name, codes in compiler.compiled.items():
        for code in codes:
            check(code)
            ptx = code.asm["ptx"]
            if name == "rope_write_kernel":
                continue
            assert "mma.sync.aligned.m16n8k16" in ptx, name
            assert "cp.async.cg.shared.global" in ptx, f"{name} must read 16 bytes at once, while it computes"
            assert "ld.global.b16" not in ptx, name


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_neox", "gpt2", "cohere", "olmo2", "olmo", "ministral3"])
def test_compiled_kernels_of_each_kind_of_family(name: str) -> None:
    """In float32; kernels of a size that is no multiple of 16, of a single head and with all that families add."""
    compiler = Compiler(80)
    cache = TreeCache(20)
    with torch.inference_mode():
        rows = Rows(flatten_chain(torch.tensor([3, 1, 4]), 0), cache)
        twin_of(single(name), TritonOperators(compiler)).forward_together([rows], hidden=True)
    for codes in compiler.compiled.values():
        for code in codes:
            check(code)
    assert compiler.compiled.keys() >= {"linear_kernel", "rope_write_kernel", "attention_kernel", "mlp_kernel"}


def test_compiled_activations() -> None:
    compiler, matrix = Compiler(80), StackedMatrix((torch.empty(16, 16),))
    for activation in ("silu", "gelu", "gelu_tanh", "quick_gelu", "relu", "relu2"):
        TritonOperators(compiler).mlp(torch.empty(1, 16), matrix, matrix, activation=activation)  # type: ignore[arg-type]
    assert len(compiler.compiled["mlp_kernel"]) == 6


def test_compiled_kernels_do_not_follow_the_number_of_rows() -> None:
    """Triton would make others for one row, and for 16."""
    for kernel in (kernels.linear_kernel, kernels.mlp_kernel):
        assert [one.name for one in kernel.params if one.do_not_specialize] == ["num_rows"]
    for kernel in (kernels.rope_write_kernel, kernels.attention_kernel, kernels.norm_kernel, kernels.angles_kernel):
        assert "num_rows" not in kernel.arg_names, "rows are programs there"


@pytest.mark.parametrize("capability", [80, 90])
def test_compiled_level_is_one_kernel_for_all_levels_of_a_width(capability: int) -> None:
    """The root's children apart: for them fewer are proposed."""
    compiler = Compiler(capability)
    packed, mask = torch.zeros(6, 200, dtype=torch.int64), torch.zeros(200, 200, dtype=torch.bool)
    for old, width in [(1, 16), (17, 16), (33, 16), (1, 64), (65, 64), (129, 64)]:
        num_nodes = 1 if old == 1 else width
        write_level(
            packed, mask, torch.zeros(num_nodes, 16), torch.zeros(num_nodes, 16, dtype=torch.int64),
            torch.ones(num_nodes, dtype=torch.bool), torch.ones(num_nodes, dtype=torch.int64),
            old=old, width=width, least=-1.0 / old, max_nodes=old, vocab_size=old, launch=compiler,
        )  # fmt: skip
    codes = compiler.compiled["level_kernel"]
    assert len(codes) == 4
    for code in codes:
        check(code)
