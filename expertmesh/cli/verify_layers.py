"""`expertmesh verify --layerwise`: a split against its original, part by part, without a mesh."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from expertmesh.checkpoint.manifest import Manifest
from expertmesh.cli.verify_reference import print_table, show_agreement
from expertmesh.verification.agreement import agreement
from expertmesh.verification.forced import ForcedPass
from expertmesh.verification.layerwise import prove
from expertmesh.verification.originals import Proof
from expertmesh.verification.reference import Reference

SHOWN_FAULTS = 20


def verify(model: Path, original: Path, reference_file: Path | None, tolerance: float) -> bool:
    """Prints what came out; gives whether all is equal."""
    spec = Manifest.read(model).spec
    reference = Reference.read(reference_file, spec) if reference_file else None
    forced = ForcedPass(reference) if reference else None
    columns = (TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("comparing", total=None)

        def show(part: str, done: int, total: int) -> None:
            progress.update(task, description=part, completed=done, total=total)

        if forced is None:
            proof = prove(model, original, show)
        else:
            proof = prove(model, original, show, forced.sequences, forced.observe)
    _show(proof)
    faults = [*proof.spec_faults, *(fault for place in proof.places.values() for fault in place.faults)]
    for fault in faults[:SHOWN_FAULTS]:
        print(f"differs             {fault}")
    if len(faults) > SHOWN_FAULTS:
        print(f"differs             {len(faults) - SHOWN_FAULTS} more")
    print(f"{model} IS NOT {original}" if faults else f"every part of {model} is that of {original}, bit by bit")
    if reference is not None and forced is not None:
        agrees = show_agreement(agreement(spec, reference, forced.computed), tolerance)
    else:
        agrees = True
    return agrees and not faults


def _show(proof: Proof) -> None:
    table = Table("place", "parts", "tensors", "MB", "numbers computed", "equal")
    for place in proof.places.values():
        equal = "NO" if place.faults else "yes"
        size = f"{place.size_bytes / 1e6:.2f}"
        table.add_row(place.name, str(place.parts), str(place.tensors), size, str(place.outputs), equal)
    print_table(table)
