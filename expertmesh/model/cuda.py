"""Operations of `invariant` on CUDA, and products of several matrices in one launch.

cuBLAS picks its algorithm by the number of rows, and torch its way of adding up by the number of sums; see docs/gpu.md
for what was measured. So products, sums and norms run as kernels of our own there, wherever a model serves: under
`torch.inference_mode`. Training takes torch's operations, which have gradients.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

ALIGNMENT_BYTES = 16  # of matrices that are found by address
_LEAST_WIDTH = 32


@dataclass(frozen=True)
class Tiling:
    """How a product is cut into tiles, one for each program of a launch. No bit depends on it; see docs/gpu.md.

    Attributes:
        rows: Of a tile.
        outputs: Of a tile.
        step: Inputs that are added up at once.
        warps: Of a program.
        stages: Loads under way at once.
    """

    rows: int
    outputs: int
    step: int
    warps: int
    stages: int


# Large tiles read less; small ones keep more of the processor busy. The first that gives enough programs is taken.
_ENOUGH_PROGRAMS = 192
_TILINGS = {
    torch.float32: (
        Tiling(128, 128, 16, 4, 4),
        Tiling(64, 64, 16, 2, 4),
        Tiling(16, 64, 32, 1, 3),
        Tiling(16, 16, 64, 1, 3),
        Tiling(16, 8, 64, 1, 3),
    ),
    torch.bfloat16: (Tiling(128, 128, 64, 4, 4), Tiling(64, 64, 64, 4, 4), Tiling(16, 32, 128, 4, 3)),
}
_FEW_ROWS = {torch.float32: (Tiling(1, 32, 64, 1, 3), Tiling(4, 16, 64, 1, 3)), torch.bfloat16: ()}


@cache
def has_kernels() -> bool:
    """Whether our kernels can run: with Triton, which torch's CUDA builds for Linux bring, and the C compiler it needs.

    Triton before 3.3, that of torch 2.6, has no tiles of fewer than 16 rows.
    """
    try:
        major, minor, *_ = version("triton").split(".")
    except PackageNotFoundError:
        return False
    return (int(major), int(minor)) >= (3, 3) and any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang")))


@cache
def _kernels() -> Any:
    from expertmesh.model import kernels  # Triton is only there where CUDA is

    return kernels


def serves(x: Tensor) -> bool:
    """Whether an operation on `x` is to be done here."""
    return x.is_cuda and torch.is_inference_mode_enabled() and x.dtype in _TILINGS and has_kernels()


def linear(x_ND: Tensor, weight_OD: Tensor, bias_O: Tensor | None) -> Tensor:
    """Multiplies rows with a weight matrix: [N, D] and [O, D] give [N, O]."""
    out_NO = x_ND.new_empty(len(x_ND), len(weight_OD))
    if weight_OD.stride(1) != 1 and weight_OD.stride(0) != 1:
        weight_OD = weight_OD.contiguous()
    outputs_inner = weight_OD.stride(1) != 1
    _multiply(x_ND, weight_OD, bias_O, out_NO, 1, weight_OD.stride(1 if outputs_inner else 0), 0, outputs_inner)
    return out_NO


def products(x_GND: Tensor, y_GDO: Tensor) -> Tensor:
    """A product for each of G groups: [G, N, D] and [G, D, O] give [G, N, O]."""
    groups, rows, _ = x_GND.shape
    out_GNO = x_GND.new_empty(groups, rows, y_GDO.shape[2])
    if y_GDO.stride(1) != 1 and y_GDO.stride(2) != 1:
        y_GDO = y_GDO.contiguous()
    outputs_inner = y_GDO.stride(1) != 1
    stride = y_GDO.stride(1 if outputs_inner else 2)
    _multiply(x_GND, y_GDO, None, out_GNO, groups, stride, y_GDO.stride(0), outputs_inner)
    return out_GNO


def row_sums(x: Tensor) -> Tensor:
    """Sums over the last dimension, in float32."""
    x = x.float().contiguous()
    sums = x.new_empty(x.shape[:-1])
    with _at(x):
        _kernels().row_sum[(sums.numel(),)](x, sums, x.shape[-1], WIDTH=_power_of_two(x.shape[-1]))
    return sums


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root mean square norm over the last dimension, in float32."""
    x, width = x.contiguous(), x.shape[-1]
    out = torch.empty_like(x, dtype=torch.float32)
    with _at(x):
        _kernels().rms_norm[(x.numel() // width,)](x, weight, out, eps, width, WIDTH=_power_of_two(width))
    return out


@dataclass(frozen=True)
class Matrices:
    """Weight matrices [O, D] of one shape, by which rows of several groups are multiplied in one launch.

    Attributes:
        weights: The matrices as they were found; they stay where they are, even if a layer gets others.
        biases: Likewise; none or one for each.
        addresses_E: Where they are, on the device.
        bias_addresses_E: Where their biases are, if they have some.
    """

    weights: Sequence[Tensor]
    biases: Sequence[Tensor]
    addresses_E: Tensor
    bias_addresses_E: Tensor | None

    @staticmethod
    def of(layers: Sequence[torch.nn.Linear]) -> Matrices:
        """Those of linear layers."""
        weights = [layer.weight.detach() for layer in layers]
        device = weights[0].device

        def addresses(tensors: Sequence[Tensor]) -> Tensor:
            assert all(tensor.is_contiguous() and tensor.data_ptr() % ALIGNMENT_BYTES == 0 for tensor in tensors)
            return torch.tensor([tensor.data_ptr() for tensor in tensors], device=device)

        biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
        return Matrices(weights, biases, addresses(weights), addresses(biases) if biases else None)

    def multiply(self, x_ND: Tensor, tiles_T3: Tensor, tile_rows: int) -> Tensor:
        """Multiplies the rows of each tile with its matrix: [N, D] gives [N, O]; rows in no tile are left undefined."""
        outputs, inputs = self.weights[0].shape
        out_NO = x_ND.new_empty(len(x_ND), outputs)
        choice = [tiling for tiling in _TILINGS[x_ND.dtype] if tiling.rows == tile_rows]
        tiling = _choose(choice, outputs, lambda _: len(tiles_T3))
        _launch(
            (x_ND, self.addresses_E, self.bias_addresses_E, out_NO, tiles_T3, 0, 0, outputs, inputs, inputs, 0),
            (len(tiles_T3), -(-outputs // tiling.outputs)),
            tiling,
            grouped=True,
        )
        return out_NO


def rows_of_tiles(rows: int, matrices: int) -> int:
    """A sensible number of rows for the tiles of so many rows and matrices."""
    each = rows // matrices
    return 16 if each < 48 else 64 if each < 192 else 128


def tiles_of(matrices: Sequence[int], counts: Sequence[int], tile_rows: int, least: int = 0) -> npt.NDArray[np.int32]:
    """Tiles of rows that lie matrix by matrix: [T, 3] of matrix, first row and end.

    Args:
        matrices: Which ones, in the order of their rows.
        counts: Rows of each.
        tile_rows: Rows of a tile.
        least: As many tiles there are at least; those behind have no rows.
    """
    tiles, start = [], 0
    for matrix, count in zip(matrices, counts, strict=True):
        end = start + count
        tiles += [(matrix, first, min(first + tile_rows, end)) for first in range(start, end, tile_rows)]
        start = end
    table_T3 = np.zeros((max(least, len(tiles)), 3), np.int32)
    table_T3[: len(tiles)] = np.reshape(tiles, (-1, 3))
    return table_T3


def _multiply(
    x: Tensor, y: Tensor, bias: Tensor | None, out: Tensor, groups: int, stride: int, group_stride: int, inner: bool
) -> None:
    if not out.numel():
        return
    *_, rows, inputs = x.shape
    outputs = out.shape[-1]
    few = next((tiling for tiling in _FEW_ROWS[x.dtype] if rows <= tiling.rows), None)
    sparing = [tiling for tiling in _TILINGS[x.dtype] if tiling.rows < 2 * rows] or _TILINGS[x.dtype][-1:]
    tiling = few or _choose(sparing, outputs, lambda tiling: groups * -(-rows // tiling.rows))
    row_tiles = -(-rows // tiling.rows)
    _launch(
        (x.contiguous(), y, bias, out, None, rows, row_tiles, outputs, inputs, stride, group_stride),
        (groups * row_tiles, -(-outputs // tiling.outputs)),
        tiling,
        outputs_inner=inner,
    )


def _choose(choice: Sequence[Tiling], outputs: int, row_tiles: Callable[[Tiling], int]) -> Tiling:
    for tiling in choice:
        if row_tiles(tiling) * -(-outputs // tiling.outputs) >= _ENOUGH_PROGRAMS:
            return tiling
    return choice[-1]


def _launch(
    arguments: tuple[Any, ...],
    programs: tuple[int, int],
    tiling: Tiling,
    grouped: bool = False,
    outputs_inner: bool = False,
) -> None:
    with _at(arguments[0]):
        _kernels().product[programs](
            *arguments,
            GROUPED=grouped,
            OUTPUTS_INNER=outputs_inner,
            HAS_BIAS=arguments[2] is not None,
            ROWS=tiling.rows,
            OUTPUTS=tiling.outputs,
            STEP=tiling.step,
            num_warps=tiling.warps,
            num_stages=tiling.stages,
        )


def _at(x: Tensor) -> AbstractContextManager[Any]:
    """Makes the device of a tensor the current one, on which kernels are launched."""
    return nullcontext() if x.device.index == torch.cuda.current_device() else torch.cuda.device(x.device)


def _power_of_two(width: int) -> int:
    return max(_LEAST_WIDTH, 1 << (width - 1).bit_length())
