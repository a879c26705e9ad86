"""What a split and its original have to have in common: spec, tokenizer files, and every tensor of every part."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from expertmesh.checkpoint.manifest import Manifest, read_checked
from expertmesh.checkpoint.tensor_file import PartTensor, read_header
from expertmesh.model.spec import ModelSpec


@dataclass
class Place:
    """What was compared in a layer, or in a stage that belongs to none.

    Attributes:
        name: Which.
        parts: Parts compared.
        tensors: Tensors, or files of the tokenizer.
        size_bytes: Their bytes in the split.
        outputs: Numbers that stages loaded from both gave.
        faults: What differs.
    """

    name: str
    parts: int = 0
    tensors: int = 0
    size_bytes: int = 0
    outputs: int = 0
    faults: list[str] = field(default_factory=list)


@dataclass
class Proof:
    """All of it.

    Attributes:
        spec_faults: Fields of the spec that differ.
        places: By name.
    """

    spec_faults: list[str]
    places: dict[str, Place] = field(default_factory=dict)

    def place(self, name: str) -> Place:
        """One place, which begins with nothing."""
        return self.places.setdefault(name, Place(name))

    @property
    def are_equal(self) -> bool:
        """Whether nothing differs."""
        return not self.spec_faults and not any(place.faults for place in self.places.values())


def spec_faults(ours: ModelSpec, theirs: ModelSpec) -> list[str]:
    """Says which fields of two specs differ."""
    left, right = ours.to_dict(), theirs.to_dict()
    return [
        f"spec: {key} is {str(left[key])[:200]}, of the original {str(right[key])[:200]}"
        for key in left
        if left[key] != right[key]
    ]


def compare_tokenizer(folder: Path, manifest: Manifest, files: Mapping[str, bytes], place: Place) -> None:
    """Compares tokenizer files byte by byte."""
    parts = manifest.parts
    originals = {f"tokenizer/{name}": data for name, data in files.items()}
    place.parts = 1
    for name in sorted(originals.keys() | set(manifest.tokenizer_parts())):
        if name not in parts or name not in originals:
            place.faults.append(f"{name} is only in {'the split' if name in parts else 'the original'}")
            continue
        place.tensors += 1
        place.size_bytes += parts[name].size_bytes
        if read_checked(folder, name, parts[name]) != originals[name]:
            place.faults.append(f"{name} has other bytes than in the original")


def compare_part(
    folder: Path, manifest: Manifest, part: str, originals: Mapping[str, PartTensor], place: Place
) -> None:
    """Compares the tensors in a part's file with the original's, a piece at a time."""
    entry = manifest.parts[part]
    ours = read_header(folder / entry.file)
    place.parts += 1
    place.tensors += len(ours)
    place.size_bytes += entry.size_bytes
    for name in sorted(ours.keys() | originals.keys()):
        if name not in ours or name not in originals:
            place.faults.append(f"{part}: {name} is only in {'the split' if name in ours else 'the original'}")
        elif (ours[name].dtype, ours[name].shape) != (originals[name].dtype, tuple(originals[name].shape)):
            place.faults.append(f"{part}: {name} has another dtype or shape than in the original")
        elif not _same_elements(ours[name], originals[name]):
            place.faults.append(f"{part}: {name} has other values than in the original")


def whole(tensor: PartTensor) -> Tensor:
    """All of a tensor."""
    pieces = list(tensor.chunks())
    flat = torch.cat(pieces) if pieces else torch.empty(0, dtype=tensor.dtype)
    return flat.reshape(tensor.shape)


def bytes_of(tensor: Tensor) -> Tensor:
    """A tensor's bytes, uint8 [N]."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _same_elements(ours: PartTensor, theirs: PartTensor) -> bool:
    """Whether two tensors of one dtype and shape have the same bits."""
    left, right = _byte_chunks(ours), _byte_chunks(theirs)
    mine = other = torch.empty(0, dtype=torch.uint8)
    while True:
        if not len(mine):
            mine = next(left, mine)
        if not len(other):
            other = next(right, other)
        count = min(len(mine), len(other))
        if not count:
            return len(mine) == len(other)
        if not torch.equal(mine[:count], other[:count]):
            return False
        mine, other = mine[count:], other[count:]


def _byte_chunks(tensor: PartTensor) -> Iterator[Tensor]:
    for chunk in tensor.chunks():
        if len(chunk):
            yield bytes_of(chunk)
