"""The tensors of a Hugging Face folder: one file or shards with an index, all of them inside the folder."""

from __future__ import annotations

from pathlib import Path

from expertmesh.checkpoint.huggingface.config import shown
from expertmesh.checkpoint.strict_json import read_object
from expertmesh.checkpoint.tensor_file import MAX_HEADER_BYTES, MAX_TENSORS, StoredTensor, read_header
from expertmesh.errors import BadCheckpoint

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


def read_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint, by its name on disk.

    Raises:
        BadCheckpoint: A file is missing, damaged or outside the folder, or the index and the files disagree.
    """
    if (folder / SINGLE_FILE).exists():
        return read_header(inside(folder, SINGLE_FILE))
    if not (folder / INDEX_FILE).exists():
        other = next((path.name for path in sorted(folder.glob("*.bin"))), "")
        hint = f"; {other} may be a pickle, and pickles are never read: save it as safetensors" if other else ""
        raise BadCheckpoint(f"{folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}{hint}")
    name2file = _index(folder)
    tensors: dict[str, StoredTensor] = {}
    for file in sorted(set(name2file.values())):
        path = inside(folder, file)
        for name, tensor in read_header(path).items():
            if name2file.get(name) != file:
                raise BadCheckpoint(f"{path} holds tensor {name!r}, which {INDEX_FILE} does not say")
            tensors[name] = tensor
    missing = next((name for name in name2file if name not in tensors), None)
    if missing is not None:
        raise BadCheckpoint(f"{folder / name2file[missing]} misses tensor {missing!r}, which {INDEX_FILE} promises")
    return tensors


def inside(folder: Path, file: str) -> Path:
    """A regular file of the folder.

    It may be a link only within the folder, or from a snapshot in the cache of huggingface_hub to that model's blobs.

    Raises:
        BadCheckpoint: There is none, or it leads out of the folder.
    """
    if file in ("", ".", "..") or "/" in file or "\\" in file or "\0" in file:
        raise BadCheckpoint(f"{folder}: {shown(file)} is no name of a file in this folder")
    path, root = (folder / file).resolve(), folder.resolve()
    blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else root
    if not path.is_relative_to(root) and not path.is_relative_to(blobs):
        raise BadCheckpoint(f"{folder / file} leads out of the folder")
    if not path.is_file():
        raise BadCheckpoint(f"there is no file {folder / file}")
    return path


def _index(folder: Path) -> dict[str, str]:
    where = folder / INDEX_FILE
    name2file = read_object(inside(folder, INDEX_FILE), MAX_HEADER_BYTES).get("weight_map")
    if not isinstance(name2file, dict) or not name2file:
        raise BadCheckpoint(f"{where} has no weight_map")
    if len(name2file) > MAX_TENSORS:
        raise BadCheckpoint(f"{where} has more than {MAX_TENSORS} tensors")
    for name, file in name2file.items():
        if not isinstance(file, str) or not file.endswith(".safetensors"):
            raise BadCheckpoint(f"{where}: {shown(file)}, where tensor {shown(name)} shall be, is no safetensors file")
    return name2file
