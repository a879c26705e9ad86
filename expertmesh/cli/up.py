"""`expertmesh up`: every service of a model as a local process."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from expertmesh.checkpoint.manifest import Manifest
from expertmesh.cli import placement, session
from expertmesh.local import control, state
from expertmesh.local.plan import MESH_FILE, Options, Plan, plan_mesh
from expertmesh.local.rolling import Rolling
from expertmesh.local.supervisor import HANG_S


def up(
    run_dir: placement.RunDir,
    model: placement.Model = placement.DEFAULT_MODEL,
    grpc: Annotated[
        str, typer.Option(help="Address of the gateway's gRPC side; others take the next free ports.")
    ] = "127.0.0.1:50051",
    http: Annotated[str, typer.Option(help="Address of the gateway's HTTP side, likewise.")] = "127.0.0.1:8080",
    expert_services: placement.ExpertServices = 0,
    replicas: placement.Replicas = None,
    device: placement.Devices = None,
    full_model: Annotated[bool, typer.Option(help="Also run the full model, to fall back on.")] = True,
    restart: Annotated[bool, typer.Option(help="Start a process that dies again, after 0.5 s, then 1 s, ...")] = True,
    hang_s: Annotated[
        float,
        typer.Option(help="Kill and restart a process that has not answered for so many seconds; 0: never.", min=0),
    ] = HANG_S,
    inspect: Annotated[bool, typer.Option(help="Offer InspectionService, which shows hidden states.")] = False,
    faults: Annotated[bool, typer.Option(help="Let experts offer faults on demand.")] = False,
) -> None:
    """Starts a mesh, prints its addresses, and runs it until Ctrl-C, SIGTERM or `expertmesh down`."""
    options = placement.read_options(expert_services, replicas, device, grpc, http, inspect, faults, full_model)
    session.run(_up(model, run_dir.resolve(), options, restart, hang_s), until_told=True)


async def _up(model: Path, run_dir: Path, options: Options, restart: bool, hang_s: float) -> None:
    manifest = Manifest.read(model)
    with state.hold(run_dir):
        plan = plan_mesh(model, manifest, run_dir, options)
        async with (
            session.started(plan, run_dir, restart, hang_s) as supervisor,
            control.listening(Rolling(supervisor), run_dir),
        ):
            _show(plan, run_dir, supervisor.pids())
            await supervisor.wait_for_failure()


def _show(plan: Plan, run_dir: Path, pids: dict[str, int]) -> None:
    console = Console(width=None if Console().is_terminal else 160, highlight=False)
    table = Table("service", "kind", "pid", "address")
    for process in plan.processes:
        table.add_row(process.name, process.kind, str(pids.get(process.name, "")), process.address)
    console.print(table)
    console.print(f"mesh file  {run_dir / MESH_FILE}", soft_wrap=True)
    console.print(f"logs       {run_dir / 'logs'}", soft_wrap=True)
    console.print(f"gRPC       {plan.grpc.replace(',', ', ')}")
    console.print(f"HTTP       http://{plan.http.replace(',', ', http://')}")
    console.print(f"ready: {len(plan.processes)} processes; stop with Ctrl-C or `expertmesh down`")
