"""What processes hold and have counted: memory, descriptors, tasks, KV blocks, calls to experts."""

from __future__ import annotations

import asyncio
import os
import re
import time
import urllib.request
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import grpc.aio

from expertmesh.rpc.channel import open_channel
from expertmesh.v1.description_pb2 import DescribeRequest
from expertmesh.v1.description_pb2_grpc import DescriptionServiceStub
from tests.chaos.mesh import Mesh, Service

PERIOD_S = 1.0
ASK_TIMEOUT_S = 3.0
_SAMPLE = re.compile(r"(\w+)(?:\{(.*)\})? (\S+)")
_LABEL = re.compile(r'(\w+)="([^"]*)"')
COUNTED = ("expertmesh_calls_total", "expertmesh_replica_events_total", "expertmesh_rebuilds_total")


@dataclass(frozen=True)
class Vitals:
    """One process at one moment.

    Attributes:
        pid: Of the process.
        rss_bytes: Resident memory, much of which it shares with its siblings.
        descriptors: Open ones.
        tasks: Of its event loop.
        kv_blocks: Blocks of its KV cache that are held; None where it has none.
    """

    pid: int
    rss_bytes: int
    descriptors: int
    tasks: int
    kv_blocks: int | None


Name = tuple[str, frozenset[tuple[str, str]]]  # of a sample: the metric and its labels
Metrics = dict[Name, float]
Counted = Counter[Name]


def parse_metrics(text: str) -> Metrics:
    """Samples of Prometheus' text format, by name and labels."""
    found = (_SAMPLE.fullmatch(line) for line in text.splitlines() if not line.startswith("#"))
    return {(m[1], frozenset(_LABEL.findall(m[2] or ""))): float(m[3]) for m in found if m}


class Watch:
    """Looks at a mesh every second, and sums what its gateways count over their lives, also of those that were killed.

    Args:
        mesh: The mesh.

    Attributes:
        counted: Growth of every counter of `COUNTED` since the watch began, by name and labels.
        memory: (when, bytes) of all processes together.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._metrics_address: dict[int, str] = {}
        self._last: dict[int, Metrics] = {}
        self.counted: Counted = Counter()
        self.memory: list[tuple[float, int]] = []

    async def __aenter__(self) -> Watch:
        await self.look(from_here=True)
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(PERIOD_S)
            await self.look()

    async def look(self, from_here: bool = False) -> None:
        """Takes counters down now; counts none of what there is if `from_here`."""
        pids = [service.pid for service in self._mesh.services().values() if service.pid]
        self.memory.append((time.monotonic(), sum(map(_rss_bytes, pids))))
        for gateway in self._mesh.of_kind("gateway"):
            with suppress(OSError, grpc.aio.AioRpcError):
                now = await self.metrics(gateway)
                last = self._last.get(gateway.pid, now if from_here else {})
                self._last[gateway.pid] = now
                for key, value in now.items():
                    if key[0] in COUNTED:
                        self.counted[key] += value - last.get(key, 0.0)  # type: ignore[assignment]

    def expert_calls(self, since: Counted) -> Mapping[str, float]:
        """Calls to experts by why they were made (first, retry or hedge), beyond those counted before."""
        calls: Counter[str] = Counter()
        for (name, labels), value in (self.counted - since).items():
            has = dict(labels)
            if name == "expertmesh_calls_total" and has["service"].startswith("expert"):
                calls[has["why"]] += value  # type: ignore[assignment]
        return calls

    async def sequences(self) -> int:
        """Sequences that hold blocks in gating, in all."""
        found = await asyncio.gather(*(self.metrics(service) for service in self._mesh.of_kind("gating")))
        return sum(int(metrics["expertmesh_kv_sequences", frozenset()]) for metrics in found)

    async def vitals(self) -> dict[str, Vitals]:
        """What every process holds now, by name; one that does not answer is left out."""
        services = list(self._mesh.services().values())
        found = await asyncio.gather(*(self._vitals(service) for service in services))
        return {service.name: one for service, one in zip(services, found, strict=True) if one is not None}

    async def _vitals(self, service: Service) -> Vitals | None:
        try:
            metrics = await self.metrics(service)
            descriptors = len(os.listdir(f"/proc/{service.pid}/fd"))
            rss_bytes = _rss_bytes(service.pid)
        except (OSError, grpc.aio.AioRpcError):
            return None
        blocks = metrics.get(("expertmesh_kv_blocks", frozenset({("state", "used")})))
        tasks = int(metrics["expertmesh_tasks", frozenset()])
        return Vitals(service.pid, rss_bytes, descriptors, tasks, None if blocks is None else int(blocks))

    async def metrics(self, service: Service) -> Metrics:
        """Every metric of a process.

        Raises:
            OSError: It does not answer.
        """
        address = self._metrics_address.get(service.pid)
        if address is None:
            address = await self._find_metrics(service)
            self._metrics_address[service.pid] = address
        return parse_metrics(await asyncio.to_thread(_read, address))

    async def _find_metrics(self, service: Service) -> str:
        async with open_channel(service.address) as channel:
            described = await DescriptionServiceStub(channel).Describe(DescribeRequest(), timeout=ASK_TIMEOUT_S)
        return described.metrics_address or self._mesh.http_of(service)


def _read(address: str) -> str:
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=ASK_TIMEOUT_S) as reply:
        text: str = reply.read().decode()
    return text


def _rss_bytes(pid: int) -> int:
    """Resident memory of a process, in bytes; 0 for one that is gone."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")
