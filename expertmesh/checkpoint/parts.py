"""Weights in part files: written piece by piece, checked by digest, name, shape and value before they are used."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from expertmesh.checkpoint.manifest import Manifest, Part, read_checked
from expertmesh.checkpoint.shapes import check_shapes
from expertmesh.checkpoint.tensor_file import PartTensor
from expertmesh.errors import BadCheckpoint

STORED_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def write_part(folder: Path, name: str, tensors: Mapping[str, PartTensor]) -> Part:
    """Writes a part as safetensors, as `safetensors.torch.save` does, holding one piece of a tensor at a time.

    Raises:
        BadCheckpoint: A tensor has a dtype that is not stored, or a value that is not finite.
    """
    for key, tensor in tensors.items():
        check_dtype(f"part {name}", key, tensor.dtype)
    kinds = list(STORED_DTYPES)
    order = sorted(tensors, key=lambda key: (kinds.index(tensors[key].dtype), key))
    path = folder / f"{name}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        header = _header(tensors, order)
        digest.update(header)
        file.write(header)
        for key in order:
            for flat in tensors[key].chunks():
                if not torch.isfinite(flat).all():
                    raise BadCheckpoint(f"part {name}: tensor {key!r} holds values that are not finite")
                data = flat.view(torch.uint8).numpy().data
                digest.update(data)
                file.write(data)
        size_bytes = file.tell()
    return Part(f"{name}.safetensors", size_bytes, digest.digest())


def check_dtype(where: str, name: str, dtype: torch.dtype) -> None:
    """Refuses dtypes that no part may have.

    Raises:
        BadCheckpoint: It is none of fp32, bf16 and fp16.
    """
    if dtype not in STORED_DTYPES:
        raise BadCheckpoint(f"{where}: tensor {name!r} has dtype {str(dtype).removeprefix('torch.')}")


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
        check_dtype(what, name, tensor.dtype)
    return tensors


def load_part(folder: Path, manifest: Manifest, name: str, module: nn.Module, device: torch.device) -> nn.Module:
    """Fills a module, made on the meta device, with a part's weights, each in the dtype that the module has it in.

    Raises:
        BadCheckpoint: The part is missing or damaged, or its tensors are not those of the module, by name and shape.
    """
    part = manifest.parts[name]
    tensors = parse(read_checked(folder, name, part), f"part {name}")
    wanted = module.state_dict()
    check_shapes(
        name,
        {key: tuple(value.shape) for key, value in tensors.items()},
        {key: tuple(value.shape) for key, value in wanted.items()},
    )
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise BadCheckpoint(f"part {name}: tensor {key!r} holds values that are not finite")
    module.load_state_dict({key: tensor.to(device, wanted[key].dtype) for key, tensor in tensors.items()}, assign=True)
    return module.eval().requires_grad_(False)


def _header(tensors: Mapping[str, PartTensor], order: list[str]) -> bytes:
    entries, begin = {}, 0
    for key in order:
        tensor = tensors[key]
        end = begin + torch.Size(tensor.shape).numel() * tensor.dtype.itemsize
        entries[key] = {
            "dtype": STORED_DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
