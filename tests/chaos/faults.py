"""The injector: does things to processes of a mesh and writes down when."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc.aio

from expertmesh.v1.fault_pb2 import MisbehaveRequest
from expertmesh.v1.fault_pb2_grpc import FaultServiceStub
from tests.chaos.mesh import Mesh
from tests.chaos.proxy import HONEST, Fault, Proxy
from tests.up import exists

GONE_TIMEOUT_S = 15.0
BACK_TIMEOUT_S = 60.0


@dataclass
class Mark:
    """A fault.

    Attributes:
        what: Its kind.
        target: Name of the process.
        start_s: When it began, in seconds of `time.monotonic`.
        end_s: When it was over by itself; what a kill leaves to be started again is not part of it.
        hits: How often it took effect, where that can be told; 0 is a fault that nobody met.
    """

    what: str
    target: str
    start_s: float
    end_s: float = 0.0
    hits: int = 1


class Injector:
    """Breaks processes of one mesh, by name; touches nothing else.

    Args:
        mesh: The mesh.
        proxies: By name of the replica.

    Attributes:
        marks: What was done.
    """

    def __init__(self, mesh: Mesh, proxies: dict[str, Proxy]) -> None:
        self._mesh, self._proxies = mesh, proxies
        self.marks: list[Mark] = []

    @contextmanager
    def marked(self, what: str, target: str) -> Iterator[Mark]:
        """A fault that lasts as long as the context."""
        mark = Mark(what, target, time.monotonic())
        self.marks.append(mark)
        try:
            yield mark
        finally:
            mark.end_s = time.monotonic()

    def pid(self, name: str) -> int:
        """The pid of a process that runs.

        Raises:
            ProcessLookupError: It does not run.
        """
        pid = self._mesh.services()[name].pid
        if not pid or not exists(pid):
            raise ProcessLookupError(f"{name} does not run")
        return pid

    async def kill(self, name: str) -> None:
        """kill -9; returns when it is gone."""
        await self._end(name, signal.SIGKILL)

    @asynccontextmanager
    async def down(self, name: str) -> AsyncIterator[None]:
        """kill -9, and as long as the context is open it cannot be started again: a folder is where its socket was."""
        path = Path(self._mesh.services()[name].address.removeprefix("unix:"))
        with self.marked("down", name):
            await self.kill(name)
            block(path)
            try:
                yield
            finally:
                unblock(path)

    async def terminate(self, name: str) -> None:
        """SIGTERM, upon which it ends in peace; returns when it is gone."""
        await self._end(name, signal.SIGTERM)

    async def stop(self, name: str, seconds: float) -> None:
        """SIGSTOP, and SIGCONT after a time; one that was ended meanwhile stays so."""
        pid = self.pid(name)
        with self.marked("stop", name):
            os.kill(pid, signal.SIGSTOP)
            try:
                await asyncio.sleep(seconds)
            finally:
                if exists(pid):
                    os.kill(pid, signal.SIGCONT)

    async def misbehave(self, name: str, kind: str, seconds: float, delay_ms: int = 0) -> None:
        """Has an expert go wrong for a time, as `Misbehaviour` tells; the mark's `hits` says how often it did."""
        value = f"MISBEHAVIOUR_{kind}"
        with self.marked(kind.lower().replace("_", " "), name) as mark:
            before = await self._ask(name, MisbehaveRequest(kind=value, delay_ms=delay_ms, seconds=seconds))
            await asyncio.sleep(seconds)
            mark.hits = await self._ask(name, MisbehaveRequest()) - before

    async def spoil(self, name: str, fault: Fault, what: str, seconds: float) -> None:
        """Has a proxy treat bytes badly for a time."""
        proxy = self._proxies[name]
        with self.marked(what, name) as mark:
            proxy.fault = fault
            corrupted, swallowed = proxy.corrupted, proxy.swallowed_bytes
            try:
                await asyncio.sleep(seconds)
            finally:
                proxy.fault = HONEST
                if fault.corrupt or fault.swallow:
                    mark.hits = proxy.corrupted - corrupted + proxy.swallowed_bytes - swallowed

    async def reset(self, name: str) -> None:
        """Ends all connections through a proxy."""
        with self.marked("reset", name):
            await self._proxies[name].reset()

    async def half_close(self, name: str, direction: str) -> None:
        """Has a proxy say that nothing more comes in one direction."""
        with self.marked("half-close", name):
            await self._proxies[name].half_close(direction)

    async def fill_disk(self, name: str, seconds: float) -> None:
        """Starts a process again with a log on a device that is full, and after a time with one that is not."""
        log = self._mesh.run_dir / "logs" / f"{name}.log"
        with self.marked("full disk", name):
            pid = self.pid(name)
            log.unlink()
            log.symlink_to("/dev/full")
            try:
                os.kill(pid, signal.SIGKILL)
                await self.until_back(name, pid)
                await asyncio.sleep(seconds)
            finally:
                log.unlink()
            os.kill(self.pid(name), signal.SIGKILL)

    async def until_back(self, name: str, old_pid: int) -> None:
        """Waits until a process was started again."""
        async with asyncio.timeout(BACK_TIMEOUT_S):
            while self._mesh.services()[name].pid in (0, old_pid):
                await asyncio.sleep(0.05)

    async def _end(self, name: str, number: signal.Signals) -> None:
        pid = self.pid(name)
        with self.marked("kill" if number is signal.SIGKILL else "terminate", name):
            os.kill(pid, number)
            async with asyncio.timeout(GONE_TIMEOUT_S):
                while exists(pid):
                    await asyncio.sleep(0.01)

    async def _ask(self, name: str, request: MisbehaveRequest) -> int:
        async with grpc.aio.insecure_channel(self._mesh.services()[name].address) as channel:
            reply = await FaultServiceStub(channel).Misbehave(request, timeout=10)
        gone_wrong: int = reply.gone_wrong
        return gone_wrong


def block(path: Path) -> None:
    """Puts a folder where a socket was, so that nobody can listen there."""
    path.unlink(missing_ok=True)
    path.mkdir()


def unblock(path: Path) -> None:
    """Takes it away."""
    path.rmdir()
