"""The services of a mesh as the gateway sees them: one replica set a service, and who holds which expert."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from contextlib import AsyncExitStack
from functools import partial
from types import TracebackType
from typing import Self

import grpc.aio

from expertmesh import wire
from expertmesh.checkpoint import manifest as names
from expertmesh.checkpoint.manifest import Manifest
from expertmesh.errors import SetupError, Unavailable
from expertmesh.mesh_file import MeshFile, Service, parse_experts
from expertmesh.rpc.channel import open_channel
from expertmesh.rpc.link.channel import LinkChannel
from expertmesh.rpc.replica import ReplicaEvent, require_parts
from expertmesh.rpc.replicas import ReplicaSet
from expertmesh.telemetry import metrics
from expertmesh.telemetry.logging import event
from expertmesh.telemetry.tracing import Tracing
from expertmesh.v1.classifier_pb2_grpc import ClassifierServiceStub
from expertmesh.v1.embedding_pb2_grpc import EmbeddingServiceStub
from expertmesh.v1.expert_pb2_grpc import ExpertServiceStub
from expertmesh.v1.gating_pb2_grpc import GatingServiceStub
from expertmesh.v1.inference_pb2_grpc import InferenceServiceStub
from expertmesh.v1.inspection_pb2_grpc import InspectionServiceStub
from expertmesh.v1.tokenizer_pb2_grpc import TokenizerServiceStub

ANSWER_CALLERS = ("tokenizer", "full_model")  # what they refuse is the caller's text; other requests are the mesh's own
MESSAGE_MARGIN_BYTES = 64 * 2**10  # for what a message has beside its rows
PLACE_BYTES = 64  # of where a row belongs in the KV cache


class FullModelStub:
    """The gRPC services of a full model behind one name."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        inference, tokenizer = InferenceServiceStub(channel), TokenizerServiceStub(channel)
        self.Classify, self.Generate = inference.Classify, inference.Generate
        self.Inspect = InspectionServiceStub(channel).Inspect
        self.EncodePrompt, self.DecodeBatch = tokenizer.EncodePrompt, tokenizer.DecodeBatch


_STUBS = {
    "tokenizer": TokenizerServiceStub,
    "embedding": EmbeddingServiceStub,
    "gating": GatingServiceStub,
    "expert": ExpertServiceStub,
    "classifier": ClassifierServiceStub,
    "full_model": FullModelStub,
}


class Mesh:
    """Every service that the mesh file names. Use as an async context manager.

    Args:
        mesh_file: Which services there are, and where.
        manifest: What they must hold.
        max_message_bytes: Largest message accepted.
        tracing: Carries trace context on every call.
        settle_s: After a start, how long to wait for replicas that are not there yet before saying ready without them.
        shared_apart: "on" if shared experts run while the routed ones do, "off" if before them; "auto": apart where
            gating has a device of its own.
        wire_dtype: What rows travel to experts in and back, of `wire.ROW_DTYPES`; empty for the model's own dtype.

    Raises:
        SetupError: A stage, or an expert of the model, is in no service; or a single stage is in two.
    """

    def __init__(
        self,
        mesh_file: MeshFile,
        manifest: Manifest,
        max_message_bytes: int,
        tracing: Tracing,
        settle_s: float,
        wire_dtype: str = "",
        shared_apart: str = "auto",
    ) -> None:
        self._shared_apart = shared_apart
        self.manifest = manifest
        self.wire_dtype = wire.ROW_DTYPES[wire_dtype or manifest.spec.dtype]
        self.narrows = wire_dtype not in ("", "float32", manifest.spec.dtype)
        self.message_bytes = max_message_bytes - min(MESSAGE_MARGIN_BYTES, max_message_bytes // 2)
        self.message_rows = max(1, self.message_bytes // (4 * manifest.spec.width))
        gated_bytes = 8 * manifest.spec.width + 8 * manifest.spec.router.top_k + PLACE_BYTES
        self.step_rows = max(1, self.message_bytes // gated_bytes)
        self._connect = partial(open_channel, max_message_bytes=max_message_bytes, tracing=tracing)
        self._link = partial(LinkChannel, tracing=tracing, max_message_bytes=max_message_bytes)
        self.tokenizer = self._single(mesh_file, "tokenizer", manifest.tokenizer_parts())
        self.embedding = self._single(mesh_file, "embedding", [names.embedding_part()])
        self.gating = self._single(mesh_file, "gating", map(names.gating_part, range(manifest.spec.layers)))
        self.classifier = self._single(mesh_file, "classifier", [names.classifier_part()])
        self.full_model: ReplicaSet | None = None
        if mesh_file.of_kind("full_model"):
            self.full_model = self._single(mesh_file, "full_model", manifest.parts)
        self.experts: list[ReplicaSet] = []
        self._pair2services: dict[tuple[int, int], list[ReplicaSet]] = {}
        for service in mesh_file.of_kind("expert"):
            self._add_experts(service)
        self._check_experts()
        self.draining = False
        self.on_change: Callable[[], None] = lambda: None  # whoever waits for replicas looks again
        self._settled = False
        self._settle_s = settle_s
        self._settle_at_s = 0.0

    async def __aenter__(self) -> Self:
        """Starts to follow every replica."""
        self._stack = AsyncExitStack()
        self._settle_at_s = time.monotonic() + self._settle_s
        for replicas in self.all():
            await self._stack.enter_async_context(replicas)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Closes every channel."""
        await self._stack.aclose()

    def all(self) -> list[ReplicaSet]:
        """Every service, in the order of a request."""
        stages = [self.tokenizer, self.embedding, self.gating, *self.experts, self.classifier]
        return stages if self.full_model is None else [*stages, self.full_model]

    def holder(self, layer: int, expert: int) -> ReplicaSet:
        """The service to ask for an expert: of those that hold it, one that has live replicas.

        Raises:
            Unavailable: None has; names the layer and the expert.
        """
        services = self._pair2services[layer, expert]
        for service in services:
            if service.live:
                return service
        raise expert_unavailable(services[0].unavailable(), layer, expert)

    def require_complete(self) -> None:
        """Checks that every stage and every expert has a live replica, before anything is computed in vain.

        Raises:
            Unavailable: Names the first that has none.
        """
        for stage in (self.tokenizer, self.embedding, self.gating, self.classifier):
            if not stage.live:
                raise stage.unavailable()
        for layer, expert in self._pair2services:
            self.holder(layer, expert)

    @property
    def is_complete(self) -> bool:
        """Whether the mesh route can serve."""
        try:
            self.require_complete()
        except Unavailable:
            return False
        return True

    @property
    def is_ready(self) -> bool:
        """Whether calls are welcome and some route can serve.

        After a start it waits until every replica was met, or `settle_s` have passed.
        """
        if not self._settled:
            everyone_is_met = all(len(replicas.live) == len(replicas.replicas) for replicas in self.all())
            self._settled = everyone_is_met or time.monotonic() > self._settle_at_s
        return not self.draining and self._settled and (self.is_complete or self.has_full_model)

    @property
    def shared_apart(self) -> bool:
        """Whether shared experts are asked together with the routed ones: a call more, for work at the same time."""
        if self._shared_apart == "auto":
            return any(replica.description.device not in ("", "cpu") for replica in self.gating.live)
        return self._shared_apart == "on"

    @property
    def reference_profiles(self) -> set[str]:
        """The numeric profiles of the full model, whose answers are what exact means."""
        return set() if self.full_model is None else {one.description.profile for one in self.full_model.live}

    @property
    def has_full_model(self) -> bool:
        """Whether there is a full model to fall back on just now."""
        return self.full_model is not None and bool(self.full_model.live)

    def require_full_model(self) -> ReplicaSet:
        """The full model.

        Raises:
            Unavailable: This mesh has none.
        """
        if self.full_model is None:
            raise Unavailable("this mesh has no full_model service", "full_model")
        return self.full_model

    def expert_digest(self, layer: int, expert: int) -> bytes:
        """The digest that an expert's reply must carry."""
        return self.manifest.parts[names.expert_part(layer, expert)].digest

    def _single(self, mesh_file: MeshFile, kind: str, parts: Iterable[str]) -> ReplicaSet:
        services = mesh_file.of_kind(kind)
        if len(services) != 1:
            raise SetupError(f"the mesh file must have one service of kind {kind}, not {len(services)}")
        return self._replica_set(services[0], parts)

    def _add_experts(self, service: Service) -> None:
        spec = self.manifest.spec
        pairs = parse_experts(service.experts, spec.sparse_layers, spec.router.experts)
        replicas = self._replica_set(service, [names.expert_part(*pair) for pair in pairs])
        self.experts.append(replicas)
        for pair in pairs:
            self._pair2services.setdefault(pair, []).append(replicas)

    def _check_experts(self) -> None:
        spec = self.manifest.spec
        for layer in spec.sparse_layers:
            for expert in range(spec.router.experts):
                if (layer, expert) not in self._pair2services:
                    raise SetupError(f"no service of the mesh file holds expert {expert} of layer {layer}")

    def _replica_set(self, service: Service, parts: Iterable[str]) -> ReplicaSet:
        digests = {name: self.manifest.parts[name].digest for name in parts}
        return ReplicaSet(
            service.name,
            service.replicas,
            self._connect,
            _STUBS[service.kind],
            partial(require_parts, kind=service.kind, model_digest=self.manifest.digest, parts=digests),
            self._follow_event,
            refusals_are_faults=service.kind not in ANSWER_CALLERS,
            open_link=self._link,
        )

    def drain(self) -> None:
        """Takes nothing on any more."""
        self.draining = True
        self.on_change()

    def _follow_event(self, happened: ReplicaEvent) -> None:
        metrics.REPLICA_EVENTS.labels(happened.service, happened.what).inc()
        for replicas in self.all():
            metrics.REPLICAS_LIVE.labels(replicas.name).set(len(replicas.live))
        level = logging.INFO if happened.what in ("live", "retried", "returned") else logging.WARNING
        event(
            f"replica_{happened.what}",
            level=level,
            replica_of=happened.service,
            address=happened.address,
            reason=happened.reason,
        )
        self.on_change()


def expert_unavailable(error: Unavailable, layer: int, expert: int) -> Unavailable:
    """An expert service's unavailability, named by layer and expert."""
    return Unavailable(f"expert {expert} of layer {layer}: {error}", error.stage, layer, expert)
