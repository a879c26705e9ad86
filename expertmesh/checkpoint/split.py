"""`split`: a checkpoint becomes a folder of parts that services load one by one.

The source is a trained checkpoint (`spec.json`, `model.safetensors`, `tokenizer/`) or a folder that was split
before. The same source gives the same bytes. The target appears whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from expertmesh.checkpoint.load import StageLoader
from expertmesh.checkpoint.manifest import (
    FILE_NAME,
    PART_FILE,
    Manifest,
    Part,
    expert_part,
    gating_part,
    model_parts,
    read_checked,
)
from expertmesh.checkpoint.parts import parse
from expertmesh.errors import BadCheckpoint
from expertmesh.model.spec import ModelSpec

SPEC_FILE = "spec.json"
WEIGHTS_FILE = "model.safetensors"
TOKENIZER_FOLDER = "tokenizer"

Progress = Callable[[str, int, int], None]

_STAGE_TENSOR = re.compile(r"(embedding|classifier)\.(.+)")
_GATING_TENSOR = re.compile(r"gating\.(\d+)\.(.+)")
_EXPERT_TENSOR = re.compile(r"experts\.(\d+)\.(\d+)\.(.+)")


def split(source: Path, target: Path, name: str = "", progress: Progress | None = None) -> Manifest:
    """Writes the parts of a checkpoint and their manifest.

    Args:
        source: A trained checkpoint, or a split model.
        target: The folder to write; it must not exist, or be empty, or be an earlier split, which is replaced.
        name: The model's name; the source's by default.
        progress: Is told (part, parts done, parts in all).

    Raises:
        BadCheckpoint: The source is missing, damaged, or not complete, or the target is some other folder.
    """
    if target.exists() and not target.is_dir():
        raise BadCheckpoint(f"{target} is no folder; choose another one")
    if target.exists() and any(target.iterdir()) and not (target / FILE_NAME).is_file():
        raise BadCheckpoint(f"{target} is not empty and holds no split model; choose another folder")
    source_name, spec, part2tensors, tokenizer_files = _read(source)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as scratch:
        draft = Path(scratch) / target.name
        parts = {}
        order = list(model_parts(spec))
        for done, part in enumerate(order, start=1):
            if part not in part2tensors:
                raise BadCheckpoint(f"{source} misses the tensors of part {part}")
            parts[part] = _write(draft, f"{part}.safetensors", safetensors.torch.save(part2tensors.pop(part)))
            if progress is not None:
                progress(part, done, len(order))
        if part2tensors:
            raise BadCheckpoint(f"{source} holds tensors of {min(part2tensors)}, which the spec does not have")
        for file, data in sorted(tokenizer_files.items()):
            parts[f"{TOKENIZER_FOLDER}/{file}"] = _write(draft, f"{TOKENIZER_FOLDER}/{file}", data)
        manifest = Manifest(name or source_name, spec, parts)
        manifest.write(draft)
        StageLoader(draft, torch.device("cpu")).full_model()  # what no service could load is never put in place
        _keep_others(target, draft)
        if target.exists():
            target.rename(Path(scratch) / "replaced")
        draft.rename(target)
    return manifest


def _write(folder: Path, file: str, data: bytes) -> Part:
    path = folder / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return Part(file, len(data), hashlib.sha256(data).digest())


def _keep_others(old: Path, new: Path) -> None:
    """Carries files that are no part, such as the model card, from an earlier split into its replacement."""
    if old.is_dir():
        for path in old.iterdir():
            if path.is_file() and path.name != FILE_NAME and path.suffix != ".safetensors":
                shutil.copy2(path, new / path.name)


def _read(source: Path) -> tuple[str, ModelSpec, dict[str, dict[str, Tensor]], dict[str, bytes]]:
    if (source / FILE_NAME).is_file():
        return _read_split(source)
    if not source.is_dir():
        raise BadCheckpoint(f"there is no checkpoint folder {source}")
    for file in (SPEC_FILE, WEIGHTS_FILE, TOKENIZER_FOLDER):
        if not (source / file).exists():
            raise BadCheckpoint(f"{source} is no checkpoint: it has no {file}")
    try:
        spec = ModelSpec.from_dict(json.loads((source / SPEC_FILE).read_bytes()))
    except (ValueError, TypeError, RecursionError) as error:
        raise BadCheckpoint(f"{source / SPEC_FILE} is no JSON: {error}") from None
    part2tensors: dict[str, dict[str, Tensor]] = {}
    for name, tensor in parse((source / WEIGHTS_FILE).read_bytes(), str(source / WEIGHTS_FILE)).items():
        part, inner = _place(name)
        part2tensors.setdefault(part, {})[inner] = tensor
    files = {
        path.name: path.read_bytes()
        for path in sorted((source / TOKENIZER_FOLDER).iterdir())
        if PART_FILE.fullmatch(f"{TOKENIZER_FOLDER}/{path.name}")
    }
    return source.resolve().name, spec, part2tensors, files


def _read_split(source: Path) -> tuple[str, ModelSpec, dict[str, dict[str, Tensor]], dict[str, bytes]]:
    manifest = Manifest.read(source)
    part2bytes = {name: read_checked(source, name, part) for name, part in manifest.parts.items()}
    tensors = {name: parse(part2bytes[name], f"part {name}") for name in model_parts(manifest.spec)}
    files = {name.removeprefix("tokenizer/"): part2bytes[name] for name in manifest.tokenizer_parts()}
    return manifest.name, manifest.spec, tensors, files


def _place(tensor: str) -> tuple[str, str]:
    """The part that a tensor of the full model belongs to, and its name there."""
    if match := _STAGE_TENSOR.fullmatch(tensor):
        return match[1], match[2]
    if match := _GATING_TENSOR.fullmatch(tensor):
        return gating_part(int(match[1])), match[2]
    if match := _EXPERT_TENSOR.fullmatch(tensor):
        return expert_part(int(match[1]), int(match[2])), match[3]
    raise BadCheckpoint(f"tensor {tensor!r} belongs to no stage")
