"""Between numpy, which the wire speaks, and torch, which computes."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_NUMPY2TORCH = {np.dtype("f4"): torch.float32, np.dtype("i4"): torch.int32, np.dtype("i8"): torch.int64}


def to_torch(array: npt.NDArray[Any], device: torch.device) -> Tensor:
    """Copies an array, at whatever address it lies, into memory that torch has aligned."""
    tensor = torch.empty(array.shape, dtype=_NUMPY2TORCH[array.dtype])
    np.copyto(tensor.numpy(), array)
    return tensor.to(device)


def to_numpy(tensor: Tensor) -> npt.NDArray[Any]:
    """Gives a tensor's values as a numpy array; on CPU without copying."""
    array: npt.NDArray[Any] = tensor.detach().cpu().numpy()
    return array
