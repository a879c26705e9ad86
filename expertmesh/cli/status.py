"""`expertmesh status`: services, replicas, health and load of the running mesh."""

from __future__ import annotations

import asyncio
import json
import urllib.request
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import grpc.aio
import typer
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.table import Table

from expertmesh.checkpoint.manifest import Manifest
from expertmesh.cli import placement, session
from expertmesh.client import Client
from expertmesh.errors import MeshError, SetupError
from expertmesh.local import state
from expertmesh.local.state import RunningMesh, RunningProcess
from expertmesh.rpc.channel import open_channel

CHECK_TIMEOUT_S = 2.0


@dataclass(frozen=True)
class Seen:
    """One process as it was seen.

    Attributes:
        health: "serving", "not serving" or "no answer".
        expert_tokens: Token rows that it computed, by "LAYER:EXPERT"; empty for other kinds.
    """

    name: str
    service: str
    kind: str
    pid: int
    address: str
    restarts: int
    health: str
    device: str
    profile: str
    metrics: str
    expert_tokens: dict[str, int]


def status(
    run_dir: placement.RunDir, as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False
) -> None:
    """Shows every process; exits with 1 if one of them does not serve."""
    found = state.find(run_dir)
    if found is None:
        raise SetupError(f"no mesh runs in {run_dir}; start one with `expertmesh up`")
    seen = session.run(_see_all(found))
    if as_json:
        plain = {"model": found.model, "grpc": found.grpc, "http": found.http, "pid": found.pid}
        print(json.dumps({**plain, "processes": [asdict(process) for process in seen]}, indent=1))
    else:
        _show(found, seen)
    if any(process.health != "serving" for process in seen):
        raise typer.Exit(1)


async def _see_all(found: RunningMesh) -> list[Seen]:
    return await asyncio.gather(*(_see(name, process) for name, process in found.processes.items()))


async def _see(name: str, process: RunningProcess) -> Seen:
    health = device = profile = metrics = ""
    try:
        async with open_channel(process.address) as channel, Client(process.address, CHECK_TIMEOUT_S) as client:
            check = health_pb2_grpc.HealthStub(channel).Check
            reply = await check(health_pb2.HealthCheckRequest(), timeout=CHECK_TIMEOUT_S)
            health = health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status).lower().replace("_", " ")
            described = await client.describe()
        device, profile, metrics = described.device, described.profile, described.metrics_address
    except (grpc.aio.AioRpcError, MeshError):
        health = health or "no answer"
    load = await asyncio.to_thread(_expert_tokens, metrics) if process.kind == "expert" and metrics else {}
    return Seen(
        name, process.service, process.kind, process.pid, process.address, process.restarts,
        health, device, profile, metrics, load,
    )  # fmt: skip


def _expert_tokens(metrics_address: str) -> dict[str, int]:
    try:
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with direct.open(f"http://{metrics_address}/metrics", timeout=CHECK_TIMEOUT_S) as reply:
            text = reply.read().decode()
    except OSError:
        return {}
    return {
        f"{sample.labels['layer']}:{sample.labels['expert']}": int(sample.value)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == "expertmesh_expert_tokens_total"
    }


def _show(found: RunningMesh, seen: list[Seen]) -> None:
    console = Console(width=None if Console().is_terminal else 160, highlight=False)
    total = sum(sum(process.expert_tokens.values()) for process in seen)
    table = Table("process", "kind", "pid", "health", "device", "restarts", "tokens", "share of expert tokens")
    for process in seen:
        tokens = sum(process.expert_tokens.values())
        share: Any = f"{tokens / total:6.1%} {'█' * round(40 * tokens / total)}" if total and tokens else ""
        table.add_row(
            process.name, process.kind, str(process.pid or ""), process.health, process.device,
            str(process.restarts), str(tokens) if process.kind == "expert" else "", share,
        )  # fmt: skip
    console.print(table)
    replicas = Counter(process.service for process in seen)
    console.print(f"model {Manifest.read(Path(found.model)).name} · {len(replicas)} services, {len(seen)} processes")
    grpc, http = found.grpc.replace(",", ", "), found.http.replace(",", ", http://")
    console.print(f"gRPC {grpc} · HTTP http://{http}")
