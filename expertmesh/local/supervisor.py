"""Runs a planned mesh: which processes it has, as the mesh file and the state file say, and how that changes."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from expertmesh.errors import SetupError
from expertmesh.local.child import Child, until_let_go
from expertmesh.local.plan import MESH_FILE, Plan, Process
from expertmesh.local.processes import Processes
from expertmesh.local.state import RunningMesh, RunningProcess
from expertmesh.mesh_file import MeshFile

HANG_S = 10.0

Show = Callable[[str, str], None]


class Supervisor:
    """A local mesh that is being started or runs.

    Args:
        plan: What to run.
        folder: Where sockets, logs, mesh file and state go.
        restart: Whether a process that dies or hangs is started again, after a delay that doubles.
        show: Is told (process, state) whenever one changes: starting, ready, ended, restarting.
        hang_s: After how many seconds without an answer a process counts as hung; 0: never.

    Attributes:
        mesh_file: What the gateways read now.
    """

    def __init__(self, plan: Plan, folder: Path, restart: bool, show: Show, hang_s: float = HANG_S) -> None:
        self.plan = plan
        self.mesh_file = plan.mesh_file
        self._folder = folder
        self._show = show
        self._processes = Processes(folder / "logs", restart, hang_s, self._changed)
        self._ready = False

    async def start(self) -> None:
        """Starts every process and waits until all are healthy.

        Raises:
            SetupError: One could not start; says why. Everything else has been told to stop.
        """
        self._write_mesh_file(self.mesh_file)
        await self._processes.open()
        children = self._processes.add(self.plan.processes)
        await self._processes.bring_up(sorted(children, key=lambda child: not child.process.fresh))
        self._ready = True
        self.change(self.mesh_file)

    async def stop(self) -> None:
        """Stops every process and kills what does not stop in time."""
        self._ready = False
        await self._processes.close()

    async def wait_for_failure(self) -> None:
        """Returns never; raises SetupError if the mesh cannot go on (its nursery died)."""
        await asyncio.shield(self._processes.failure)

    def pids(self) -> dict[str, int]:
        """The pid of every process that runs, by name."""
        return {child.process.name: child.pid for child in self._processes if child.pid}

    def process_at(self, address: str) -> Process:
        """What listens at an address of the mesh file, or is to when it is started again."""
        return self._processes.at(address).process

    async def add(self, processes: Sequence[Process]) -> None:
        """Starts processes that are not of the mesh yet, and returns when all are healthy.

        Raises:
            SetupError: One did not become healthy; none of them is left.
        """
        children = self._processes.add(processes)
        try:
            await self._processes.bring_up(children)
        except SetupError:
            await self._processes.end(children)
            self._processes.forget(children)
            raise

    def change(self, mesh_file: MeshFile) -> None:
        """Tells the gateways of another mesh file, whose processes all run.

        Raises:
            SetupError: It cannot be written; everything is as it was.
        """
        self._write_mesh_file(mesh_file)
        self.mesh_file = mesh_file
        self._processes.make_members({address for service in mesh_file.services for address in service.replicas})
        self._write_state()

    async def remove(self, processes: Sequence[Process]) -> None:
        """Ends processes that the mesh file does not have any more; only the last log of a service is left of them."""
        children = [self._processes[process.name] for process in processes]
        for child in children:
            child.unfollow()
        await asyncio.gather(*(until_let_go(child.process.address) for child in children))
        await self._processes.end(children)
        self._processes.forget(children)

    async def replace(self, process: Process) -> None:
        """Ends a process and starts it anew at the same address.

        Raises:
            SetupError: It did not become healthy again; it is treated as one that died.
        """
        child = self._processes[process.name]
        await self._processes.end([child])
        await self._processes.bring_up([child])

    def _write_mesh_file(self, mesh_file: MeshFile) -> None:
        try:
            mesh_file.write(self._folder / MESH_FILE)
        except OSError as error:
            raise SetupError(f"the mesh file cannot be written: {error.strerror}") from None

    def _changed(self, child: Child) -> None:
        self._show(child.process.name, child.state)
        self._write_state()

    def _write_state(self) -> None:
        """Writes down who is of the mesh; on a full disk what was written last stays."""
        if not self._ready:
            return
        members = [self._processes.at(address) for service in self.mesh_file.services for address in service.replicas]
        gateways = [child.process for child in members if child.process.kind == "gateway"]
        running = RunningMesh(
            pid=os.getpid(),
            model=self.mesh_file.model,
            grpc=",".join(gateway.address for gateway in gateways),
            http=",".join(gateway.http for gateway in gateways),
            processes={child.process.name: _running(child) for child in members},
        )
        with suppress(OSError):
            running.write(self._folder)


def _running(child: Child) -> RunningProcess:
    process = child.process
    return RunningProcess(process.service, process.kind, process.address, child.pid, child.restarts)


@asynccontextmanager
async def running(
    plan: Plan, folder: Path, restart: bool, show: Show, hang_s: float = HANG_S
) -> AsyncIterator[Supervisor]:
    """A mesh that runs while the context is open.

    Raises:
        SetupError: It could not start; nothing of it is left.
    """
    supervisor = Supervisor(plan, folder, restart, show, hang_s)
    try:
        await supervisor.start()
        yield supervisor
    finally:
        await asyncio.shield(supervisor.stop())
