"""What a training run leaves behind: a whole model to be split, a report, and the state to go on from.

Every file is written under another name and moved into place, so a reader or a crash never meets half a file.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from expertmesh.errors import SetupError
from expertmesh.model.spec import ModelSpec

SPEC_FILE = "spec.json"
WEIGHTS_FILE = "model.safetensors"
REPORT_FILE = "training.json"
STATE_FILE = "state/resume.safetensors"
TOKENIZER_FOLDER = "tokenizer"


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file so that it is either the old or the new one, whole, also after a power cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, values: Any) -> None:
    """Writes JSON with sorted keys, atomically."""
    write_atomically(path, (json.dumps(values, indent=2, sort_keys=True) + "\n").encode())


def file_digest(path: Path) -> str:
    """Gives the SHA-256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def to_storage(weights: dict[str, Tensor], dtype: str) -> dict[str, Tensor]:
    """Rounds weights to the dtype they are stored in."""
    return {name: weight.detach().to("cpu", getattr(torch, dtype)).contiguous() for name, weight in weights.items()}


def write_weights(out: Path, spec: ModelSpec, stored: dict[str, Tensor]) -> str:
    """Writes `spec.json` and `model.safetensors`, and gives the SHA-256 of the latter."""
    content = save(stored, metadata={"format": "pt"})
    write_json(out / SPEC_FILE, spec.to_dict())
    write_atomically(out / WEIGHTS_FILE, content)
    return hashlib.sha256(content).hexdigest()


@dataclass(frozen=True)
class ResumeState:
    """All that a run needs to go on as if it had never stopped.

    Attributes:
        tensors: Weights, averaged weights, optimizer moments and generator states, by name.
        progress: Counters, history and digests; plain values.
    """

    tensors: dict[str, Tensor]
    progress: dict[str, Any]


def write_state(out: Path, state: ResumeState) -> None:
    """Writes the state in one file, the plain values as JSON in its header."""
    write_atomically(out / STATE_FILE, save(state.tensors, metadata={"progress": json.dumps(state.progress)}))


def read_state(out: Path) -> ResumeState:
    """Reads what `write_state` wrote.

    Raises:
        SetupError: It is missing or damaged.
    """
    path = out / STATE_FILE
    try:
        with safe_open(path, framework="pt") as file:
            progress = json.loads(file.metadata()["progress"])
            return ResumeState({name: file.get_tensor(name) for name in file.keys()}, progress)  # noqa: SIM118
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise SetupError(f"{path}: no state to resume from ({error})") from None
