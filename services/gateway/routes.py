"""Which way a call goes: the mesh, or the full model when its contract allows and the mesh cannot."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from expertmesh.errors import CorruptReply, MeshError, NotFinite
from expertmesh.rpc.deadline import Deadline
from expertmesh.rpc.origin import Origin
from expertmesh.serving.batcher import Batcher, Limits
from expertmesh.serving.inspection import Trace
from expertmesh.serving.passes import Answer, are_exact
from expertmesh.v1.inference_pb2 import (
    ROUTE_FULL_MODEL,
    Classification,
    ClassifyRequest,
    ClassifyResponse,
    Contract,
    Route,
)
from expertmesh.v1.inspection_pb2 import InspectRequest, InspectResponse

from .expert_calls import Absence
from .mesh import Mesh
from .mesh_pass import MeshPass
from .ways import FAILURES, Way, Ways, refuse, told


class RoutedClassifier:
    """Answers texts through the mesh, or the full model, and says which.

    Args:
        mesh: The services.
        limits: How much is taken on.
    """

    def __init__(self, mesh: Mesh, limits: Limits) -> None:
        self._mesh = mesh
        self._batcher: Batcher[str, Answer] = Batcher(self._run_pass, limits, len)
        self._degraded: Batcher[str, Answer] = Batcher(self._run_degraded, limits, len)

    async def classify(
        self, texts: Sequence[str], contract: Contract, route: Route, deadline: Deadline
    ) -> list[Answer]:
        """Answers texts, in their order.

        Texts that may be answered without dead experts have passes of their own, which are entered only where every
        exact way failed; so nobody else's pass lacks an expert.

        Raises:
            Unavailable: No route that the contract allows has every stage; names the stage or expert.
            MeshError: A text, or the way it went, failed.
        """
        ways = Ways(self._mesh, contract, route)
        while True:
            try:
                match ways.now:
                    case Way.MESH:
                        return await self._batcher.submit(texts, deadline)
                    case Way.FULL_MODEL:
                        answers = await self._by_full_model(texts, deadline)
                        ways.served()
                        return answers
                    case Way.DEGRADED:
                        return await self._degraded.submit(texts, deadline)
            except FAILURES as error:
                ways.turn(error)

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
        return await self._finite(texts, deadline, degrades=False)

    async def _run_degraded(self, texts: list[str], deadline: Deadline) -> Sequence[Answer | MeshError]:
        return await self._finite(texts, deadline, degrades=True)

    async def _finite(self, texts: list[str], deadline: Deadline, degrades: bool) -> Sequence[Answer | MeshError]:
        """One pass; where it gives nothing finite, whoever is at fault for that is found: a replica, or a text."""
        try:
            return await self._through_mesh(texts, deadline, degrades)
        except NotFinite as error:
            if len(texts) > 1 and not error.is_agreed:
                await self._judge(texts, error, deadline)
            return await self._divided(texts, error, deadline, degrades)

    async def _through_mesh(self, texts: list[str], deadline: Deadline, degrades: bool) -> Sequence[Answer | MeshError]:
        return await MeshPass(self._mesh, deadline, absence=Absence.of(degrades, len(texts))).run(texts)

    async def _judge(self, texts: Sequence[str], error: NotFinite, deadline: Deadline) -> None:
        """Asks the full model, which gives the same bits, about texts of which nothing finite came.

        Raises:
            Unavailable: What it gives is finite, so the mesh was wrong; whoever computed that is refused.
        """
        if not self._mesh.has_full_model:
            return
        try:
            await self._by_full_model(texts, deadline)
        except MeshError:
            return
        refuse(error)
        raise told(error)

    async def _divided(
        self, texts: list[str], error: NotFinite, deadline: Deadline, degrades: bool
    ) -> list[Answer | MeshError]:
        """Finds the texts of which nothing finite comes, so that nobody else has to suffer for them."""
        if len(texts) == 1:
            return [error]
        answers: list[Answer | MeshError] = []
        for half in (texts[: len(texts) // 2], texts[len(texts) // 2 :]):
            try:
                answers += await self._through_mesh(half, deadline, degrades)
            except NotFinite as still:
                answers += await self._divided(half, still, deadline, degrades)
        return answers

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
