"""A client of the mesh for Python programs: `async with Client("127.0.0.1:50051") as client: ...`."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from types import TracebackType
from typing import Any, Self

import grpc.aio
import numpy as np
from google.protobuf.message import EncodeError

from expertmesh.errors import CorruptReply, InvalidInput
from expertmesh.rpc.channel import open_channel
from expertmesh.rpc.errors import from_call
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


class Client:
    """A connection to a gateway, or to a full model by itself.

    Args:
        address: Its gRPC address.
        timeout_s: Deadline of each call, in seconds; by default 30, and 600 for one that generates.

    Raises:
        MeshError: From every call, as `expertmesh.errors` tells.
    """

    def __init__(self, address: str, timeout_s: float | None = None) -> None:
        self._timeout_s = DEFAULT_TIMEOUT_S if timeout_s is None else timeout_s
        self._generate_timeout_s = GENERATE_TIMEOUT_S if timeout_s is None else timeout_s
        self._channel = open_channel(address)
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
        `async with contextlib.aclosing(client.generate(request)) as messages: ...`.
        """
        call = self._inference.Generate(request, timeout=self._generate_timeout_s)
        try:
            async for message in call:
                yield _parsed(message)
        except grpc.aio.AioRpcError as error:
            raise from_call(error, "the gateway") from None
        finally:
            call.cancel()  # gRPC does not do it for a stream that nobody reads any more

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
