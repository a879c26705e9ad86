"""The supervisor's end of the pipes to the nursery, which starts, signals and reaps processes."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from expertmesh.local.plan import Process

CLOSE_TIMEOUT_S = 8.0
# Processes share the cores: each computes with one thread unless its settings say more, and threads that wait sleep.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "passive",
}


class Lifeline:
    """A running nursery; its processes end when this does."""

    def __init__(self, nursery: asyncio.subprocess.Process) -> None:
        self._nursery = nursery

    @classmethod
    async def open(cls) -> Lifeline:
        """Starts a nursery."""
        return cls(
            await asyncio.create_subprocess_exec(
                sys.executable,
                "-P",
                "-m",
                "expertmesh.local.nursery",
                str(os.getpid()),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                start_new_session=True,
                env={**os.environ, **ENVIRONMENT},
            )
        )

    @property
    def is_open(self) -> bool:
        """Whether there is still somebody at the other end."""
        return self._nursery.returncode is None

    def start(self, process: Process, log: Path) -> None:
        """Has a process started, with its output at the end of a log."""
        self._tell(
            {
                "do": "start",
                "name": process.name,
                "module": process.module,
                "arguments": process.arguments,
                "fresh": process.fresh,
                "log": str(log),
                "environment": {},
            }
        )

    def signal(self, pid: int, number: int) -> None:
        """Sends a signal to a process, if it is one that was started here and still runs."""
        self._tell({"do": "signal", "pid": pid, "signal": number})

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        """Gives what happens, `started` or `ended` with a name and a pid, until the nursery ends."""
        assert self._nursery.stdout is not None
        async for line in self._nursery.stdout:
            yield json.loads(line)
        await self._nursery.wait()

    async def close(self) -> None:
        """Ends the nursery, which kills what is left."""
        assert self._nursery.stdin is not None
        self._nursery.stdin.close()
        with suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await self._nursery.wait()
        if self.is_open:
            self._nursery.kill()
            await self._nursery.wait()

    def _tell(self, command: dict[str, Any]) -> None:
        assert self._nursery.stdin is not None
        with suppress(ConnectionError):
            self._nursery.stdin.write(json.dumps(command).encode() + b"\n")
