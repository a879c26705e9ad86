"""`expertmesh up` as a user runs it: a process of its own, talked to by its command and its ports."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Self

START_TIMEOUT_S = 120
COMMAND = (sys.executable, "-P", "-m", "expertmesh.cli.main")


def run(*arguments: object, timeout_s: float = 180, **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs `expertmesh ARGUMENTS` to its end."""
    command = [*COMMAND, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False, **options)


def exists(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits for its parent does not."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] not in "ZX"


class Up:
    """A running `expertmesh up` with free ports and a run folder of its own; a context manager."""

    def __init__(self, model: Path, *options: str, environment: dict[str, str] | None = None) -> None:
        self.run_dir = Path(tempfile.mkdtemp(prefix="em-"))
        self._command = [
            *COMMAND, "up", str(model), "--run-dir", str(self.run_dir),
            "--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0", *options,
        ]  # fmt: skip
        self._environment = {**os.environ, **(environment or {})}
        self.process: subprocess.Popen[str]
        self.lines: list[str] = []

    def __enter__(self) -> Self:
        self.process = subprocess.Popen(
            self._command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=self._environment
        )
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            if line.startswith("ready:"):
                break
        else:
            assert self.process.stderr is not None
            raise AssertionError(f"up did not start: {self.process.stderr.read()}")
        self.state: dict[str, Any] = json.loads((self.run_dir / "up.json").read_text())
        self.grpc: str = self.state["grpc"]
        self.http = f"http://{self.state['http']}"
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            self.process.communicate(timeout=30)
        finally:
            self.process.kill()
            shutil.rmtree(self.run_dir, ignore_errors=True)

    def processes(self) -> dict[str, dict[str, Any]]:
        """What `up` has written down of its processes."""
        state: dict[str, Any] = json.loads((self.run_dir / "up.json").read_text())
        found: dict[str, dict[str, Any]] = state["processes"]
        return found

    def pid(self, name: str) -> int:
        pid: int = self.processes()[name]["pid"]
        return pid

    def all_pids(self) -> list[int]:
        """`up`, its nursery and every service."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return [self.process.pid, *map(int, children), *(p["pid"] for p in self.processes().values() if p["pid"])]

    def kill(self, name: str) -> None:
        """kill -9 of one service; returns when it is gone."""
        pid = self.pid(name)
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not exists(pid), 5)

    def start_again(self, name: str) -> None:
        """Starts a replacement of a killed service by its own command, as an operator would."""
        process = self.processes()[name]
        arguments = [f"--model={self.state['model']}", f"--listen={process['address']}", f"--name={name}"]
        if process["kind"] == "expert":
            held = [int(number) for number in process["service"].split("-")[1:]]  # expert-3, experts-4-7
            experts = ",".join(f"*:{expert}" for expert in range(held[0], held[-1] + 1))
            arguments.append(f"--experts={experts}")
        command = [sys.executable, "-P", "-m", f"services.{process['kind']}", *arguments]
        with (self.run_dir / "logs" / f"{name}.again.log").open("w") as log:
            self.replacements = [*getattr(self, "replacements", []), subprocess.Popen(command, stderr=log)]

    def end_replacements(self) -> None:
        for process in getattr(self, "replacements", []):
            process.terminate()
            process.wait(timeout=15)


def wait_until(holds: Any, timeout_s: float) -> None:
    """Asks again and again until something holds."""
    give_up_s = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < give_up_s, "it did not come true in time"
        time.sleep(0.01)
