"""The services of a mesh as the gateway sees them: one replica set a service, and whom to ask for which expert.

They follow the mesh file while calls are made (`apply`). What is new is met before anything depends on it, and what
left ends in peace.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import Self

from expertmesh import wire
from expertmesh.checkpoint.manifest import Manifest
from expertmesh.errors import Unavailable
from expertmesh.mesh_file import MeshFile
from expertmesh.rpc.alarms import Alarms
from expertmesh.rpc.channel import open_channel
from expertmesh.rpc.link.channel import LinkChannel
from expertmesh.rpc.replicas.admission import require_parts
from expertmesh.rpc.replicas.replica import ReplicaEvent, State
from expertmesh.rpc.replicas.replica_set import ReplicaSet
from expertmesh.rpc.replicas.resolver import Names
from expertmesh.telemetry import metrics
from expertmesh.telemetry.logging import event
from expertmesh.telemetry.tracing import Tracing

from .holders import Holders
from .placement import Placed, Placement
from .stubs import STUBS

ANSWER_CALLERS = ("tokenizer", "full_model")  # what they refuse is the caller's text; other requests are the mesh's own
MESSAGE_MARGIN_BYTES = 64 * 2**10  # for what a message has beside its rows
PLACE_BYTES = 64  # of where a row belongs in the KV cache
ORDERLY = ("live", "retried", "returned", "draining", "left")  # events that nobody need worry about
MEET_TIMEOUT_S = 5.0  # services that are new get so long to be met before what left is let go


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
        resolve_s: How often DNS names are looked up.

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
        resolve_s: float = 2.0,
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
        self._names = partial(Names, every_s=resolve_s)
        self.alarms = Alarms()  # tell that one of several calls is late
        self.on_change: Callable[[], None] = lambda: None  # whoever waits for replicas looks again
        self.draining = False
        self._settled = False
        self._settle_s = settle_s
        self._settle_at_s = 0.0
        self._leaves: set[asyncio.Task[None]] = set()
        self._happened = asyncio.Event()
        self._placement = Placement.of(mesh_file, manifest)
        self._name2set = {name: self._replica_set(placed) for name, placed in self._placement.all.items()}
        self._take_places()

    async def __aenter__(self) -> Self:
        """Starts to follow every replica."""
        self._settle_at_s = time.monotonic() + self._settle_s
        for replicas in self.all():
            await replicas.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Closes every channel."""
        self.alarms.close()
        for task in self._leaves:
            task.cancel()
        await asyncio.gather(*self._leaves, return_exceptions=True)
        for replicas in self.all():
            await replicas.__aexit__(None, None, None)

    async def apply(self, mesh_file: MeshFile) -> None:
        """Becomes the mesh that another file of the same model describes.

        Services that are new, or hold something else than before, are met first; then calls go to them.

        Raises:
            SetupError: It does not describe a whole mesh; nothing has changed.
        """
        new, old = Placement.of(mesh_file, self.manifest), self._placement.all
        kept = {name for name, placed in new.all.items() if name in old and placed.is_same(old[name])}
        name2set = {name: self._name2set[name] for name in kept}
        joining = {name: self._replica_set(placed) for name, placed in new.all.items() if name not in kept}
        try:
            for replicas in joining.values():
                await replicas.__aenter__()
            await self._meet(list(joining.values()))
        except BaseException:
            for replicas in joining.values():
                await replicas.__aexit__(None, None, None)
            raise
        leaving = [replicas for name, replicas in self._name2set.items() if name not in kept]
        self._placement, self._name2set = new, name2set | joining
        self._take_places()
        for name in kept:
            self._name2set[name].set_addresses(new.all[name].service.replicas)
        for replicas in leaving:
            task = asyncio.create_task(self._let_go(replicas))
            self._leaves.add(task)
            task.add_done_callback(self._leaves.discard)
        self._tell_live()
        self.on_change()

    def all(self) -> list[ReplicaSet]:
        """Every service, in the order of a request."""
        stages = [self.tokenizer, self.embedding, self.gating, *self.experts, self.classifier]
        return stages if self.full_model is None else [*stages, self.full_model]

    def require_complete(self) -> None:
        """Checks that every stage and every expert has a live replica, before anything is computed in vain.

        Raises:
            Unavailable: Names the first that has none.
        """
        self.require_stages()
        self.holders.require_all()

    def require_stages(self) -> None:
        """Checks that every stage has a live replica; experts do not count.

        Raises:
            Unavailable: Names the first that has none.
        """
        for stage in (self.tokenizer, self.embedding, self.gating, self.classifier):
            if not stage.live:
                raise stage.unavailable()

    @property
    def has_stages(self) -> bool:
        """Whether the mesh route can serve those who can do without some experts."""
        return all(stage.live for stage in (self.tokenizer, self.embedding, self.gating, self.classifier))

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
            everyone_is_met = all(replicas.are_met for replicas in self.all())
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

    def _take_places(self) -> None:
        """Puts every replica set where the placement says."""
        stages = {kind: self._name2set[placed.service.name] for kind, placed in self._placement.stages.items()}
        self.tokenizer, self.embedding = stages["tokenizer"], stages["embedding"]
        self.gating, self.classifier = stages["gating"], stages["classifier"]
        self.full_model = stages.get("full_model")
        self.experts = [self._name2set[placed.service.name] for placed in self._placement.experts]
        placed = zip(self.experts, self._placement.experts, strict=True)
        self.holders = Holders(((replicas, one.pairs) for replicas, one in placed), self.manifest)

    def _replica_set(self, placed: Placed) -> ReplicaSet:
        kind, digests = placed.service.kind, {name: self.manifest.parts[name].digest for name in placed.parts}
        return ReplicaSet(
            placed.service.name,
            placed.service.replicas,
            self._connect,
            STUBS[kind],
            partial(require_parts, kind=kind, model_digest=self.manifest.digest, parts=digests),
            self._follow_event,
            refusals_are_faults=kind not in ANSWER_CALLERS,
            open_link=self._link,
            names=self._names,
        )

    async def _meet(self, joining: Sequence[ReplicaSet]) -> None:
        """Waits until all of some services have a live replica, or for as long as is sensible."""
        with suppress(TimeoutError):
            async with asyncio.timeout(MEET_TIMEOUT_S):
                while not all(replicas.has_live for replicas in joining):
                    self._happened.clear()
                    await self._happened.wait()

    async def _let_go(self, replicas: ReplicaSet) -> None:
        """Ends a service that has left the mesh, and what was counted of it."""
        try:
            await replicas.leave()
        finally:
            await replicas.__aexit__(None, None, None)
            if replicas.name not in self._name2set:
                metrics.forget_service(replicas.name)

    def drain(self) -> None:
        """Takes nothing on any more."""
        self.draining = True
        self.on_change()

    def _follow_event(self, happened: ReplicaEvent) -> None:
        if happened.service in self._name2set:
            metrics.REPLICA_EVENTS.labels(happened.service, happened.what).inc()
        if happened.what == "left":
            metrics.forget_replica(happened.service, happened.address)
        self.holders.look_again()
        self._tell_live()
        self._happened.set()
        level = logging.INFO if happened.what in ORDERLY else logging.WARNING
        event(
            f"replica_{happened.what}",
            level=level,
            replica_of=happened.service,
            address=happened.address,
            reason=happened.reason,
        )
        self.on_change()

    def _tell_live(self) -> None:
        for replicas in self.all():
            metrics.REPLICAS_LIVE.labels(replicas.name).set(sum(one.state is State.LIVE for one in replicas.replicas))
