"""Meshes that a benchmark compares, and their metrics."""

from __future__ import annotations

import asyncio
import json
import os
import re
import urllib.request
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

from expertmesh.checkpoint.manifest import Manifest
from expertmesh.cli import session
from expertmesh.client import Client
from expertmesh.local.plan import Options, Plan, Process
from expertmesh.local.state import STATE_FILE
from expertmesh.telemetry import tracing
from services.gateway.mesh import Mesh

MAX_MESSAGE_BYTES = 64 * 2**20
TIMEOUT_S = 30.0


@asynccontextmanager
async def mesh(model: Path, options: Options, settings: Mapping[str, object] | None = None) -> AsyncIterator[Plan]:
    """A mesh as `expertmesh up` starts it.

    Args:
        model: Folder of the split model.
        options: Its layout.
        settings: Of its services, by name, as the environment tells them.
    """
    with _environment({f"EXPERTMESH_{name.upper()}": str(value) for name, value in (settings or {}).items()}):
        context = session.temporary_mesh(model, options)
        running = await context.__aenter__()
    try:
        assert running.plan is not None
        yield running.plan
    finally:
        await context.__aexit__(None, None, None)


@asynccontextmanager
async def as_gateway(plan: Plan, manifest: Manifest) -> AsyncIterator[Mesh]:
    """The services of a mesh as its gateway has them, but in this process; all of them are met."""
    complete = asyncio.Event()
    async with Mesh(plan.mesh_file, manifest, MAX_MESSAGE_BYTES, tracing.OFF, TIMEOUT_S) as own:
        own.on_change = lambda: complete.set() if own.is_complete else None
        if not own.is_complete:
            await complete.wait()
        yield own


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def full_model_address(plan: Plan) -> str:
    """Where the full model itself is."""
    return next(process.address for process in plan.processes if process.kind == "full_model")


async def total(plan: Plan, kind: str, metric: str) -> float:
    """Sum of a metric over its labels and over all processes of a kind."""
    addresses = [await _metrics_address(plan, process.address, kind) for process in _processes(plan, kind)]
    return sum([await asyncio.to_thread(_read, address, metric) for address in addresses])


def count(plan: Plan, kind: str) -> int:
    """Processes of a kind."""
    return len(_processes(plan, kind))


async def samples(plan: Plan, kind: str) -> Counter[str]:
    """Every sample of its metrics as `name{labels}`, summed over all processes of a kind."""
    summed: Counter[str] = Counter()
    for process in _processes(plan, kind):
        text = await asyncio.to_thread(_exposition, await _metrics_address(plan, process.address, kind))
        for line in text.splitlines():
            if not line.startswith("#"):
                name, _, value = line.rpartition(" ")
                summed[name] += float(value)  # type: ignore[assignment]  # a Counter adds any number
    return summed


def pids(plan: Plan) -> dict[str, list[int]]:
    """The pids of every kind of process, as the mesh wrote them down in the folder of its sockets."""
    folder = next(Path(one.address.removeprefix("unix:")).parent for one in plan.processes if one.kind != "gateway")
    kind2pids: dict[str, list[int]] = {}
    for process in json.loads((folder / STATE_FILE).read_text())["processes"].values():
        kind2pids.setdefault(process["kind"], []).append(process["pid"])
    return kind2pids


def _processes(plan: Plan, kind: str) -> list[Process]:
    return [process for process in plan.processes if process.kind == kind]


async def _metrics_address(plan: Plan, address: str, kind: str) -> str:
    if kind == "gateway":
        return plan.http
    async with Client(address) as client:
        return (await client.describe()).metrics_address


def _exposition(address: str) -> str:
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=30) as reply:
        text: str = reply.read().decode()
    return text


def _read(address: str, metric: str) -> float:
    lines = _exposition(address).splitlines()
    found = [re.fullmatch(rf"{metric}(?:\{{.*\}})? (\S+)", line) for line in lines]
    return sum(float(match[1]) for match in found if match)
