"""One MoE layer: dispatch, 8 experts in 8 processes, combine; against one process, a bare echo, and other systems.

    python -m benchmarks.layer [--ray-python PATH] [--hivemind-python PATH] [--json FILE]

The mesh is a split model with random weights, its services started as `expertmesh up` starts them; this process runs
the gateway's own code. Beside it, within the same rounds: the project's own layer and a plain torch loop over experts,
each in a process with 2 threads (that wait by spinning or asleep, whichever is faster), and a bare echo over gRPC
streams, of the same bytes to as many processes as the layer reaches.

Ray Serve and hivemind are measured when an interpreter that has them is named; see `layer_ray` and `layer_hivemind`.
Whoever's turn it is has the machine for itself: the other processes, with all they have started, are held.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.table import Table

from benchmarks.child import Child
from benchmarks.echo import Echo, echoes
from benchmarks.layer_case import EXPERTS, Case, make_case
from benchmarks.meshes import TIMEOUT_S, as_gateway
from benchmarks.models import random_model
from benchmarks.report import JsonFile, Report, ratio, spread
from benchmarks.rounds import Figures, faster, in_turn, median_ms
from expertmesh.checkpoint.manifest import Manifest
from expertmesh.cli import session
from expertmesh.cli.placement import read_options
from expertmesh.dispatch import ApplyExperts, combine, plan_dispatch
from expertmesh.rpc.deadline import Deadline
from services.gateway.mesh import Mesh
from services.gateway.stage_calls import StageCalls

TOKENS = (1, 16, 64, 256)
PEER_TOKENS = 64
THREADS = 2
MESSAGE_BYTES = 64  # beside the rows
MESH, ECHO = "mesh", "bare echo"
WAITS = ("passive", "active")  # how threads wait, as OpenMP calls it
PEERS = {"Ray Serve": 4.0, "hivemind": 25.0}  # how many times faster the mesh shall be

HELP = "An interpreter that has {}; left out if none is named."
Contender = Callable[[], Awaitable[float]]


def main(
    rounds: Annotated[int, typer.Option(help="Rounds of each size.")] = 7,
    seconds: Annotated[float, typer.Option(help="Seconds of each contender in a round.")] = 0.4,
    ray_python: Annotated[Path | None, typer.Option(envvar="RAY_PYTHON", help=HELP.format("Ray Serve"))] = None,
    hivemind_python: Annotated[
        Path | None, typer.Option(envvar="HIVEMIND_PYTHON", help=HELP.format("hivemind"))
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Prints milliseconds of one layer, and ratios."""
    peers = {
        "Ray Serve": ("benchmarks.layer_ray", ray_python),
        "hivemind": ("benchmarks.layer_hivemind", hivemind_python),
    }
    report = Report("layer")
    with random_model("layer") as model:
        session.run(_measure(model, rounds, seconds, peers, report))
    report.publish(json_file)


async def _measure(
    model: Path, rounds: int, seconds: float, peers: dict[str, tuple[str, Path | None]], report: Report
) -> None:
    manifest = Manifest.read(model)
    async with AsyncExitStack() as stack:
        running = await stack.enter_async_context(session.temporary_mesh(model, read_options(full_model=False)))
        assert running.plan is not None
        mesh = await stack.enter_async_context(as_gateway(running.plan, manifest))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="echo-")))
        echo = await stack.enter_async_context(echoes(EXPERTS, folder))
        locals_ = {
            wait: await stack.enter_async_context(
                Child(
                    "benchmarks.layer_local",
                    str(model),
                    str(THREADS),
                    environment={"OMP_NUM_THREADS": str(THREADS), "OMP_WAIT_POLICY": wait},
                )
            )
            for wait in WAITS
        }
        await _note_bits(mesh, locals_["passive"], report)
        sizes: dict[int, Figures] = {}
        for tokens in TOKENS:
            contenders = {MESH: _mesh(mesh, tokens, seconds), ECHO: _echo(echo, tokens, seconds)}
            for wait, child in locals_.items():
                for layer in ("own", "plain"):
                    ask = partial(child.ask, layer=layer, tokens=tokens, seconds=seconds)
                    contenders[f"{layer}, {wait} wait"] = ask
            sizes[tokens] = await in_turn(contenders, rounds)
        report.figures["ms"] = {str(tokens): figures for tokens, figures in sizes.items()}
        _compare(sizes, report)
        for name, (module, python) in peers.items():
            if python is None:
                report.notes.append(f"{name}: left out, since no interpreter that has it was named")
                continue
            await _measure_peer(name, module, python, mesh, rounds, seconds, report)


def _mesh(mesh: Mesh, tokens: int, seconds: float) -> Contender:
    case = make_case(tokens)
    return partial(median_ms, lambda: _layer(mesh, case), seconds)


async def _layer(mesh: Mesh, case: Case) -> np.ndarray:  # type: ignore[type-arg]
    plan = plan_dispatch(case.ids_TK, EXPERTS)
    calls = StageCalls(mesh, Deadline.after(TIMEOUT_S))
    applied = await calls.answer(ApplyExperts(0, case.x_TD[plan.row2token], plan.counts_E))
    combined_TD: np.ndarray = combine(case.x_TD, applied.rows_ND, case.weights_TK, plan)  # type: ignore[type-arg]
    return combined_TD


def _echo(echo: Echo, tokens: int, seconds: float) -> Contender:
    case = make_case(tokens)
    counts_E = plan_dispatch(case.ids_TK, EXPERTS).counts_E
    messages = [os.urandom(int(count) * case.x_TD[0].nbytes + MESSAGE_BYTES) for count in counts_E if count]
    return partial(median_ms, lambda: echo.fan_out(messages), seconds)


async def _note_bits(mesh: Mesh, child: Child, report: Report) -> None:
    """Notes whether mesh and own layer give the same bits; both, and the plain loop, must nearly give the same."""
    case = make_case(TOKENS[-1])
    given_TD = await _layer(mesh, case)
    own, plain = [
        np.array(await child.ask(layer=layer, tokens=TOKENS[-1], seconds=0), np.float32) for layer in ("own", "plain")
    ]
    for other in (own, plain):
        assert np.allclose(given_TD, other, atol=1e-4)
    same = bool((given_TD == own).all())
    report.figures["same_bits"] = same
    report.notes.append(f"mesh and own layer with {THREADS} threads, {TOKENS[-1]} tokens: same bits: {same}")


def _compare(sizes: dict[int, Figures], report: Report) -> None:
    table = Table("tokens", "contender", "ms", "of the mesh")
    targets = {256: 1.15, 64: 1.3}
    for tokens, figures in sizes.items():
        local = faster(figures, *(name for name in figures if name not in (MESH, ECHO)))
        for name, figures_ms in figures.items():
            share = ratio(name, figures_ms, figures[MESH], at_most=1).value
            table.add_row(str(tokens), name, spread(figures_ms), f"{share:.2f}", end_section=name == list(figures)[-1])
        if tokens in targets:
            what = f"{tokens} tokens: mesh / {local}"
            report.targets.append(ratio(what, figures[MESH], figures[local], at_most=targets[tokens]))
        if tokens == 1:
            report.targets.append(ratio("1 token: mesh / bare echo", figures[MESH], figures[ECHO], at_most=5))
    report.tables.append(table)


async def _peer(child: Child, way: str, seconds: float) -> float:
    """What a peer takes in its turn: measured twice, since it catches up at first on what it missed while held."""
    await child.ask(way=way, tokens=PEER_TOKENS, seconds=seconds)
    taken_ms: float = await child.ask(way=way, tokens=PEER_TOKENS, seconds=seconds)
    return taken_ms


async def _measure_peer(
    name: str, module: str, python: Path, mesh: Mesh, rounds: int, seconds: float, report: Report
) -> None:
    async with Child(module, python=python) as child:
        ways = await child.ask(ways=True)
        contenders: dict[str, Contender] = {MESH: _mesh(mesh, PEER_TOKENS, seconds)}
        for way in ways:
            contenders[way] = partial(_peer, child, way, seconds)
        figures = await in_turn(contenders, rounds)
    table = Table(f"beside {name}, {PEER_TOKENS} tokens", "ms", "of the mesh")
    for contender, figures_ms in figures.items():
        share = ratio(contender, figures_ms, figures[MESH], at_most=1).value
        table.add_row(contender, spread(figures_ms), f"{share:.1f}")
    report.tables.append(table)
    report.figures[name] = figures
    what = f"{PEER_TOKENS} tokens: {ways[0]} / mesh"
    report.targets.append(ratio(what, figures[ways[0]], figures[MESH], at_least=PEERS[name]))


if __name__ == "__main__":
    typer.run(main)
