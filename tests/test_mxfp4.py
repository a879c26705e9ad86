from __future__ import annotations

import math

import pytest
import torch

from expertmesh.checkpoint.huggingface.mxfp4 import BLOCK, dequantised

MAGNITUDES = [0, 0.5, 1, 1.5, 2, 3, 4, 6]


def number(bits: int, scale: int) -> float:
    """What 4 bits and a scale stand for, by the definition: a sign, then one of eight magnitudes."""
    return (-1 if bits & 8 else 1) * math.ldexp(MAGNITUDES[bits & 7], scale - 127)


@pytest.mark.parametrize("scale", [0, 1, 100, 126, 127, 128, 200, 251, 252])
def test_every_byte_is_two_numbers_the_lower_half_first(scale: int) -> None:
    blocks = torch.arange(256, dtype=torch.uint8).view(2, 8, BLOCK // 2)
    values = dequantised(blocks, torch.full((2, 8), scale, dtype=torch.uint8))
    assert values.dtype == torch.bfloat16
    assert values.shape == (2, 8 * BLOCK)
    expected = [number(half, scale) for byte in range(256) for half in (byte & 15, byte >> 4)]
    assert values.double().flatten().tolist() == expected


def test_each_block_has_a_scale_of_its_own() -> None:
    blocks = torch.full((2, 2, BLOCK // 2), 0x22, dtype=torch.uint8)
    values = dequantised(blocks, torch.tensor([[127, 128], [126, 130]], dtype=torch.uint8))
    assert values[:, ::BLOCK].tolist() == [[1, 2], [0.5, 8]]
    assert values[:, BLOCK - 1 :: BLOCK].tolist() == [[1, 2], [0.5, 8]]


def test_what_overflows_is_not_finite() -> None:
    blocks = torch.full((1, 1, BLOCK // 2), 0x77, dtype=torch.uint8)
    for scale in (254, 255):
        assert not dequantised(blocks, torch.tensor([[scale]], dtype=torch.uint8)).isfinite().any()
    assert not dequantised(torch.zeros_like(blocks), torch.tensor([[255]], dtype=torch.uint8)).isfinite().any()
