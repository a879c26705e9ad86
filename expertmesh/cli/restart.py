"""`expertmesh restart`: new processes in place of running ones, while the mesh serves."""

from __future__ import annotations

from typing import Annotated

import typer

from expertmesh.cli import placement, session
from expertmesh.errors import SetupError


def restart(
    run_dir: placement.RunDir,
    services: Annotated[
        list[str] | None, typer.Argument(help="SERVICE, KIND or a single replica, as in gating, expert or expert-3.0.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Every service, in the order of a request.")] = False,
) -> None:
    """Restarts processes of the running mesh one after another; each serves until its successor is healthy."""
    if bool(services) == everything:
        raise SetupError("name services to restart, or --all")
    session.told_by_mesh(run_dir, {"do": "restart", "names": services or []})
