"""`expertmesh eval`: accuracy and confusions on labelled data, through either route."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from expertmesh.checkpoint.manifest import Manifest
from expertmesh.cli import placement, session
from expertmesh.client import Client
from expertmesh.errors import MeshError, SetupError
from expertmesh.serving.inference import parse_route
from expertmesh.v1.inference_pb2 import CONTRACT_EXACT, CONTRACT_MESH_ONLY, ROUTE_FULL_MODEL, Route

CALL_TEXTS = 64


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
    texts = [row.text for row in rows]
    wanted = parse_route(route)
    given, tokens_LE = session.run(_classify(texts, wanted, address, run_dir, model))
    truth = np.array([row.label for row in rows])
    predicted = np.array([labels.index(label) for label in given])
    low, high = wilson_interval(int((truth == predicted).sum()), len(rows))
    print(f"rows      {len(rows)}")
    print(f"route     {route}")
    print(f"accuracy  {(truth == predicted).mean():.2%}  (95 % interval {low:.2%} to {high:.2%})")
    _show_confusions(labels, truth, predicted)
    _show_load(tokens_LE)


async def _classify(
    texts: list[str], route: Route, address: str, run_dir: Path, model: Path
) -> tuple[list[str], np.ndarray]:  # type: ignore[type-arg]
    from expertmesh import wire

    given: list[str] = []
    tokens_LE: np.ndarray = np.zeros((), np.int64)  # type: ignore[type-arg]
    mesh = session.any_mesh(model, address, run_dir, placement.read_options())
    with Progress(console=Console(stderr=True), transient=True) as progress:
        async with mesh as opened, Client(opened.grpc, timeout_s=120) as client:
            task = progress.add_task("classifying", total=len(texts))
            for start in range(0, len(texts), CALL_TEXTS):
                try:
                    chunk = texts[start : start + CALL_TEXTS]
                    contract = CONTRACT_EXACT if route == ROUTE_FULL_MODEL else CONTRACT_MESH_ONLY
                    response = await client.classify(chunk, contract, route, include_experts=True)
                except MeshError as error:
                    raise SetupError(f"row {start}: {error}") from None
                for result in response.results:
                    given.append(result.label)
                    shape = tuple(result.expert_tokens.shape)
                    tokens_LE = tokens_LE + wire.decode(result.expert_tokens, wire.INT32, shape, "expert_tokens")
                progress.update(task, completed=len(given))
    return given, tokens_LE


def wilson_interval(hits: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """The Wilson score interval of a share (Wilson, 1927); `z` = 1.96 gives 95 %."""
    share = hits / total
    middle = share + z**2 / (2 * total)
    half = z * (share * (1 - share) / total + z**2 / (4 * total**2)) ** 0.5
    return (middle - half) / (1 + z**2 / total), (middle + half) / (1 + z**2 / total)


def _show_confusions(labels: tuple[str, ...], truth: np.ndarray, predicted: np.ndarray) -> None:  # type: ignore[type-arg]
    console = Console(width=None if Console().is_terminal else 120, highlight=False)
    table = Table("true \\ given", *labels, title="confusions")
    for index, label in enumerate(labels):
        counts = [int(((truth == index) & (predicted == other)).sum()) for other in range(len(labels))]
        table.add_row(label, *map(str, counts))
    console.print(table)


def _show_load(tokens_LE: np.ndarray) -> None:  # type: ignore[type-arg]
    console = Console(width=None if Console().is_terminal else 120, highlight=False)
    layers, experts = tokens_LE.shape
    table = Table("layer", *(f"expert {expert}" for expert in range(experts)), title="tokens, in fair shares")
    for layer in range(layers):
        shares_E = tokens_LE[layer] / tokens_LE[layer].sum() * experts
        table.add_row(str(layer), *(f"{share:.2f}" for share in shares_E))
    console.print(table)
