"""Weights from part files, checked by digest, name, shape and value before they are used."""

from __future__ import annotations

from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from expertmesh.checkpoint.manifest import Manifest, read_checked
from expertmesh.errors import BadCheckpoint

STORED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def parse(data: bytes, what: str) -> dict[str, Tensor]:
    """Reads safetensors; anything else, a pickle under that name included, is refused by its content.

    Raises:
        BadCheckpoint: The bytes are no safetensors, or hold a tensor of a dtype that is not understood.
    """
    try:
        tensors: dict[str, Tensor] = safetensors.torch.load(data)
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise BadCheckpoint(f"{what} is no safetensors file: {error}") from None
    for name, tensor in tensors.items():
        if tensor.dtype not in STORED_DTYPES:
            raise BadCheckpoint(f"{what}: tensor {name} has dtype {tensor.dtype}")
    return tensors


def load_part(folder: Path, manifest: Manifest, name: str, module: nn.Module, device: torch.device) -> nn.Module:
    """Fills a module, made on the meta device, with a part's weights in fp32.

    Raises:
        BadCheckpoint: The part is missing or damaged, or its tensors are not those of the module, by name and shape.
    """
    part = manifest.parts[name]
    tensors = parse(read_checked(folder, name, part), f"part {name}")
    expected = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    given = {key: tuple(value.shape) for key, value in tensors.items()}
    if given != expected:
        wrong = sorted(key for key in expected.keys() | given.keys() if expected.get(key) != given.get(key))
        raise BadCheckpoint(
            f"part {name}: tensor {wrong[0]!r} is {given.get(wrong[0], 'absent')},"
            f" the spec needs {expected.get(wrong[0], 'none')}"
        )
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise BadCheckpoint(f"part {name}: tensor {key!r} holds values that are not finite")
    module.load_state_dict({key: tensor.to(device, torch.float32) for key, tensor in tensors.items()}, assign=True)
    return module.eval().requires_grad_(False)
