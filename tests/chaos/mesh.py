"""The mesh that is broken: `expertmesh up` in a process of its own, which starts again what dies."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Self

import grpc
import grpc.aio
import tomli_w
from grpc_health.v1 import health_pb2, health_pb2_grpc

from expertmesh.rpc.channel import open_channel
from tests.chaos.samples import AGNEWS, ROOT

START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 40.0


@dataclass(frozen=True)
class Layout:
    """What mesh is wanted.

    Attributes:
        model: Folder of the split model.
        replicas: By service or kind.
        expert_services: Over how many services experts are spread.
        full_model: Whether there is one.
        simulate: By service or kind, as `Options.simulate`.
        proxies: Replicas that the gateway reaches through a proxy, as `SERVICE.REPLICA`.
        settings: Of all services, by name, as the environment tells them.
    """

    model: Path = AGNEWS
    replicas: Mapping[str, int] = field(default_factory=dict)
    expert_services: int = 0
    full_model: bool = True
    simulate: Mapping[str, str] = field(default_factory=dict)
    proxies: Sequence[str] = ()
    settings: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Service:
    """A process as `up` has written it down; `pid` 0 for one that does not run."""

    name: str
    service: str
    kind: str
    address: str
    pid: int
    restarts: int


class Mesh:
    """A running mesh with a folder of its own; an async context manager.

    Args:
        layout: What is wanted.

    Attributes:
        run_dir: Its folder.
        process: `up`.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.run_dir = Path(tempfile.mkdtemp(prefix="em-"))
        self.process: asyncio.subprocess.Process

    def listens(self, name: str) -> str:
        """Where a replica that was planned listens."""
        return f"unix:{self.run_dir / name}.sock"

    def proxy_of(self, name: str) -> str:
        """Where the proxy before a replica listens."""
        return f"unix:{self.run_dir / name}.proxy"

    async def __aenter__(self) -> Self:
        layout = self.layout
        extras = self.run_dir / "extras.toml"
        proxies = {self.listens(name): self.proxy_of(name) for name in layout.proxies}
        extras.write_text(tomli_w.dumps({"simulate": dict(layout.simulate), "proxies": proxies}))
        command = [
            sys.executable, "-m", "tests.chaos.house", str(extras),
            "up", str(layout.model), "--run-dir", str(self.run_dir), "--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0",
            "--faults", "--expert-services", str(layout.expert_services),
            "--full-model" if layout.full_model else "--no-full-model",
        ]  # fmt: skip
        for name, replicas in layout.replicas.items():
            command += ["--replicas", f"{name}={replicas}"]
        settings = {f"EXPERTMESH_{name.upper()}": str(value) for name, value in layout.settings.items()}
        with (self.run_dir / "up.log").open("wb") as log:
            self.process = await asyncio.create_subprocess_exec(
                *command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, env={**os.environ, **settings}
            )
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                await self._started()
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        if self.process.returncode is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(STOP_TIMEOUT_S):
                await self.process.wait()
        finally:
            if self.process.returncode is None:
                self.process.kill()  # its nursery and services end with it
                await self.process.wait()
            shutil.rmtree(self.run_dir, ignore_errors=True)

    def services(self) -> dict[str, Service]:
        """Every process by name, as it is now."""
        known = [entry.name for entry in fields(Service)][1:]
        processes = self._state()["processes"].items()
        return {name: Service(name, *(plain[key] for key in known)) for name, plain in processes}

    def of_kind(self, kind: str) -> list[Service]:
        """Every process of a kind."""
        return [service for service in self.services().values() if service.kind == kind]

    @property
    def gateways(self) -> list[str]:
        """gRPC addresses of the gateways."""
        return [service.address for service in self.of_kind("gateway")]

    def http_of(self, gateway: Service) -> str:
        """Address of a gateway's HTTP side."""
        state = self._state()
        sides: dict[str, str] = dict(zip(state["grpc"].split(","), state["http"].split(","), strict=True))
        return sides[gateway.address]

    def log(self, name: str) -> str:
        """What a process has logged."""
        return (self.run_dir / "logs" / f"{name}.log").read_text()

    async def command(self, *arguments: str, timeout_s: float = 180.0) -> str:
        """Runs a verb of `expertmesh` on this mesh; gives what it printed.

        Raises:
            RuntimeError: It failed.
        """
        verb, *rest = arguments
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "expertmesh.cli.main", verb, *rest, "--run-dir", str(self.run_dir),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=ROOT,
        )  # fmt: skip
        async with asyncio.timeout(timeout_s):
            printed, _ = await process.communicate()
        if process.returncode:
            raise RuntimeError(f"expertmesh {' '.join(arguments)}: {printed.decode()[-500:]}")
        return printed.decode()

    async def until_whole(self, timeout_s: float = 60.0) -> None:
        """Waits until every process runs and says that it serves."""
        async with asyncio.timeout(timeout_s):
            while not await self._is_whole():
                await asyncio.sleep(0.05)

    async def _is_whole(self) -> bool:
        services = self.services().values()
        return all(service.pid for service in services) and all(
            await asyncio.gather(*(is_serving(service.address) for service in services))
        )

    async def _started(self) -> None:
        log = self.run_dir / "up.log"
        while "\nready:" not in log.read_text():
            if self.process.returncode is not None:
                raise RuntimeError(f"up did not start: {log.read_text()}")
            await asyncio.sleep(0.05)

    def _state(self) -> dict[str, Any]:
        state: dict[str, Any] = json.loads((self.run_dir / "up.json").read_text())
        return state


async def is_serving(address: str) -> bool:
    """Whether a process says so, at once."""
    async with open_channel(address) as channel:
        try:
            reply = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=2.0)
        except grpc.aio.AioRpcError:
            return False
    return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)
