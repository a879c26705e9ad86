"""`InferenceService`, the same for every program that offers it; they differ in the `Classifier` behind it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from functools import cache
from typing import Any, Protocol

import grpc.aio

from expertmesh.errors import InvalidInput, WrongPart
from expertmesh.model.spec import ModelSpec
from expertmesh.rpc import request_id as request_ids
from expertmesh.rpc.deadline import Deadline
from expertmesh.rpc.server import Servicer
from expertmesh.serving.generator import Generator
from expertmesh.serving.passes import Answer
from expertmesh.serving.requests import DEFAULT_TIMEOUT_S, GENERATE_TIMEOUT_S, check_classify
from expertmesh.telemetry import metrics
from expertmesh.telemetry.logging import event
from expertmesh.v1 import inference_pb2, inference_pb2_grpc
from expertmesh.v1.inference_pb2 import (
    ClassifyRequest,
    ClassifyResponse,
    CompleteRequest,
    CompleteResponse,
    Contract,
    GenerateRequest,
    GenerateResponse,
    Route,
    StageTiming,
    TokenizeRequest,
    TokenizeResponse,
)


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
        classifier: What answers, of a model that classifies.
        generator: What answers, of a model that generates.
    """

    def __init__(
        self, spec: ModelSpec, classifier: Classifier | None = None, generator: Generator | None = None
    ) -> None:
        self._spec = spec
        self._classifier = classifier
        self._generator = generator

    def registration(self) -> Servicer:
        """How this is added to a server."""
        name = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name
        return Servicer(name, inference_pb2_grpc.add_InferenceServiceServicer_to_server, self)

    async def Classify(self, request: ClassifyRequest, context: grpc.aio.ServicerContext) -> ClassifyResponse:
        """Classifies a batch of texts."""
        return await self.answer(request, Deadline.of_call(context, DEFAULT_TIMEOUT_S))

    async def Generate(
        self, request: GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncGenerator[GenerateResponse, None]:
        """Generates, token by token."""
        async with aclosing(self.generate(request, Deadline.of_call(context, GENERATE_TIMEOUT_S))) as messages:
            async for message in messages:
                yield message

    async def Complete(self, request: CompleteRequest, context: grpc.aio.ServicerContext) -> CompleteResponse:
        """Generates, and answers when all is done."""
        return await self.complete(request.request, Deadline.of_call(context, GENERATE_TIMEOUT_S))

    async def Tokenize(self, request: TokenizeRequest, context: grpc.aio.ServicerContext) -> TokenizeResponse:
        """Gives the ids of a prompt."""
        return await self.tokenize(request, Deadline.of_call(context, DEFAULT_TIMEOUT_S))

    async def generate(self, request: GenerateRequest, deadline: Deadline) -> AsyncGenerator[GenerateResponse, None]:
        """Generates, whichever protocol the request came by; closing the iterator frees whatever it holds.

        Raises:
            WrongPart: The model classifies.
            InvalidInput: The request is at fault.
            MeshError: It could not be served, or not to its end.
        """
        async with aclosing(self._generating().generate(request, deadline)) as messages:
            async for message in messages:
                yield message

    async def complete(self, request: GenerateRequest, deadline: Deadline) -> CompleteResponse:
        """The same, whole."""
        return await self._generating().complete(request, deadline)

    async def tokenize(self, request: TokenizeRequest, deadline: Deadline) -> TokenizeResponse:
        """The ids of a prompt, as `generate` would see them."""
        return await self._generating().tokenize(request, deadline)

    async def token_texts(self, ids: Sequence[int]) -> list[str]:
        """The text of every single token."""
        return await self._generating().texts(ids, Deadline.after(DEFAULT_TIMEOUT_S))

    def _generating(self) -> Generator:
        if self._generator is None:
            raise WrongPart("this model classifies texts and does not generate; use Classify")
        return self._generator

    async def answer(self, request: ClassifyRequest, deadline: Deadline) -> ClassifyResponse:
        """Answers a request, whichever protocol it came by.

        Raises:
            InvalidInput: The request is at fault.
            MeshError: It could not be answered.
        """
        if self._classifier is None:
            raise WrongPart("this model generates text and does not classify; use Generate")
        check_classify(request)
        request_id = request_ids.current_or_new()
        answers = await self._classifier.classify(request.texts, request.contract, request.route, deadline)
        response = ClassifyResponse(
            results=[answer.classification for answer in answers],
            labels=self._spec.head.labels,
            request_id=request_id,
            timings=_sum_of_passes(answers),
        )
        route2texts = Counter(result.route for result in response.results)
        for route, texts in route2texts.items():
            metrics.TEXTS.labels(route_name(route)).inc(texts)
        if not request.include_experts:
            for result in response.results:
                result.ClearField("expert_tokens")
        routes = sorted(map(route_name, route2texts))
        event("classified", request_id=request_id, texts=len(request.texts), routes=routes)
        return response


@cache
def route_name(route: Route) -> str:
    """A route as people read it: `mesh`, `full-model`, `degraded`."""
    return Route.Name(route).removeprefix("ROUTE_").lower().replace("_", "-")


def told_missing(experts: Iterable[tuple[int, int]]) -> dict[str, Any]:
    """What is told in JSON of (layer, expert) that were missing: nothing where none was."""
    missing = [{"layer": layer, "expert": expert} for layer, expert in sorted(experts)]
    return {"missing_experts": missing} if missing else {}


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


def _sum_of_passes(answers: Sequence[Answer]) -> Sequence[StageTiming]:
    passes = {id(answer.timings): answer.timings for answer in answers}
    if len(passes) == 1:
        return answers[0].timings
    seconds: defaultdict[str, float] = defaultdict(float)
    for timings in passes.values():
        for timing in timings:
            seconds[timing.stage] += timing.seconds
    return [StageTiming(stage=stage, seconds=value) for stage, value in seconds.items()]
