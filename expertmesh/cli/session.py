"""A mesh to talk to: the one at an address, the one that `up` runs, or one that is started and stopped again."""

from __future__ import annotations

import asyncio
import shutil
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Coroutine
from contextlib import aclosing, asynccontextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from expertmesh.checkpoint.manifest import Manifest
from expertmesh.client import Client
from expertmesh.errors import MeshError, SetupError, Unavailable
from expertmesh.local import control, state
from expertmesh.local.plan import Options, Plan, plan_mesh
from expertmesh.local.supervisor import HANG_S, Supervisor, running

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


def run(coroutine: Coroutine[Any, Any, ResultT], until_told: bool = False) -> ResultT:
    """Runs a verb; a signal to stop cancels it, so that whatever it started is stopped as well.

    Args:
        coroutine: The verb.
        until_told: Whether it runs until it is told to stop, which is then no failure.

    Raises:
        KeyboardInterrupt: It was interrupted.
        SystemExit: It was told to stop, and that is how it ends well.
    """
    told: list[signal.Signals] = []

    async def guarded() -> ResultT:
        task = asyncio.current_task()
        assert task is not None

        def stop(number: signal.Signals) -> None:
            told.append(number)
            print("stopping", file=sys.stderr)
            task.cancel()

        for number in STOPPING_SIGNALS:
            if signal.getsignal(number) is signal.SIG_IGN:  # as nohup wants it
                continue
            asyncio.get_running_loop().add_signal_handler(number, stop, number)
        return await coroutine

    try:
        return asyncio.run(guarded())
    except (asyncio.CancelledError, Unavailable) as error:
        if isinstance(error, Unavailable) and not told:
            raise  # a call that is cancelled may end as one that failed
        if until_told and told and told[0] is not signal.SIGINT:
            sys.exit(0)
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
        own = model or Path("models/agnews")
        other = state.find(run_dir)
        why = f"the mesh in {run_dir} serves another model" if other else f"no mesh runs in {run_dir}"
        print(f"{why}: starting one of {own} for this call", file=sys.stderr)
        async with temporary_mesh(own, options) as session:
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
async def started(plan: Plan, folder: Path, restart: bool, hang_s: float = HANG_S) -> AsyncIterator[Supervisor]:
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
        async with running(plan, folder, restart, show, hang_s) as supervisor:
            progress.update(up, description="ready", completed=len(plan.processes))
            progress.stop()
            yield supervisor
    finally:
        progress.stop()


def told_by_mesh(run_dir: Path, request: dict[str, Any]) -> None:
    """Has the running mesh do something, and shows what it says of it.

    Raises:
        SetupError: No mesh runs there, or it could not do it.
    """

    async def follow() -> None:
        console = Console(highlight=False)
        with console.status("asked the mesh") if console.is_terminal else nullcontext() as shown:
            async with aclosing(control.ask(run_dir, request)) as replies:
                async for text in replies:
                    console.print(text, markup=False)
                    if shown is not None:
                        shown.update(text)

    run(follow())
