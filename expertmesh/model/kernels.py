"""Kernels for CUDA, in Triton: products, sums and norms whose every row is computed in one and the same way.

A library's product picks another algorithm for another number of rows; here each element of a product is
one chain of additions over ascending inputs, whatever the tile. So neither the number of rows, nor a row's place, nor
how many groups share a launch changes a bit. Launching is `cuda`'s part; nothing else imports this module, since
Triton is there only where CUDA is.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows", "row_tiles"])
def product(
    x,
    w,
    bias,
    out,
    tiles,
    rows,
    row_tiles,
    outputs,
    inputs,
    w_stride,
    w_group,
    GROUPED: tl.constexpr,
    OUTPUTS_INNER: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    STEP: tl.constexpr,
):
    """One tile of `x @ w.T + bias`: `x` [groups * rows, inputs] and `out` [groups * rows, outputs] are contiguous.

    Args:
        x: Rows.
        w: A matrix for each group, `w_group` elements apart, of rows `w_stride` apart: [outputs, inputs], or [inputs,
            outputs] with OUTPUTS_INNER. With GROUPED, a table of addresses of such matrices.
        bias: [outputs], or with GROUPED a table of addresses; not looked at without HAS_BIAS.
        out: Result.
        tiles: With GROUPED, [T, 3]: matrix, first row and end of each tile; a tile without rows does nothing.
        rows: Rows of each group.
        row_tiles: Tiles of each group.
        outputs: Outputs.
        inputs: Inputs.
        w_stride: See `w`.
        w_group: See `w`.
        GROUPED: Whether rows of a tile and its matrix are told by `tiles`.
        OUTPUTS_INNER: See `w`.
        HAS_BIAS: Whether there is a bias.
        ROWS: Rows of a tile.
        OUTPUTS: Outputs of a tile.
        STEP: Inputs that are added up at once.
    """
    place = tl.program_id(0)
    if GROUPED:
        group = tl.load(tiles + 3 * place)
        first = tl.load(tiles + 3 * place + 1).to(tl.int64)
        end = tl.load(tiles + 3 * place + 2).to(tl.int64)
        if first >= end:
            return
        w = tl.load(w + group).to(tl.pointer_type(x.dtype.element_ty))
        w = tl.multiple_of(w, 16)
    else:
        group = (place // row_tiles).to(tl.int64)
        end = (group + 1) * rows
        first = group * rows + (place % row_tiles) * ROWS
        w += group * w_group
    row_R = first + tl.arange(0, ROWS)
    output_O = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    step_S = tl.arange(0, STEP)
    inside_R, inside_O = row_R < end, output_O < outputs
    sum_RO = tl.zeros((ROWS, OUTPUTS), tl.float32)
    for start in range(0, inputs, STEP):
        input_S = start + step_S
        inside_S = input_S < inputs
        x_RS = tl.load(x + row_R[:, None] * inputs + input_S[None, :], inside_R[:, None] & inside_S[None, :], 0.0)
        if OUTPUTS_INNER:
            place_SO = input_S[:, None] * w_stride + output_O[None, :]
        else:
            place_SO = input_S[:, None] + output_O[None, :] * w_stride
        w_SO = tl.load(w + place_SO, inside_S[:, None] & inside_O[None, :], 0.0)
        sum_RO = tl.dot(x_RS, w_SO, sum_RO, input_precision="ieee")
    if HAS_BIAS:
        if GROUPED:
            bias = tl.load(bias + group).to(tl.pointer_type(x.dtype.element_ty))
        sum_RO += tl.load(bias + output_O, inside_O, 0.0).to(tl.float32)[None, :]
    place_RO = row_R[:, None] * outputs + output_O[None, :]
    tl.store(out + place_RO, sum_RO.to(out.dtype.element_ty), inside_R[:, None] & inside_O[None, :])


@triton.jit
def rms_norm(x, weight, out, eps, width, WIDTH: tl.constexpr):
    """One row of `x / sqrt(mean(x**2) + eps) * weight`; `x` [rows, width] in any dtype, `out` in float32."""
    row = tl.program_id(0).to(tl.int64)
    column_W = tl.arange(0, WIDTH)
    inside_W = column_W < width
    x_W = tl.load(x + row * width + column_W, inside_W, 0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x_W * x_W, 0) / width + eps)
    weight_W = tl.load(weight + column_W, inside_W, 0.0)
    tl.store(out + row * width + column_W, x_W * scale * weight_W, inside_W)


@triton.jit
def row_sum(x, out, width, WIDTH: tl.constexpr):
    """The sum of one row of `x` [rows, width] in float32."""
    row = tl.program_id(0).to(tl.int64)
    column_W = tl.arange(0, WIDTH)
    tl.store(out + row, tl.sum(tl.load(x + row * width + column_W, column_W < width, 0.0), 0))
