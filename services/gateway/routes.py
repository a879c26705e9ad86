"""Which way a call goes: the mesh, or the full model when its contract allows and the mesh cannot."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np

from expertmesh.errors import CorruptReply, MeshError, Unavailable
from expertmesh.rpc.deadline import Deadline
from expertmesh.rpc.origin import Origin
from expertmesh.serving.batcher import Batcher, Limits
from expertmesh.serving.inspection import Trace
from expertmesh.serving.passes import Answer, are_exact
from expertmesh.telemetry import metrics
from expertmesh.telemetry.logging import event
from expertmesh.v1.inference_pb2 import (
    CONTRACT_MESH_ONLY,
    ROUTE_FULL_MODEL,
    Classification,
    ClassifyRequest,
    ClassifyResponse,
    Contract,
    Route,
)
from expertmesh.v1.inspection_pb2 import InspectRequest, InspectResponse

from .mesh import Mesh
from .mesh_pass import MeshPass


class RoutedClassifier:
    """Answers texts through the mesh, or the full model, and says which.

    Args:
        mesh: The services.
        limits: How much is taken on.
    """

    def __init__(self, mesh: Mesh, limits: Limits) -> None:
        self._mesh = mesh
        self._batcher: Batcher[str, Answer] = Batcher(self._run_pass, limits, len)

    async def classify(
        self, texts: Sequence[str], contract: Contract, route: Route, deadline: Deadline
    ) -> list[Answer]:
        """Answers texts, in their order.

        `CONTRACT_DEGRADED_OK` is served as `CONTRACT_EXACT`: an answer that is exact satisfies it.

        Raises:
            Unavailable: No route that the contract allows has every stage; names the stage or expert.
            MeshError: A text, or the way it went, failed.
        """
        if route == ROUTE_FULL_MODEL:
            return await self._by_full_model(texts, deadline)
        try:
            return await self._batcher.submit(texts, deadline)
        except (Unavailable, CorruptReply) as error:
            if contract == CONTRACT_MESH_ONLY or not self._mesh.has_full_model:
                raise
            stage = error.stage if isinstance(error, Unavailable) else "corrupt"
            metrics.FALLBACKS.labels(stage).inc()
            event("fallback", level=logging.WARNING, reason=str(error), texts=len(texts))
            return await self._by_full_model(texts, deadline)

    async def inspect(self, request: InspectRequest, deadline: Deadline) -> InspectResponse:
        """Gives the trace of one text by the route that is asked for, and by no other."""
        if request.route == ROUTE_FULL_MODEL:
            return await self._mesh.require_full_model().call("Inspect", request, deadline, lambda reply, _: reply)
        trace = Trace()
        for answer in await MeshPass(self._mesh, deadline, trace.observe).run([request.text]):
            if isinstance(answer, MeshError):
                raise answer
        return trace.response

    async def _run_pass(self, texts: list[str], deadline: Deadline) -> Sequence[Answer | MeshError]:
        return await MeshPass(self._mesh, deadline).run(texts)

    def _check(self, result: Classification) -> None:
        labels = self._mesh.manifest.spec.head.labels
        scores = np.array([*result.probabilities, *result.logits])
        if (
            len(result.probabilities) != len(labels)
            or len(result.logits) != len(labels)
            or not np.isfinite(scores).all()
        ):
            raise CorruptReply("a result has not one finite score for each class")
        if result.label != labels[int(np.argmax(result.probabilities))]:
            raise CorruptReply("a label is not that of the highest probability")

    async def _by_full_model(self, texts: Sequence[str], deadline: Deadline) -> list[Answer]:
        def read(reply: ClassifyResponse, origin: Origin) -> list[Answer]:
            if len(reply.results) != len(texts):
                raise CorruptReply("it has not one result for each text")
            for result in reply.results:
                self._check(result)
                result.route = ROUTE_FULL_MODEL
                result.profile = origin.profile
                result.exact = are_exact({origin.profile})
            return [Answer(result, reply.timings) for result in reply.results]

        request = ClassifyRequest(texts=texts, route=ROUTE_FULL_MODEL, include_experts=True)
        return await self._mesh.require_full_model().call("Classify", request, deadline, read)
