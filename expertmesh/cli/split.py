"""`expertmesh split`: a checkpoint becomes parts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from expertmesh.checkpoint import split as splitting


def split(
    checkpoint: Annotated[Path, typer.Argument(help="A trained checkpoint, or a split model.")],
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    name: Annotated[str, typer.Option(help="The model's name; the checkpoint's by default.")] = "",
) -> None:
    """Writes the parts of a checkpoint, a manifest of their digests, and says what they are."""
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("splitting", total=None)

        def show(part: str, done: int, total: int) -> None:
            progress.update(task, description=part, completed=done, total=total)

        manifest = splitting.split(checkpoint, out, name, show)
    size = sum(part.size_bytes for part in manifest.parts.values())
    print(f"{out}: {len(manifest.parts)} parts, {size / 1e6:.1f} MB, model digest {manifest.digest[:16]}")
