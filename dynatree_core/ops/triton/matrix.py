"""Weights where they lie: the parameters of a module, seen as one matrix. Nothing is copied."""

from __future__ import annotations

from typing import TYPE_CHECKING

import attrs
import torch
from torch import Tensor

from dynatree_core.errors import InputError
from dynatree_core.ops.matrix import Activations

if TYPE_CHECKING:
    from dynatree_core.ops.reference import MatrixLike

__all__ = ["StackedMatrix"]

MAX_PARTS = 3  # queries, keys and values
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@attrs.frozen(eq=False)
class StackedMatrix:
    """Linear layers that read the same rows, one below the other.

    Raises:
        InputError: more than three, or parts that are not alike in inputs, dtype, device and strides.
    """

    parts: tuple[Tensor, ...]  # [outputs, inputs] each, of any strides
    bias: Tensor | None = None  # [outputs of all parts] float32
    order: Tensor | None = None  # [outputs] int32: the rows of the one part in which they are wanted

    def __attrs_post_init__(self) -> None:
        alike = {(one.shape[1:], one.dtype, one.device, one.stride()) for one in self.parts if one.dim() == 2}
        fits = 1 <= len(self.parts) <= MAX_PARTS and len(alike) == 1 and self.parts[0].dtype in DTYPES
        if not fits or any(one.dim() != 2 or one.numel() == 0 for one in self.parts):
            raise InputError(
                f"a matrix must be 1 to {MAX_PARTS} parts [outputs, inputs] alike in inputs, strides, device and a "
                f"dtype of {', '.join(map(str, DTYPES))}, got "
                f"{[(list(one.shape), one.stride(), str(one.dtype), str(one.device)) for one in self.parts]}"
            )
        if self.order is not None and (len(self.parts) > 1 or self.order.dtype != torch.int32):
            raise InputError(
                f"an order must be int32 and of the rows of one part, got {self.order.dtype} for {len(self.parts)}"
            )
        if self.bias is not None and (self.bias.shape != (self.num_outputs,) or self.bias.dtype != torch.float32):
            raise InputError(
                f"a bias must be [{self.num_outputs}] float32, got {list(self.bias.shape)} {self.bias.dtype}"
            )

    @property
    def num_outputs(self) -> int:
        return sum(len(part) for part in self.parts) if self.order is None else len(self.order)

    @property
    def num_inputs(self) -> int:
        return self.parts[0].shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """What it is computed in."""
        return torch.float32

    @property
    def activations(self) -> Activations:
        """How the rows are taken that it multiplies, for the reference: as they are."""
        return "full"

    def unpacked(self) -> Tensor:
        """[outputs, inputs] float32, for the reference."""
        whole = torch.cat([part.detach() for part in self.parts]).float()
        return whole if self.order is None else whole[self.order.long()]

    def halves(self) -> tuple[Tensor, Tensor]:
        """Views of the upper and the lower half of the rows, as of a gate and what it is multiplied with.

        Raises:
            InputError: no part ends in the middle, or rows are wanted in another order.
        """
        middle = self.num_outputs // 2
        sizes = [len(part) for part in self.parts]
        if self.order is not None or self.num_outputs % 2 or sizes not in ([2 * middle], [middle, middle]):
            raise InputError(f"a gated matrix must be one part or two of one size, got {sizes} outputs")
        return (self.parts[0][:middle], self.parts[-1][-middle:])


if TYPE_CHECKING:  # tests compare with the reference, but where Triton is installed only

    def _of_the_reference(stacked: StackedMatrix) -> MatrixLike:
        return stacked
