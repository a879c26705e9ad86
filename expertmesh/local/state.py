"""What a running local mesh leaves for `status`, `down` and `classify`: a folder with a lock, addresses and logs."""

from __future__ import annotations

import fcntl
import json
import os
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from expertmesh.errors import SetupError

STATE_FILE = "up.json"
LOCK_FILE = "lock"
ENVIRONMENT = "EXPERTMESH_RUN_DIR"
LOCK_PATIENCE_S = 0.2


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
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise SetupError(f"{folder} cannot be made: {error.strerror}; choose another with --run-dir") from None
    if not _is_ours(folder):
        raise SetupError(f"{folder} belongs to another user; choose another with --run-dir")
    folder.chmod(0o700)
    handle = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        if not _locked(handle):
            raise SetupError(
                f"a mesh is running in {folder} already: stop it with `expertmesh down`, or choose another --run-dir"
            )
        (folder / STATE_FILE).unlink(missing_ok=True)
        try:
            os.truncate(handle, 0)
            os.write(handle, str(os.getpid()).encode())
        except OSError as error:
            raise SetupError(f"{folder} cannot be written to: {error.strerror}") from None
        try:
            yield
        finally:
            (folder / STATE_FILE).unlink(missing_ok=True)
    finally:
        os.close(handle)


def is_held(folder: Path) -> bool:
    """Whether a mesh of ours runs in a folder."""
    if not _is_ours(folder):
        return False
    try:
        handle = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(handle)
    return False


def holder(folder: Path) -> int | None:
    """The pid of the mesh of ours that runs in a folder, be it ready or not; None if none does."""
    give_up_s = time.monotonic() + LOCK_PATIENCE_S
    while is_held(folder):
        with suppress(OSError, ValueError):  # it is written a moment after the lock was taken
            return int((folder / LOCK_FILE).read_text())
        if time.monotonic() > give_up_s:
            break
        time.sleep(0.01)
    return None


def find(folder: Path) -> RunningMesh | None:
    """The mesh of ours that is ready in a folder; None if none is."""
    if not is_held(folder):
        return None
    try:
        values: dict[str, Any] = json.loads((folder / STATE_FILE).read_text())
    except (OSError, ValueError):
        return None
    processes = {name: RunningProcess(**plain) for name, plain in values.pop("processes").items()}
    return RunningMesh(**values, processes=processes)


def _is_ours(folder: Path) -> bool:
    """Whether a folder, and not a link to one, belongs to this user: nobody else may say what runs in it."""
    try:
        found = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()


def _locked(handle: int) -> bool:
    """Takes the lock; tried again for a moment, since one who only looks whether it is held lets go of it at once."""
    give_up_s = time.monotonic() + LOCK_PATIENCE_S
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            if time.monotonic() > give_up_s:
                return False
            time.sleep(0.01)
        else:
            return True
