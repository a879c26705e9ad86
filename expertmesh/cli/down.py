"""`expertmesh down`: stops the mesh that `up` started."""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import suppress

import typer

from expertmesh.cli import placement
from expertmesh.errors import SetupError
from expertmesh.local import state

TIMEOUT_S = 30.0


def down(run_dir: placement.RunDir) -> None:
    """Asks `up` to stop and waits until it and its processes have."""
    pid = state.holder(run_dir)
    if pid is None:
        print(f"no mesh runs in {run_dir}", file=sys.stderr)
        raise typer.Exit(1)
    found = state.find(run_dir)
    with suppress(ProcessLookupError):  # it ended by itself just now
        os.kill(pid, signal.SIGTERM)
    give_up_s = time.monotonic() + TIMEOUT_S
    while state.is_held(run_dir):
        if time.monotonic() > give_up_s:
            raise SetupError(f"`expertmesh up` (pid {pid}) did not stop within {TIMEOUT_S:.0f} s")
        time.sleep(0.05)
    print(f"stopped {len(found.processes)} processes" if found else "stopped a mesh that was starting")
