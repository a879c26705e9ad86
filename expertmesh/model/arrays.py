"""Between numpy, which the wire speaks, and torch, which computes.

To and from CUDA, arrays go through pinned memory, which torch gives out again once a copy has ended. Copies to
the device are waited for by nobody; copies from it are waited for once, however many they are.
"""

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
    is_narrow = array.dtype == _BFLOAT16
    on_cuda = device.type == "cuda"
    dtype = torch.int16 if is_narrow else _NUMPY2TORCH[array.dtype]
    tensor = torch.empty(array.shape, dtype=dtype, pin_memory=on_cuda)
    np.copyto(tensor.numpy(), array.view("i2") if is_narrow else array)
    if is_narrow:
        tensor = tensor.view(torch.bfloat16)
    return tensor.to(device, non_blocking=on_cuda)


def to_numpy(tensor: Tensor) -> npt.NDArray[Any]:
    """Gives a tensor's values as a numpy array; on CPU without copying."""
    return to_arrays(tensor)[0]


def to_arrays(*tensors: Tensor) -> list[npt.NDArray[Any]]:
    """Gives the values of tensors of one device as numpy arrays."""
    on_host = [_on_host(tensor.detach()) for tensor in tensors]
    if tensors[0].is_cuda:
        torch.cuda.current_stream(tensors[0].device).synchronize()
    return [
        tensor.view(torch.int16).numpy().view(_BFLOAT16) if tensor.dtype == torch.bfloat16 else tensor.numpy()
        for tensor in on_host
    ]


def _on_host(tensor: Tensor) -> Tensor:
    if tensor.is_cuda:
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return host.copy_(tensor, non_blocking=True)
    return tensor.contiguous() if tensor.dtype == torch.bfloat16 else tensor
