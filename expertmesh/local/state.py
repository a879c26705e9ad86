"""What a running local mesh leaves for `status`, `down` and `classify`: a folder with a lock, addresses and logs."""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from expertmesh.errors import SetupError

STATE_FILE = "up.json"
LOCK_FILE = "lock"
ENVIRONMENT = "EXPERTMESH_RUN_DIR"


@dataclass
class RunningProcess:
    """One process of a running mesh."""

    service: str
    kind: str
    address: str
    pid: int
    restarts: int = 0


@dataclass
class RunningMesh:
    """A running mesh, as `up` writes it down at every change."""

    pid: int
    model: str
    grpc: str
    http: str
    processes: dict[str, RunningProcess] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Writes it down; a reader sees the old or the new one."""
        draft = folder / f"{STATE_FILE}.draft"
        draft.write_text(json.dumps(asdict(self), indent=1))
        draft.replace(folder / STATE_FILE)


def default_folder() -> Path:
    """The folder that `up` uses when it is not told: one a user."""
    if given := os.environ.get(ENVIRONMENT):
        return Path(given)
    if runtime := os.environ.get("XDG_RUNTIME_DIR"):
        return Path(runtime) / "expertmesh"
    return Path(tempfile.gettempdir()) / f"expertmesh-{os.getuid()}"


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Holds the folder's lock: whoever holds it is the mesh of that folder.

    Raises:
        SetupError: Another mesh holds it, or the folder is somebody else's.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise SetupError(f"{folder} belongs to another user; choose another with --run-dir")
    handle = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise SetupError(
                f"a mesh is running in {folder} already: stop it with `expertmesh down`, or choose another --run-dir"
            ) from None
        yield
        (folder / STATE_FILE).unlink(missing_ok=True)
    finally:
        os.close(handle)


def is_held(folder: Path) -> bool:
    """Whether a mesh runs in a folder."""
    try:
        handle = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(handle)
    return False


def find(folder: Path) -> RunningMesh | None:
    """The mesh that runs in a folder; None if none does."""
    if not is_held(folder):
        return None
    try:
        values: dict[str, Any] = json.loads((folder / STATE_FILE).read_text())
    except (OSError, ValueError):
        return None
    processes = {name: RunningProcess(**plain) for name, plain in values.pop("processes").items()}
    return RunningMesh(**values, processes=processes)
