"""One process of a local mesh and what became of it."""

from __future__ import annotations

import asyncio
import math
import signal
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from expertmesh.local.plan import Process
from expertmesh.rpc.channel import open_channel
from expertmesh.rpc.settings import LINK_SUFFIX

CHECKS_UNTIL_HUNG = 4  # one that fails may have met a moment in which this process itself was held up
UNIX_SOCKETS = Path("/proc/net/unix")
CONNECTED = "03"  # as the kernel's list of sockets has it
LET_GO_S = 2.0
LOOK_EVERY_S = 0.02


@dataclass
class Child:
    """A process that is started, watched and ended.

    Attributes:
        process: What it runs.
        log: Where its output goes.
        member: Whether the mesh file has it: then it is started again when it dies.
        leaving: Whether it has been told to stop.
        state: What people are told of it.
        pid: 0 while it does not run.
        failure: How it ended, the last time that it did.
        restarts: How often it has been started again, of late.
        healthy_since_s: When it was seen healthy, on the monotonic clock.
        ended: Set while it does not run.
        outcome: Whether it became healthy: known once it did, or ended before.
        follower: Watches its health.
    """

    process: Process
    log: Path
    member: bool = False
    leaving: bool = False
    state: str = "waiting"
    pid: int = 0
    failure: str = ""
    restarts: int = 0
    healthy_since_s: float = math.inf
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    outcome: asyncio.Future[bool] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    follower: asyncio.Task[None] | None = None

    def __post_init__(self) -> None:
        self.ended.set()

    @property
    def has_failed(self) -> bool:
        """Whether it ended before it was healthy."""
        return self.outcome.done() and not self.outcome.result()

    def begin(self) -> None:
        """Is called when it is about to be started."""
        self.leaving = False
        self.healthy_since_s = math.inf
        self.ended.clear()
        self.outcome = asyncio.get_running_loop().create_future()

    def end(self, status: int) -> None:
        """Is called when it has ended."""
        self.pid = 0
        self.failure = how(status)
        self.ended.set()
        self.unfollow()
        if not self.outcome.done():
            self.outcome.set_result(False)

    def unfollow(self) -> None:
        """Stops watching its health, whose connection is one that it would wait for."""
        if self.follower is not None:
            self.follower.cancel()
            self.follower = None

    def clean(self) -> None:
        """Removes what a process leaves that was killed."""
        for path in _sockets(self.process.address):
            Path(path).unlink(missing_ok=True)


async def until_serving(address: str) -> None:
    """Returns once a process says that it serves."""
    async with open_channel(address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        while True:
            with suppress(grpc.aio.AioRpcError):
                reply = await health.Check(health_pb2.HealthCheckRequest(), timeout=5, wait_for_ready=True)
                if reply.status == health_pb2.HealthCheckResponse.SERVING:
                    return
                await asyncio.sleep(0.05)


async def answers(address: str, timeout_s: float) -> bool:
    """Whether a process says anything of its health."""
    async with open_channel(address) as channel:
        try:
            await health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(), timeout=timeout_s, wait_for_ready=True
            )
        except grpc.aio.AioRpcError:
            return False
    return True


async def until_silent(address: str, hang_s: float) -> None:
    """Returns once a process has not answered, whatever it says of its health, for some seconds."""
    each_s = hang_s / CHECKS_UNTIL_HUNG
    failed = 0
    async with open_channel(address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        while failed < CHECKS_UNTIL_HUNG:
            next_s = time.monotonic() + each_s
            try:
                await health.Check(health_pb2.HealthCheckRequest(), timeout=each_s)
                failed = 0
            except grpc.aio.AioRpcError:
                failed += 1
            await asyncio.sleep(next_s - time.monotonic())


async def until_let_go(address: str) -> None:
    """Returns once nobody is connected to a unix socket or to its links, or after `LET_GO_S`."""
    paths = _sockets(address)
    for _ in range(round(LET_GO_S / LOOK_EVERY_S)):
        if not _may_be_connected(paths):
            return
        await asyncio.sleep(LOOK_EVERY_S)


def _sockets(address: str) -> list[str]:
    path = address.removeprefix("unix:")
    return [path, path + LINK_SUFFIX] if path != address else []


def _may_be_connected(paths: Iterable[str]) -> bool:
    """Whether the kernel has a connection that was accepted at one of some paths, or does not tell."""
    try:
        text = UNIX_SOCKETS.read_text(errors="replace")
    except OSError:
        return True
    lines = (line.split(maxsplit=7) for line in text.splitlines())
    return any(line[5] == CONNECTED and line[7] in paths for line in lines if len(line) == 8)


def how(status: int) -> str:
    """How a process ended, for people."""
    return f"exit status {status}" if status >= 0 else signal.Signals(-status).name
