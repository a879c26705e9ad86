"""`InferenceService`, the same for every program that offers it; they differ in the `Classifier` behind it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Protocol

import grpc.aio

from expertmesh.errors import InvalidInput
from expertmesh.model.spec import ModelSpec
from expertmesh.rpc import request_id as request_ids
from expertmesh.rpc.deadline import Deadline
from expertmesh.rpc.server import Servicer
from expertmesh.serving.passes import Answer
from expertmesh.serving.requests import DEFAULT_TIMEOUT_S, check_classify
from expertmesh.telemetry import metrics
from expertmesh.telemetry.logging import event
from expertmesh.v1 import inference_pb2, inference_pb2_grpc
from expertmesh.v1.inference_pb2 import ClassifyRequest, ClassifyResponse, Contract, Route, StageTiming


class Classifier(Protocol):
    """Answers texts under a contract."""

    async def classify(
        self, texts: Sequence[str], contract: Contract, route: Route, deadline: Deadline
    ) -> list[Answer]:
        """Answers texts, in their order; raises MeshError if one of them cannot be."""


class InferenceServicer(inference_pb2_grpc.InferenceServiceServicer):
    """Checks a request, has it answered, and writes the reply.

    Args:
        spec: The model.
        classifier: What answers.
    """

    def __init__(self, spec: ModelSpec, classifier: Classifier) -> None:
        self._spec = spec
        self._classifier = classifier

    def registration(self) -> Servicer:
        """How this is added to a server."""
        name = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name
        return Servicer(name, inference_pb2_grpc.add_InferenceServiceServicer_to_server, self)

    async def Classify(self, request: ClassifyRequest, context: grpc.aio.ServicerContext) -> ClassifyResponse:
        """Classifies a batch of texts."""
        return await self.answer(request, Deadline.of_call(context, DEFAULT_TIMEOUT_S))

    async def answer(self, request: ClassifyRequest, deadline: Deadline) -> ClassifyResponse:
        """Answers a request, whichever protocol it came by.

        Raises:
            InvalidInput: The request is at fault.
            MeshError: It could not be answered.
        """
        check_classify(request)
        request_id = request_ids.current_or_new()
        answers = await self._classifier.classify(request.texts, request.contract, request.route, deadline)
        response = ClassifyResponse(
            results=[answer.classification for answer in answers],
            labels=self._spec.head.labels,
            request_id=request_id,
            timings=_sum_of_passes(answers),
        )
        for result in response.results:
            metrics.TEXTS.labels(route_name(result.route)).inc()
            if not request.include_experts:
                result.ClearField("expert_tokens")
        routes = sorted({route_name(result.route) for result in response.results})
        event("classified", request_id=request_id, texts=len(request.texts), routes=routes)
        return response


def route_name(route: Route) -> str:
    """A route as people read it: `mesh`, `full-model`, `degraded`."""
    return Route.Name(route).removeprefix("ROUTE_").lower().replace("_", "-")


def parse_route(name: str) -> Route:
    """The route that a name stands for; the empty name leaves it open.

    Raises:
        InvalidInput: There is no such route.
    """
    routes = {
        "": inference_pb2.ROUTE_UNSPECIFIED,
        "mesh": inference_pb2.ROUTE_MESH,
        "full-model": inference_pb2.ROUTE_FULL_MODEL,
    }
    if name not in routes:
        raise InvalidInput(f"route {name[:64]!r} is not known; known: mesh, full-model", "route")
    return routes[name]


def _sum_of_passes(answers: Sequence[Answer]) -> list[StageTiming]:
    seconds: defaultdict[str, float] = defaultdict(float)
    for timings in {id(answer.timings): answer.timings for answer in answers}.values():
        for timing in timings:
            seconds[timing.stage] += timing.seconds
    return [StageTiming(stage=stage, seconds=value) for stage, value in seconds.items()]
