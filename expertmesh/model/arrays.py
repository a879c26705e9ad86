"""Between numpy, which the wire speaks, and torch, which computes."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_BFLOAT16 = np.dtype("V2")  # as `wire` has it: numpy knows no bfloat16
_NUMPY2TORCH = {
    np.dtype("f4"): torch.float32,
    np.dtype("f2"): torch.float16,
    np.dtype("i4"): torch.int32,
    np.dtype("i8"): torch.int64,
}


def to_torch(array: npt.NDArray[Any], device: torch.device) -> Tensor:
    """Copies an array, at whatever address it lies, into memory that torch has aligned."""
    if array.dtype == _BFLOAT16:
        bits = torch.empty(array.shape, dtype=torch.int16)
        np.copyto(bits.numpy(), array.view("i2"))
        return bits.view(torch.bfloat16).to(device)
    tensor = torch.empty(array.shape, dtype=_NUMPY2TORCH[array.dtype])
    np.copyto(tensor.numpy(), array)
    return tensor.to(device)


def to_numpy(tensor: Tensor) -> npt.NDArray[Any]:
    """Gives a tensor's values as a numpy array; on CPU without copying."""
    on_host = tensor.detach().cpu()
    if on_host.dtype == torch.bfloat16:
        bits: npt.NDArray[Any] = on_host.contiguous().view(torch.int16).numpy().view(_BFLOAT16)
        return bits
    array: npt.NDArray[Any] = on_host.numpy()
    return array
