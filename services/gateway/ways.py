"""The ways that one request may go, one after another, as its contract allows and the mesh can."""

from __future__ import annotations

import logging
from enum import Enum

from expertmesh.errors import CorruptReply, MeshError, NotFinite, Unavailable
from expertmesh.telemetry import metrics
from expertmesh.telemetry.logging import event
from expertmesh.v1.inference_pb2 import (
    CONTRACT_DEGRADED_OK,
    CONTRACT_MESH_ONLY,
    ROUTE_FULL_MODEL,
    Contract,
    Route,
)

from .mesh import Mesh

FAILURES = (Unavailable, CorruptReply)  # of which another way may know nothing
MOST_WAYS = 8  # in a row of which nothing comes, where services come and go all the time


class Way(Enum):
    """How a request may be served."""

    MESH = "mesh"
    FULL_MODEL = "full model"
    DEGRADED = "degraded"


class Ways:
    """Where one request is, and where it goes next.

    Args:
        mesh: The services.
        contract: What the caller wants to happen when a part of the mesh is dead.
        route: What the caller asks for.

    Attributes:
        now: The way to go.
        have_turned: Whether it is another than the first one.
    """

    def __init__(self, mesh: Mesh, contract: Contract, route: Route) -> None:
        self._mesh = mesh
        self._contract = contract
        self._is_fixed = route == ROUTE_FULL_MODEL
        self._left = MOST_WAYS
        self._failed: Unavailable | CorruptReply | None = None  # what the mesh said last, which is what is told
        self.now = Way.FULL_MODEL if self._is_fixed else Way.MESH
        self.have_turned = False

    def turn(self, error: Unavailable | CorruptReply) -> None:
        """Chooses the next way after a failure.

        Raises:
            Unavailable: There is none; names the stage or expert that failed in the mesh.
            NotFinite: There is none, and NaN or infinity is what the model makes of the request: several agree.
        """
        if self._failed is None or self.now is not Way.FULL_MODEL:
            self._failed = error
        elif isinstance(error, NotFinite) and isinstance(self._failed, NotFinite):
            self._failed.is_agreed = True
        self._left -= 1
        following = self._following() if self._left else None
        if following is None:
            raise told(self._failed) from None
        stage = error.stage if isinstance(error, Unavailable) else "corrupt"
        metrics.FALLBACKS.labels(stage).inc()
        event("fallback", level=logging.WARNING, reason=str(error), was=self.now.value, goes=following.value)
        self.now, self.have_turned = following, True

    def served(self) -> None:
        """Something came of the way it goes now, and it is finite."""
        self._left = MOST_WAYS
        if self.now is Way.FULL_MODEL and isinstance(self._failed, NotFinite):
            refuse(self._failed)
            self._failed = Unavailable(str(self._failed), self._failed.stage, self._failed.layer, self._failed.expert)

    def _following(self) -> Way | None:
        if self._is_fixed or (isinstance(self._failed, NotFinite) and self._failed.is_agreed):
            return None
        may_leave = self._contract != CONTRACT_MESH_ONLY
        if may_leave and self.now is not Way.FULL_MODEL and self._mesh.has_full_model:
            return Way.FULL_MODEL
        if self.now is Way.FULL_MODEL and self._mesh.is_complete and not isinstance(self._failed, NotFinite):
            return Way.MESH
        if self._contract == CONTRACT_DEGRADED_OK and self.now is not Way.DEGRADED and self._mesh.has_stages:
            return Way.DEGRADED
        return None


def told(error: MeshError) -> MeshError:
    """What a caller hears of a failure: a wrong reply is a fault of the mesh that may be gone when it is tried again.

    NaN and infinity are told as such only where several agree that these are what the model makes of the request.
    """
    if not isinstance(error, CorruptReply) or (isinstance(error, NotFinite) and error.is_agreed):
        return error
    return Unavailable(str(error), error.stage or "gateway", error.layer, error.expert)


def refuse(error: NotFinite) -> None:
    """Takes whoever computed what is not finite out of the traffic, since the full model's answer is finite."""
    for suspect in error.suspects:
        suspect.refuse("it computed rows that are not finite where the full model's are")
