"""`expertmesh verify --layerwise`: a split against its original, part by part, without a mesh."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from expertmesh.verification.layerwise import prove
from expertmesh.verification.originals import Proof

SHOWN_FAULTS = 20


def verify(model: Path, original: Path) -> bool:
    """Prints what came out; gives whether all is equal."""
    columns = (TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("comparing", total=None)
        proof = prove(
            model,
            original,
            lambda part, done, total: progress.update(task, description=part, completed=done, total=total),
        )
    _show(proof)
    faults = [*proof.spec_faults, *(fault for place in proof.places.values() for fault in place.faults)]
    for fault in faults[:SHOWN_FAULTS]:
        print(f"differs             {fault}")
    if len(faults) > SHOWN_FAULTS:
        print(f"differs             {len(faults) - SHOWN_FAULTS} more")
    print(f"{model} IS NOT {original}" if faults else f"every part of {model} is that of {original}, bit by bit")
    return not faults


def _show(proof: Proof) -> None:
    table = Table("place", "parts", "tensors", "MB", "numbers computed", "equal")
    for place in proof.places.values():
        equal = "NO" if place.faults else "yes"
        size = f"{place.size_bytes / 1e6:.2f}"
        table.add_row(place.name, str(place.parts), str(place.tensors), size, str(place.outputs), equal)
    console = Console(highlight=False)
    Console(width=None if console.is_terminal else 120, highlight=False).print(table)
