"""`manifest.json`: the one agreement between splitter, services and gateway.

It says what the model is and the digest of every part. This module imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from expertmesh.errors import BadCheckpoint
from expertmesh.model.spec import ModelSpec

FILE_NAME = "manifest.json"
FORMAT = 1
TOKENIZER_PARTS = ("tokenizer/normalizer.json", "tokenizer/tokenizer.model")
LANGUAGE_TOKENIZER_PARTS = ("tokenizer/tokenizer.json", "tokenizer/tokenizer.model")
MAX_MANIFEST_BYTES = 64 * 2**20

PART_FILE = re.compile(
    r"(embedding|classifier|gating/layer-\d{2,3}|experts/layer-\d{2,3}/expert-\d{2,3})\.safetensors"
    r"|tokenizer/[a-z_]+\.(json|model|jinja)"
)


def embedding_part() -> str:
    """Name of the embedding's part."""
    return "embedding"


def gating_part(layer: int) -> str:
    """Name of one layer's gating part."""
    return f"gating/layer-{layer:02d}"


def expert_part(layer: int, expert: int) -> str:
    """Name of one expert's part."""
    return f"experts/layer-{layer:02d}/expert-{expert:02d}"


def classifier_part() -> str:
    """Name of the classifier's part."""
    return "classifier"


def model_parts(spec: ModelSpec) -> Iterator[str]:
    """Every part that holds weights, in the order of a request."""
    dense = frozenset(spec.dense.layers)
    yield embedding_part()
    for layer in range(spec.layers):
        yield gating_part(layer)
        for expert in range(0 if layer in dense else spec.router.experts):
            yield expert_part(layer, expert)
    yield classifier_part()


@dataclass(frozen=True)
class Part:
    """One file of the model: its path in the folder, its size and its SHA-256."""

    file: str
    size_bytes: int
    digest: bytes


@dataclass(frozen=True)
class Manifest:
    """The agreement.

    Attributes:
        name: What the model is called.
        spec: What it is.
        parts: Every part by name; tokenizer files are parts named `tokenizer/FILE`.
        verified_on: The numeric profile on which mesh and full model were last seen bit-equal; may be empty.
    """

    name: str
    spec: ModelSpec
    parts: dict[str, Part]
    verified_on: str = ""

    @property
    def digest(self) -> str:
        """SHA-256, in hex, of everything that decides an answer: spec and part digests."""
        return hashlib.sha256(_canonical({**self._plain(), "name": "", "verified_on": ""})).hexdigest()

    def tokenizer_parts(self) -> list[str]:
        """Names of the tokenizer's files."""
        return [name for name in self.parts if name.startswith("tokenizer/")]

    def write(self, folder: Path) -> None:
        """Writes `manifest.json`; the same manifest gives the same bytes."""
        draft = folder / f"{FILE_NAME}.draft"
        draft.write_bytes(json.dumps(self._plain(), indent=1, sort_keys=True).encode() + b"\n")
        draft.replace(folder / FILE_NAME)

    def _plain(self) -> dict[str, Any]:
        parts = {
            name: {"file": part.file, "bytes": part.size_bytes, "sha256": part.digest.hex()}
            for name, part in self.parts.items()
        }
        return {
            "format": FORMAT,
            "name": self.name,
            "parts": parts,
            "spec": self.spec.to_dict(),
            "verified_on": self.verified_on,
        }

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Reads the manifest of a split model.

        Raises:
            BadCheckpoint: The folder or the manifest is missing, damaged, or of another format.
        """
        path = folder / FILE_NAME
        if not folder.is_dir():
            raise BadCheckpoint(f"there is no model folder {folder}")
        if not path.is_file():
            raise BadCheckpoint(f"{folder} holds no {FILE_NAME}; make one with: expertmesh split CHECKPOINT {folder}")
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise BadCheckpoint(f"{path} is larger than {MAX_MANIFEST_BYTES} bytes")
        try:
            values = json.loads(path.read_bytes())
            if values["format"] != FORMAT:
                raise BadCheckpoint(f"{path} has format {values['format']!r}; this version reads format {FORMAT}")
            spec = ModelSpec.from_dict(values["spec"])
            parts = {
                str(name): Part(str(part["file"]), int(part["bytes"]), bytes.fromhex(part["sha256"]))
                for name, part in values["parts"].items()
            }
            manifest = cls(str(values["name"]), spec, parts, str(values.get("verified_on", "")))
            manifest._check(path)
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise BadCheckpoint(f"{path} is damaged: {type(error).__name__}: {error}") from None
        return manifest

    def _check(self, path: Path) -> None:
        is_language = TOKENIZER_PARTS[0] not in self.parts and any(p in self.parts for p in LANGUAGE_TOKENIZER_PARTS)
        needed = chain(model_parts(self.spec), () if is_language else TOKENIZER_PARTS)
        missing = next((name for name in needed if name not in self.parts), None)
        if missing is not None:
            raise BadCheckpoint(f"{path} misses parts that its spec needs, the first is {missing}")
        for name, part in self.parts.items():
            if not PART_FILE.fullmatch(part.file) or not part.file.startswith(name) or len(part.digest) != 32:
                raise BadCheckpoint(f"{path}: part {name!r} has a file name or digest that cannot be right")


def read_checked(folder: Path, name: str, part: Part) -> bytes:
    """Reads a part's bytes.

    Raises:
        BadCheckpoint: The file is missing, or has another size or digest than the manifest says.
    """
    path = folder / part.file
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BadCheckpoint(f"part {name}: {path} cannot be read: {error.strerror}") from None
    if len(data) != part.size_bytes:
        raise BadCheckpoint(f"part {name}: {path} has {len(data)} bytes, the manifest says {part.size_bytes}")
    if hashlib.sha256(data).digest() != part.digest:
        raise BadCheckpoint(f"part {name}: the SHA-256 of {path} is not the one in the manifest")
    return data


def _canonical(values: dict[str, Any]) -> bytes:
    return json.dumps(values, sort_keys=True, separators=(",", ":")).encode()
