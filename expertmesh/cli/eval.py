"""`expertmesh eval`: accuracy and confusions on labelled data, through either route."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from expertmesh.checkpoint.manifest import Manifest
from expertmesh.cli import placement, session
from expertmesh.client import Client
from expertmesh.errors import MeshError, SetupError
from expertmesh.evaluation import Labelled, fair_shares, label_texts, wilson_interval
from expertmesh.serving.inference import parse_route
from expertmesh.v1.inference_pb2 import Route


def eval(
    run_dir: placement.RunDir,
    data: Annotated[Path, typer.Option(help="CSV file of class,title,description; .xz is unpacked.")],
    model: placement.Model = placement.DEFAULT_MODEL,
    route: Annotated[str, typer.Option(help="mesh or full-model.")] = "mesh",
    held_out: Annotated[bool, typer.Option("--held-out", help="Only the rows that training holds out.")] = False,
    address: Annotated[str, typer.Option(help="gRPC address of a gateway; by default the mesh that `up` runs.")] = "",
) -> None:
    """Prints accuracy with its 95 % interval, a table of confusions, and the load of every expert."""
    from expertmesh.train.data import read_rows, split

    labels = Manifest.read(model).spec.head.labels
    rows = read_rows(data, len(labels))
    if held_out:
        rows = split(rows).heldout
    if not rows:
        raise SetupError(f"{data} has no rows to evaluate on")
    empty = next((number for number, row in enumerate(rows, start=1) if not row.text.strip()), None)
    if empty is not None:
        raise SetupError(f"{data}: row {empty} has neither title nor description")
    given = session.run(label([row.text for row in rows], parse_route(route), address, run_dir, model))
    truth = np.array([row.label for row in rows])
    predicted = np.array([labels.index(name) for name in given.labels])
    low, high = wilson_interval(int((truth == predicted).sum()), len(rows))
    print(f"rows      {len(rows)}")
    print(f"route     {route}")
    print(f"accuracy  {(truth == predicted).mean():.2%}  (95 % interval {low:.2%} to {high:.2%})")
    _show_confusions(labels, truth, predicted)
    show_load(given.tokens_LE)


async def label(texts: list[str], route: Route, address: str, run_dir: Path, model: Path) -> Labelled:
    """Labels texts through the mesh at an address, the running one, or one that is started for it.

    Raises:
        SetupError: It could not.
    """
    mesh = session.any_mesh(model, address, run_dir, placement.read_options())
    with Progress(console=Console(stderr=True), transient=True) as progress:
        async with mesh as opened, Client(opened.grpc, timeout_s=120) as client:
            task = progress.add_task("classifying", total=len(texts))
            try:
                return await label_texts(client, texts, route, lambda done: progress.update(task, completed=done))
            except MeshError as error:
                raise SetupError(f"a call failed: {error}") from None


def show_load(tokens_LE: npt.NDArray[Any]) -> None:
    """Prints a table of the tokens that each expert served."""
    console = Console(width=None if Console().is_terminal else 120, highlight=False)
    shares_LE = fair_shares(tokens_LE)
    names = (f"expert {expert}" for expert in range(shares_LE.shape[1]))
    table = Table("layer", *names, title="tokens, in fair shares")
    for layer, shares_E in enumerate(shares_LE):
        table.add_row(str(layer), *(f"{share:.2f}" for share in shares_E))
    console.print(table)


def _show_confusions(labels: tuple[str, ...], truth: npt.NDArray[Any], predicted: npt.NDArray[Any]) -> None:
    console = Console(width=None if Console().is_terminal else 120, highlight=False)
    table = Table("true \\ given", *labels, title="confusions")
    for index, name in enumerate(labels):
        counts = [int(((truth == index) & (predicted == other)).sum()) for other in range(len(labels))]
        table.add_row(name, *map(str, counts))
    console.print(table)
