"""Runs a planned mesh: starts its processes, sees them healthy, starts again what dies, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import json
import math
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from expertmesh.errors import SetupError
from expertmesh.local.plan import MESH_FILE, START_TIMEOUT_S, Plan, Process
from expertmesh.local.state import RunningMesh, RunningProcess
from expertmesh.rpc.channel import open_channel

STOP_TIMEOUT_S = 8.0
RESTART_FIRST_S = 2.0
RESTART_MOST_S = 30.0
FORGET_RESTARTS_S = 60.0
LAST_WORDS_BYTES = 8192
# Processes share the cores: each computes with one thread unless its settings say more, and threads that wait sleep.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "passive",
}

Show = Callable[[str, str], None]


@dataclass
class _Child:
    """A planned process and what became of it."""

    process: Process
    log: Path
    state: str = "waiting"
    pid: int = 0
    restarts: int = 0
    healthy_since_s: float = math.inf
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    healthy: asyncio.Event = field(default_factory=asyncio.Event)


class Supervisor:
    """A local mesh that is being started or runs.

    Args:
        plan: What to run.
        folder: Where sockets, logs, mesh file and state go.
        restart: Whether a process that dies is started again, after a delay that doubles.
        show: Is told (process, state) whenever one changes: starting, ready, ended, restarting.
    """

    def __init__(self, plan: Plan, folder: Path, restart: bool, show: Show) -> None:
        self.plan = plan
        self._folder = folder
        self._restart = restart
        self._show = show
        self._children = {
            process.name: _Child(process, folder / "logs" / f"{process.name}.log") for process in plan.processes
        }
        self._tasks: set[asyncio.Task[Any]] = set()
        self._failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._nursery: asyncio.subprocess.Process
        self._ready = False
        self._stopping = False

    async def start(self) -> None:
        """Starts every process and waits until all are healthy.

        Raises:
            SetupError: One could not start; says why. Everything else has been told to stop.
        """
        (self._folder / "logs").mkdir(exist_ok=True)
        for child in self._children.values():
            child.log.unlink(missing_ok=True)
        self.plan.mesh_file.write(self._folder / MESH_FILE)
        self._nursery = await asyncio.create_subprocess_exec(
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
        self._spawn(self._listen())
        for child in sorted(self._children.values(), key=lambda child: not child.process.fresh):
            self._launch(child)
        everyone = asyncio.ensure_future(self._everyone_is_healthy())
        waits: list[asyncio.Future[Any]] = [everyone, self._failure]
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        except TimeoutError:
            late = [name for name, child in self._children.items() if not child.healthy.is_set()]
            raise SetupError(f"not ready within {START_TIMEOUT_S:.0f} s: {', '.join(late)}") from None
        finally:
            everyone.cancel()
        if self._failure.done():
            self._failure.result()
        self._ready = True
        self._write_state()

    async def stop(self) -> None:
        """Stops every process and kills what does not stop in time; stages serve until the gateway has drained."""
        self._stopping = True
        if not hasattr(self, "_nursery"):
            return
        if self._failure.done():
            self._failure.exception()
        alive = [child for child in self._children.values() if child.pid]
        await self._end([child for child in alive if child.process.kind == "gateway"])
        await self._end([child for child in alive if child.process.kind != "gateway"])
        assert self._nursery.stdin is not None
        self._nursery.stdin.close()  # the nursery kills what is left, and ends
        with suppress(TimeoutError):
            async with asyncio.timeout(STOP_TIMEOUT_S):
                await self._nursery.wait()
        if self._nursery.returncode is None:
            self._nursery.kill()
            await self._nursery.wait()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _end(self, children: list[_Child]) -> None:
        for child in children:
            self._tell({"do": "signal", "pid": child.pid, "signal": signal.SIGTERM})
        if self._nursery.returncode is None:
            with suppress(TimeoutError):
                async with asyncio.timeout(STOP_TIMEOUT_S):
                    await asyncio.gather(*(child.ended.wait() for child in children))

    async def wait_for_failure(self) -> None:
        """Returns never; raises SetupError if the mesh cannot go on (its nursery died)."""
        await asyncio.shield(self._failure)

    def pids(self) -> dict[str, int]:
        """The pid of every process that runs, by name."""
        return {name: child.pid for name, child in self._children.items() if child.pid}

    def _launch(self, child: _Child) -> None:
        child.ended.clear()
        child.healthy.clear()
        process = child.process
        self._tell(
            {
                "do": "start",
                "name": process.name,
                "module": process.module,
                "arguments": process.arguments,
                "fresh": process.fresh,
                "log": str(child.log),
                "environment": {},
            }
        )

    def _tell(self, command: dict[str, Any]) -> None:
        assert self._nursery.stdin is not None
        with suppress(ConnectionError):
            self._nursery.stdin.write(json.dumps(command).encode() + b"\n")

    async def _listen(self) -> None:
        """Follows what the nursery tells."""
        assert self._nursery.stdout is not None
        async for line in self._nursery.stdout:
            event = json.loads(line)
            child = self._children[event["name"]]
            if event["event"] == "started":
                child.pid = event["pid"]
                self._set(child, "starting")
                self._spawn(self._see_healthy(child))
            else:
                self._ended(child, event["status"])
        await self._nursery.wait()
        if not self._stopping and not self._failure.done():
            for pid in self.pids().values():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self._failure.set_exception(SetupError("the process that starts the services ended; so did they"))

    def _ended(self, child: _Child, status: int) -> None:
        was_healthy = child.healthy.is_set()
        child.pid = 0
        child.ended.set()
        child.healthy.clear()
        self._set(child, f"ended ({_how(status)})")
        if self._stopping:
            return
        if time.monotonic() - child.healthy_since_s > FORGET_RESTARTS_S:
            child.restarts = 0
        if not was_healthy and not child.restarts:
            if not self._failure.done():
                why = f"{child.process.name} could not start ({_how(status)}): {_last_words(child.log)}"
                self._failure.set_exception(SetupError(why))
        elif self._restart:
            self._spawn(self._start_again(child))
        self._write_state()

    async def _start_again(self, child: _Child) -> None:
        delay_s = min(RESTART_FIRST_S * 2**child.restarts, RESTART_MOST_S)
        self._set(child, f"restarting in {delay_s:.0f} s")
        await asyncio.sleep(delay_s)
        child.restarts += 1
        self._launch(child)

    async def _everyone_is_healthy(self) -> None:
        await asyncio.gather(*(child.healthy.wait() for child in self._children.values()))

    async def _see_healthy(self, child: _Child) -> None:
        pid = child.pid
        async with open_channel(child.process.address) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            while child.pid == pid:
                try:
                    reply = await health.Check(health_pb2.HealthCheckRequest(), timeout=5, wait_for_ready=True)
                except grpc.aio.AioRpcError:
                    continue
                if reply.status == health_pb2.HealthCheckResponse.SERVING:
                    child.healthy.set()
                    child.healthy_since_s = time.monotonic()
                    self._set(child, "ready")
                    self._write_state()
                    return
                await asyncio.sleep(0.05)

    def _set(self, child: _Child, state: str) -> None:
        child.state = state
        self._show(child.process.name, state)

    def _spawn(self, coroutine: Any) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _write_state(self) -> None:
        if not self._ready:
            return
        processes = {
            name: RunningProcess(
                child.process.service, child.process.kind, child.process.address, child.pid, child.restarts
            )
            for name, child in self._children.items()
        }
        plan = self.plan
        RunningMesh(os.getpid(), plan.mesh_file.model, plan.grpc, plan.http, processes).write(self._folder)


@asynccontextmanager
async def running(plan: Plan, folder: Path, restart: bool, show: Show) -> AsyncIterator[Supervisor]:
    """A mesh that runs while the context is open.

    Raises:
        SetupError: It could not start; nothing of it is left.
    """
    supervisor = Supervisor(plan, folder, restart, show)
    try:
        await supervisor.start()
        yield supervisor
    finally:
        await asyncio.shield(supervisor.stop())


def _how(status: int) -> str:
    return f"exit status {status}" if status >= 0 else signal.Signals(-status).name


def _last_words(log: Path) -> str:
    """The reason in a log's last line, for people."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - LAST_WORDS_BYTES))
            lines = [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    except OSError:
        lines = []
    if not lines:
        return "it said nothing"
    try:
        return str(json.loads(lines[-1])["reason"])
    except (ValueError, KeyError, TypeError):
        return lines[-1].removeprefix("error: ")
