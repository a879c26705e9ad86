"""Operations of `invariant` on CUDA, and products of several matrices in one launch.

cuBLAS picks its algorithm by the number of rows, and torch its way of adding up by the number of sums; see docs/gpu.md
for what was measured. So products, sums and norms run as kernels of our own there, wherever a model serves: under
`torch.inference_mode`. Training takes torch's operations, which have gradients.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

ROWS = 16  # of a tile
_SHAPES = {torch.float32: (32, 64), torch.bfloat16: (32, 128)}  # of a tile: outputs, and inputs added up at once
_WARPS, _STAGES = 4, 3
_LEAST_WIDTH = 32
ALIGNMENT_BYTES = 16  # of matrices that are found by address


@cache
def has_kernels() -> bool:
    """Whether our kernels can run: Triton comes with torch's CUDA builds for Linux."""
    return importlib.util.find_spec("triton") is not None


@cache
def _kernels() -> Any:
    from expertmesh.model import kernels  # Triton is only there where CUDA is

    return kernels


def serves(x: Tensor) -> bool:
    """Whether an operation on `x` is to be done here."""
    return x.is_cuda and torch.is_inference_mode_enabled() and x.dtype in _SHAPES and has_kernels()


def linear(x_ND: Tensor, weight_OD: Tensor, bias_O: Tensor | None) -> Tensor:
    """Multiplies rows with a weight matrix: [N, D] and [O, D] give [N, O]."""
    return _multiply(x_ND[None], weight_OD.transpose(0, 1)[None], bias_O)[0]


def products(x_GND: Tensor, y_GDO: Tensor) -> Tensor:
    """A product for each of G groups: [G, N, D] and [G, D, O] give [G, N, O]."""
    return _multiply(x_GND, y_GDO, None)


def row_sums(x: Tensor) -> Tensor:
    """Sums over the last dimension, in float32."""
    x = x.float().contiguous()
    sums = x.new_empty(x.shape[:-1])
    with torch.cuda.device(x.device):
        _kernels().row_sum[(sums.numel(),)](x, sums, x.shape[-1], WIDTH=_power_of_two(x.shape[-1]))
    return sums


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root mean square norm over the last dimension, in float32."""
    x, width = x.contiguous(), x.shape[-1]
    out = torch.empty_like(x, dtype=torch.float32)
    with torch.cuda.device(x.device):
        _kernels().rms_norm[(x.numel() // width,)](x, weight, out, eps, width, WIDTH=_power_of_two(width))
    return out


@dataclass(frozen=True)
class Matrices:
    """Weight matrices [O, D] of one shape, by which rows of several groups are multiplied in one launch.

    Attributes:
        weights: The matrices; they must not move.
        addresses_E: Where they are, on the device.
        bias_addresses_E: Where their biases are, if they have some.
    """

    weights: Sequence[Tensor]
    addresses_E: Tensor
    bias_addresses_E: Tensor | None

    @staticmethod
    def of(layers: Sequence[torch.nn.Linear]) -> Matrices:
        """Those of linear layers."""
        weights = [layer.weight for layer in layers]
        device = weights[0].device

        def addresses(tensors: Sequence[Tensor]) -> Tensor:
            assert all(tensor.is_contiguous() and tensor.data_ptr() % ALIGNMENT_BYTES == 0 for tensor in tensors)
            return torch.tensor([tensor.data_ptr() for tensor in tensors], device=device)

        biases = [layer.bias for layer in layers if layer.bias is not None]
        return Matrices(weights, addresses(weights), addresses(biases) if biases else None)

    def multiply(self, x_ND: Tensor, tiles_T3: Tensor) -> Tensor:
        """Multiplies the rows of each tile with its matrix: [N, D] gives [N, O]; rows in no tile are left undefined."""
        outputs, inputs = self.weights[0].shape
        out_NO = x_ND.new_empty(len(x_ND), outputs)
        _launch(
            (x_ND, self.addresses_E, self.bias_addresses_E, out_NO, tiles_T3, 0, 0, outputs, inputs, inputs, 0),
            len(tiles_T3),
            grouped=True,
        )
        return out_NO


def tiles_of(matrices: Sequence[int], counts: Sequence[int], least: int = 0) -> npt.NDArray[np.int32]:
    """Tiles of rows that lie matrix by matrix: [T, 3] of matrix, first row and end.

    Args:
        matrices: Which ones, in the order of their rows.
        counts: Rows of each.
        least: As many tiles there are at least; those behind have no rows.
    """
    tiles, start = [], 0
    for matrix, count in zip(matrices, counts, strict=True):
        end = start + count
        tiles += [(matrix, first, min(first + ROWS, end)) for first in range(start, end, ROWS)]
        start = end
    table_T3 = np.zeros((max(least, len(tiles)), 3), np.int32)
    table_T3[: len(tiles)] = np.reshape(tiles, (-1, 3))
    return table_T3


def _multiply(x_GND: Tensor, y_GDO: Tensor, bias_O: Tensor | None) -> Tensor:
    groups, rows, inputs = x_GND.shape
    outputs = y_GDO.shape[2]
    outputs_inner = y_GDO.stride(2) == 1 and outputs > 1
    if not outputs_inner and y_GDO.stride(1) != 1:
        y_GDO, outputs_inner = y_GDO.contiguous(), True
    out_GNO = x_GND.new_empty(groups, rows, outputs)
    if not out_GNO.numel():
        return out_GNO
    tiles = -(-rows // ROWS)
    stride, group_stride = y_GDO.stride(1 if outputs_inner else 2), y_GDO.stride(0) if groups > 1 else 0
    _launch(
        (x_GND.contiguous(), y_GDO, bias_O, out_GNO, None, rows, tiles, outputs, inputs, stride, group_stride),
        groups * tiles,
        outputs_inner=outputs_inner,
    )
    return out_GNO


def _launch(arguments: tuple[Any, ...], tiles: int, grouped: bool = False, outputs_inner: bool = False) -> None:
    x, _, bias, *_ = arguments
    outputs = arguments[7]
    columns, step = _SHAPES[x.dtype]
    with torch.cuda.device(x.device):
        _kernels().product[(tiles, -(-outputs // columns))](
            *arguments,
            GROUPED=grouped,
            OUTPUTS_INNER=outputs_inner,
            HAS_BIAS=bias is not None,
            ROWS=ROWS,
            OUTPUTS=columns,
            STEP=step,
            num_warps=_WARPS,
            num_stages=_STAGES,
        )


def _power_of_two(width: int) -> int:
    return max(_LEAST_WIDTH, 1 << (width - 1).bit_length())
