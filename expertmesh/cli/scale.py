"""`expertmesh scale`: more or fewer replicas of services of the running mesh."""

from __future__ import annotations

from typing import Annotated

import typer

from expertmesh.cli import placement, session


def scale(
    run_dir: placement.RunDir,
    counts: Annotated[list[str], typer.Argument(help="SERVICE=N or KIND=N, as in expert-3=2 or expert=2.")],
) -> None:
    """Gives services of the running mesh as many replicas as are asked for, 1 to 64, while it serves."""
    session.told_by_mesh(run_dir, {"do": "scale", "counts": placement.read_counts(counts, "scale")})
