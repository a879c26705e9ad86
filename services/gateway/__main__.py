"""Starts the gateway: `python -m services.gateway --mesh MESH.toml --listen ADDRESS`. It imports no torch."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from expertmesh import __version__
from expertmesh.checkpoint.manifest import Manifest
from expertmesh.mesh_file import MeshFile
from expertmesh.rpc.server import Program, Servicer, main_guard, run
from expertmesh.rpc.settings import Settings, check, parse_host_port, read_settings, setting
from expertmesh.serving.batcher import Limits
from expertmesh.serving.generator import Generator
from expertmesh.serving.inference import InferenceServicer
from expertmesh.serving.inspection import InspectionServicer
from expertmesh.serving.rebuilds import RebuildLimits
from expertmesh.serving.scheduler import StepLimits
from expertmesh.telemetry.logging import event
from expertmesh.telemetry.tracing import Tracing
from expertmesh.v1.description_pb2 import DescribeResponse
from expertmesh.wire import ROW_DTYPES

from .language import RoutedTokenizing, RoutedTokens
from .mesh import Mesh
from .mesh_watch import MeshWatch
from .open_inference import OpenInferenceServicer
from .routes import RoutedClassifier
from .web.application import application, serve


@dataclass(frozen=True)
class GatewaySettings(Settings):
    """What the gateway can be told."""

    mesh: Path = setting("the mesh file: which services there are, and where", Path("mesh.toml"))
    model: str = setting("folder of the split model; the mesh file's own by default", "")
    http: str = setting("HTTP address: HOST:PORT (port 0: a free one); empty for none", "127.0.0.1:0")
    inspect: bool = setting("offer InspectionService, which shows hidden states", False)
    pass_texts: int = setting("most texts that share a pass", 64)
    passes: int = setting("passes under way at once; 0 finds out how many are fastest", 0)
    waiting_texts: int = setting("most texts that wait; more are refused", 8192)
    step_rows: int = setting("most token rows that share a step of generation", 256)
    step_sequences: int = setting("most sequences that generate at once at one gating replica", 128)
    micro_batches: int = setting("steps under way at once at one gating replica; 0 finds out how many are fastest", 0)
    rebuild_rows: int = setting(
        "token rows a second of sequences that are computed anew, once their KV cache was lost; 0 for no limit", 4096
    )
    rebuild_tokens: int = setting("tokens of the longest sequence that is computed anew; 0 for the model's context", 0)
    wire_dtype: str = setting(
        "what rows travel to experts in: float32, float16 or bfloat16; by default the model's own, which is exact", ""
    )
    shared_apart: str = setting(
        "on: shared experts run while the routed ones do, for one more call a layer; off: before them; auto: on if"
        " gating has a device of its own",
        "auto",
    )
    resolve_s: float = setting("seconds after which DNS names in the mesh file are looked up again", 2.0)
    settle_s: float = setting("after a start, seconds to wait for replicas that are not there yet", 10.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.http:
            parse_host_port(self.http, "http")
        check(self.pass_texts >= 1, "pass_texts must be at least 1")
        check(self.passes >= 0, "passes must be at least 0")
        check(self.waiting_texts >= 1, "waiting_texts must be at least 1")
        check(self.step_rows >= 1, "step_rows must be at least 1")
        check(self.step_sequences >= 1, "step_sequences must be at least 1")
        check(self.micro_batches >= 0, "micro_batches must be at least 0")
        check(self.rebuild_rows >= 0, "rebuild_rows must be at least 0")
        check(self.rebuild_tokens >= 0, "rebuild_tokens must be at least 0")
        known = ", ".join(ROW_DTYPES)
        check(self.wire_dtype in ("", *ROW_DTYPES), f"wire_dtype {self.wire_dtype!r} is not one of {known}")
        check(self.shared_apart in ("auto", "on", "off"), f"shared_apart {self.shared_apart!r} is not auto, on or off")
        check(0.1 <= self.resolve_s <= 3600, "resolve_s must be in [0.1, 3600]")
        check(0 <= self.settle_s <= 3600, "settle_s must be in [0, 3600]")


def load(settings: GatewaySettings, tracing: Tracing) -> Program:
    """Reads the mesh file and the manifest, and connects to the services while it runs."""
    mesh_file = MeshFile.read(settings.mesh)
    manifest = Manifest.read(Path(settings.model or mesh_file.model))
    mesh = Mesh(
        mesh_file,
        manifest,
        settings.max_message_bytes,
        tracing,
        settings.settle_s,
        settings.wire_dtype,
        settings.shared_apart,
        settings.resolve_s,
    )
    watch = MeshWatch(settings.mesh, mesh_file, mesh)
    offer = (_language if manifest.spec.generates else _classifier)(settings, mesh)
    app = application(
        offer.inference,
        lambda: mesh.is_ready,
        manifest.name,
        int(time.time()),
        manifest.spec.context,
        offer.inference.token_texts,
    )

    @asynccontextmanager
    async def lifespan() -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(mesh)
            stack.callback(offer.close)
            await stack.enter_async_context(watch.watching())
            if settings.http:
                address = await stack.enter_async_context(serve(app, settings.http))
                event("http_ready", address=address)
            yield

    description = DescribeResponse(kind="gateway", model_digest=manifest.digest, version=__version__)
    return Program(offer.servicers, description, lifespan(), lambda: mesh.is_ready, mesh.drain)


@dataclass(frozen=True)
class _Offer:
    """What a gateway offers, which depends on what its model does."""

    inference: InferenceServicer
    servicers: list[Servicer]
    close: Callable[[], None] = lambda: None


def _classifier(settings: GatewaySettings, mesh: Mesh) -> _Offer:
    limits = Limits(pass_texts=settings.pass_texts, passes=settings.passes, waiting_texts=settings.waiting_texts)
    classifier = RoutedClassifier(mesh, limits)
    inference = InferenceServicer(mesh.manifest.spec, classifier)
    servicers = [
        inference.registration(),
        OpenInferenceServicer(mesh.manifest, inference, lambda: mesh.is_ready).registration(),
    ]
    if settings.inspect:
        servicers.append(InspectionServicer(classifier.inspect).registration())
    return _Offer(inference, servicers)


def _language(settings: GatewaySettings, mesh: Mesh) -> _Offer:
    limits = StepLimits(
        settings.step_rows,
        settings.step_sequences,
        settings.waiting_texts,
        settings.micro_batches,
        RebuildLimits(settings.rebuild_rows, settings.rebuild_tokens),
    )
    tokens = RoutedTokens(mesh, limits)
    generator = Generator(mesh.manifest.spec, tokens, RoutedTokenizing(mesh))
    inference = InferenceServicer(mesh.manifest.spec, generator=generator)
    servicers = [inference.registration()]
    if settings.inspect:
        servicers.append(InspectionServicer(tokens.inspect).registration())
    return _Offer(inference, servicers, tokens.close)


def main(arguments: list[str]) -> int:
    """Runs the program until it is stopped; gives its exit status."""
    return run(read_settings(GatewaySettings, "gateway", arguments), "gateway", load)


if __name__ == "__main__":
    main_guard(main)
