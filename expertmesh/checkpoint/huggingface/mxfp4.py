"""MXFP4: blocks of 32 numbers of 4 bits with a common scale of 8 bits.

The format is that of Open Compute Project, "OCP Microscaling Formats", 2023. A byte holds two numbers, the lower half
first; the scale is an exponent of 2, biased by 127. Every value that does not overflow is a bf16 number, so nothing is
lost.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

BLOCK = 32

_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_NUMBERS = torch.tensor([*_MAGNITUDES, *(-number for number in _MAGNITUDES)])
_POWERS = torch.tensor([math.ldexp(1.0, exponent - 127) for exponent in range(255)] + [math.nan])


def dequantised(blocks: Tensor, scales: Tensor) -> Tensor:
    """uint8 blocks [rows, columns / 32, 16] and scales [rows, columns / 32] to bf16 [rows, columns]."""
    pairs = torch.stack([_NUMBERS[(blocks & 15).int()], _NUMBERS[(blocks >> 4).int()]], dim=-1)
    values = pairs.flatten(-2) * _POWERS[scales.int()][..., None]
    return values.flatten(-2).to(torch.bfloat16)
