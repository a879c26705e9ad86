"""Starts the gateway: `python -m services.gateway --mesh MESH.toml --listen ADDRESS`. It imports no torch."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from expertmesh import __version__
from expertmesh.checkpoint.manifest import Manifest
from expertmesh.mesh_file import MeshFile
from expertmesh.rpc.server import Program, main_guard, run
from expertmesh.rpc.settings import Settings, check, parse_host_port, read_settings, setting
from expertmesh.serving.batcher import Limits
from expertmesh.serving.inference import InferenceServicer
from expertmesh.serving.inspection import InspectionServicer
from expertmesh.telemetry.logging import event
from expertmesh.telemetry.tracing import Tracing
from expertmesh.v1.description_pb2 import DescribeResponse

from .http import application, serve
from .mesh import Mesh
from .open_inference import OpenInferenceServicer
from .routes import RoutedClassifier


@dataclass(frozen=True)
class GatewaySettings(Settings):
    """What the gateway can be told."""

    mesh: Path = setting("the mesh file: which services there are, and where", Path("mesh.toml"))
    model: str = setting("folder of the split model; the mesh file's own by default", "")
    http: str = setting("HTTP address: HOST:PORT (port 0: a free one); empty for none", "127.0.0.1:0")
    inspect: bool = setting("offer InspectionService, which shows hidden states", False)
    pass_texts: int = setting("most texts that share a pass", 64)
    passes: int = setting("most passes under way at once; 1 shares most, more overlap on devices of their own", 1)
    waiting_texts: int = setting("most texts that wait; more are refused", 8192)
    settle_s: float = setting("after a start, seconds to wait for replicas that are not there yet", 10.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.http:
            parse_host_port(self.http, "http")
        check(self.pass_texts >= 1, "pass_texts must be at least 1")
        check(self.passes >= 1, "passes must be at least 1")
        check(self.waiting_texts >= 1, "waiting_texts must be at least 1")
        check(0 <= self.settle_s <= 3600, "settle_s must be in [0, 3600]")


def load(settings: GatewaySettings, tracing: Tracing) -> Program:
    """Reads the mesh file and the manifest, and connects to the services while it runs."""
    mesh_file = MeshFile.read(settings.mesh)
    manifest = Manifest.read(Path(settings.model or mesh_file.model))
    mesh = Mesh(mesh_file, manifest, settings.max_message_bytes, tracing, settings.settle_s)
    classifier = RoutedClassifier(
        mesh, Limits(pass_texts=settings.pass_texts, passes=settings.passes, waiting_texts=settings.waiting_texts)
    )
    inference = InferenceServicer(manifest.spec, classifier)

    def is_ready() -> bool:
        return mesh.is_ready

    def drain() -> None:
        mesh.draining = True

    @asynccontextmanager
    async def lifespan() -> AsyncIterator[None]:
        async with mesh:
            if not settings.http:
                yield
                return
            async with serve(application(inference, is_ready), settings.http) as address:
                event("http_ready", address=address)
                yield

    registrations = [
        inference.registration(),
        OpenInferenceServicer(manifest, inference, is_ready).registration(),
    ]
    if settings.inspect:
        registrations.append(InspectionServicer(classifier.inspect).registration())
    description = DescribeResponse(kind="gateway", model_digest=manifest.digest, version=__version__)
    return Program(registrations, description, lifespan(), is_ready, drain)


def main(arguments: list[str]) -> int:
    """Runs the program until it is stopped; gives its exit status."""
    return run(read_settings(GatewaySettings, "gateway", arguments), "gateway", load)


if __name__ == "__main__":
    main_guard(main)
