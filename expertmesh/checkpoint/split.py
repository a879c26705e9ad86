"""`split`: a checkpoint becomes a folder of parts that services load one by one.

The same source gives the same bytes. The target appears whole or not at all. One piece of one tensor is in memory at a
time, whatever the size of the model; names and shapes are compared with the spec before anything is written.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from expertmesh.checkpoint.manifest import FILE_NAME, Manifest, Part, model_parts
from expertmesh.checkpoint.parts import write_part
from expertmesh.checkpoint.shapes import PartShapes, check_shapes
from expertmesh.checkpoint.sources import SPEC_FILE, TOKENIZER_FOLDER, WEIGHTS_FILE, Source, open_source
from expertmesh.checkpoint.tokenizer import load_tokenizer
from expertmesh.errors import BadCheckpoint, SetupError

__all__ = ["SPEC_FILE", "WEIGHTS_FILE", "Progress", "split"]

Progress = Callable[[str, int, int], None]


def split(
    source: Path | Source,
    target: Path,
    name: str = "",
    progress: Progress | None = None,
    *,
    dtype: str | None = None,
    context: int | None = None,
) -> Manifest:
    """Writes the parts of a checkpoint and their manifest.

    Args:
        source: A trained checkpoint, a split model or a Hugging Face folder, perhaps opened already.
        target: The folder to write; it must not exist, or be empty, or be an earlier split, which is replaced.
        name: The model's name; the source's by default.
        progress: Is told (part, parts done, parts in all).
        dtype: What the model shall compute in, if other than its own.
        context: Most tokens in a sequence, if other than the model's own.

    Raises:
        BadCheckpoint: The source is missing, damaged, or not complete, or the target is some other folder.
        SetupError: The target cannot be written.
    """
    try:
        return _split(source, target, name, progress, dtype, context)
    except OSError as error:
        raise SetupError(f"{target} cannot be written: {error.strerror or error}") from None


def _split(
    source: Path | Source, target: Path, name: str, progress: Progress | None, dtype: str | None, context: int | None
) -> Manifest:
    if target.exists() and not target.is_dir():
        raise BadCheckpoint(f"{target} is no folder; choose another one")
    if target.exists() and any(target.iterdir()) and not (target / FILE_NAME).is_file():
        raise BadCheckpoint(f"{target} is not empty and holds no split model; choose another folder")
    opened = open_source(source, dtype, context) if isinstance(source, Path) else source
    tokenizer_files = opened.tokenizer_files()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as scratch:
        draft = Path(scratch) / target.name
        names = {file: f"{TOKENIZER_FOLDER}/{file}" for file in sorted(tokenizer_files)}
        parts = {part: _write(draft, part, tokenizer_files[file]) for file, part in names.items()}
        load_tokenizer(draft, Manifest("", opened.spec, parts))  # before the weights, which take longer
        parts |= _write_parts(opened, draft, progress)
        manifest = Manifest(name or opened.name, opened.spec, parts)
        manifest.write(draft)
        Manifest.read(draft)  # what no service could load is never put in place
        _keep_others(target, draft)
        if target.exists():
            target.rename(Path(scratch) / "replaced")
        draft.rename(target)
    return manifest


def _write_parts(source: Source, draft: Path, progress: Progress | None) -> dict[str, Part]:
    parts = {}
    shapes = PartShapes(source.spec)
    order = list(model_parts(source.spec))
    for done, part in enumerate(order, start=1):
        tensors = source.part(part)
        check_shapes(part, {key: tensor.shape for key, tensor in tensors.items()}, shapes.of(part))
        parts[part] = write_part(draft, part, tensors)
        if progress is not None:
            progress(part, done, len(order))
    return parts


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
