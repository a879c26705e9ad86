"""Texts per second through the mesh and through the full model, side by side in one run.

    python benchmarks/classify.py [MODEL] [--seconds 8] [--json FILE]

Closed loop: every caller sends its next text when the last one is answered. Both routes are asked in turns, several
rounds each, so that a machine that slows down slows down both; medians and their spread over the rounds are printed.
The full model is asked directly, at its own address, as a client without a mesh would.
"""

from __future__ import annotations

import asyncio
import json
import os
import platform
import statistics
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from expertmesh.cli import placement, session
from expertmesh.cli.classify import read_lines
from expertmesh.client import Client
from expertmesh.local.plan import Plan
from expertmesh.v1.inference_pb2 import CONTRACT_EXACT, CONTRACT_MESH_ONLY, ROUTE_FULL_MODEL, ROUTE_MESH, Route

CALLERS = (1, 32)
ROUNDS = 5
WARM_UP_S = 1.0
MESH, FULL = "mesh", "full model"


@dataclass(frozen=True)
class Round:
    """What one round of one route gave."""

    texts_per_s: float
    p50_ms: float
    p99_ms: float


def main(
    model: placement.Model = placement.DEFAULT_MODEL,
    file: Annotated[Path, typer.Option(help="Raw texts, one a line.")] = Path("examples/headlines.txt"),
    seconds: Annotated[float, typer.Option(help="Seconds of each round.")] = 3.0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the figures as JSON.")] = None,
) -> None:
    """Prints a table of medians and ratios."""
    texts = [line.text for line in read_lines(file) if not line.error]
    results = session.run(_measure(model, texts, seconds))
    _show(results)
    if json_file is not None:
        json_file.write_text(json.dumps({"machine": machine(), "callers": _plain(results)}, indent=1))


async def _measure(model: Path, texts: list[str], seconds: float) -> dict[int, dict[str, list[Round]]]:
    results: dict[int, dict[str, list[Round]]] = defaultdict(lambda: defaultdict(list))
    async with session.temporary_mesh(model, placement.read_options()) as mesh:
        assert mesh.plan is not None
        addresses = {MESH: (mesh.grpc, ROUTE_MESH), FULL: (_full_model_address(mesh.plan), ROUTE_FULL_MODEL)}
        for callers in CALLERS:
            for address, route in addresses.values():
                await _round(address, route, texts, callers, WARM_UP_S)
            for _ in range(ROUNDS):
                for name, (address, route) in addresses.items():
                    results[callers][name].append(await _round(address, route, texts, callers, seconds))
    return results


def _full_model_address(plan: Plan) -> str:
    return next(process.address for process in plan.processes if process.kind == "full_model")


async def _round(address: str, route: Route, texts: list[str], callers: int, seconds: float) -> Round:
    latencies_s: list[float] = []
    contract = CONTRACT_EXACT if route == ROUTE_FULL_MODEL else CONTRACT_MESH_ONLY
    started_s = time.perf_counter()

    async def caller(number: int, client: Client) -> None:
        turn = number
        while time.perf_counter() - started_s < seconds:
            sent_s = time.perf_counter()
            await client.classify([texts[turn % len(texts)]], contract, route)
            latencies_s.append(time.perf_counter() - sent_s)
            turn += 1

    async with Client(address) as client:
        await asyncio.gather(*(caller(number, client) for number in range(callers)))
    took_s = time.perf_counter() - started_s
    latencies_s.sort()
    p99_s = latencies_s[min(len(latencies_s) - 1, int(0.99 * len(latencies_s)))]
    return Round(len(latencies_s) / took_s, statistics.median(latencies_s) * 1e3, p99_s * 1e3)


def machine() -> str:
    """Names this machine as figures should."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        processor = names[0] if names else processor
    return f"{os.cpu_count()} cores of {processor}, {platform.system()}, Python {platform.python_version()}"


def _plain(results: dict[int, dict[str, list[Round]]]) -> dict[str, Any]:
    return {
        str(callers): {name: [vars(one) for one in rounds] for name, rounds in routes.items()}
        for callers, routes in results.items()
    }


def _show(results: dict[int, dict[str, list[Round]]]) -> None:
    console = Console(width=None if Console().is_terminal else 120, highlight=False)
    table = Table("callers", "route", "texts/s", "spread", "p50 ms", "p99 ms", "of full model")
    for callers, routes in results.items():
        full = statistics.median(one.texts_per_s for one in routes[FULL])
        for name, rounds in routes.items():
            rates = [one.texts_per_s for one in rounds]
            rate = statistics.median(rates)
            p50, p99 = statistics.median(one.p50_ms for one in rounds), statistics.median(one.p99_ms for one in rounds)
            spread = f"{min(rates):.0f}-{max(rates):.0f}"
            table.add_row(str(callers), name, f"{rate:.0f}", spread, f"{p50:.1f}", f"{p99:.1f}", f"{rate / full:.2f}")
    console.print(table)
    console.print(machine())


if __name__ == "__main__":
    typer.run(main)
