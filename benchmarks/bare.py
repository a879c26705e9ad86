"""What this machine charges for a model whose stages are processes, when nothing is served.

    python -m benchmarks.bare [--json FILE]

Embedding, gating, head and every expert are processes with one thread that compute with the project's own stages, each
behind a bare socket; see `bare_peers` for what is left out. One process asks them in the order of the layer loop.
Beside it, in turns, the same model in one process with 2 threads. What a mesh takes beyond this is its own; what this
takes beyond one process is what the shape costs here.
"""

from __future__ import annotations

import asyncio
import statistics
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from benchmarks.child import Child
from benchmarks.models import MIXTRAL_LAYERS, random_model
from benchmarks.report import JsonFile, Report, spread
from benchmarks.rounds import Figures, in_turn
from expertmesh.cli.placement import DEFAULT_MODEL


@dataclass(frozen=True)
class Work:
    """What is computed.

    Attributes:
        model: A model with random weights; empty for the bundled one.
        sizes: Of how many tokens, texts or streams a pass is.
        unit: One of these.
        layers: Of the model.
    """

    model: str
    sizes: tuple[int, ...]
    unit: str
    layers: int


WORKS = {
    "layer": Work("layer", (1, 64, 256), "tokens", 1),
    "classify": Work("", (1, 28), "texts", 2),
    "generate": Work("mixtral", (1, 16), "streams", MIXTRAL_LAYERS),
}
THREADS = 2
OWN, BARE = "own", "bare"


def main(
    rounds: Annotated[int, typer.Option(help="Rounds of each way.")] = 5,
    seconds: Annotated[float, typer.Option(help="Seconds of each way in a round.")] = 1.0,
    json_file: JsonFile = None,
) -> None:
    """Prints what a pass takes in one process and in processes of their own."""
    report = Report("bare")
    table = Table("a pass, ms", "one process", "bare processes", "times", "more for a layer, ms")
    for name, work in WORKS.items():
        with random_model(work.model) if work.model else nullcontext(DEFAULT_MODEL) as model:
            passes = asyncio.run(_measure(name, work, model, rounds, seconds))
        for size, figures in passes.items():
            what = f"{name}, {size} {work.unit}"
            report.figures[what] = figures
            own_ms, bare_ms = (statistics.median(figures[way]) for way in (OWN, BARE))
            more = f"{(bare_ms - own_ms) / work.layers:.2f}"
            table.add_row(what, spread(figures[OWN]), spread(figures[BARE]), f"{bare_ms / own_ms:.2f}", more)
    report.tables.append(table)
    report.publish(json_file)


async def _measure(name: str, work: Work, model: Path, rounds: int, seconds: float) -> dict[int, Figures]:
    """Milliseconds of each way, for every size."""
    environment = {"OMP_NUM_THREADS": str(THREADS), "OMP_WAIT_POLICY": "passive"}
    passes = {}
    async with Child("benchmarks.bare_model", name, str(model), str(THREADS), environment=environment) as child:
        for size in work.sizes:
            ask = partial(child.ask, size=size, seconds=seconds)
            passes[size] = await in_turn({way: partial(ask, way=way) for way in (OWN, BARE)}, rounds)
    return passes


if __name__ == "__main__":
    typer.run(main)
