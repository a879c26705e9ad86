"""`expertmesh split`: a checkpoint becomes parts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from expertmesh.checkpoint import split as splitting
from expertmesh.checkpoint.sources import open_source
from expertmesh.model.spec import DTYPES


def split(
    checkpoint: Annotated[Path, typer.Argument(help="A Hugging Face folder, a trained checkpoint, or a split model.")],
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    name: Annotated[str, typer.Option(help="The model's name; the checkpoint's by default.")] = "",
    dtype: Annotated[
        str, typer.Option(help=f"What it computes in, {' or '.join(DTYPES)}; {DTYPES[0]} by default.")
    ] = "",
    context: Annotated[
        int, typer.Option(help="Most tokens in a sequence; by default what the model was made for.", min=0)
    ] = 0,
) -> None:
    """Writes the parts of a checkpoint, a manifest of their digests, and says what they are."""
    source = open_source(checkpoint, dtype or None, context or None)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("splitting", total=None)

        def show(part: str, done: int, total: int) -> None:
            progress.update(task, description=part, completed=done, total=total)

        manifest = splitting.split(source, out, name, show)
    size, spec = sum(part.size_bytes for part in manifest.parts.values()), manifest.spec
    print(f"{out}: {len(manifest.parts)} parts, {size / 1e6:.1f} MB, model digest {manifest.digest[:16]}")
    experts = f"{len(spec.sparse_layers)} with {spec.router.experts} experts of which {spec.router.top_k} are used"
    print(f"{manifest.name}: {source.kind}, {spec.layers} layers, {experts}, context {spec.context}, {spec.dtype}")
