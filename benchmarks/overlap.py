"""Two passes in flight against one: attention of one runs while experts serve the other.

    python -m benchmarks.overlap [--json FILE]

Gating and experts are simulated: each takes 5 ms for every step, alone on a device of its own, and computes next to
nothing. So the ratio tells what the gateway makes of devices that could work at the same time. The busy share of each
stage is read from its own metrics. Two passes leave a device idle while both are with the other stage, on the wire, or
at embedding and classifier; more of them fill that. So the busy share is asked of four.
"""

from __future__ import annotations

from contextlib import AsyncExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from benchmarks.load import closed_loop
from benchmarks.meshes import count, mesh, total
from benchmarks.models import HEADLINES, random_model
from benchmarks.report import JsonFile, Report, level, ratio, spread
from benchmarks.rounds import in_turn
from expertmesh.cli import session
from expertmesh.cli.placement import read_options
from expertmesh.local.plan import Plan
from expertmesh.v1.inference_pb2 import ROUTE_MESH

STEP_MS = 5
PASSES = (1, 2, 4)
PASS_TEXTS, CALLERS = 4, 32
EXPERT_SERVICES = 2  # few, so that two cores carry their messages beside the simulated time
LEAD_S = 1.0
STAGES = ("gating", "expert")
BUSY = "expertmesh_busy_seconds_total"


def main(
    rounds: Annotated[int, typer.Option(help="Rounds of each contender.")] = 5,
    seconds: Annotated[float, typer.Option(help="Seconds of each round.")] = 3.0,
    json_file: JsonFile = None,
) -> None:
    """Prints texts per second and busy shares."""
    report = Report("overlap")
    with random_model("small-8") as model:
        session.run(_measure(model, rounds, seconds, report))
    report.publish(json_file)


async def _measure(model: Path, rounds: int, seconds: float, report: Report) -> None:
    simulated = {stage: str(STEP_MS) for stage in STAGES}
    options = replace(read_options(expert_services=EXPERT_SERVICES, full_model=False), simulate=simulated)
    async with AsyncExitStack() as stack:
        plans = {
            passes: await stack.enter_async_context(mesh(model, options, {"passes": passes, "pass_texts": PASS_TEXTS}))
            for passes in PASSES
        }
        texts = HEADLINES.read_text().splitlines()
        measured = await in_turn(
            {str(passes): partial(_round, plan, texts, seconds) for passes, plan in plans.items()}, rounds
        )
    rates = {name: [one["texts_per_s"] for one in given] for name, given in measured.items()}
    report.figures = dict(measured)
    table = Table("passes in flight", "texts/s", *(f"{stage} busy" for stage in STAGES))
    for name, given in measured.items():
        table.add_row(name, spread(rates[name]), *(spread([one[stage] for one in given]) for stage in STAGES))
    report.tables.append(table)
    one, two, four = map(str, PASSES)
    report.targets.append(ratio("texts per second: two passes / one", rates[two], rates[one], at_least=1.8))
    for stage in STAGES:
        shares = [given[stage] for given in measured[four]]
        report.targets.append(level(f"busy share of {stage}, four passes", shares, at_least=0.8))


async def _round(plan: Plan, texts: list[str], seconds: float) -> dict[str, float]:
    before = {stage: await total(plan, stage, BUSY) for stage in STAGES}
    given = await closed_loop(plan.grpc, ROUTE_MESH, texts, CALLERS, seconds, LEAD_S)
    after = {stage: await total(plan, stage, BUSY) for stage in STAGES}
    shares = {stage: (after[stage] - before[stage]) / given.seconds / count(plan, stage) for stage in STAGES}
    return {"texts_per_s": given.texts_per_s, **shares}


if __name__ == "__main__":
    typer.run(main)
