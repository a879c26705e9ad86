"""`expertmesh eval`: a classifier's accuracy and confusions through either route, or how well texts are foretold."""

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

MAX_WINDOW = 1024


def eval(
    run_dir: placement.RunDir,
    data: Annotated[
        Path, typer.Option(help="CSV file of class,title,description, .xz is unpacked; for a language model a text.")
    ],
    model: placement.Model = placement.DEFAULT_MODEL,
    route: Annotated[
        str, typer.Option(help="mesh or full-model; a language model is measured in this process.")
    ] = "mesh",
    held_out: Annotated[bool, typer.Option("--held-out", help="Only what training on this file holds out.")] = False,
    address: placement.Address = "",
    window: Annotated[
        int, typer.Option(help="Of a language model: most tokens in view; 0: its context, at most 1024.", min=0)
    ] = 0,
    stride: Annotated[
        int, typer.Option(help="Of a language model: tokens that each window adds; 0: half a window.", min=0)
    ] = 0,
) -> None:
    """Prints a classifier's accuracy or a language model's nats per character, and the load of every expert."""
    manifest = Manifest.read(model)
    if manifest.spec.generates:
        if address or route != "mesh":
            raise SetupError("a language model is measured in this process: neither --address nor --route applies")
        _foretell(model, manifest, data, held_out, window, stride)
    elif window or stride:
        raise SetupError("--window and --stride are for language models")
    else:
        _classify(model, manifest, data, held_out, route, address, run_dir)


def _classify(
    model: Path, manifest: Manifest, data: Path, held_out: bool, route: str, address: str, run_dir: Path
) -> None:
    from expertmesh.train.data import read_rows, split

    labels = manifest.spec.head.labels
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


def _foretell(model: Path, manifest: Manifest, data: Path, held_out: bool, window: int, stride: int) -> None:
    import torch

    from expertmesh.checkpoint.load import StageLoader
    from expertmesh.train.likelihood import measure, read_ids
    from expertmesh.train.texts import read_text, read_texts

    text = read_texts([data]).heldout if held_out else read_text(data)
    window = window or min(manifest.spec.context, MAX_WINDOW)
    if window > manifest.spec.context:
        raise SetupError(f"--window {window} is more than the model's context of {manifest.spec.context}")
    stride = stride or max(window // 2, 1)
    if stride > window:
        raise SetupError(f"--stride {stride} is more than the window of {window} tokens")
    ids = read_ids(model, manifest, text)
    full = StageLoader(model, torch.device("cpu")).full_model()
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("measuring", total=None)
        told = measure(full, ids, window, stride, lambda done, of: progress.update(task, completed=done, total=of))
    print(f"characters          {ids.characters}")
    print(f"tokens              {told.tokens}")
    print(f"nats per character  {told.nats / ids.characters:.4f}")
    print(f"nats per token      {told.nats / told.tokens:.4f}")
    print(f"tokens in view      {window}, windows {stride} apart: tokens see at least {window - stride} before them,")
    print("                    but in the first window, which begins where the text does")
    if len(told.counts_LE):
        show_load(told.counts_LE)


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
