"""Texts per second through meshes of 8 and of 2 expert services, and through the full model, side by side in one run.

    python -m benchmarks.classify [MODEL] [--seconds 3] [--json FILE]

Closed loop: every caller sends its next text when the last one is answered. All are asked in turns, several rounds
each, so that a machine that slows down slows down all. The full model is asked directly, at its own address, as a
client without a mesh would; that it is no straw man shows its forward pass beside a plain torch forward.
"""

from __future__ import annotations

import statistics
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from benchmarks.child import Child
from benchmarks.load import Round, closed_loop
from benchmarks.meshes import full_model_address, mesh
from benchmarks.report import JsonFile, Report, difference, ratio, spread
from benchmarks.rounds import in_turn
from expertmesh.checkpoint.manifest import Manifest
from expertmesh.cli import placement, session
from expertmesh.cli.classify import read_lines
from expertmesh.v1.inference_pb2 import ROUTE_FULL_MODEL, ROUTE_MESH, Route

CALLERS = (1, 32)
SERVICES = {8: 3.0, 2: 1.5}  # and how many milliseconds the mesh may add to a layer
BATCHES = (1, 32)
THREADS = 2
FULL = "full model"


def main(
    model: placement.Model = placement.DEFAULT_MODEL,
    file: Annotated[Path, typer.Option(help="Raw texts, one a line.")] = Path("examples/headlines.txt"),
    rounds: Annotated[int, typer.Option(help="Rounds of each contender.")] = 5,
    seconds: Annotated[float, typer.Option(help="Seconds of each round.")] = 3.0,
    json_file: JsonFile = None,
) -> None:
    """Prints a table of medians and ratios."""
    texts = [line.text for line in read_lines(file) if not line.error]
    report = Report("classify")
    session.run(_measure_services(model, texts, rounds, seconds, report))
    session.run(_measure_forward(model, texts, rounds, report))
    report.publish(json_file)


async def _measure_services(model: Path, texts: list[str], rounds: int, seconds: float, report: Report) -> None:
    layers = Manifest.read(model).spec.layers
    async with AsyncExitStack() as stack:
        addresses: dict[str, tuple[str, Route]] = {}
        for services in SERVICES:
            is_first = not addresses
            options = placement.read_options(expert_services=services, full_model=is_first)
            plan = await stack.enter_async_context(mesh(model, options))
            if is_first:
                addresses[FULL] = (full_model_address(plan), ROUTE_FULL_MODEL)
            addresses[_name(services)] = (plan.grpc, ROUTE_MESH)
        for callers in CALLERS:
            contenders = {
                name: partial(closed_loop, address, route, texts, callers, seconds)
                for name, (address, route) in addresses.items()
            }
            _compare(await in_turn(contenders, rounds), callers, layers, report)


def _compare(measured: dict[str, list[Round]], callers: int, layers: int, report: Report) -> None:
    table = Table(f"callers: {callers}", "texts/s", "p50 ms", "p99 ms", "of full model")
    rates = {name: [one.texts_per_s for one in given] for name, given in measured.items()}
    times_ms = {name: [one.p50_ms for one in given] for name, given in measured.items()}
    for name, given in measured.items():
        share = statistics.median(rates[name]) / statistics.median(rates[FULL])
        p99 = spread([one.p99_ms for one in given])
        table.add_row(name, spread(rates[name]), spread(times_ms[name]), p99, f"{share:.2f}")
    report.tables.append(table)
    report.figures[f"{callers} callers"] = {name: [vars(one) for one in given] for name, given in measured.items()}
    for services, most_ms in SERVICES.items():
        name = _name(services)
        if callers == 1:
            what = f"1 caller: {name} adds to a layer"
            target = difference(what, times_ms[name], times_ms[FULL], "ms", 1 / layers, at_most=most_ms)
            report.targets.append(target)
        elif services == max(SERVICES):
            report.targets.append(ratio(f"{callers} callers: {name} / {FULL}", rates[name], rates[FULL], at_least=0.85))


def _name(services: int) -> str:
    return f"mesh, {services} expert services"


async def _measure_forward(model: Path, texts: list[str], rounds: int, report: Report) -> None:
    environment = {"OMP_NUM_THREADS": str(THREADS), "OMP_WAIT_POLICY": "passive"}
    table = Table("forward pass", "own ms", "plain ms", "own / plain")
    async with Child("benchmarks.classify_forward", str(model), str(THREADS), environment=environment) as child:
        for batch in BATCHES:
            ask = partial(child.ask, texts=texts, batch=batch, seconds=1.0)
            times_ms = await in_turn({way: partial(ask, way=way) for way in ("own", "plain")}, rounds)
            what = f"forward pass of {batch}: full model / plain torch"
            target = ratio(what, times_ms["own"], times_ms["plain"], at_most=1.1)
            report.targets.append(target)
            report.figures[f"forward of {batch}, ms"] = times_ms
            table.add_row(f"{batch} texts", spread(times_ms["own"]), spread(times_ms["plain"]), f"{target.value:.2f}")
    report.tables.append(table)


if __name__ == "__main__":
    typer.run(main)
