"""Safetensors files read piece by piece: the header is checked, tensors are read when they are asked for.

Nothing is mapped into memory, so that what was read does not stay resident; a piece has at most `CHUNK_BYTES`.
The format is that of https://huggingface.co/docs/safetensors.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from expertmesh.checkpoint.strict_json import parse_object
from expertmesh.errors import BadCheckpoint

MAX_HEADER_BYTES = 100 * 10**6
MAX_TENSORS = 500_000
MAX_DIMENSIONS = 8
MAX_SIZE = 2**62
CHUNK_BYTES = 16 * 2**20

DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class PartTensor(Protocol):
    """A tensor that will be written into a part."""

    @property
    def dtype(self) -> torch.dtype:
        """Its dtype."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""

    def chunks(self) -> Iterator[Tensor]:
        """Its elements in order, as flat tensors."""


@dataclass(frozen=True)
class StoredTensor:
    """A contiguous tensor in a file.

    Attributes:
        path: The file.
        name: The tensor's name there.
        dtype: Its dtype.
        shape: Its shape.
        offset_bytes: Where it begins in the file.
    """

    path: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset_bytes: int

    @property
    def size_bytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __getitem__(self, index: int) -> StoredTensor:
        """One entry of the first dimension."""
        entry = replace(self, shape=self.shape[1:])
        return replace(entry, offset_bytes=self.offset_bytes + index * entry.size_bytes)

    def rows(self, start: int, stop: int) -> StoredTensor:
        """Entries of the first dimension from `start` up to `stop`."""
        shape = (stop - start, *self.shape[1:])
        return replace(self, shape=shape, offset_bytes=self[start].offset_bytes)

    def chunks(self) -> Iterator[Tensor]:
        """Its elements in order, as flat tensors of at most `CHUNK_BYTES`."""
        left = self.size_bytes
        try:
            with self.path.open("rb") as file:
                file.seek(self.offset_bytes)
                while left:
                    data = bytearray(min(left, CHUNK_BYTES))
                    if file.readinto(data) != len(data):
                        raise BadCheckpoint(f"{self.path} became shorter while it was read")
                    left -= len(data)
                    yield torch.frombuffer(data, dtype=self.dtype)
        except OSError as error:
            raise BadCheckpoint(f"{self.path} cannot be read: {error.strerror}") from None

    def load(self) -> Tensor:
        """The whole of it."""
        pieces = list(self.chunks())
        flat = torch.cat(pieces) if pieces else torch.empty(0, dtype=self.dtype)
        return flat.reshape(self.shape)


@dataclass(frozen=True)
class ComputedTensor:
    """A tensor that is made of stored ones when it is written."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    compute: Callable[[], Tensor]

    def chunks(self) -> Iterator[Tensor]:
        """All its elements at once."""
        yield self.compute().to(self.dtype).reshape(-1)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, by name.

    Raises:
        BadCheckpoint: The file is missing, truncated, no safetensors, or its header contradicts itself or the file.
    """
    if not path.is_file():
        raise BadCheckpoint(f"there is no file {path}")
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
                raise BadCheckpoint(f"{path} is no safetensors file: {_what_it_is(start, length, size)}")
            header = file.read(length)
    except OSError as error:
        raise BadCheckpoint(f"{path} cannot be read: {error.strerror}") from None
    if not header.startswith(b"{"):
        raise BadCheckpoint(f"{path} is no safetensors file: its header is no JSON")
    if header.count(b'"data_offsets"') > MAX_TENSORS:
        raise BadCheckpoint(f"{path} has more than {MAX_TENSORS} tensors")
    values = parse_object(header, f"the header of {path}")
    values.pop("__metadata__", None)
    tensors = {name: _entry(path, name, entry, 8 + length) for name, entry in values.items()}
    end = 8 + length
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.offset_bytes, tensor.size_bytes)):
        if tensor.offset_bytes != end:
            raise BadCheckpoint(f"{path}: tensor {tensor.name!r} overlaps another one or leaves a gap")
        end += tensor.size_bytes
    if end != size:
        raise BadCheckpoint(f"{path} has {size} bytes, its header describes {end}; it may be truncated")
    return tensors


def _entry(path: Path, name: str, entry: Any, start: int) -> StoredTensor:
    try:
        code, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        numbers = [*shape, begin, end]
        if len(entry) != 3 or len(shape) > MAX_DIMENSIONS or not all(map(_is_size, numbers)):
            raise ValueError
        if code not in DTYPES:
            raise BadCheckpoint(f"{path}: tensor {name!r} has dtype {code!r}, which is not understood")
    except (TypeError, ValueError, KeyError):
        raise BadCheckpoint(f"{path}: the header's entry of tensor {name!r} is malformed") from None
    tensor = StoredTensor(path, name, DTYPES[code], tuple(shape), start + begin)
    if tensor.size_bytes != end - begin:
        raise BadCheckpoint(f"{path}: tensor {name!r} has {end - begin} bytes, its shape needs {tensor.size_bytes}")
    return tensor


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MAX_SIZE


def _what_it_is(start: bytes, length: int, size: int) -> str:
    if start[:1] == b"\x80" or start[:2] == b"PK":
        return "it begins as a pickle does, and pickles are never read"
    if start.startswith(b"version "):
        return "it is a Git LFS pointer; fetch the file itself with: git lfs pull"
    return f"it has {size} bytes and claims a header of {length}"
