"""Where the time of a pass goes: sending and waking, queues, computing, and the gateway's own work.

    python -m benchmarks.profile [MODEL] [--seconds 2] [--json FILE]

Meshes of 8 and of 2 expert services classify, for 1 caller, for 32, and for one whose calls have 16 texts: between the
last two the gateway's processor time differs by what it costs to serve callers, and by how many texts a pass has. Wall
is what the gateway waited for a stage, handler what the stage itself spent on a call from its arrival to its end, with
its queue and its computing; the rest of the wall is wire and wake: sending, waking up and reading, both ways. Experts
of a layer are called at once: their handler is the mean of one call a layer, so the wait for the slowest of them
counts as wire and wake. Processor time is what the kernel gave to all threads of these processes. Warm is what the very
calls of a pass take when those of one stage are made again and again and nothing else is: between it and what they take
in a pass lie caches that are cold, since all processes share them. Beside it stand the gateway's work on rows, done
again by itself, and the full model's forward pass with one thread: what no transport can remove.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from benchmarks import gateway_work, warm_calls
from benchmarks.child import Child
from benchmarks.load import closed_loop
from benchmarks.meshes import mesh, pids, samples
from benchmarks.models import HEADLINES
from benchmarks.processor import IS_TOLD, processor_ns
from benchmarks.report import JsonFile, Report, spread
from benchmarks.rounds import in_turn
from benchmarks.warm_calls import Warm
from expertmesh.checkpoint.manifest import Manifest
from expertmesh.cli import placement, session
from expertmesh.local.plan import Plan
from expertmesh.v1.inference_pb2 import ROUTE_MESH, ClassifyResponse

SERVICES = (8, 2)
LOADS = ((1, 1), (32, 1), (1, 16))  # callers, and texts of a call
STAGES = {
    "tokenizer": "TokenizerService/Encode",
    "embedding": "EmbeddingService/Embed",
    "gating": "GatingService/Gate",
    "expert": "ExpertService/Apply",
    "classifier": "ClassifierService/Score",
}
CLIENT = "client"
FIGURES = ("calls", "wall", "handler", "queue", "compute", "wire")  # of a `StageShare`


@dataclass(frozen=True)
class StageShare:
    """A stage's part of a pass; milliseconds.

    Attributes:
        calls: Calls.
        wall: What the gateway waited.
        handler: What the stage spent on them; of calls that are made at once, the mean.
        queue: Of that, waiting for the device.
        compute: Of that, computing.
    """

    calls: float
    wall: float
    handler: float
    queue: float
    compute: float

    @property
    def wire(self) -> float:
        """Sending, waking and reading."""
        return self.wall - self.handler


@dataclass(frozen=True)
class Profile:
    """One round; milliseconds are of a pass.

    Attributes:
        texts: Texts that shared a pass.
        rows: Their token rows.
        answer: Median time to an answer, as the client sees it.
        queue: In the gateway before the pass.
        combine: In the gateway between the stages: dispatch and combine.
        stages: Each stage's.
        processor: Processor time of every kind of process, and of the client; empty where it is not told.
        busy: Share of the cores that these were at work; 0 where it is not told.
    """

    texts: float
    rows: float
    answer: float
    queue: float
    combine: float
    stages: dict[str, StageShare]
    processor: dict[str, float]
    busy: float


def main(
    model: placement.Model = placement.DEFAULT_MODEL,
    rounds: Annotated[int, typer.Option(help="Rounds of each contender.")] = 3,
    seconds: Annotated[float, typer.Option(help="Seconds of each round.")] = 2.0,
    json_file: JsonFile = None,
) -> None:
    """Prints a table of medians for each mesh and number of callers, and the gateway's own work."""
    report = Report("profile")
    session.run(_measure(model, HEADLINES.read_text().splitlines(), rounds, seconds, report))
    if not IS_TOLD:
        report.notes.append("this system does not tell the processor time of threads")
    report.publish(json_file)


async def _measure(model: Path, texts: list[str], rounds: int, seconds: float, report: Report) -> None:
    layers = Manifest.read(model).spec.layers
    name2services = {_name(services, *load): services for load in LOADS for services in SERVICES}
    async with AsyncExitStack() as stack:
        plans = {
            services: await stack.enter_async_context(
                mesh(model, placement.read_options(expert_services=services, full_model=False))
            )
            for services in SERVICES
        }
        contenders = {
            _name(services, *load): partial(_round, plans[services], layers, texts, load, seconds)
            for load in LOADS
            for services in SERVICES
        }
        measured = await in_turn(contenders, rounds)
        warm = {
            name: await warm_calls.measure(plans[services], Manifest.read(model), texts[: _texts(measured[name])])
            for name, services in name2services.items()
        }
    floors_ms = await _forward_ms(model, texts, {name: _texts(given) for name, given in measured.items()}, rounds)
    works_us: dict[str, dict[str, float]] = {}
    for name, services in name2services.items():
        given = measured[name]
        works_us[name] = _own_work(model, given, services)
        report.tables.append(_stages_table(name, given, floors_ms[name], warm[name]))
        report.figures[name] = {
            "rounds": [asdict(one) for one in given],
            "warm calls, ms": {stage: asdict(one) for stage, one in warm[name].items()},
            "gateway's work, µs per layer": works_us[name],
            "forward pass of the full model with one thread, ms": floors_ms[name],
        }
    report.tables.append(_work_table(measured, works_us, layers))


def _name(services: int, callers: int, call_texts: int) -> str:
    load = f"{callers} caller{'s' if callers > 1 else ''}"
    return f"{services} expert services, {load}" + (f" of {call_texts} texts" if call_texts > 1 else "")


def _texts(given: Sequence[Profile]) -> int:
    return max(1, round(statistics.median(one.texts for one in given)))


async def _round(plan: Plan, layers: int, texts: list[str], load: tuple[int, int], seconds: float) -> Profile:
    passes: set[tuple[tuple[str, float], ...]] = set()  # all texts of a pass have the same timings

    def observe(response: ClassifyResponse) -> None:
        passes.add(tuple((timing.stage, timing.seconds) for timing in response.timings))

    kind2pids = {**pids(plan), CLIENT: [os.getpid()]} if IS_TOLD else {}
    before = await _samples(plan)
    before_ns = {kind: processor_ns(group) for kind, group in kind2pids.items()}
    started_s = time.perf_counter()
    callers, call_texts = load
    given = await closed_loop(plan.grpc, ROUTE_MESH, texts, callers, seconds, call_texts=call_texts, observe=observe)
    took_ms = (time.perf_counter() - started_s) * 1e3
    used_ms = {kind: (processor_ns(group) - before_ns[kind]) / 1e6 for kind, group in kind2pids.items()}
    after = await _samples(plan)
    grown = {kind: Counter({name: after[kind][name] - before[kind][name] for name in after[kind]}) for kind in after}
    count = grown["gateway"]["expertmesh_pass_texts_count"]
    wall_ms: Counter[str] = Counter()
    for timings in passes:
        for stage, stage_s in timings:
            wall_ms[stage] += stage_s / count * 1e3  # type: ignore[assignment]
    answered = grown["gateway"]["expertmesh_pass_texts_sum"]
    return Profile(
        texts=answered / count,
        rows=grown["embedding"]['expertmesh_tokens_total{stage="embedding"}'] / count,
        answer=given.p50_ms,
        queue=grown["gateway"]['expertmesh_queue_seconds_sum{stage="pass"}'] / answered * 1e3,
        combine=wall_ms["combine"],
        stages={stage: _share(stage, grown[stage], count, layers, wall_ms[stage]) for stage in STAGES},
        processor={kind: ms / count for kind, ms in used_ms.items()},
        busy=sum(used_ms.values()) / took_ms / (os.cpu_count() or 1),
    )


async def _samples(plan: Plan) -> dict[str, Counter[str]]:
    kinds = ("gateway", *STAGES)
    return dict(zip(kinds, await asyncio.gather(*(samples(plan, kind) for kind in kinds)), strict=True))


def _share(stage: str, grown: Mapping[str, float], passes: float, layers: int, wall_ms: float) -> StageShare:
    method = f'{{method="/expertmesh.v1.{STAGES[stage]}"}}'
    calls = grown[f"expertmesh_request_seconds_count{method}"] / passes
    at_once = calls / layers if stage == "expert" else 1.0

    def ms(sample: str) -> float:
        return grown[sample] / passes / at_once * 1e3

    return StageShare(
        calls=calls,
        wall=wall_ms,
        handler=ms(f"expertmesh_request_seconds_sum{method}"),
        queue=ms(f'expertmesh_queue_seconds_sum{{stage="{stage}"}}'),
        compute=ms(f'expertmesh_compute_seconds_sum{{stage="{stage}"}}'),
    )


async def _forward_ms(model: Path, texts: list[str], batches: Mapping[str, int], rounds: int) -> dict[str, list[float]]:
    """Milliseconds that the full model's forward pass takes with one thread, of as many texts as each pass had."""
    environment = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    async with Child("benchmarks.classify_forward", str(model), "1", environment=environment) as child:
        return await in_turn(
            {
                name: partial(child.ask, way="own", texts=texts, batch=batch, seconds=0.5)
                for name, batch in batches.items()
            },
            rounds,
        )


def _own_work(model: Path, given: Sequence[Profile], services: int) -> dict[str, float]:
    rows = max(1, round(statistics.median(one.rows for one in given)))
    return gateway_work.measure(Manifest.read(model).spec, rows, _texts(given), services)


def _stages_table(name: str, given: Sequence[Profile], floor_ms: Sequence[float], warm: Mapping[str, Warm]) -> Table:
    texts, rows = spread([one.texts for one in given]), spread([one.rows for one in given])
    columns = (*FIGURES[:-1], "wire and wake", "processor", "warm wall", "warm processor")
    table = Table("ms of a pass", *columns, title=f"{name}; texts of a pass {texts}, rows {rows}")

    def processor(kind: str) -> str:
        return _median([one.processor[kind] for one in given]) if IS_TOLD else ""

    for stage in STAGES:
        shares = [one.stages[stage] for one in given]
        cells = [_median([getattr(share, what) for share in shares]) for what in FIGURES]
        own = warm[stage]
        table.add_row(stage, *cells, processor(stage), _ms(own.wall), _ms(own.processor) if IS_TOLD else "")
    table.add_row("dispatch, combine", "", _median([one.combine for one in given]), *[""] * 4, "")
    table.add_row("before the pass", "", "", "", _median([one.queue for one in given]), "", "", "")
    sums = {what: [sum(getattr(share, what) for share in one.stages.values()) for one in given] for what in FIGURES}
    sums["wall"] = [wall + one.combine for wall, one in zip(sums["wall"], given, strict=True)]
    table.add_section()
    if IS_TOLD:
        table.add_row("gateway", *[""] * 6, processor("gateway"))
        table.add_row(CLIENT, *[""] * 6, processor(CLIENT))
    whole = _median([sum(one.processor.values()) for one in given]) if IS_TOLD else ""
    warm_ms = [_ms(sum(one.wall for one in warm.values())), _ms(sum(one.processor for one in warm.values()))]
    table.add_row("all", *(_median(sums[what]) for what in FIGURES), whole, *(warm_ms if IS_TOLD else warm_ms[:1]))
    table.add_row("answer at the client", "", spread([one.answer for one in given]), *[""] * 5)
    table.add_row("full model, 1 thread", *[""] * 4, spread(floor_ms), "", "")
    if IS_TOLD:
        busy = statistics.median(one.busy for one in given)
        table.add_row(f"busy of {os.cpu_count()} cores", *[""] * 6, f"{busy:.0%}")
    return table


def _work_table(
    measured: Mapping[str, Sequence[Profile]], works_us: Mapping[str, Mapping[str, float]], layers: int
) -> Table:
    kinds = next(iter(works_us.values()))
    title = "gateway's own work: µs of a layer; all of it and the rest of its processor time: ms of a pass"
    table = Table("", *kinds, "all", *(["rest"] if IS_TOLD else []), title=title)
    for name, work_us in works_us.items():
        whole_ms = sum(work_us.values()) * layers / 1e3
        used_ms = [one.processor["gateway"] for one in measured[name]] if IS_TOLD else []
        rest = [_ms(statistics.median(used_ms) - whole_ms)] if IS_TOLD else []
        table.add_row(name, *(f"{us:.0f}" for us in work_us.values()), _ms(whole_ms), *rest)
    return table


def _median(figures: Sequence[float]) -> str:
    return _ms(statistics.median(figures))


def _ms(value: float) -> str:
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


if __name__ == "__main__":
    typer.run(main)
