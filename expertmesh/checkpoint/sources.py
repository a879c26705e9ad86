"""What can be split: a trained checkpoint, a folder that was split before, a Hugging Face folder."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from expertmesh.checkpoint.huggingface import config as huggingface
from expertmesh.checkpoint.huggingface.source import HuggingFaceSource
from expertmesh.checkpoint.manifest import (
    FILE_NAME,
    PART_FILE,
    Manifest,
    expert_part,
    gating_part,
    model_parts,
    read_checked,
)
from expertmesh.checkpoint.parts import check_dtype
from expertmesh.checkpoint.strict_json import read_file, read_object
from expertmesh.checkpoint.tensor_file import CHUNK_BYTES, PartTensor, StoredTensor, read_header
from expertmesh.errors import BadCheckpoint
from expertmesh.model.spec import ModelSpec

SPEC_FILE = "spec.json"
WEIGHTS_FILE = "model.safetensors"
TOKENIZER_FOLDER = "tokenizer"
MAX_SPEC_BYTES = 2**20
MAX_TOKENIZER_BYTES = 256 * 2**20

_STAGE_TENSOR = re.compile(r"(embedding|classifier)\.(.+)")
_GATING_TENSOR = re.compile(r"gating\.(\d{1,6})\.(.+)")
_EXPERT_TENSOR = re.compile(r"experts\.(\d{1,6})\.(\d{1,6})\.(.+)")


class Source(Protocol):
    """A model folder of some kind, as parts.

    Attributes:
        kind: Of what kind it is.
        name: What its model is called.
        spec: What its model is.
    """

    kind: str
    name: str
    spec: ModelSpec

    def part(self, name: str) -> Mapping[str, PartTensor]:
        """The tensors of one part, which are read when they are written."""

    def tokenizer_files(self) -> dict[str, bytes]:
        """The tokenizer's files by name."""


def open_source(folder: Path, dtype: str | None = None, context: int | None = None) -> Source:
    """Opens a folder by what lies in it.

    Args:
        folder: The folder.
        dtype: What the model shall compute in; by default as its spec says, and float32 where it has none.
        context: A smaller context than the model's own.

    Raises:
        BadCheckpoint: It is none of the three kinds, or damaged.
    """
    if not folder.is_dir():
        raise BadCheckpoint(f"there is no checkpoint folder {folder}")
    if (folder / huggingface.FILE_NAME).exists() and not any((folder / f).exists() for f in (FILE_NAME, SPEC_FILE)):
        return HuggingFaceSource(folder, dtype or "float32", context)
    source = SplitSource(folder) if (folder / FILE_NAME).exists() else TrainedSource(folder)
    if dtype is not None:
        source.spec = replace(source.spec, dtype=dtype)
    if context is not None:
        if source.spec.embedding.learned_positions or not 0 < context <= source.spec.context:
            raise BadCheckpoint(f"{folder}: a context of {context} instead of {source.spec.context} cannot be had")
        source.spec = replace(source.spec, context=context)
    return source


class TrainedSource:
    """What `expertmesh train` writes: `spec.json`, `model.safetensors`, `tokenizer/`."""

    kind = "trained"

    def __init__(self, folder: Path) -> None:
        self.name = folder.resolve().name
        self._folder = folder
        for file in (SPEC_FILE, WEIGHTS_FILE, TOKENIZER_FOLDER):
            if not (folder / file).exists():
                raise BadCheckpoint(
                    f"{folder} is no checkpoint: it has no {file}, nor is there a {huggingface.FILE_NAME}"
                )
        self.spec = ModelSpec.from_dict(read_object(folder / SPEC_FILE, MAX_SPEC_BYTES))
        self._part2tensors: dict[str, dict[str, StoredTensor]] = {}
        for name, tensor in read_header(folder / WEIGHTS_FILE).items():
            check_dtype(str(folder / WEIGHTS_FILE), name, tensor.dtype)
            part, inner = _place(name)
            self._part2tensors.setdefault(part, {})[inner] = tensor
        extra = self._part2tensors.keys() - set(model_parts(self.spec))
        if extra:
            raise BadCheckpoint(f"{folder} holds tensors of {min(extra)}, which the spec does not have")

    def part(self, name: str) -> Mapping[str, PartTensor]:
        """The tensors of one part."""
        if name not in self._part2tensors:
            raise BadCheckpoint(f"{self._folder} misses the tensors of part {name}")
        return self._part2tensors[name]

    def tokenizer_files(self) -> dict[str, bytes]:
        """The tokenizer's files by name; what else lies there is left alone."""
        return {
            path.name: read_file(path, MAX_TOKENIZER_BYTES)
            for path in sorted((self._folder / TOKENIZER_FOLDER).iterdir())
            if PART_FILE.fullmatch(f"{TOKENIZER_FOLDER}/{path.name}")
        }


class SplitSource:
    """A folder of parts; every one is compared with its digest before it is used."""

    kind = "split"

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._manifest = Manifest.read(folder)
        self.name = self._manifest.name
        self.spec = self._manifest.spec

    def part(self, name: str) -> Mapping[str, PartTensor]:
        """The tensors of one part."""
        part = self._manifest.parts[name]
        path, digest = self._folder / part.file, hashlib.sha256()
        try:
            with path.open("rb") as file:
                while data := file.read(CHUNK_BYTES):
                    digest.update(data)
        except OSError as error:
            raise BadCheckpoint(f"part {name}: {path} cannot be read: {error.strerror}") from None
        if digest.digest() != part.digest:
            raise BadCheckpoint(f"part {name}: the SHA-256 of {path} is not the one in the manifest")
        return read_header(path)

    def tokenizer_files(self) -> dict[str, bytes]:
        """The tokenizer's files by name."""
        parts = self._manifest.parts
        return {
            name.removeprefix(f"{TOKENIZER_FOLDER}/"): read_checked(self._folder, name, parts[name])
            for name in self._manifest.tokenizer_parts()
        }


def _place(tensor: str) -> tuple[str, str]:
    """The part that a tensor of the full model belongs to, and its name there."""
    if match := _STAGE_TENSOR.fullmatch(tensor):
        return match[1], match[2]
    if match := _GATING_TENSOR.fullmatch(tensor):
        return gating_part(int(match[1])), match[2]
    if match := _EXPERT_TENSOR.fullmatch(tensor):
        return expert_part(int(match[1]), int(match[2])), match[3]
    raise BadCheckpoint(f"tensor {tensor!r} belongs to no stage")
