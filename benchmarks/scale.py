"""More replicas, more experts, more callers, with experts on simulated devices, so that two cores stand for many.

    python -m benchmarks.scale [--json FILE]

Every expert service has a device of its own that takes 25 ms a step and 0.1 ms a row; what is left on the processor are
messages. Three questions: what two and four replicas of each expert give under saturating load; what 64 experts cost
the gateway, in processor time per token, against 8; how requests per second grow from 1 to 64 callers, and beside it
the same with nothing simulated.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from benchmarks.load import closed_loop
from benchmarks.meshes import mesh, total
from benchmarks.models import HEADLINES, SMALL_LAYERS, random_model
from benchmarks.report import JsonFile, Report, ratio, spread
from benchmarks.rounds import Figures, in_turn
from expertmesh.cli import session
from expertmesh.cli.placement import read_options
from expertmesh.local.plan import Options, Plan
from expertmesh.v1.inference_pb2 import ROUTE_MESH

SIMULATED = {"expert": "25+100"}
REPLICAS = (1, 2, 4)
# A pass is one step of an expert service in each layer, and there are enough of them for every replica.
SATURATING_CALLERS, SATURATING = 48, {"passes": 12, "pass_texts": 4, "together_rows": 1}
REPLICATED_SERVICES = 2  # few, so that two cores carry the messages of all replicas
SIZES = {"8 experts in 8 services": (8, 8), "64 experts in 8 services": (64, 8), "64 experts in 64 services": (64, 64)}
SIZE_CALLERS = 32
CALLERS = (1, 64)
LEAD_S = 2.0
# With one replica a saturating pass takes 1.4 s, and answers come in bunches: a round must count many of them.
REPLICA_TIMES, REPLICA_LEAD_S = 3, 4.0  # rounds so many times as long; and before counting
CPU = "process_cpu_seconds_total"


def main(
    rounds: Annotated[int, typer.Option(help="Rounds of each contender.")] = 5,
    seconds: Annotated[float, typer.Option(help="Seconds of each round.")] = 3.0,
    json_file: JsonFile = None,
) -> None:
    """Prints throughputs, the gateway's processor time, and ratios."""
    report = Report("scale")
    texts = HEADLINES.read_text().splitlines()
    with random_model("small-8") as few, random_model("small-64") as many:
        session.run(_measure_replicas(few, texts, rounds, seconds, report))
        session.run(_measure_sizes({8: few, 64: many}, texts, rounds, seconds, report))
        session.run(_measure_callers(few, texts, rounds, seconds, report))
    report.notes.append(f"model: {SMALL_LAYERS} layers, width 32; {SIMULATED['expert']} are ms a step + µs a row")
    report.publish(json_file)


async def _measure_replicas(model: Path, texts: list[str], rounds: int, seconds: float, report: Report) -> None:
    async with AsyncExitStack() as stack:
        plans = {
            number: await stack.enter_async_context(
                mesh(model, _options(REPLICATED_SERVICES, replicas={"expert": number}), SATURATING)
            )
            for number in REPLICAS
        }
        ask = partial(
            _rate,
            texts=texts,
            callers=SATURATING_CALLERS,
            seconds=REPLICA_TIMES * seconds,
            lead_s=REPLICA_LEAD_S,
        )
        rates = await in_turn({str(number): partial(ask, plan) for number, plan in plans.items()}, rounds)
    _show(report, "replicas of each expert", "texts/s", rates)
    for number, least in ((2, 1.9), (4, 3.7)):
        what = f"texts per second: {number} replicas / 1"
        report.targets.append(ratio(what, rates[str(number)], rates["1"], at_least=least))


async def _measure_sizes(
    models: Mapping[int, Path], texts: list[str], rounds: int, seconds: float, report: Report
) -> None:
    async with AsyncExitStack() as stack:
        plans = {
            name: await stack.enter_async_context(mesh(models[experts], _options(services)))
            for name, (experts, services) in SIZES.items()
        }
        costs = await in_turn(
            {name: partial(_gateway_us, plan, texts, seconds) for name, plan in plans.items()}, rounds
        )
    _show(report, f"{SIZE_CALLERS} callers", "gateway's processor time, µs per token", costs)
    base, fewer, most = SIZES
    report.targets.append(ratio(f"µs per token: {fewer} / {base}", costs[fewer], costs[base], at_most=1.3))
    report.targets.append(ratio(f"µs per token: {most} / {base}", costs[most], costs[base], at_most=4.0))


async def _measure_callers(model: Path, texts: list[str], rounds: int, seconds: float, report: Report) -> None:
    async with AsyncExitStack() as stack:
        plans = {
            "simulated": await stack.enter_async_context(mesh(model, _options(8))),
            "real": await stack.enter_async_context(mesh(model, _options(8, simulate={}))),
        }
        contenders = {
            f"{name}, {callers} callers": partial(_rate, plan, texts=texts, callers=callers, seconds=seconds)
            for name, plan in plans.items()
            for callers in CALLERS
        }
        rates = await in_turn(contenders, rounds)
    _show(report, "experts", "requests/s", rates)
    few, many = CALLERS
    grown = {name: (rates[f"{name}, {many} callers"], rates[f"{name}, {few} callers"]) for name in plans}
    what = f"requests per second: {many} callers / {few}"
    report.targets.append(ratio(f"{what}, simulated", *grown["simulated"], at_least=10))
    real = ratio(what, *grown["real"], at_least=0)
    report.notes.append(f"with nothing simulated, {what}: {real.value:.2f} ({real.low:.2f}-{real.high:.2f})")


def _options(
    services: int, replicas: Mapping[str, int] | None = None, simulate: Mapping[str, str] = SIMULATED
) -> Options:
    return replace(read_options(expert_services=services, full_model=False), replicas=replicas or {}, simulate=simulate)


async def _rate(plan: Plan, texts: list[str], callers: int, seconds: float, lead_s: float = LEAD_S) -> float:
    return (await closed_loop(plan.grpc, ROUTE_MESH, texts, callers, seconds, lead_s)).texts_per_s


async def _gateway_us(plan: Plan, texts: list[str], seconds: float) -> float:
    before_s = await total(plan, "gateway", CPU)
    given = await closed_loop(plan.grpc, ROUTE_MESH, texts, SIZE_CALLERS, seconds)
    return (await total(plan, "gateway", CPU) - before_s) / given.tokens * 1e6


def _show(report: Report, what: str, unit: str, figures: Figures) -> None:
    report.figures[what] = figures
    table = Table(what, unit)
    for name, rounds in figures.items():
        table.add_row(name, spread(rounds))
    report.tables.append(table)


if __name__ == "__main__":
    typer.run(main)
