"""A client of the mesh for Python programs: `async with Client("127.0.0.1:50051") as client: ...`.

Of a mesh with several gateways it may be given all: `Client(["127.0.0.1:50051", "127.0.0.1:50052"])`. Then the loss of
one is not seen: calls are made again at another, and streams go on there.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, Sequence
from types import TracebackType
from typing import Any, Self

import grpc.aio
import numpy as np
from google.protobuf.message import EncodeError

from expertmesh.errors import CorruptReply, InvalidInput
from expertmesh.resumption import Resumption
from expertmesh.rpc.deadline import Deadline
from expertmesh.rpc.errors import error_info, from_call
from expertmesh.rpc.gateways import are_several, open_gateways
from expertmesh.v1.description_pb2 import DescribeRequest, DescribeResponse
from expertmesh.v1.description_pb2_grpc import DescriptionServiceStub
from expertmesh.v1.inference_pb2 import (
    CONTRACT_UNSPECIFIED,
    ROUTE_UNSPECIFIED,
    ClassifyRequest,
    ClassifyResponse,
    CompleteRequest,
    CompleteResponse,
    Contract,
    GenerateRequest,
    GenerateResponse,
    Route,
    TokenizeRequest,
    TokenizeResponse,
)
from expertmesh.v1.inference_pb2_grpc import InferenceServiceStub
from expertmesh.v1.inspection_pb2 import InspectRequest, InspectResponse
from expertmesh.v1.inspection_pb2_grpc import InspectionServiceStub
from expertmesh.wire import encode

DEFAULT_TIMEOUT_S = 30.0
GENERATE_TIMEOUT_S = 600.0
MOST_RESUMPTIONS = 5
RESUME_AFTER_S = 0.05
LOST = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)


class Client:
    """A connection to a gateway, to several of one mesh, or to a full model by itself.

    Args:
        address: Its gRPC address; of several gateways a list, or one text with commas, each as `IP:PORT`.
        timeout_s: Deadline of each call, in seconds; by default 30, and 600 for one that generates.

    Raises:
        SetupError: Several addresses are given, and one is not `IP:PORT`.
        MeshError: From every call, as `expertmesh.errors` tells.
    """

    def __init__(self, address: str | Sequence[str], timeout_s: float | None = None) -> None:
        self._timeout_s = DEFAULT_TIMEOUT_S if timeout_s is None else timeout_s
        self._generate_timeout_s = GENERATE_TIMEOUT_S if timeout_s is None else timeout_s
        addresses = address.split(",") if isinstance(address, str) else address
        self._has_several = are_several(addresses)
        self._channel = open_gateways(addresses)
        self._inference = InferenceServiceStub(self._channel)
        self._inspection = InspectionServiceStub(self._channel)
        self._description = DescriptionServiceStub(self._channel)

    async def __aenter__(self) -> Self:
        """Opens nothing yet; the first call connects."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Closes the connection."""
        await self._channel.close()

    async def classify(
        self,
        texts: Sequence[str],
        contract: Contract = CONTRACT_UNSPECIFIED,
        route: Route = ROUTE_UNSPECIFIED,
        include_experts: bool = False,
    ) -> ClassifyResponse:
        """Classifies raw texts; the reply has one result for each, in their order."""
        if isinstance(texts, str):
            raise InvalidInput("texts must be a list of strings, not one string", "texts")
        try:
            request = ClassifyRequest(texts=texts, contract=contract, route=route, include_experts=include_experts)
        except (ValueError, TypeError, EncodeError):
            raise InvalidInput("texts must be strings that are valid Unicode", "texts") from None
        return await self._call(self._inference.Classify, request)  # type: ignore[no-any-return]

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[GenerateResponse, None]:
        """Generates token by token.

        The mesh stops working for it when the generator is closed, so close one that is left before its end:
        `async with contextlib.aclosing(client.generate(request)) as messages: ...`. Where several gateways were given
        and one is lost, the stream goes on at another, with a request id of its own.
        """
        deadline = Deadline.after(self._generate_timeout_s)
        so_far = Resumption(request)
        for resumptions in itertools.count():
            call = self._inference.Generate(so_far.request, timeout=deadline.remaining_s())
            try:
                async for message in call:
                    part = so_far.new_part(_parsed(message))
                    if part is not None:
                        yield part
                return
            except grpc.aio.AioRpcError as error:
                if so_far.is_complete:
                    return
                if not self._may_resume(error, so_far) or resumptions == MOST_RESUMPTIONS:
                    raise from_call(error, "the gateway") from None
            finally:
                call.cancel()  # gRPC does not do it for a stream that nobody reads any more
            await asyncio.sleep(RESUME_AFTER_S * 2**resumptions)
            so_far.begin_again()

    def _may_resume(self, error: grpc.aio.AioRpcError, so_far: Resumption) -> bool:
        """Whether a stream was lost with its gateway, which told no reason of the mesh, and can be had again."""
        is_lost = error.code() in LOST and not error_info(error)
        return self._has_several and is_lost and so_far.is_exact

    async def complete(self, request: GenerateRequest) -> CompleteResponse:
        """Generates, and answers when all is done."""
        wrapped = CompleteRequest(request=request)
        return await self._call(self._inference.Complete, wrapped, self._generate_timeout_s)  # type: ignore[no-any-return]

    async def tokenize(self, request: TokenizeRequest) -> TokenizeResponse:
        """Gives the ids of a prompt, as `generate` would see them."""
        return await self._call(self._inference.Tokenize, request)  # type: ignore[no-any-return]

    async def inspect(self, text: str, route: Route) -> InspectResponse:
        """Gives hidden states, routes and logits of one text; the program must have inspection switched on."""
        return await self._call(self._inspection.Inspect, InspectRequest(text=text, route=route))  # type: ignore[no-any-return]

    async def inspect_ids(self, ids: Sequence[int], route: Route, chunk: int = 0) -> InspectResponse:
        """The same of a sequence of token ids, which goes through the layers `chunk` tokens at a time; 0: at once."""
        request = InspectRequest(ids=encode(np.array(ids, np.int32)), route=route, chunk=chunk)
        return await self._call(self._inspection.Inspect, request, self._generate_timeout_s)  # type: ignore[no-any-return]

    async def describe(self) -> DescribeResponse:
        """Gives what the program holds."""
        return await self._call(self._description.Describe, DescribeRequest())  # type: ignore[no-any-return]

    async def _call(self, method: Any, request: Any, timeout_s: float | None = None) -> Any:
        try:
            return _parsed(await method(request, timeout=timeout_s or self._timeout_s))
        except grpc.aio.AioRpcError as error:
            raise from_call(error, "the gateway") from None


def _parsed(reply: Any) -> Any:
    if reply is None:  # what gRPC gives for a message that it cannot parse
        raise CorruptReply("the gateway gave a reply that cannot be parsed")
    return reply
