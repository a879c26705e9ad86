"""A mesh to talk to: the one at an address, the one that `up` runs, or one that is started and stopped again."""

from __future__ import annotations

import asyncio
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from expertmesh.checkpoint.manifest import Manifest
from expertmesh.client import Client
from expertmesh.errors import MeshError, SetupError
from expertmesh.local import state
from expertmesh.local.plan import Options, Plan, plan_mesh
from expertmesh.local.supervisor import Supervisor, running

ResultT = TypeVar("ResultT")
STOPPING_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


@dataclass(frozen=True)
class Session:
    """A mesh that answers.

    Attributes:
        grpc: Address of its gateway.
        plan: What was started for this session; None for a mesh that ran already.
    """

    grpc: str
    plan: Plan | None = None


def run(coroutine: Coroutine[Any, Any, ResultT]) -> ResultT:
    """Runs a verb; a signal to stop cancels it, so that whatever it started is stopped as well."""

    async def guarded() -> ResultT:
        task = asyncio.current_task()
        assert task is not None
        for number in STOPPING_SIGNALS:
            if signal.getsignal(number) is signal.SIG_IGN:  # as nohup wants it
                continue
            asyncio.get_running_loop().add_signal_handler(number, task.cancel)
        return await coroutine

    try:
        return asyncio.run(guarded())
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None


@asynccontextmanager
async def temporary_mesh(model: Path, options: Options) -> AsyncIterator[Session]:
    """A mesh of its own that ends with the context.

    Raises:
        SetupError: It could not start.
    """
    manifest = Manifest.read(model)
    folder = Path(tempfile.mkdtemp(prefix="expertmesh-"))
    try:
        plan = plan_mesh(model, manifest, folder, options)
        async with started(plan, folder, restart=False):
            yield Session(plan.grpc, plan)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@asynccontextmanager
async def any_mesh(model: Path | None, address: str, run_dir: Path, options: Options) -> AsyncIterator[Session]:
    """The mesh at an address if one is given, else the running one if it serves the model, else a temporary one.

    Raises:
        SetupError: None runs and none could be started, or the one at the address serves another model.
    """
    found = _running(model, run_dir)
    if address:
        if model is not None:
            await _require_model(address, Manifest.read(model))
        yield Session(address)
    elif found is not None:
        yield Session(found.grpc)
    else:
        async with temporary_mesh(model or Path("models/agnews"), options) as session:
            yield session


async def _require_model(address: str, manifest: Manifest) -> None:
    async with Client(address) as client:
        try:
            described = await client.describe()
        except MeshError as error:
            raise SetupError(f"{address}: {error}; give the gRPC address of a gateway as HOST:PORT") from None
    if described.model_digest != manifest.digest:
        raise SetupError(f"the mesh at {address} serves another model than {manifest.name} ({manifest.digest[:16]})")


def _running(model: Path | None, run_dir: Path) -> state.RunningMesh | None:
    found = state.find(run_dir)
    return found if found and (model is None or Path(found.model) == model.resolve()) else None


@asynccontextmanager
async def started(plan: Plan, folder: Path, restart: bool) -> AsyncIterator[Supervisor]:
    """Runs a plan and shows its processes coming up, on stderr."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn())
    progress = Progress(*columns, console=console, transient=not console.is_terminal, disable=not console.is_terminal)
    up = progress.add_task("starting", total=len(plan.processes))

    def show(name: str, state: str) -> None:
        if progress.finished:
            if not state.startswith(("starting", "ended (exit status 0)")):
                console.print(f"{name}: {state}", highlight=False)
        elif state == "ready":
            progress.advance(up)
            progress.update(up, description=f"{name} is ready")

    progress.start()
    try:
        async with running(plan, folder, restart, show) as supervisor:
            progress.update(up, description="ready", completed=len(plan.processes))
            progress.stop()
            yield supervisor
    finally:
        progress.stop()
