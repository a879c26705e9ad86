"""Experts as gpt-oss has them: [E, in, out] with gate and up in turns, or MXFP4 blocks of [E, out, in]."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from expertmesh.checkpoint.huggingface.mxfp4 import BLOCK, dequantised
from expertmesh.checkpoint.tensor_file import ComputedTensor, PartTensor, StoredTensor
from expertmesh.errors import BadCheckpoint
from expertmesh.model.spec import ModelSpec


class Take(Protocol):
    """Gives a checked tensor of the checkpoint."""

    def __call__(
        self, names: tuple[str, ...], shape: tuple[int, ...], dtype: torch.dtype | None = None
    ) -> StoredTensor:
        """The tensor with the first of these names."""


def interleaved_expert(
    take: Take, has: Callable[[str], bool], prefix: str, expert: int, spec: ModelSpec
) -> dict[str, PartTensor]:
    """One expert's tensors, each made of the stored ones when it is written.

    Args:
        take: Gives a tensor of the checkpoint.
        has: Whether it has one.
        prefix: What the names of this layer's experts begin with.
        expert: Which one.
        spec: The model.
    """
    experts, width, inner = spec.router.experts, spec.width, spec.expert.width
    gate_up_bias = take((f"{prefix}gate_up_proj_bias",), (experts, 2 * inner))[expert]
    parts: dict[str, PartTensor] = {
        "gate.bias": _every_second(gate_up_bias, 0),
        "up.bias": _every_second(gate_up_bias, 1),
        "down.bias": take((f"{prefix}down_proj_bias",), (experts, width))[expert],
    }
    if has(f"{prefix}gate_up_proj_blocks"):
        gate_up = _quantised(take, f"{prefix}gate_up_proj", (experts, 2 * inner, width), expert)
        down = _quantised(take, f"{prefix}down_proj", (experts, width, inner), expert)
        return parts | {
            "gate.weight": _computed((inner, width), torch.bfloat16, lambda: gate_up(slice(0, None, 2))),
            "up.weight": _computed((inner, width), torch.bfloat16, lambda: gate_up(slice(1, None, 2))),
            "down.weight": _computed((width, inner), torch.bfloat16, lambda: down(slice(None))),
        }
    both = take((f"{prefix}gate_up_proj",), (experts, width, 2 * inner))[expert]
    out = take((f"{prefix}down_proj",), (experts, inner, width))[expert]
    return parts | {
        "gate.weight": _computed((inner, width), both.dtype, lambda: both.load()[:, 0::2].T),
        "up.weight": _computed((inner, width), both.dtype, lambda: both.load()[:, 1::2].T),
        "down.weight": _computed((width, inner), out.dtype, lambda: out.load().T),
    }


def _quantised(take: Take, name: str, shape: tuple[int, int, int], expert: int) -> Callable[[slice], Tensor]:
    """A function that gives some rows of one expert's matrix in bf16."""
    experts, rows, columns = shape
    if columns % BLOCK:
        raise BadCheckpoint(f"{name} is quantised, but its rows of {columns} do not divide into blocks of {BLOCK}")
    blocks = take((f"{name}_blocks",), (experts, rows, columns // BLOCK, BLOCK // 2), torch.uint8)[expert]
    scales = take((f"{name}_scales",), (experts, rows, columns // BLOCK), torch.uint8)[expert]
    return lambda chosen: dequantised(blocks.load()[chosen], scales.load()[chosen])


def _every_second(tensor: StoredTensor, first: int) -> ComputedTensor:
    return _computed((tensor.shape[0] // 2,), tensor.dtype, lambda: tensor.load()[first::2])


def _computed(shape: tuple[int, ...], dtype: torch.dtype, compute: Callable[[], Tensor]) -> ComputedTensor:
    return ComputedTensor(dtype, shape, lambda: compute().contiguous())
