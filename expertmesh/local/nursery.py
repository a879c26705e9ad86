"""The parent of a local mesh's processes: `python -m expertmesh.local.nursery PID`. Used by the supervisor only.

Importing torch costs more than anything else a service does to start, so it is imported once here and services are
forked from it. Programs that must not hold torch are executed afresh. Nothing of gRPC is started before a fork.

Commands come as JSON lines on stdin, events go as JSON lines to stdout. When stdin ends, which it does however the
supervisor ends, every child is killed; where the system can (Linux), children also die with the nursery itself.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import select
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn

from expertmesh.errors import SetupError

PRELOADED = (
    "torch",
    "safetensors.torch",
    "grpc.aio",
    "services.classifier.__main__",
    "services.embedding.__main__",
    "services.expert.__main__",
    "services.full_model.__main__",
    "services.gating.__main__",
)
EXIT_SETUP_ERROR = 2
_PR_SET_PDEATHSIG = 1


class Nursery:
    """Starts, signals and reaps children.

    Args:
        tell: Writes one event.
    """

    def __init__(self, tell: Callable[[dict[str, Any]], None]) -> None:
        self._tell = tell
        self._pid2name: dict[int, str] = {}

    def obey(self, command: dict[str, Any]) -> None:
        """Carries out one command: `start` or `signal`."""
        if command["do"] == "start":
            self._start(command)
        elif command["pid"] in self._pid2name:
            os.kill(command["pid"], command["signal"])

    def reap(self) -> None:
        """Tells of children that ended."""
        while self._pid2name:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            name = self._pid2name.pop(pid)
            self._tell({"event": "ended", "name": name, "pid": pid, "status": os.waitstatus_to_exitcode(status)})

    def kill_all(self) -> None:
        """Ends every child that is left."""
        for pid in self._pid2name:
            os.kill(pid, signal.SIGKILL)
        while self._pid2name:
            self._pid2name.pop(os.waitpid(-1, 0)[0])

    def _start(self, command: dict[str, Any]) -> None:
        nursery = os.getpid()
        try:
            pid = os.fork()
        except OSError:  # no memory or no process number left just now; whoever asked may ask again
            self._tell({"event": "ended", "name": command["name"], "pid": 0, "status": 1})
            return
        if pid == 0:
            _become(command, nursery)
        self._pid2name[pid] = command["name"]
        self._tell({"event": "started", "name": command["name"], "pid": pid})


def _become(command: dict[str, Any], nursery: int) -> NoReturn:
    """Turns this forked child into a service."""
    status = 1
    try:
        os.setsid()
        die_with_parent(nursery)
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        log = _open_log(command["log"])
        nothing = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((nothing, 0), (log, 1), (log, 2)):
            os.dup2(source, target)
        os.environ.update(command["environment"])
        if command["fresh"]:
            program = [sys.executable, "-P", "-m", command["module"], *command["arguments"]]
            os.execv(sys.executable, program)  # noqa: S606
        module = importlib.import_module(f"{command['module']}.__main__")
        status = module.main(command["arguments"])
    except SetupError as error:
        status = EXIT_SETUP_ERROR
        with suppress(OSError):
            print(f"error: {error}", file=sys.stderr)
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException:
        with suppress(OSError):
            traceback.print_exc()
    finally:  # whatever becomes of its last words, a child must not go on as a second nursery
        with suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _open_log(path: str) -> int:
    """Opens a log; where none can be made, a service runs without."""
    try:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    except OSError:
        return os.open(os.devnull, os.O_WRONLY)


def die_with_parent(parent: int) -> None:
    """Has the system kill this process when its parent ends; does nothing where the system cannot."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def main() -> None:
    """Obeys until stdin ends; the argument is the pid of the supervisor, without which it does not live on."""
    die_with_parent(int(sys.argv[1]))
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def tell(event: dict[str, Any]) -> None:
        os.write(1, json.dumps(event).encode() + b"\n")

    nursery = Nursery(tell)
    waiting = b""
    preloaded = False
    try:
        while True:
            readable, _, _ = select.select([0, wake_read], [], [])
            if wake_read in readable:
                os.read(wake_read, 4096)
                nursery.reap()
            if 0 in readable:
                data = os.read(0, 65536)
                if not data:
                    break
                *lines, waiting = (waiting + data).split(b"\n")
                for command in map(json.loads, lines):
                    if not preloaded and not command.get("fresh", True):
                        _preload()
                        preloaded = True
                    nursery.obey(command)
    except BrokenPipeError:
        pass
    finally:
        nursery.kill_all()


def _preload() -> None:
    for name in PRELOADED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()


if __name__ == "__main__":
    main()
